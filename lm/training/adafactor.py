"""Adafactor (Shazeer and Stern, 2018) without momentum: a matrix's second moments from their means over its two sides.

What is kept of a matrix of m × n is m + n numbers (section 3); every layer's, and every expert's, is factored alone.
The rate is the one given, as AdamW's is, not multiplied by the size of the parameter; the rest is the paper's.
"""

import jax
import jax.numpy as jnp

from lm.training.param_groups import ParamInfo

EPS = 1e-30  # added to squared gradients (the paper's ε₁)
CLIP = 1.0  # the largest RMS of an array's update (section 6)
DECAY = 0.8  # the second moments' decay at update t is 1 − t^−0.8 (section 7.2): no bias to correct


def init(param: jax.Array, info: ParamInfo) -> dict[str, jax.Array]:
    """{'row', 'col'}: the two sides' means, of a matrix; {'nu'}: all second moments, of what is none."""
    if info.rows is None:
        return {'nu': jnp.zeros_like(param)}
    sides = {'row': jnp.mean(param, _other_side(info)), 'col': jnp.mean(param, info.rows)}
    return jax.tree.map(jnp.zeros_like, sides)  # each split over the mesh as its side is


def update(
    grad: jax.Array, moments: dict[str, jax.Array], info: ParamInfo, count: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(direction, moments) of update number `count`, from 1."""
    decay = 1 - count.astype(jnp.float32) ** -DECAY
    average = lambda old, new: decay * old + (1 - decay) * new
    square = grad * grad + EPS
    if info.rows is None:
        new = {'nu': average(moments['nu'], square)}
        direction = grad * jax.lax.rsqrt(new['nu'])
    else:
        other = _other_side(info)
        new = {
            'row': average(moments['row'], jnp.mean(square, other)),
            'col': average(moments['col'], jnp.mean(square, info.rows)),
        }
        row, col = jnp.expand_dims(new['row'], other), jnp.expand_dims(new['col'], info.rows)
        direction = grad * jax.lax.rsqrt(row / jnp.mean(row, info.rows, keepdims=True)) * jax.lax.rsqrt(col)
    within = tuple(range(info.counts, grad.ndim))
    rms = jnp.sqrt(jnp.mean(direction * direction, within, keepdims=True))
    return direction / jnp.maximum(1.0, rms / CLIP), new


def _other_side(info: ParamInfo) -> tuple[int, ...]:
    """The axes of what is not D."""
    assert info.rows is not None
    axes = range(info.counts, info.stacked + len(info.dims))
    return tuple(axis for axis in axes if axis != info.rows)
