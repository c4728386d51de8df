"""The small parts of a layer: normalisation and rotary positions."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import seam


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last dimension, in float32 (Zhang and Sennrich, 2019, eq. 4)."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def block_norm(x_BTD: jax.Array, scale_D: jax.Array, *, eps: float) -> jax.Array:
    """`rms_norm` of the residual stream with a stored scale, which may be split by FSDP."""
    return rms_norm(x_BTD, seam.gather(seam.dense(scale_D), 'D'), eps=eps)


def rope_angles(positions_BT: jax.Array, head_dim: int, *, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of the rotary embedding (Su et al., 2021, eq. 15), in float32.

    Whole over the model's axes, whatever those split: heads leave them none, a sequence takes its slice in `rope`.
    """
    if sharding.axis_sizes():
        storage = [a for a in sharding.AXES if a not in sharding.MODEL_AXES]
        positions_BT = jax.reshard(positions_BT, sharding.array_spec('BT', positions_BT.shape, storage))
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, heads, H] by position; the halves of H pair up (the half-split layout of Hugging Face)."""
    if sharding.axis_sizes():
        angles = jax.reshard(angles, P(*jax.typeof(x).sharding.spec[:2], None, None))
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
