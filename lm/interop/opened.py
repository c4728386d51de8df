"""A model at rest, wherever it lies: its shape, its tokenizer's files, and its weights as they can be read one by one.

Each form (a run, a folder of Hugging Face's, a GGUF file) is opened as an `Opened` and written from one; none knows of
the others. Nothing of the weights is in memory until a leaf is read, and then one layer of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.errors import UsageError


class Leaf(NamedTuple):
    """One parameter, as `lm.model.parameters` names it and lays it out.

    Attributes:
      shape: of one layer's, without L.
      dtype: as it is stored; bfloat16 is ml_dtypes'. Of what is quantized, float32.
      layers: how many there are stacked; None: it is none of the layers'.
      read: layer (0 where there are none) -> the array, of this shape and dtype, perhaps a view of a file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: int | None
    read: Callable[[int], np.ndarray]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by their paths, as `Opened.leaves` names them."""
    return {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass(frozen=True)
class Opened:
    """A model that can be read.

    Attributes:
      where: what the user called it.
      model: the settings `model.*` that describe its graph, without scan.
      leaves: by path, as 'embed_VD', 'layers/wq_DNH', 'score_D'.
      tokenizer: the files of its tokenizer by name, as a run's tokenizer/ holds them: tokenizer.json or tokenizer.model
        and what stands beside it (tokenizer_config.json, generation_config.json, chat_template.jinja).
      scored: whether it is a reward model.
      scale: of a reward model, the mean and the standard deviation that its scores are normalised with, if known.
      notes: what was left out or changed on the way in, one sentence each, for the user.
    """

    where: str
    model: Mapping[str, Any]
    leaves: Mapping[str, Leaf]
    tokenizer: Mapping[str, bytes] = field(repr=False)
    scored: bool = False
    scale: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def leaf(self, name: str) -> Leaf:
        """Raises UsageError if there is no such parameter."""
        if name not in self.leaves:
            raise UsageError(f'{self.where}: has no parameter {name}')
        return self.leaves[name]
