"""What each leaf of a parameter tree is to an optimizer, told by its name."""

from fnmatch import fnmatch
from typing import Any, NamedTuple

import jax

from lm import sharding
from lm.model import seam


class Kind(NamedTuple):
    """How a leaf is trained."""

    decays: bool  # weight decay shrinks it
    matrix: bool  # it maps activations to activations, so that its spectrum means something: Muon takes it


# By the parameter's name; the first pattern that fits counts. Embedding and head map words, one at a time, and are no
# matrices to Muon (Jordan et al., 2024).
KINDS = (
    ('*norm*', Kind(decays=False, matrix=False)),
    ('bias*', Kind(decays=False, matrix=False)),
    ('embed*', Kind(decays=False, matrix=False)),
    ('head*', Kind(decays=True, matrix=False)),
    ('*', Kind(decays=True, matrix=True)),
)


class Leaf(NamedTuple):
    """One array of a parameter tree."""

    name: str  # of the parameter that it is, or is a field of
    dims: str  # the letters of its own dimensions, without L
    stacked: bool  # whether L comes before them

    @property
    def kind(self) -> Kind:
        """An adapter's two factors (R) are no matrices: what acts on activations is their product."""
        found = next(kind for pattern, kind in KINDS if fnmatch(self.name, pattern))
        return found._replace(matrix=found.matrix and self.rows is not None and 'R' not in self.dims)

    @property
    def rows(self) -> int | None:
        """The axis of D, the side that every matrix has: the other letters are its other side, except for L and E,
        which count matrices. wq_DNH is [D, N·H], wo_NHD a [D, N·H] transposed. None if there are no such two sides."""
        own = self.dims.replace('E', '')
        two_sides = len(own) > 1 and own.count('D') == 1 and 'D' in (own[0], own[-1])
        return self.stacked + self.dims.index('D') if two_sides else None

    @property
    def counts(self) -> int:
        """How many leading axes count matrices."""
        return self.stacked + self.dims.startswith('E')


def leaves_of(params: Any) -> list[Leaf]:
    """A Leaf for each array of a parameter tree, in the order of `jax.tree.leaves`."""
    is_weight = lambda x: isinstance(x, seam.Weight)
    found = []
    for path, value in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        leaf = Leaf(keys[-1], sharding.dims_of(keys[-1]), 'layers' in keys)
        if is_weight(value):
            fields = value.dims(leaf.dims)
            names = [p[0].name for p, _ in jax.tree_util.tree_leaves_with_path(value)]
            found += [leaf._replace(dims=fields[name]) for name in names]
        else:
            found.append(leaf)
    return found
