"""A run's model as a Flax NNX module, for libraries that want one (Tunix, Qwix and friends), and back.

The module is a view: its parameters have the names that they have in a run, layers stacked, and it computes what
`lm.model.transformer` does.

    with sharding.use_mesh():
        model = loading.load('runs/a', warn=print)
        module = to_nnx(model.params, model.cfg)
        …
        lazy_checkpoint.write_run(opened(module, lazy_checkpoint.open_run('runs/a')), 'runs/b')
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from lm.errors import UsageError
from lm.interop.opened import Leaf, Opened, by_path
from lm.model import adapters, transformer
from lm.model.config import ModelConfig
from lm.model.parameters import Params


class Decoder(nnx.Module):
    """A decoder whose parameters are `nnx.Param`s, in `module.parameters` by their names in a run."""

    def __init__(self, params: Params, cfg: ModelConfig) -> None:
        """
        Args:
          params: arrays, as `loading.load(run, warn=print).params`, loaded under `sharding.use_mesh()`.
        """
        self.cfg = cfg
        self.parameters = nnx.data(jax.tree.map(nnx.Param, dict(params)))

    def __call__(self, tokens_BT: jax.Array, **rows: Any) -> jax.Array:
        """Float32 logits [B, T, vocab_size]; `rows` as for `transformer.forward`: segments_BT, positions_BT."""
        params = from_nnx(self)
        return transformer.logits(params, self.cfg, transformer.forward(params, self.cfg, tokens_BT, **rows)[0])


def to_nnx(params: Params, cfg: ModelConfig) -> Decoder:
    """A model's parameters as a module: arrays, which it does not copy, and dense ones of what is quantized."""
    return Decoder(adapters.merged(params), cfg)


def from_nnx(module: Decoder) -> dict[str, Any]:
    """The parameters of a module, as it has them now."""
    return jax.tree.map(lambda x: x[...], module.parameters, is_leaf=lambda x: isinstance(x, nnx.Variable))


def opened(module: Decoder, like: Opened) -> Opened:
    """The model `like` with a module's parameters, to be written as a run or in another form.

    Raises UsageError if the module has not the parameters of that model.
    """
    found = by_path(from_nnx(module))
    if odd := sorted(set(found) ^ set(like.leaves)):
        raise UsageError(f'the module and {like.where} are not of one graph: {odd[0]} is in one of them alone')
    leaves = {
        name: leaf._replace(dtype=np.dtype(found[name].dtype), read=partial(_read, found[name], leaf))
        for name, leaf in like.leaves.items()
    }
    return dataclasses.replace(like, leaves=leaves, notes=())


def _read(x: jax.Array, leaf: Leaf, layer: int) -> np.ndarray:
    """A layer without the vocabulary's padding."""
    whole = np.asarray(x if leaf.layers is None else x[layer])
    return whole[tuple(slice(n) for n in leaf.shape)]
