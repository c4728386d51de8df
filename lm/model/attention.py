"""Attention: one function for training, prefill and decoding.

T becomes S, and key/value heads meet their query heads, here and nowhere else. Under a mesh each device works on its
own batch rows and heads with all the keys (`jax.shard_map`); with a split sequence its queries know their offset.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import attention_kernels as kernels
from lm.model.causal_blocks import NEGATIVE, causal_blocks

INVALID = np.iinfo(np.int32).max  # the position of a slot that holds no token: after every query


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = 'blocks',
) -> jax.Array:
    """Causal grouped-query attention (Ainslie et al., 2023) -> [B, T, N, H].

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, and keys and values with K dividing N.
      segments_BT: queries see keys of their own segment alone (packed rows); needs S = T.
      window: see the last `window` keys alone, oneself included (Beltagy et al., 2020); None sees all.
      softcap: logits become cap·tanh(logits/cap) (Gemma 2).
      backend: one of `attention_kernels.NAMES`.
    """
    attend = partial(BACKENDS[backend], window=window, softcap=softcap)
    # Under a mesh, even of one device, JAX cannot lay a kernel out: it is run on each device's own arrays.
    manual = backend in kernels.NEEDS and not jax.sharding.get_abstract_mesh().empty
    if not sharding.axis_sizes() and not manual:
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT, offset=None)
    else:
        out_BTNH = _sharded(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT)
    # what a remat policy may keep; of a kernel that is more than the output
    return out_BTNH if backend in kernels.NEEDS else checkpoint_name(out_BTNH, kernels.NAME)


def _sharded(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """Runs `attend` on each device's rows, heads and queries."""
    (B, T, N, _), K = q_BTNH.shape, k_BSKH.shape[2]
    taken = sharding.assign({'B': B, 'N': N, 'T': T})
    if sharding.assign({'K': K})['K'] != taken['N']:  # kv heads that do not divide are repeated for their queries
        k_BSKH, v_BSKH = (
            jnp.repeat(jax.reshard(x, sharding.spec('BS1H', taken)), N // K, axis=2) for x in (k_BSKH, v_BSKH)
        )
    # B first, then heads, then what is left of T's axes
    q_spec, kv_spec, row = sharding.spec('BTNH', taken), sharding.spec('BSNH', taken), sharding.spec('BT', taken)
    sequence_axes = taken['T']

    def local(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS):
        offset = jax.lax.axis_index(sequence_axes) * q_BTNH.shape[1] if sequence_axes else None
        return attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, offset=offset)

    specs = (q_spec, kv_spec, kv_spec, row, P(row[0], None))
    return sharding.on_shards(local, (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT), specs, q_spec)


def _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, *, offset, window, softcap):
    """One device's attention: in causal blocks of queries where query t is key t, else over all keys at once."""
    q_BKTJH, k_BKSH, v_BKSH = _lead_heads(q_BTNH, k_BSKH, v_BSKH)
    if offset is None:
        return _follow_heads(causal_blocks(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window, softcap))
    sizes = q_BTNH.shape[1], k_BSKH.shape[1]
    mask_BTS = kernels.visible(*sizes, offset=offset, window=window, segments_BT=segments_BT, segments_BS=segments_BS)
    return _follow_heads(_block(q_BKTJH, k_BKSH, v_BKSH, mask_BTS, softcap=softcap))


def _lead_heads(q_BTNH, k_BSKH, v_BSKH):
    """(q_BKTJH scaled, k_BKSH, v_BKSH): batch and heads lead, so that products are batched without a transpose."""
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    q_BKTJH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    return q_BKTJH, k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)


def _follow_heads(out_BKTJH):
    """[B, T, N, H] again."""
    B, K, T, J, H = out_BKTJH.shape
    return out_BKTJH.transpose(0, 2, 1, 3, 4).reshape(B, T, K * J, H)


def _block(q_BKTJH, k_BKSH, v_BKSH, mask_BTS, *, softcap):
    """Softmax attention over all keys, its softmax in float32."""
    B, K, T, J, H = q_BKTJH.shape
    q_BKTH = q_BKTJH.reshape(B, K, T * J, H)
    logits_BKTS = jnp.einsum('BKTH,BKSH->BKTS', q_BKTH, k_BKSH, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits_BKTS = softcap * jnp.tanh(logits_BKTS / softcap)
    mask_BKTS = jnp.repeat(mask_BTS, J, axis=1)[:, None]
    probs_BKTS = jax.nn.softmax(jnp.where(mask_BKTS, logits_BKTS, NEGATIVE), axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum('BKTS,BKSH->BKTH', probs_BKTS, v_BKSH).reshape(B, K, T, J, H)


class CachePositions(NamedTuple):
    """The positions of the tokens of `cached_attention` in their texts; INVALID is a token that nobody sees."""

    query_BT: Any
    new_BT: Any  # of the keys that are read with the queries
    cached_BS: Any
    slot: Any  # the first slot to write to


def cached_attention(q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions: CachePositions, *, window=None, softcap=None):
    """Attention to a cache and to the T tokens after it, which it then writes: ([B, T, N, H], k_BKSH, v_BKSH).

    Reads the cache as it was and takes the new tokens from its arguments, so that the cache is written in place: a
    product that reads what was just written has XLA copy the cache at batch 1. Under a mesh heads are split as the
    cache is, and each device writes its part.
    """
    local = partial(_cached, window=window, softcap=softcap)
    if not sharding.axis_sizes():
        return local(q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions)
    (B, T, _, _), K = q_BTNH.shape, k_BKSH.shape[1]
    taken = sharding.assign({'B': B, 'K': K, 'T': T})
    q_spec, kv_spec, cache_spec = (sharding.spec(dims, taken) for dims in ('BTKH', 'BSKH', 'BKSH'))
    row, all_rows = sharding.spec('BT', taken), sharding.spec('BS', taken)
    specs = (q_spec, kv_spec, kv_spec, cache_spec, cache_spec, CachePositions(row, all_rows, all_rows, P()))
    args = (q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions)
    return sharding.on_shards(local, args, specs, (q_spec, cache_spec, cache_spec))


def _cached(q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions, *, window, softcap):
    """One device's `cached_attention`: one softmax, in float32, over two sets of keys that lie apart."""
    q_BKTJH, *new = _lead_heads(q_BTNH, k_BTKH, v_BTKH)
    B, K, T, J, H = q_BKTJH.shape
    q_BKTH = q_BKTJH.reshape(B, K, T * J, H)
    new_k_BKTH, new_v_BKTH = (x.astype(k_BKSH.dtype) for x in new)

    def logits(keys_BKSH, position_BS):
        x_BKTS = jnp.einsum('BKTH,BKSH->BKTS', q_BKTH, keys_BKSH, preferred_element_type=jnp.float32)
        if softcap is not None:
            x_BKTS = softcap * jnp.tanh(x_BKTS / softcap)
        mask_BTS = position_BS[:, None] <= positions.query_BT[..., None]
        if window is not None:
            mask_BTS &= position_BS[:, None] > positions.query_BT[..., None] - window
        return jnp.where(jnp.repeat(mask_BTS, J, axis=1)[:, None], x_BKTS, NEGATIVE)

    old_BKTS, new_BKTT = logits(k_BKSH, positions.cached_BS), logits(new_k_BKTH, positions.new_BT)
    top_BKT1 = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (old_BKTS, new_BKTT)))
    old_BKTS, new_BKTT = jnp.exp(old_BKTS - top_BKT1), jnp.exp(new_BKTT - top_BKT1)
    total_BKT1 = sum(jnp.sum(x, axis=-1, keepdims=True) for x in (old_BKTS, new_BKTT))
    product = partial(jnp.einsum, 'BKTS,BKSH->BKTH', preferred_element_type=jnp.float32)
    out_BKTH = product(old_BKTS.astype(v_BKSH.dtype), v_BKSH) + product(new_BKTT.astype(v_BKSH.dtype), new_v_BKTH)
    out_BKTH = (out_BKTH / total_BKT1).astype(q_BTNH.dtype)
    # 0 that XLA cannot know: the write waits for the reads above, else XLA copies the cache to be safe
    start = (0, 0, positions.slot + jnp.isinf(out_BKTH[0, 0, 0, 0]), 0)
    k_BKSH, v_BKSH = (jax.lax.dynamic_update_slice(*x, start) for x in ((k_BKSH, new_k_BKTH), (v_BKSH, new_v_BKTH)))
    return _follow_heads(out_BKTH.reshape(q_BKTJH.shape)), k_BKSH, v_BKSH


def dense_attention(
    q_BTNH, k_BSKH, v_BSKH, *, segments_BT=None, segments_BS=None, positions_BT=None, window=None, softcap=None
):
    """The same in the plainest way: the twin that tests compare every other form with."""
    T, S, J = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, J, axis=2).astype(jnp.float32) for x in (k_BSKH, v_BSKH))
    logits_BNTS = jnp.einsum('BTNH,BSNH->BNTS', q_BTNH.astype(jnp.float32), k_BSNH) * q_BTNH.shape[-1] ** -0.5
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    index_BT = jnp.arange(T)[None] if positions_BT is None else positions_BT
    behind_BTS = index_BT[..., None] - jnp.arange(S)
    mask_BTS = (behind_BTS >= 0) & (behind_BTS < (S if window is None else window))
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == (segments_BT if segments_BS is None else segments_BS)[:, None]
    probs_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], logits_BNTS, NEGATIVE), axis=-1)
    return jnp.einsum('BNTS,BSNH->BTNH', probs_BNTS, v_BSNH).astype(q_BTNH.dtype)


def _dense(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, *, offset, **options):
    """The twin as a backend."""
    positions_BT = None if offset is None else jnp.arange(q_BTNH.shape[1])[None] + offset
    segments = {'segments_BT': segments_BT, 'segments_BS': segments_BS}
    return dense_attention(q_BTNH, k_BSKH, v_BSKH, **segments, positions_BT=positions_BT, **options)


BACKENDS = {'blocks': _attend, 'dense': _dense, 'cudnn': kernels.cudnn, 'splash': kernels.splash}
