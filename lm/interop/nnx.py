"""A run's model as a Flax NNX module, for libraries that want one (Tunix, Qwix and friends), and back.

The module is a view: its parameters have the names that they have in a run, layers stacked, and it computes what
`lm.model.transformer` does.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lm.model import transformer
from lm.model.transformer import ModelConfig, Params


class Decoder(nnx.Module):
    """A decoder whose parameters are `nnx.Param`s, in `module.parameters` by their names in a run."""

    def __init__(self, params: Params, cfg: ModelConfig) -> None:
        """
        Args:
          params: arrays, as `runs.load(run, warn=print).params`, loaded under `sharding.use_mesh()`.
        """
        self.cfg = cfg
        self.parameters = nnx.data(_wrapped(params))

    def __call__(self, tokens_BT: jax.Array, **rows: Any) -> jax.Array:
        """Float32 logits [B, T, vocab_size]; `rows` as for `transformer.forward`: segments_BT, positions_BT."""
        params = from_nnx(self)
        return transformer.logits(params, self.cfg, transformer.forward(params, self.cfg, tokens_BT, **rows))


def to_nnx(params: Params, cfg: ModelConfig) -> Decoder:
    """A model's parameters, which it does not copy, as a module."""
    return Decoder(params, cfg)


def from_nnx(module: Decoder) -> dict[str, Any]:
    """The parameters of a module, as it has them now."""
    unwrap = lambda node: {k: unwrap(v) if isinstance(v, Mapping) else v[...] for k, v in node.items()}
    return unwrap(module.parameters)


def _wrapped(params: Params) -> dict[str, Any]:
    return {k: _wrapped(v) if isinstance(v, Mapping) else nnx.Param(v) for k, v in params.items()}
