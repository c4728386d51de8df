"""Tables: which graph each architecture of GGUF is, and how it calls our parameters and settings.

What llama.cpp does with a file is in its sources, src/models/ARCHITECTURE.cpp; constants here that a file need not
name are the ones it takes then.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from lm.errors import UsageError
from lm.interop.graph import of_layers
from lm.model.layers import RopeScaling

_LAYER = 'blk.{layer}.'
TOP = {'embed_VD': 'token_embd.weight', 'final_norm_D': 'output_norm.weight'}
HEAD = {'head_DV': 'output.weight'}
ROPE_FREQS = 'rope_freqs.weight'  # what the rotary frequencies are divided by: llama3 scaling
LAYER = of_layers(_LAYER, {
    'attn_norm_D': 'attn_norm.weight', 'wq_DNH': 'attn_q.weight', 'wk_DKH': 'attn_k.weight',
    'wv_DKH': 'attn_v.weight', 'wo_NHD': 'attn_output.weight', 'mlp_norm_D': 'ffn_norm.weight',
    'w_gate_DF': 'ffn_gate.weight', 'w_up_DF': 'ffn_up.weight', 'w_down_FD': 'ffn_down.weight',
})  # fmt: skip
BIASES = of_layers(_LAYER, {'bias_q_NH': 'attn_q.bias', 'bias_k_KH': 'attn_k.bias', 'bias_v_KH': 'attn_v.bias'})
QK_NORMS = of_layers(_LAYER, {'q_norm_H': 'attn_q_norm.weight', 'k_norm_H': 'attn_k_norm.weight'})
POST_NORMS = of_layers(_LAYER, {
    'attn_post_norm_D': 'post_attention_norm.weight', 'mlp_post_norm_D': 'post_ffw_norm.weight',
})  # fmt: skip
ROTATED = ('wq_DNH', 'wk_DKH', 'bias_q_NH', 'bias_k_KH')  # their last letter is what rotary positions pair up

# Settings that are numbers: model.* -> (key after the architecture's name, its type).
SIZES = {
    'layers': 'block_count', 'dim': 'embedding_length', 'ffn_dim': 'feed_forward_length',
    'heads': 'attention.head_count',
}  # fmt: skip
# Keys that change the graph into one that we have not: whatever is not this value is refused.
NEUTRAL = {
    'expert_count': 0, 'expert_used_count': 0, 'attention.causal': True, 'attention.scale': 0.0, 'logit_scale': 0.0,
    'residual_scale': 0.0, 'embedding_scale': 0.0, 'attention.clamp_kqv': 0.0, 'attention.max_alibi_bias': 0.0,
    'use_parallel_residual': False, 'attention.shared_kv_layers': 0, 'pooling_type': 0,
}  # fmt: skip


class Arch(NamedTuple):
    """An architecture of GGUF.

    Attributes:
      graph: model.*, where it is not PLAIN.
      layer: the names of each layer's tensors, with {layer} in them.
      interleaved: rotary positions pair neighbours, so the rows of queries and keys lie in another order than ours.
      untied: it may have a head of its own.
      freqs: it reads ROPE_FREQS.
      linear: it has linear scaling of all of its positions.
      period: of its layers the last of so many is global, the others are local; None: all are global.
      softcaps: of attention and logits where the file names none.
      square: its heads are together as wide as the model.
      scaled: the number of layers at which query_scale is (dim // heads)^-½; at others it is head_dim^-½.
    """

    graph: dict[str, Any]
    layer: dict[str, str]
    interleaved: bool = False
    untied: bool = True
    freqs: bool = False
    linear: bool = True
    period: int | None = None
    softcaps: tuple[float | None, float | None] = (None, None)
    square: bool = False
    scaled: int | None = None


_GEMMA = {'norms': 'both', 'norm_plus_one': True, 'activation': 'gelu'}
ARCHS = {
    'llama': Arch({}, LAYER, interleaved=True, freqs=True),
    'qwen2': Arch({'qkv_bias': True}, LAYER | BIASES, square=True),
    'qwen3': Arch({'qk_norm': True}, LAYER | QK_NORMS),
    'gemma2': Arch(
        _GEMMA, LAYER | POST_NORMS, untied=False, linear=False, period=2, softcaps=(50.0, 30.0), scaled=46
    ),
    'gemma3': Arch(_GEMMA | {'qk_norm': True}, LAYER | POST_NORMS | QK_NORMS, period=6, scaled=62),
}  # fmt: skip


# ---- rotary scaling ----


def llama3_factors(scaling: str, *, theta: float, head_dim: int) -> np.ndarray:
    """Float32 [H/2]: what the rotary frequencies are divided by under 'llama3,factor=…,low=…,high=…,original=…'
    (Grattafiori et al., 2024; long wavelengths are stretched by the factor, short ones kept)."""
    found = RopeScaling.parse(scaling)
    if found is None or found.kind != 'llama3':
        raise UsageError(f'model.rope_scaling={scaling}: only llama3 has a factor for each frequency')
    _, factor, low, high, original = found
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def llama3_scaling(factors: np.ndarray, *, theta: float, head_dim: int, where: str) -> str | None:
    """The settings that give these factors. Raises UsageError if none of the usual ones do."""
    if factors.shape != (head_dim // 2,):
        raise UsageError(f'{where}: {ROPE_FREQS} of shape {factors.shape} is not one number a pair of {head_dim}')
    if np.all(factors == 1):
        return None
    for original in (8192, *(2**n for n in range(5, 21))):
        scaling = f'llama3,factor={plain_number(factors.max())},low=1,high=4,original={original}'
        if np.allclose(llama3_factors(scaling, theta=theta, head_dim=head_dim), factors, rtol=1e-4, atol=0):
            return scaling
    raise UsageError(f'{where}: {ROPE_FREQS} is no llama3 scaling (low=1, high=4) of rotary positions')


def plain_number(x: float) -> str:
    """The shortest text of a float32: '8', '0.25'."""
    return f'{float(str(np.float32(x))):g}'
