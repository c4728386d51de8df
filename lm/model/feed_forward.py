"""The feed-forward of a layer, with its parameters' rows."""

import jax
from jax.ad_checkpoint import checkpoint_name

from lm.model import seam
from lm.model.config import ACTIVATIONS, ModelConfig
from lm.model.param import matrix

ROWS = (matrix('w_gate_DF', 'D'), matrix('w_up_DF', 'D'), matrix('w_down_FD', 'F', 'residual'))


def gated(y_BTD: jax.Array, layer, cfg: ModelConfig) -> jax.Array:
    """What the gated feed-forward adds (SwiGLU; Shazeer, 2020)."""
    gate_BTF = ACTIVATIONS[cfg.activation](seam.einsum('BTD,DF->BTF', y_BTD, layer['w_gate_DF']))
    gated_BTF = checkpoint_name(gate_BTF * seam.einsum('BTD,DF->BTF', y_BTD, layer['w_up_DF']), 'gated')
    return seam.einsum('BTF,FD->BTD', gated_BTF, layer['w_down_FD'])
