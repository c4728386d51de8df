"""The facts that an optimizer is told of each array of a parameter tree: its row in the model's table, and its
letters."""

from typing import Any, NamedTuple

import jax

from lm import sharding
from lm.model import parameters, seam


class ParamInfo(NamedTuple):
    """One array of a parameter tree."""

    name: str  # of the parameter that it is, or is a field of
    dims: str  # the letters of its own dimensions, without L
    stacked: bool  # whether L comes before them

    @property
    def decays(self) -> bool:
        """True if weight decay shrinks it."""
        return parameters.row(self.name).decays

    @property
    def matrix(self) -> bool:
        """True if Muon takes it. An adapter's two factors (R) are no matrices: what acts on activations is their
        product."""
        return parameters.row(self.name).matrix and self.rows is not None and 'R' not in self.dims

    @property
    def rows(self) -> int | None:
        """The axis of D, the side that every matrix has: the other letters are its other side, except for L and E,
        which count matrices. wq_DNH is [D, N·H], wo_NHD a [D, N·H] transposed. None if there are no such two sides."""
        own = self.dims.replace('E', '')
        two_sides = len(own) > 1 and own.count('D') == 1 and 'D' in (own[0], own[-1])
        return self.stacked + self.dims.index('D') if two_sides else None

    @property
    def counts(self) -> int:
        """The number of leading axes that count matrices."""
        return self.stacked + self.dims.startswith('E')


def infos_of(params: Any) -> list[ParamInfo]:
    """A ParamInfo for each array of a parameter tree, in the order of `jax.tree.leaves`."""
    is_weight = lambda x: isinstance(x, seam.Weight)
    infos = []
    for path, value in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        info = ParamInfo(keys[-1], sharding.dims_of(keys[-1]), 'layers' in keys)
        if is_weight(value):
            fields = value.dims(info.dims)
            names = [p[0].name for p, _ in jax.tree_util.tree_leaves_with_path(value)]
            infos += [info._replace(dims=fields[name]) for name in names]
        else:
            infos.append(info)
    return infos
