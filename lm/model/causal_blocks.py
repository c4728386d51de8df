"""Causal attention on a CPU: blocks of queries, each against the keys it can see, with a backward pass of its own.

Blocks skip most of what causality masks. Their probabilities are kept for the backward pass, which JAX would also do;
what it would not do is write the gradients so that every product is rows times columns in memory order. XLA on CPU has
fast kernels for those alone: a product over the leading dimension of both operands runs at a third to a half of their
speed, so the small operand is turned around first.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.model.attention_kernels import visible

NEGATIVE = -1e30  # not -inf: a row that sees no key (padding) gives the mean of v, which nobody reads, and not nan
LEAST_BLOCK, MOST_BLOCK = 64, 256  # queries: shorter ones skip more of what is masked, longer ones multiply faster


def _blocks(T: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each block."""
    size = min(max(T // 4, LEAST_BLOCK), MOST_BLOCK)
    starts = range(0, T, size)
    return [(max(0, start - window + 1) if window else 0, start, min(start + size, T)) for start in starts]


def _rows(x_BKTJH: jax.Array, start: int, stop: int) -> jax.Array:
    """Queries start..stop and the J that share a head as rows: [B, K, (stop-start)·J, H]."""
    B, K, _, J, H = x_BKTJH.shape
    return x_BKTJH[:, :, start:stop].reshape(B, K, (stop - start) * J, H)


def _mask(first: int, start: int, stop: int, segments_BT: jax.Array | None, window: int | None) -> jax.Array:
    """[B or 1, 1, queries, 1, keys]: what each query of a block sees."""
    segments = {}
    if segments_BT is not None:
        segments = {'segments_BT': segments_BT[:, start:stop], 'segments_BS': segments_BT[:, first:stop]}
    seen_BTS = visible(stop - start, stop - first, offset=start - first, window=window, **segments)
    return seen_BTS[:, None, :, None]


def _forward(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap) -> tuple[jax.Array, list[Any]]:
    """The result, and what the backward pass needs of each block: its probabilities and the soft cap's slope."""
    B, K, T, J, H = q_BKTJH.shape
    outs, kept = [], []
    for first, start, stop in _blocks(T, window):
        k, v = k_BKSH[:, :, first:stop], v_BKSH[:, :, first:stop]
        x = jnp.einsum('BKTH,BKSH->BKTS', _rows(q_BKTJH, start, stop), k, preferred_element_type=jnp.float32)
        slope = None
        if softcap is not None:
            tanh = jnp.tanh(x / softcap)
            x, slope = softcap * tanh, 1 - jnp.square(tanh)
        x_BKTJS = x.reshape(B, K, stop - start, J, -1)
        seen = _mask(first, start, stop, segments_BT, window)
        p = jax.nn.softmax(jnp.where(seen, x_BKTJS, NEGATIVE), axis=-1).astype(v.dtype).reshape(x.shape)
        out = jnp.einsum('BKTS,BKSH->BKTH', p, v)
        outs.append(out.reshape(B, K, stop - start, J, H))
        kept.append((p, slope))
    return jnp.concatenate(outs, axis=2), kept


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_blocks(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap):
    """Attention of queries t to keys s ≤ t of their own segment, T = S, as [B, K, T, J, H]; q is scaled already.

    J are the queries that share a key/value head. Raises nothing: the shapes were checked by `attention`.
    """
    return _forward(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap)[0]


def _causal_forward(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap):
    out_BKTJH, kept = _forward(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap)
    return out_BKTJH, (q_BKTJH, k_BKSH, v_BKSH, kept)


def _causal_backward(window, softcap, saved, g_BKTJH):
    """With p = softmax(x) and dp = g·v: dv = pᵀg, dx = p·(dp − Σ p·dp), dq = dx·k, dk = dxᵀq.

    dv and dk are made as [H, S], gᵀ·p and qᵀ·dx, and each block adds to the part of them that its queries saw.
    """
    del softcap  # its slope was kept
    q_BKTJH, k_BKSH, v_BKSH, kept = saved
    B, K, T, J, H = q_BKTJH.shape
    # The barrier has them turned around in memory, not inside the products.
    turned = jax.lax.optimization_barrier(tuple(_rows(x, 0, T).swapaxes(2, 3) for x in (g_BKTJH, q_BKTJH)))
    gT_BKHT, qT_BKHT = turned
    dq, dk_BKHS, dv_BKHS = [], jnp.zeros((B, K, H, T), k_BKSH.dtype), jnp.zeros((B, K, H, T), v_BKSH.dtype)
    for (first, start, stop), (p, slope) in zip(_blocks(T, window), kept, strict=True):
        k, v = k_BKSH[:, :, first:stop], v_BKSH[:, :, first:stop]
        rows, keys = slice(start * J, stop * J), slice(first, stop)
        dp = jnp.einsum('BKTH,BKSH->BKTS', _rows(g_BKTJH, start, stop), v, preferred_element_type=jnp.float32)
        dx = p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))
        dx = (dx if slope is None else dx * slope).astype(k.dtype)
        dq.append(jnp.einsum('BKTS,BKSH->BKTH', dx, k).reshape(B, K, stop - start, J, H))
        dv_BKHS = dv_BKHS.at[..., keys].add(jnp.einsum('BKHT,BKTS->BKHS', gT_BKHT[..., rows], p))
        dk_BKHS = dk_BKHS.at[..., keys].add(jnp.einsum('BKHT,BKTS->BKHS', qT_BKHT[..., rows], dx))
    return jnp.concatenate(dq, axis=2), dk_BKHS.swapaxes(2, 3), dv_BKHS.swapaxes(2, 3), None


causal_blocks.defvjp(_causal_forward, _causal_backward)
