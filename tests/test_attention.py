"""Attention: every form of it equals the dense twin, values and gradients."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_twin import assert_same, jitted

from lm import sharding
from lm.model.attention import INVALID, CachePositions, attention, cached_attention, dense_attention

B, H = 4, 4


def inputs(T, *, N=4, K=2, seed=0):
    """Queries, keys, values and a cotangent; logits large enough for the soft-cap to matter."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    return [2 * rng.standard_normal(s, np.float32) for s in shapes]


def segments(T, seed=0):
    begins_BT = np.random.default_rng(seed).random((B, T)) < 0.15
    return np.cumsum(begins_BT, axis=1, dtype=np.int32)


CASES = [
    # T, queries a block, N, K, window, softcap, segments
    (13, 4, 4, 2, None, None, False),
    (16, 4, 4, 1, None, None, True),
    (13, 4, 4, 4, 3, None, True),
    (13, 4, 6, 2, 6, 1.5, False),
    (7, 16, 4, 2, 1, 1.5, True),
    (9, 4, 4, 2, 50, None, False),
]


@pytest.mark.parametrize(('T', 'block', 'N', 'K', 'window', 'softcap', 'packed'), CASES)
def test_blocks_equal_the_dense_twin(set_block, T, block, N, K, window, softcap, packed):
    set_block(block)
    args = inputs(T, N=N, K=K)
    static = {'window': window, 'softcap': softcap}
    arrays = {'segments_BT': segments(T)} if packed else {}
    assert_same(
        jitted(attention, *args, static=static, **arrays), jitted(dense_attention, *args, static=static, **arrays)
    )


def test_the_twin_is_attention_written_out():
    """One query at a time in NumPy: what each case above rests on."""
    T, N, K, window, softcap = 7, 4, 2, 3, 1.5
    q, k, v, _ = (np.asarray(x, np.float64) for x in inputs(T, N=N, K=K))
    segments_BT = segments(T)
    expected = np.zeros((B, T, N, H))
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        scores = softcap * np.tanh(k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H) / softcap)
        expected[b, t, n] = np.exp(scores) @ v[b, seen, n // (N // K)] / np.exp(scores).sum()
    got = dense_attention(*inputs(T, N=N, K=K)[:3], segments_BT=segments_BT, window=window, softcap=softcap)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def cached(q, k, v, *, K=2, slots=11, seed=0):
    """Arguments of `cached_attention`: new queries, keys and values after a cache filled to another length per row.

    The keys that each row has lie anywhere among its slots, in no order; the last three slots are free.
    """
    rng = np.random.default_rng(seed)
    length_B, T = np.array([0, 7, 3, 5], np.int32), q.shape[1]
    position_BS = np.full((B, slots), INVALID, np.int32)
    for b, n in enumerate(length_B):
        position_BS[b, rng.permutation(slots - 3)[:n]] = rng.permutation(n)
    k_BKSH, v_BKSH = (rng.standard_normal((B, K, slots, H), np.float32) for _ in range(2))
    query_BT = length_B[:, None] + np.arange(T, dtype=np.int32)
    return q, k, v, k_BKSH, v_BKSH, CachePositions(query_BT, query_BT, position_BS, np.int32(slots - 3))


def in_order(row, k_BTKH, v_BTKH, k_BKSH, v_BKSH, positions):
    """(keys, values) [1, S, K, H] of one row as they stand in its text."""
    position_S = positions.cached_BS[row]
    order = np.argsort(position_S)[: np.sum(position_S != INVALID)]
    both = ((k_BKSH, k_BTKH), (v_BKSH, v_BTKH))
    return [np.concatenate([old[row][:, order].swapaxes(0, 1), new[row]])[None] for old, new in both]


@pytest.mark.parametrize(('window', 'softcap'), [(None, None), (4, 1.5)])
def test_a_cache_gives_what_the_whole_text_gives(window, softcap):
    q, *new = inputs(3)[:3]
    args = cached(q, *new)
    options = {'window': window, 'softcap': softcap}
    out, k_BKSH, v_BKSH = jax.jit(partial(cached_attention, **options))(*args)
    for row in range(B):
        k, v = in_order(row, *args[1:])
        positions_BT = args[-1].query_BT[row : row + 1]
        expected = dense_attention(q[row : row + 1], k, v, positions_BT=positions_BT, **options)
        np.testing.assert_allclose(out[row : row + 1], expected, atol=1e-5)
    for after, before, x in ((k_BKSH, args[3], new[0]), (v_BKSH, args[4], new[1])):
        np.testing.assert_array_equal(after[:, :, 8:], x.swapaxes(1, 2))
        np.testing.assert_array_equal(after[:, :, :8], before[:, :, :8])


def test_every_mesh_gives_the_same(mesh, set_block):
    """Segments, a window that crosses the devices' parts of the sequence, kv heads that do and do not divide."""
    set_block(4)
    T, K = 16, 1 if mesh.shape['tensor'] == 4 or mesh.shape['seq'] == 2 else 2
    args, static, segments_BT = inputs(T, K=K), {'window': 7, 'softcap': None}, segments(T)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = jitted(dense_attention, *args, static=static, segments_BT=segments_BT)
    put = lambda dims, x: jax.device_put(
        np.asarray(x), jax.NamedSharding(mesh, sharding.activation_spec(dims, x.shape))
    )
    placed = [put(dims, x) for dims, x in zip(('BTNH', 'BTKH', 'BTKH', 'BTNH'), args, strict=True)]
    assert_same(jitted(attention, *placed, static=static, segments_BT=put('BT', segments_BT)), expected)


@pytest.mark.parametrize('mesh', ['data2-fsdp2-tensor2', 'tensor4', 'seq4-tensor2'], indirect=True)
def test_a_cache_under_a_mesh(mesh):
    args = cached(*inputs(4, K=1)[:3], K=1)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = jax.device_get(jax.jit(cached_attention)(*args))
    put = lambda dims, x: jax.device_put(x, jax.NamedSharding(mesh, sharding.activation_spec(dims, x.shape)))
    placed = [put(d, x) for d, x in zip(('BTNH', 'BTKH', 'BTKH', 'BKSH', 'BKSH'), args[:5], strict=True)]
    positions = CachePositions(*(put(d, x) for d, x in zip(('BT', 'BT', 'BS', ''), args[5], strict=True)))
    assert_same(jax.device_get(jax.jit(cached_attention)(*placed, positions)), expected)


def test_a_query_that_sees_no_key_is_finite():
    """Padding of a ragged batch, before anything is in the cache, must not poison its row."""
    *args, positions = cached(*inputs(2)[:3])
    nothing = positions._replace(
        new_BT=np.full_like(positions.new_BT, INVALID), cached_BS=np.full_like(positions.cached_BS, INVALID)
    )
    assert np.all(np.isfinite(cached_attention(*args, nothing)[0]))


def test_the_softmax_is_float32():
    """bfloat16 inputs are as near to the float32 result as their own rounding, for keys that nearly tie."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(64, N=2, K=1))
    exact = dense_attention(*(x.astype(jnp.float32) for x in (q, k * 0.01, v)))
    got = attention(q, k * jnp.bfloat16(0.01), v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)
