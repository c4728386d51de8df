"""Rows of float32 as the blocks of GGUF's quantized kinds.

A K-quant is a super-block of 256 values under one float16 scale, cut into blocks that each have a small integer scale
of their own. Q4_K and Q5_K have 8 blocks of 32, x ≈ d · scale · q − dmin · min with q in 0..15 or 0..31 and scale and
min in 0..63; Q6_K has 16 blocks of 16, x ≈ d · scale · q with q in −32..31 and scale in −128..127. Every block's scale
is searched: a few ways to round the block are tried, each gets the least-squares scale of its integers, and the least
weighted error stays. The errors are those of llama.cpp's quantizer without an importance matrix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SIMPLE = ('Q8_0', 'Q4_0', 'Q5_0', 'Q5_1')  # which the package gguf does exactly
SUPER = 256  # values of a super-block
SIMPLE_BLOCK = 32
CHUNK = 2048  # super-blocks at once, 2 MiB of float32: always as many, so that the order of sums is the same
# Of Q4_K and Q5_K: the largest integer; the candidates' number of steps is that plus FIRST + 0.1 · i, i = 0..COUNT.
ASYMMETRIC = {'Q4_K': (15, -1.0, 20), 'Q5_K': (31, -0.5, 15)}
STEP = 0.1
SYMMETRIC = 9  # Q6_K: the candidates' number of steps is 32 + 0.1 · i, i = −9..9
# Where the float16 numbers of a block lie: (bytes of a block, first byte, how many numbers).
FLOATS = {
    'Q8_0': (34, 0, 1), 'Q4_0': (18, 0, 1), 'Q5_0': (22, 0, 1), 'Q5_1': (24, 0, 2),
    'Q4_K': (144, 0, 2), 'Q5_K': (176, 0, 2), 'Q6_K': (210, 208, 1),
}  # fmt: skip


def quantize(rows: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [n, bytes] of float32 [n, columns]. Raises ValueError for a kind, a width or numbers that cannot be."""
    if kind not in FLOATS:
        raise ValueError(f'{kind} is not one of {", ".join(FLOATS)}')
    block = SIMPLE_BLOCK if kind in SIMPLE else SUPER
    if rows.ndim != 2 or rows.shape[1] % block or rows.shape[1] == 0:
        raise ValueError(f'{kind} needs rows of a multiple of {block} numbers, not an array of shape {rows.shape}')
    rows = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f'{kind} has no form for a number that is not finite')
    out = _simple(rows, kind) if kind in SIMPLE else _searched(rows, kind)
    size, first, count = FLOATS[kind]
    floats = np.ascontiguousarray(out.reshape(-1, size)[:, first : first + 2 * count]).view(np.float16)
    if not np.isfinite(floats).all():
        raise ValueError(f'{kind} has float16 scales, which numbers up to {np.abs(rows).max():.3g} are too large for')
    return out


def _simple(rows: np.ndarray, kind: str) -> np.ndarray:
    from lm.interop.gguf import file

    gguf = file.package()
    with np.errstate(over='ignore'):  # the caller looks at the scales
        return gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind])


def _searched(rows: np.ndarray, kind: str) -> np.ndarray:
    """A K-quant, CHUNK super-blocks at a time, the last padded with zeros: a row's bytes depend on no other row."""
    blocks = rows.reshape(-1, SUPER)
    out = np.empty((len(blocks), FLOATS[kind][0]), np.uint8)
    for i in range(0, len(blocks), CHUNK):
        part = blocks[i : i + CHUNK]
        count = len(part)
        if count < CHUNK:
            part = np.concatenate([part, np.zeros((CHUNK - count, SUPER), np.float32)])
        out[i : i + count] = np.asarray(_super_blocks(part, kind=kind))[:count]
    return out.reshape(len(rows), -1)


@functools.partial(jax.jit, static_argnames='kind')
def _super_blocks(x_GN: jax.Array, *, kind: str) -> jax.Array:
    """uint8 [super-blocks, bytes]. The search is in units of a power of two near the largest value: squares fit."""
    _, power_G = jnp.frexp(jnp.abs(x_GN).max(1))
    power_G = jnp.clip(power_G, -100, 100)  # beyond, scales are 0 or infinite as float16; 1 / unit stays normal
    unit_G = jnp.ldexp(jnp.float32(1), power_G)
    x_GN = x_GN / unit_G[:, None]
    return _q6(x_GN, unit_G) if kind == 'Q6_K' else _q45(x_GN, unit_G, kind)


# ---- Q4_K and Q5_K ----


def _q45(x_GN: jax.Array, unit_G: jax.Array, kind: str) -> jax.Array:
    count, (most, first, steps) = len(x_GN), ASYMMETRIC[kind]
    x_NB = x_GN.reshape(-1, 32).T  # a block's values first: sums over them run in step over blocks
    scale_B, min_B = _least_squares(x_NB, most, first, steps)
    scale_GB, min_GB = scale_B.reshape(-1, 8), min_B.reshape(-1, 8)
    d_G, scales_GB = _small(scale_GB, unit_G)
    dmin_G, mins_GB = _small(min_GB, unit_G)
    by_B = (_half(d_G, unit_G)[:, None] * scales_GB).reshape(-1)
    off_B = (_half(dmin_G, unit_G)[:, None] * mins_GB).reshape(-1)
    q_NB = jnp.where(by_B > 0, jnp.clip(jnp.round((x_NB + off_B) / jnp.where(by_B > 0, by_B, 1)), 0, most), 0)
    q = q_NB.T.astype(jnp.uint8).reshape(count, 4, 2, 32)
    low = (q[:, :, 0] & 15) | ((q[:, :, 1] & 15) << 4)
    parts = [_bytes(d_G), _bytes(dmin_G), _pack_scales(scales_GB, mins_GB)]
    if kind == 'Q5_K':
        bits = (q >> 4).reshape(count, 8, 32) << jnp.arange(8, dtype=jnp.uint8)[:, None]
        parts.append(bits.sum(1, dtype=jnp.uint8))
    return jnp.concatenate([*parts, low.reshape(count, 128)], axis=1)


def _least_squares(x_NB: jax.Array, most: int, first: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """(scale, min) [blocks], both ≥ 0, such that scale · q − min is near x, q in 0..most. Large values weigh more."""
    weight_NB = jnp.sqrt((x_NB**2).mean(0)) + jnp.abs(x_NB)
    low_B, high_B = jnp.minimum(x_NB.min(0), 0), x_NB.max(0)
    width_B = high_B - low_B
    flat_B = width_B <= 0
    width_B = jnp.where(flat_B, 1, width_B)
    sum_w, sum_x = weight_NB.sum(0), (weight_NB * x_NB).sum(0)

    def rounded(levels: jax.Array | float) -> jax.Array:
        return jnp.clip(jnp.round((levels / width_B) * (x_NB - low_B)), 0, most)

    def error(q_NB: jax.Array, scale_B: jax.Array, low_B: jax.Array) -> jax.Array:
        return (weight_NB * (scale_B * q_NB + low_B - x_NB) ** 2).sum(0)

    def attempt(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q_NB = rounded(most + first + STEP * i)
        wq_NB = weight_NB * q_NB
        sum_q, sum_qq, sum_xq = wq_NB.sum(0), (wq_NB * q_NB).sum(0), (wq_NB * x_NB).sum(0)
        det_B = sum_w * sum_qq - sum_q * sum_q
        det1_B = jnp.where(det_B > 0, det_B, 1)
        scale_B = (sum_w * sum_xq - sum_x * sum_q) / det1_B
        low_B = (sum_qq * sum_x - sum_q * sum_xq) / det1_B
        through_B = low_B > 0  # a min cannot lift: the line through 0
        scale_B = jnp.where(through_B, sum_xq / jnp.where(sum_qq > 0, sum_qq, 1), scale_B)
        low_B = jnp.where(through_B, 0, low_B)
        error_B = error(q_NB, scale_B, low_B)
        take_B = (det_B > 0) & (error_B < best[0])
        return tuple(jnp.where(take_B, a, b) for a, b in zip((error_B, scale_B, low_B), best, strict=True))

    scale_B = width_B / most
    start = error(rounded(float(most)), scale_B, low_B), scale_B, low_B
    _, scale_B, low_B = jax.lax.fori_loop(0, steps + 1, attempt, start)
    return jnp.where(flat_B, 0, scale_B), -low_B


def _small(scale_GB: jax.Array, unit_G: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float16 [super-blocks], whole numbers 0..63) whose product is near scale · unit."""
    most_G = jnp.maximum(scale_GB.max(1), 0)
    inverse_G = jnp.where(most_G > 0, 63 / jnp.where(most_G > 0, most_G, 1), 0)
    return (most_G / 63 * unit_G).astype(jnp.float16), jnp.clip(jnp.round(inverse_G[:, None] * scale_GB), 0, 63)


def _half(d_G: jax.Array, unit_G: jax.Array) -> jax.Array:
    """A float16 scale in the search's units."""
    return d_G.astype(jnp.float32) / unit_G


def _pack_scales(scales_GB: jax.Array, mins_GB: jax.Array) -> jax.Array:
    """12 bytes of 8 scales and 8 mins of 6 bits: the first four of each whole, with the last four's upper bits."""
    scales, mins = scales_GB.astype(jnp.uint8), mins_GB.astype(jnp.uint8)
    first = [(v[:, :4] | ((v[:, 4:] >> 4) << 6)) for v in (scales, mins)]
    return jnp.concatenate([*first, (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)], axis=1)


# ---- Q6_K ----


def _q6(x_GN: jax.Array, unit_G: jax.Array) -> jax.Array:
    count = len(x_GN)
    x_NB = x_GN.reshape(-1, 16).T
    scale_GB = _symmetric(x_NB).reshape(-1, 16)
    largest_G = jnp.take_along_axis(scale_GB, jnp.abs(scale_GB).argmax(1)[:, None], axis=1)[:, 0]
    inverse_G = jnp.where(largest_G != 0, -128 / jnp.where(largest_G != 0, largest_G, 1), 0)
    d_G = (largest_G / -128 * unit_G).astype(jnp.float16)
    scales_GB = jnp.clip(jnp.round(inverse_G[:, None] * scale_GB), -128, 127)
    by_B = (_half(d_G, unit_G)[:, None] * scales_GB).reshape(-1)
    q_NB = jnp.where(by_B != 0, jnp.clip(jnp.round(x_NB / jnp.where(by_B != 0, by_B, 1)), -32, 31), 0)
    q = (q_NB.T + 32).astype(jnp.uint8).reshape(count, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = ((q >> 4) << jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]).sum(2, dtype=jnp.uint8)
    scales = jax.lax.bitcast_convert_type(scales_GB.astype(jnp.int8), jnp.uint8)
    return jnp.concatenate([low.reshape(count, 128), high.reshape(count, 64), scales, _bytes(d_G)], axis=1)


def _symmetric(x_NB: jax.Array) -> jax.Array:
    """A scale [blocks] such that scale · q is near x, q in −32..31. A value weighs its square."""
    top_B, bottom_B = x_NB.max(0), x_NB.min(0)
    largest_B = jnp.where(top_B >= -bottom_B, top_B, bottom_B)  # with its sign: it gets −32, the farther end
    largest1_B = jnp.where(largest_B != 0, largest_B, 1)

    def attempt(steps: jax.Array | float) -> tuple[jax.Array, jax.Array]:
        """The least-squares scale, and how much of Σ w x² it explains."""
        q_NB = jnp.clip(jnp.round((-steps / largest1_B) * x_NB), -32, 31)
        wq_NB = x_NB**2 * q_NB
        sum_xq, sum_qq = (wq_NB * x_NB).sum(0), (wq_NB * q_NB).sum(0)
        scale_B = jnp.where(sum_qq > 0, sum_xq / jnp.where(sum_qq > 0, sum_qq, 1), 0)
        return scale_B, scale_B * sum_xq

    def better(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tried = attempt(32 + STEP * (i - SYMMETRIC))
        won = tried[1] > best[1]
        return jnp.where(won, tried[0], best[0]), jnp.where(won, tried[1], best[1])

    return jax.lax.fori_loop(0, 2 * SYMMETRIC + 1, better, attempt(32.0))[0]


def _bytes(d_G: jax.Array) -> jax.Array:
    """Its two bytes of each, [super-blocks, 2]."""
    return jax.lax.bitcast_convert_type(d_G, jnp.uint8)
