"""The decoder: `forward` turns tokens into hidden states, `nll` and `logits` are its head. All are pure functions.

The default graph is the Llama family's: pre-norm blocks of grouped-query attention with rotary positions and a gated
feed-forward, with per-head RMS normalisation of queries and keys, and input and output embeddings tied. Switches of
`ModelConfig` make of it the graphs of Llama, Mistral, SmolLM, Qwen, OLMo 2, Gemma and Granite.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import head, seam
from lm.model.attention import attention
from lm.model.config import REMAT, ModelConfig
from lm.model.feed_forward import FEED_FORWARDS, Aux
from lm.model.layers import RopeScaling, rms_norm, rope, rope_angles
from lm.model.parameters import Params, unstack


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
    """(final hidden states [B, T, D] of whole rows, the feed-forwards' sums over tokens and layers).

    The sums are terms of a loss: `feed_forward.aux_coefficients` and `aux_weights` say what they count.

    Args:
      tokens_BT: ids. segments_BT: int32, tokens attend within their segment only; 0 is padding; None is one segment a
        row.
      positions_BT: rotary positions, restarting with each segment; None counts from 0.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    block = partial(_whole_rows, cfg, layer_angles(cfg, positions_BT), segments_BT)
    x_BTD, aux, layers, whole = embed(params, cfg, tokens_BT), {}, params['layers'], 0
    if cfg.scan:
        whole = cfg.layers - cfg.layers % len(cfg.kinds)
        scanned = layers if whole == cfg.layers else jax.tree.map(lambda w: w[:whole], layers)
        x_BTD, aux = _scan(x_BTD, scanned, [block(kind, scanned=True) for kind in cfg.kinds])
    if whole < cfg.layers:
        rest = layers if not whole else jax.tree.map(lambda w: w[whole:], layers)
        for i, layer in enumerate(unstack(rest, cfg.layers - whole), whole):
            x_BTD, more = block(cfg.kind(i), scanned=False)(x_BTD, layer)
            aux = _summed(aux, more)
    return final_norm(params, cfg, x_BTD), aux


def _whole_rows(
    cfg: ModelConfig, angles: Mapping[str, Any], segments_BT: jax.Array | None, kind: str, *, scanned: bool
):
    """(x_BTD, parameters) -> (x_BTD, sums): a layer of a kind, over whole rows."""
    real_BT = None if segments_BT is None else segments_BT > 0

    def attend(q, k, v):
        options = {'window': cfg.window_of(kind), 'softcap': cfg.attn_softcap, 'backend': cfg.attention}
        return attention(q, k, v, segments_BT=segments_BT, **options)

    def block(x_BTD, layer):
        return apply_layer(x_BTD, layer, cfg, angles[kind], attend, real_BT)

    return block if cfg.remat == 'none' else jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=not scanned)


def _scan(x_BTD: jax.Array, layers: Any, blocks: Sequence[Any]) -> tuple[jax.Array, Aux]:
    """Stacked layers, as many at a time as there are blocks: one for each in its turn."""
    n = len(blocks)
    if n > 1:
        layers = jax.tree.map(lambda w: w.reshape(w.shape[0] // n, n, *w.shape[1:]), layers)

    def step(x_BTD, layers):
        aux = {}
        for block, layer in zip(blocks, unstack(layers, n) if n > 1 else [layers], strict=True):
            x_BTD, more = block(x_BTD, layer)
            aux = _summed(aux, more)
        return x_BTD, aux

    x_BTD, aux = jax.lax.scan(step, x_BTD, layers)
    return x_BTD, jax.tree.map(lambda x: jnp.sum(x, 0), aux)


def _summed(aux: Aux, more: Aux) -> Aux:
    return {name: aux[name] + x if name in aux else x for name, x in more.items()}


def layer(params: Any, cfg: ModelConfig, x_BTD: jax.Array, *, number: int) -> jax.Array:
    """One layer, by its own parameters, over whole rows that count from 0: what a model too large to hold is run by."""
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    return _whole_rows(cfg, layer_angles(cfg, positions_BT), None, cfg.kind(number), scanned=False)(x_BTD, params)[0]


def head_weight(params: Params, cfg: ModelConfig) -> tuple[Any, str]:
    """The head's weight and its dims: the head's own, or the tied embedding."""
    return (params['embed_VD'], 'VD') if cfg.tied and 'head_DV' not in params else (params['head_DV'], 'DV')


def head_inputs(
    params: Params, cfg: ModelConfig, h_BTD: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """(hidden states, weight, options) for the functions of lm/model/head.py: the model's own head, its logits divided
    by a temperature."""
    w, dims = head_weight(params, cfg)
    if temperature != 1:
        h_BTD = _scaled(h_BTD, 1 / temperature)
    if cfg.logit_scale is not None:
        h_BTD = _scaled(h_BTD, cfg.logit_scale)
    softcap = None if cfg.logit_softcap is None else cfg.logit_softcap / temperature  # c·tanh(x/c)/T
    return h_BTD, w, {'dims': dims, 'vocab_size': cfg.vocab_size, 'softcap': softcap}


def logits(params: Params, cfg: ModelConfig, h_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, vocab_size] of final hidden states: for sampling, not for training."""
    h_BTD, w, options = head_inputs(params, cfg, h_BTD)
    return head.logits(h_BTD, w, **options)


def nll(
    params: Params, cfg: ModelConfig, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, z_coef: float,
    sparse: bool = False,
):  # fmt: skip
    """`head.nll` with the model's own head."""
    h_BTD, w, options = head_inputs(params, cfg, h_BTD)
    return head.nll(h_BTD, w, targets_BT, weights_BT, z_coef=z_coef, sparse=sparse, **options)


def embed(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """Returns what the first layer reads, [B, T, D]."""
    with jax.named_scope('embed'):
        x_BTD = seam.lookup(params['embed_VD'], tokens_BT, dtype=cfg.dtype)
        return x_BTD if cfg.embed_scale is None else _scaled(x_BTD, cfg.embed_scale)


def final_norm(params: Params, cfg: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """Returns what the head reads of what the last layer gives."""
    return _normed(x_BTD, params, 'final_norm_D', cfg)


def _normed(x: jax.Array, layer: Params, name: str, cfg: ModelConfig) -> jax.Array:
    """`rms_norm` over the dims of the scale of that name."""
    return rms_norm(x, _gathered(layer, name), eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)


def _gathered(layer: Params, name: str) -> jax.Array:
    """A stored scale or bias as it is used; FSDP may have split it."""
    return seam.gather(seam.dense(layer[name]), sharding.dims_of(name))


def layer_angles(cfg: ModelConfig, positions_BT: jax.Array) -> dict[str, Any]:
    """The rotary angles of each kind of layer that there is."""

    def of(kind: str) -> Any:
        if kind == 'nope':
            return None
        if kind == 'local' and cfg.pattern is not None:
            theta = cfg.rope_theta if cfg.rope_theta_local is None else cfg.rope_theta_local
            return rope_angles(positions_BT, cfg.head_dim, theta=theta)
        scaling = RopeScaling.parse(cfg.rope_scaling)
        return rope_angles(positions_BT, cfg.head_dim, theta=cfg.rope_theta, scaling=scaling)

    return {kind: of(kind) for kind in dict.fromkeys(cfg.kinds)}


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor that x's dtype need not have."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def apply_layer(x_BTD, layer, cfg, angles, attend, real_BT=None):
    """One layer: attention, then the feed-forward, each added to the residual stream: (x_BTD, the latter's sums).

    Args:
      angles: of the rotary positions; None: the layer has none. attend: (q_BTNH, k_BTKH, v_BTKH) -> [B, T, N, H].
      real_BT: False at padding; None: there is none.
    """

    def read(name):
        return x_BTD if cfg.norms == 'post' else _normed(x_BTD, layer, name, cfg)

    def added(y_BTD, name):
        y_BTD = y_BTD if cfg.norms == 'pre' else _normed(y_BTD, layer, name, cfg)
        return x_BTD + (y_BTD if cfg.residual_scale is None else _scaled(y_BTD, cfg.residual_scale))

    with jax.named_scope('attention'):
        y_BTD = _attention(read('attn_norm_D'), layer, cfg, angles, attend)
        x_BTD = added(y_BTD, 'attn_post_norm_D')
    with jax.named_scope('mlp'):
        y_BTD, aux = FEED_FORWARDS[cfg.feed_forward].apply(read('mlp_norm_D'), layer, cfg, real_BT)
        return added(y_BTD, 'mlp_post_norm_D'), aux


def _attention(y_BTD, layer, cfg, angles, attend):
    """Returns what attention adds to the residual stream."""
    einsum = seam.einsum
    q_BTNH = einsum('BTD,DNH->BTNH', y_BTD, layer['wq_DNH'])
    k_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wk_DKH'])
    v_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wv_DKH'])
    if cfg.qkv_bias:
        biased = lambda x, name: x + _gathered(layer, name).astype(x.dtype)
        q_BTNH, k_BTKH = biased(q_BTNH, 'bias_q_NH'), biased(k_BTKH, 'bias_k_KH')
        v_BTKH = biased(v_BTKH, 'bias_v_KH')
    if cfg.qk_norm:  # Henry et al., 2020; per head as in Qwen 3, or over all as in OLMo 2
        q_name, k_name = ('q_norm_NH', 'k_norm_KH') if cfg.qk_norm_joint else ('q_norm_H', 'k_norm_H')
        q_BTNH, k_BTKH = _normed(q_BTNH, layer, q_name, cfg), _normed(k_BTKH, layer, k_name, cfg)
    if angles is not None:
        q_BTNH, k_BTKH = rope(q_BTNH, angles), rope(k_BTKH, angles)
    if cfg.query_scale is not None and cfg.query_scale != cfg.head_dim**-0.5:  # which attention scales by
        q_BTNH = _scaled(q_BTNH, cfg.query_scale * cfg.head_dim**0.5)
    return einsum('BTNH,NHD->BTD', attend(q_BTNH, k_BTKH, v_BTKH), layer['wo_NHD'])
