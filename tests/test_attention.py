"""Attention: every form of it equals the dense twin, values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.model.attention import attention, dense_attention

B, H = 4, 4


def inputs(T, *, S=None, N=4, K=2, seed=0):
    """Queries, keys, values and a cotangent; logits large enough for the soft-cap to matter."""
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [2 * rng.standard_normal(s, np.float32) for s in shapes]


def segments(T, seed=0):
    begins_BT = np.random.default_rng(seed).random((B, T)) < 0.15
    return np.cumsum(begins_BT, axis=1, dtype=np.int32)


def both(fn, q, k, v, g, **options):
    """(the output, the gradients for cotangent g)."""
    out, back = jax.vjp(lambda q, k, v: fn(q, k, v, **options), q, k, v)
    return out, back(g)


def jitted(fn, *args, static, **arrays):
    return jax.device_get(jax.jit(lambda args, arrays: both(fn, *args, **arrays, **static))(args, arrays))


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)), rtol=0), got, expected)


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


@pytest.mark.parametrize('window', [None, 4])
def test_positions_say_how_much_of_a_cache_each_row_sees(window):
    args = inputs(3, S=11)
    positions_BT = np.array([[0, 1, 2], [5, 6, 7], [8, 9, 10], [2, 3, 4]], np.int32)
    static = {'window': window, 'softcap': None}
    got = jitted(attention, *args, static=static, positions_BT=positions_BT)
    assert_same(got, jitted(dense_attention, *args, static=static, positions_BT=positions_BT))
    q, k, v, _ = args
    alone = attention(q[1:2], k[1:2, :8], v[1:2, :8], positions_BT=positions_BT[1:2], window=window)
    np.testing.assert_allclose(got[0][1:2], alone, atol=1e-6)


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
    args, positions_BT = inputs(4, S=11, K=1), np.arange(4, dtype=np.int32) + np.array([[0], [7], [3], [5]], np.int32)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = jitted(dense_attention, *args, static={}, positions_BT=positions_BT)
    put = lambda dims, x: jax.device_put(
        np.asarray(x), jax.NamedSharding(mesh, sharding.activation_spec(dims, x.shape))
    )
    placed = [put(dims, x) for dims, x in zip(('BTNH', 'BSKH', 'BSKH', 'BTNH'), args, strict=True)]
    assert_same(jitted(attention, *placed, static={}, positions_BT=put('BT', positions_BT)), expected)


def test_a_row_that_sees_no_key_is_finite():
    """A query behind the cache's start (padding of a ragged batch) must not poison its row."""
    q, k, v, g = inputs(2, S=3)
    positions_BT = np.full((B, 2), -1, np.int32)
    out, grads = both(attention, q, k, v, g, positions_BT=positions_BT)
    assert all(np.all(np.isfinite(x)) for x in (out, *grads))


def test_the_softmax_is_float32():
    """bfloat16 inputs are as near to the float32 result as their own rounding, for keys that nearly tie."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(64, N=2, K=1))
    exact = dense_attention(*(x.astype(jnp.float32) for x in (q, k * 0.01, v)))
    got = attention(q, k * jnp.bfloat16(0.01), v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)
