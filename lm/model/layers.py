"""The small parts of a layer: normalisation and rotary positions."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.errors import UsageError


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, plus_one: bool = False) -> jax.Array:
    """Root-mean-square normalisation over the dimensions that the scale has, the last ones, in float32 (Zhang and
    Sennrich, 2019, eq. 4); `plus_one`: the scale is stored less 1, as Gemma's."""
    x32, axes = x.astype(jnp.float32), tuple(range(-scale.ndim, 0))
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + eps)
    return (y * (scale.astype(jnp.float32) + (1 if plus_one else 0))).astype(x.dtype)


class RopeScaling(NamedTuple):
    """A slowing down of rotary frequencies, for texts longer than those of pretraining.

    linear: all by `factor` (Chen et al., 2023). llama3: wavelengths above original/low by it, those below original/high
    not, and those between by what lies between (Grattafiori et al., 2024, section 3.4.2, in Meta's code).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: float = 8192.0

    @staticmethod
    def parse(text: str | None) -> 'RopeScaling | None':
        """From 'linear,factor=8', 'llama3,factor=8,low=1,high=4,original=8192'. Raises UsageError for another text."""
        if text is None:
            return None
        kind, *pairs = text.split(',')
        try:
            found = RopeScaling(kind, **{key: float(value) for key, value in (pair.split('=') for pair in pairs)})
        except (ValueError, TypeError):
            found = None
        fits = (
            found
            and kind in ('linear', 'llama3')
            and all(0 < x < math.inf for x in found[1:])
            and found.low < found.high
        )
        if not fits or (kind == 'linear' and len(pairs) != 1):
            raise UsageError(
                f'model.rope_scaling={text} must be linear,factor=N or llama3,factor=N,low=N,high=N,original=N'
            )
        return found

    def slowed(self, frequency: jax.Array) -> jax.Array:
        """The frequencies, in radians a token, as they are used."""
        if self.kind == 'linear':
            return frequency / self.factor
        turns = self.original * frequency / (2 * math.pi)  # over the texts of pretraining
        keep = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


def rope_angles(
    positions_BT: jax.Array, head_dim: int, *, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] of the rotary embedding (Su et al., 2021, eq. 15), in float32.

    Whole over the model's axes, whatever those split: heads leave them none, a sequence takes its slice in `rope`.
    """
    if sharding.axis_sizes():
        storage = [a for a in sharding.AXES if a not in sharding.MODEL_AXES]
        positions_BT = jax.reshard(positions_BT, sharding.array_spec('BT', positions_BT.shape, storage))
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequency = frequency if scaling is None else scaling.slowed(frequency)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    tables = lambda: (jnp.cos(angle), jnp.sin(angle))
    if sharding.platform() != 'cpu' or sharding.axis_sizes():
        return tables()
    # XLA on CPU fuses them into all that reads them: made anew in each layer, for queries and keys, for each head, they
    # are an eighth of a forward pass. What a branch gives is kept; the other is never taken: positions are 0 or more.
    return jax.lax.cond(positions_BT.reshape(-1)[0] >= 0, tables, lambda: (angle, angle))


def rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, heads, H] by position; the halves of H pair up (the half-split layout of Hugging Face)."""
    if sharding.axis_sizes():
        angles = jax.reshard(angles, P(*jax.typeof(x).sharding.spec[:2], None, None))
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
