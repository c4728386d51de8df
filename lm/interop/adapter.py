"""An adapter at rest, wherever it lies: the factors of each matrix as they can be read, a layer at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lm.interop.opened import Leaf, Opened
from lm.model import seam


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

    def over(self, base: Opened) -> Opened:
        """The base with the adapter merged into it, in float32, each matrix when it is read."""
        leaves = {**base.leaves, **{name: _merged(base.leaf(name), stack) for name, stack in self.stacks.items()}}
        notes = (*base.notes, *self.notes)
        return replace(base, leaves={**leaves, **self.arrays}, scored=base.scored or self.scored, notes=notes)


def _merged(base: Leaf, stack: Stack) -> Leaf:
    def read(layer: int) -> np.ndarray:
        return np.asarray(seam.dense(stack.read(layer).over(jnp.asarray(base.read(layer)))))

    return Leaf(base.shape, np.dtype(np.float32), base.layers, read)
