"""Muon's own part: the matrix nearest to a direction among those that stretch nothing (Jordan et al., 2024).

A direction USVᵀ becomes UVᵀ, so that what the gradient says softly is learnt as fast as what it says loudly. It is done
by five steps of a Newton–Schulz iteration, which is nothing but products. They want a matrix whole, and the layers'
matrices lie in pieces all over the mesh; so equal ones are stacked, the stack is resharded over its first dimension,
each device does its own, and the pieces go back where they were. No device ever holds all of them.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.training.param_groups import ParamInfo

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: the steepest at 0 that keep the rest within 0.7 to 1.2
RMS = 0.2  # of an update's elements, as AdamW's have it: one rate does for both (Liu et al., 2025, section 2.2)


def newton_schulz(x: jax.Array) -> jax.Array:
    """[…, m, n] -> the same with singular values near 1 (0.7 to 1.2) where they were not near 0; 0 stays 0."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), (-1, -2), keepdims=True))
    x = (x / jnp.maximum(norm, 1e-30)).astype(x.dtype)
    for _ in range(STEPS):
        gram = jnp.einsum('...ij,...kj->...ik', x, x)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def orthogonal(directions: Sequence[jax.Array], infos: Sequence[ParamInfo], *, dtype: Any) -> list[jax.Array]:
    """Each direction made orthogonal, matrix by matrix, its elements of RMS 0.2; shapes, layouts and dtypes stay.

    Args:
      infos: what the directions are, all of them a `matrix`.
      dtype: of the products, and of what travels.
    """
    laid = [_rows_first(x.astype(dtype), info) for x, info in zip(directions, infos, strict=True)]
    stacks: dict[Any, list[int]] = {}
    for i, x in enumerate(laid):
        stacks.setdefault((x.shape[1:], infos[i].counts, jax.typeof(x).sharding), []).append(i)
    out = list(directions)
    for (_, counts, _), members in stacks.items():
        stack = _orthogonal_stack(jnp.concatenate([laid[i] for i in members]), max(1, counts))
        ends = list(accumulate(laid[i].shape[0] for i in members))
        for i, x in zip(members, jnp.split(stack, ends[:-1]), strict=True):
            out[i] = _rows_back(x, infos[i]).astype(directions[i].dtype)
    return out


def _rows_first(x: jax.Array, info: ParamInfo) -> jax.Array:
    """[L, E?, D, …] of whatever order D and the other side had; L is 1 where nothing counts matrices."""
    assert info.rows is not None
    x = jnp.moveaxis(x, info.rows, info.counts)
    return x if info.counts else x[None]


def _rows_back(x: jax.Array, info: ParamInfo) -> jax.Array:
    assert info.rows is not None
    x = x if info.counts else x[0]
    return jnp.moveaxis(x, info.counts, info.rows)


def _orthogonal_stack(x: jax.Array, counts: int) -> jax.Array:
    """[n, E?, D, …], laid out as it comes, made orthogonal."""
    n, path = x.shape[0], _path(x)
    parts = math.prod(sharding.axis_sizes().values())
    x = jnp.pad(x, [(0, -n % parts)] + [(0, 0)] * (x.ndim - 1))
    for spec in path[1:]:
        x = jax.reshard(x, spec)
    m, k = x.shape[counts], math.prod(x.shape[counts + 1 :])
    y = newton_schulz(x.reshape(*x.shape[:counts], m, k)) * (RMS * math.sqrt(max(m, k)))
    x = y.reshape(x.shape)
    for spec in reversed(path[:-1]):
        x = jax.reshard(x, spec)
    return x[:n]


def _path(x: jax.Array) -> list[P]:
    """The layouts from the one that x has to the one that splits its first dimension over all devices. One dimension's
    axes move at a time: each move is an all-to-all, where all at once would be a gathering of everything."""
    axes = sharding.axis_sizes()
    if not axes:
        return []
    spec = [() if s is None else (s,) if isinstance(s, str) else tuple(s) for s in jax.typeof(x).sharding.spec]
    path = [P(*spec)]
    for i in range(1, len(spec)):
        if spec[i]:
            spec[0], spec[i] = spec[0] + spec[i], ()
            path.append(P(*spec))
    rest = tuple(axis for axis in axes if axis not in spec[0])
    return path if not rest else [*path, P(spec[0] + rest, *spec[1:])]
