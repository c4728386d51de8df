"""Feed-forwards of a layer, with their parameters' rows: a new one is a file with rows and a function, and a line in
FEED_FORWARDS."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.model import seam
from lm.model.config import ACTIVATIONS, ModelConfig
from lm.model.param import Param, matrix

Aux = dict[str, jax.Array]


class FeedForward(NamedTuple):
    """A feed-forward sub-layer.

    Attributes:
      rows: its parameters in each layer.
      apply: (y_BTD, layer's parameters, cfg, real_BT) -> (what it adds [B, T, D], {name: float32 sum over tokens}).
        real_BT is False at padding, which no sum may count; None: there is none.
      coefficients: cfg -> {name: what the sum, divided by the batch's tokens, is multiplied by in the objective}.
    """

    rows: tuple[Param, ...]
    apply: Callable[[jax.Array, Mapping[str, Any], ModelConfig, jax.Array | None], tuple[jax.Array, Aux]]
    coefficients: Callable[[ModelConfig], Mapping[str, float]] = lambda cfg: {}


def gated(y_BTD: jax.Array, layer: Mapping[str, Any], cfg: ModelConfig, real_BT: jax.Array | None):
    """Returns the output of a gated feed-forward (SwiGLU; Shazeer, 2020), and no auxiliary sums."""
    del real_BT
    gate_BTF = ACTIVATIONS[cfg.activation](seam.einsum('BTD,DF->BTF', y_BTD, layer['w_gate_DF']))
    gated_BTF = checkpoint_name(gate_BTF * seam.einsum('BTD,DF->BTF', y_BTD, layer['w_up_DF']), 'gated')
    return seam.einsum('BTF,FD->BTD', gated_BTF, layer['w_down_FD']), {}


# By the name that `ModelConfig.feed_forward` says.
FEED_FORWARDS = {
    'gated': FeedForward(
        (matrix('w_gate_DF', 'D'), matrix('w_up_DF', 'D'), matrix('w_down_FD', 'F', 'residual')), gated
    ),
}


def aux_coefficients(cfg: ModelConfig) -> dict[str, float]:
    """{name: coefficient} of the sums that `transformer.forward` returns beside the hidden states: terms of a loss."""
    return dict(FEED_FORWARDS[cfg.feed_forward].coefficients(cfg))


def aux_weights(cfg: ModelConfig, batch: Mapping[str, jax.Array]) -> Aux:
    """{name: W} of these terms: the batch's tokens, padding aside."""
    segments_BT = batch.get('segments_BT')
    tokens = batch['tokens_BT'].size if segments_BT is None else jnp.sum(segments_BT > 0)
    return dict.fromkeys(aux_coefficients(cfg), jnp.asarray(tokens, jnp.float32))
