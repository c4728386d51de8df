"""The key/value cache: a decoder that reads tokens after what it has read."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import transformer
from lm.model.attention import INVALID, CachePositions, cached_attention
from lm.model.config import ModelConfig
from lm.model.parameters import Params, layer_list


class Cache(NamedTuple):
    """Keys and values of what has been read, one array [B, K, S, H] a layer: one that a product reads as it lies.

    All rows write to the same slots S, and each slot knows its token's position in each row, so ragged rows need no
    scatter, and padding is a slot that no query sees.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]
    position_BS: jax.Array  # INVALID where nothing was written, or padding
    length_B: jax.Array  # tokens read of each row: the next one's position
    used: jax.Array  # slots written


def empty_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache for `batch` rows with room for `slots` tokens, split over the mesh as attention wants it."""
    shape = (batch, cfg.kv_heads, slots, cfg.head_dim)
    zeros = lambda: jnp.zeros(shape, cfg.dtype)
    if sharding.axis_sizes():
        zeros = lambda: jax.reshard(jnp.zeros(shape, cfg.dtype), sharding.array_spec('BKSH', shape))
    k_BKSH, v_BKSH = (tuple(zeros() for _ in range(cfg.layers)) for _ in range(2))
    position_BS = jnp.full((batch, slots), INVALID, jnp.int32)
    return Cache(k_BKSH, v_BKSH, position_BS, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))


def grow_cache(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens."""

    def grow(x: jax.Array, axis: int, value: int) -> jax.Array:
        widths = [(0, slots - x.shape[axis] if i == axis else 0, 0) for i in range(x.ndim)]
        return jax.lax.pad(x, jnp.array(value, x.dtype), widths)

    k_BKSH, v_BKSH = (tuple(grow(x, 2, 0) for x in xs) for xs in (cache.k_BKSH, cache.v_BKSH))
    return cache._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH, position_BS=grow(cache.position_BS, 1, INVALID))


def forward_cached(
    params: Params, cfg: ModelConfig, tokens_BT: jax.Array, cache: Cache, *, count_B: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Reads T more tokens of each row after what the cache holds: ([B, T, D], the cache with them).

    Args:
      params: best from `unstacked`; else the layers are taken apart here, each time.
      count_B: the first so many of a row's tokens are real, the others padding; None: all are.
    """
    B, T = tokens_BT.shape
    position_BT = cache.length_B[:, None] + jnp.arange(T)
    angles = transformer.layer_angles(cfg, position_BT)
    count_B = jnp.full_like(cache.length_B, T) if count_B is None else count_B
    new_BT = jnp.where(jnp.arange(T) < count_B[:, None], position_BT, INVALID)
    positions = CachePositions(position_BT, new_BT, cache.position_BS, cache.used)
    x_BTD, ks, vs = transformer.embed(params, cfg, tokens_BT), [], []
    for i, (layer, *kv) in enumerate(zip(layer_list(params, cfg), cache.k_BKSH, cache.v_BKSH, strict=True)):
        kind = cfg.kind(i)
        x_BTD, k_BKSH, v_BKSH = _cached_block(x_BTD, layer, angles[kind], *kv, positions, cfg=cfg, kind=kind)
        ks.append(k_BKSH)
        vs.append(v_BKSH)
    position_BS = jax.lax.dynamic_update_slice(cache.position_BS, new_BT, (0, cache.used))
    cache = Cache(tuple(ks), tuple(vs), position_BS, cache.length_B + count_B, cache.used + T)
    return transformer.final_norm(params, cfg, x_BTD), cache


@partial(jax.jit, static_argnames=('cfg', 'kind'))  # so that layers alike are traced once
def _cached_block(x_BTD, layer, angles, k_BKSH, v_BKSH, positions, *, cfg, kind):
    """(x_BTD, k_BKSH, v_BKSH) after one layer over what its cache holds and the tokens after it."""
    written = []

    def attend(q_BTNH, k_BTKH, v_BTKH):
        options = {'window': cfg.window_of(kind), 'softcap': cfg.attn_softcap}
        out_BTNH, *kv = cached_attention(q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions, **options)
        written.extend(kv)
        return out_BTNH

    return transformer.apply_layer(x_BTD, layer, cfg, angles, attend)[0], *written
