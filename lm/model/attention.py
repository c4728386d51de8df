"""Attention: one function for training, prefill and decoding.

T becomes S, and key/value heads meet their query heads, here and nowhere else. Under a mesh each device works on its
own batch rows and heads with all the keys (`jax.shard_map`); with a split sequence its queries know their offset.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import attention_kernels as kernels
from lm.model.causal_blocks import NEGATIVE, causal_blocks


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = 'blocks',
) -> jax.Array:
    """Causal grouped-query attention (Ainslie et al., 2023) -> [B, T, N, H].

    Args:
      q_BTNH, k_BSKH, v_BSKH: queries, and keys and values with K dividing N.
      segments_BT: queries see keys of their own segment alone (packed rows); needs S = T.
      positions_BT: index of each query among the S keys (decoding with a cache); None: query t is key t.
      window: see the last `window` keys alone, oneself included (Beltagy et al., 2020); None sees all.
      softcap: logits become cap·tanh(logits/cap) (Gemma 2).
      backend: one of `attention_kernels.NAMES`; with positions, i.e. over a cache, there is only one.
    """
    local = _attend if positions_BT is not None else BACKENDS[backend]
    attend = partial(local, window=window, softcap=softcap)
    # Under a mesh, even of one device, JAX cannot lay a kernel out: it is run on each device's own arrays.
    manual = backend in kernels.NEEDS and not jax.sharding.get_abstract_mesh().empty
    if not sharding.axis_sizes() and not manual:
        return attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT, positions_BT, offset=None)
    return _sharded(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT, positions_BT)


def _sharded(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT, positions_BT):
    """Runs `attend` on each device's rows, heads and queries."""
    (B, T, N, _), K = q_BTNH.shape, k_BSKH.shape[2]
    taken = sharding.assign({'B': B, 'N': N, 'T': T})
    if sharding.assign({'K': K})['K'] != taken['N']:  # kv heads that do not divide are repeated for their queries
        k_BSKH, v_BSKH = (
            jnp.repeat(jax.reshard(x, sharding.spec('BS1H', taken)), N // K, axis=2) for x in (k_BSKH, v_BSKH)
        )
    # B first, then heads, then what is left of T's axes
    q_spec, kv_spec, row = sharding.spec('BTNH', taken), sharding.spec('BSNH', taken), sharding.spec('BT', taken)
    all_rows = P(row[0], None)
    sequence_axes = taken['T']

    def local(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, positions_BT):
        offset = jax.lax.axis_index(sequence_axes) * q_BTNH.shape[1] if sequence_axes else None
        return attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, positions_BT, offset=offset)

    put = lambda x, to: None if x is None else jax.reshard(x, to)
    args = (
        put(q_BTNH, q_spec), put(k_BSKH, kv_spec), put(v_BSKH, kv_spec),
        put(segments_BT, row), put(segments_BT, all_rows), put(positions_BT, row),
    )  # fmt: skip
    specs = (q_spec, kv_spec, kv_spec, row, all_rows, row)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(*args)


def _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, positions_BT, *, offset, window, softcap):
    """One device's attention: in causal blocks of queries where query t is key t, else over all keys at once."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    # Batch and heads lead, so that the products are batched matmuls without a transpose inside each.
    q_BKTJH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    if positions_BT is None and offset is None:
        out_BKTJH = causal_blocks(q_BKTJH, k_BKSH, v_BKSH, segments_BT, window=window, softcap=softcap)
        return out_BKTJH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)
    index_BT = positions_BT if positions_BT is not None else jnp.arange(T)[None] + offset
    behind_BTS = index_BT[..., None] - jnp.arange(S)
    mask_BTS = behind_BTS >= 0
    if window is not None:
        mask_BTS &= behind_BTS < window
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == segments_BS[:, None]
    out_BKTJH = _block(q_BKTJH, k_BKSH, v_BKSH, mask_BTS, softcap=softcap)
    return out_BKTJH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)


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


def _dense(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, positions_BT, *, offset, **options):
    """The twin as a backend."""
    if offset is not None:
        positions_BT = jnp.arange(q_BTNH.shape[1])[None] + offset
    segments = {'segments_BT': segments_BT, 'segments_BS': segments_BS}
    return dense_attention(q_BTNH, k_BSKH, v_BSKH, **segments, positions_BT=positions_BT, **options)


BACKENDS = {'blocks': _attend, 'dense': _dense, 'cudnn': kernels.cudnn, 'splash': kernels.splash}
