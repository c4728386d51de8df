"""An adapter at rest, wherever it lies: the factors of each matrix as they can be read, a layer at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.errors import UsageError
from lm.interop import graph
from lm.interop.graph import DTYPES, Fetch, Info
from lm.interop.opened import Leaf, Opened
from lm.model import parameters, seam
from lm.model.lora import Lora


class Stack(NamedTuple):
    """The weights of an adapter over one parameter, without what lies under them.

    Attributes:
      read: layer -> an `adapters.Part` of numpy's arrays.
    """

    layers: int
    read: Callable[[int], Any]


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter that can be read.

    Attributes:
      where: what the user called it. base: what it says lies under it.
      stacks: by path, as 'layers/wq_DNH'.
      arrays: what takes the place of the base's own, or stands beside it, as 'score_D'.
      scored: whether it makes a reward model.
      notes: what was left out or changed on the way in, one sentence each, for the user.
    """

    where: str
    base: str
    stacks: Mapping[str, Stack]
    arrays: Mapping[str, Leaf]
    scored: bool = False
    notes: tuple[str, ...] = ()

    def ranks(self) -> dict[str, int]:
        """{parameter: the rank of all that is added to it}."""
        return {name: stack.read(0).factors()[0].shape[-1] for name, stack in self.stacks.items()}

    def alpha(self) -> float:
        """A number that divided by its rank multiplies the first parameter's product."""
        name, rank = next(iter(self.ranks().items()))
        return self.stacks[name].read(0).scale * rank

    def stored(self, alpha: float) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
        """(parameter, layer, {'a': [r, in], 'b': [out, r], 'magnitude': [out] where there is one}) of each matrix, in
        float32, for a file whose products are multiplied by alpha/r: what else does is in b."""
        for name, stack in self.stacks.items():
            for layer in range(stack.layers):
                weight = stack.read(layer)
                a, b = (np.asarray(x, np.float32) for x in weight.factors())
                rank = a.shape[-1]
                factor = np.float32(weight.scale * rank / alpha)
                found = {'a': a.reshape(-1, rank).T, 'b': b.reshape(rank, -1).T * factor}
                if weight.magnitude is not None:
                    found['magnitude'] = np.asarray(weight.magnitude, np.float32).reshape(-1)
                yield name, layer, found

    def over(self, base: Opened) -> Opened:
        """The base with the adapter merged into it, in float32, each matrix when it is read."""
        leaves = {**base.leaves, **{name: _merged(base.leaf(name), stack) for name, stack in self.stacks.items()}}
        notes = (*base.notes, *self.notes)
        return replace(base, leaves={**leaves, **self.arrays}, scored=base.scored or self.scored, notes=notes)


def _merged(base: Leaf, stack: Stack) -> Leaf:
    def read(layer: int) -> np.ndarray:
        return np.asarray(seam.dense(stack.read(layer).over(jnp.asarray(base.read(layer)))))

    return Leaf(base.shape, np.dtype(np.float32), base.layers, read)


# ---- the tensors of a file, [r, in] and [out, r] ----


def check_factors(
    leaf: str, layers: Mapping[int, Mapping[str, Info]], base: Opened, needed: Sequence[str], where: str
) -> None:
    """Raises UsageError for a matrix with half of its tensors, or with one of another shape or kind.

    Args:
      layers: {layer: {'a', 'b', 'magnitude': the tensor}}. needed: of these.
    """
    _, (outputs, inputs) = graph.shapes(leaf, base.model)
    for parts in layers.values():
        one = next(iter(parts.values())).name
        if odd := sorted(set(needed) ^ set(parts)):
            raise UsageError(f'{where}: {one!r} {"lacks" if odd[0] in needed else "has"} a factor {odd[0]!r} beside it')
        rank = parts['a'].shape[0] if parts['a'].shape else 0
        wanted = {'a': (rank, inputs), 'b': (outputs, rank), 'magnitude': (outputs,)}
        for part, info in parts.items():
            if info.shape != wanted[part] or not rank or info.kind not in DTYPES:
                told = f'{where}: the tensor {info.name!r} is {info.kind} {info.shape}'
                raise UsageError(f'{told}; {base.where} makes it {wanted[part]}')


def stack_of(
    leaf: str, layers: Mapping[int, Mapping[str, Info]], base: Opened, scales: Mapping[int, float], fetch: Fetch,
    where: str, *, turned: Callable[[np.ndarray], np.ndarray] = lambda b: b,
) -> Stack:  # fmt: skip
    """The factors of a matrix in all layers, of the largest rank that one has: the others have columns of zeros, and a
    layer without any is left as it is.

    Raises UsageError for lengths of columns (DoRA) in some layers alone; reading does for what are no numbers.

    Args:
      scales: of each layer's product. turned: what a format's order of outputs is in ours, [r, …outputs].
    """
    shape, n = graph.shapes(leaf, base.model)[0], len(parameters.row(leaf).contracted)
    rank, scale = max(parts['a'].shape[0] for parts in layers.values()), scales[min(scales)]
    count, short = base.model['layers'], leaf.rpartition('_')[0]
    if len(layers) < count and any('magnitude' in parts for parts in layers.values()):
        raise UsageError(f'{where}: DoRA in some layers of {short} alone has no place here')

    def read(layer: int) -> Lora:
        a, b = np.zeros((rank, math.prod(shape[:n])), np.float32), np.zeros((math.prod(shape[n:]), rank), np.float32)
        magnitude = None
        if layer in layers:
            given = {part: _finite(fetch(info).astype(np.float32), info, where) for part, info in layers[layer].items()}
            a[: len(given['a'])] = given['a']
            b[:, : len(given['a'])] = given['b'] * np.float32(scales[layer] / scale)
            magnitude = given['magnitude'].reshape(shape[n:]) if 'magnitude' in given else None
        a, b = a.T.reshape(*shape[:n], rank), turned(b.T.reshape(rank, *shape[n:]))
        return Lora(a, b, parameters.row(leaf).contracted, scale, magnitude=magnitude)

    return Stack(count, read)


def _finite(x: np.ndarray, info: Info, where: str) -> np.ndarray:
    if not np.isfinite(x).all():
        raise UsageError(f'{where}: the tensor {info.name!r} holds values that are no numbers')
    return x
