"""The head: both entries equal the naive head, values and gradients, in a fraction of its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

from lm import sharding
from lm.model import head

B, T, D, V, WORDS = 4, 16, 8, 64, 50  # a padded vocabulary


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of seven tokens, the last of them padded."""
    monkeypatch.setattr(head, '_chunks', lambda m, v: (-(-m // 7), 7))


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    h_BTD, w_VD = rng.standard_normal((B, T, D), np.float32), rng.standard_normal((V, D), np.float32)
    y_BT = rng.integers(0, WORDS, (B, T), dtype=np.int32)
    y_BT[0, :2] = 0, WORDS - 1
    weights_BT = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    cotangents = tuple(rng.standard_normal((B, T), np.float32) for _ in range(3))
    return h_BTD, w_VD, y_BT, weights_BT, cotangents


def naive_logits(h_BTD, w_VD, softcap):
    x_BTV = jnp.einsum('BTD,VD->BTV', h_BTD, w_VD)[..., :WORDS]
    return x_BTV if softcap is None else softcap * jnp.tanh(x_BTV / softcap)


def naive_logp(h_BTD, w_VD, y_BT, softcap):
    x_BTV = naive_logits(h_BTD, w_VD, softcap)
    logp_BTV = jax.nn.log_softmax(x_BTV)
    entropy_BT = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)
    at_target_BT = jnp.take_along_axis(logp_BTV, y_BT[..., None], axis=-1)[..., 0]
    return at_target_BT, jax.nn.logsumexp(x_BTV, axis=-1), entropy_BT


def naive_nll(h_BTD, w_VD, y_BT, weights_BT, z_coef, softcap):
    logp_BT, lse_BT, _ = naive_logp(h_BTD, w_VD, y_BT, softcap)
    best_BT = jnp.argmax(naive_logits(h_BTD, w_VD, softcap), axis=-1)
    parts = {'nll': -logp_BT, 'z': lse_BT**2, 'correct': best_BT == y_BT}
    parts = {name: jnp.sum(weights_BT * x_BT) for name, x_BT in parts.items()}
    return 3.0 * (parts['nll'] + z_coef * parts['z']), parts  # times 3: the incoming gradient counts


def ours_nll(dims, z_coef, softcap):
    def fn(h_BTD, w, y_BT, weights_BT):
        total, parts = head.nll(h_BTD, w, y_BT, weights_BT, dims=dims, vocab_size=WORDS, z_coef=z_coef, softcap=softcap)
        return 3.0 * total, parts

    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))


def ours_logp(dims, softcap):
    def fn(h_BTD, w, y_BT, cotangents):
        out, back = jax.vjp(lambda h, w: head.logp(h, w, y_BT, dims=dims, vocab_size=WORDS, softcap=softcap), h_BTD, w)
        return out, back(cotangents)

    return jax.jit(fn)


@functools.cache
def expected_nll(z_coef, softcap):
    h_BTD, w_VD, y_BT, weights_BT, _ = inputs()
    fn = jax.value_and_grad(naive_nll, argnums=(0, 1), has_aux=True)
    return jax.device_get(jax.jit(fn, static_argnums=(4, 5))(h_BTD, w_VD, y_BT, weights_BT, z_coef, softcap))


@functools.cache
def expected_logp(softcap):
    h_BTD, w_VD, y_BT, _, cotangents = inputs()
    fn = lambda h, w: jax.vjp(lambda h, w: naive_logp(h, w, y_BT, softcap), h, w)
    out, back = fn(h_BTD, w_VD)
    return jax.device_get((out, back(cotangents)))


CASES = [('VD', 0.0, None), ('VD', 0.3, 2.0), ('DV', 0.3, None)]


@pytest.mark.parametrize(('dims', 'z_coef', 'softcap'), CASES)
def test_nll_equals_the_naive_head(chunks, dims, z_coef, softcap):
    h_BTD, w_VD, y_BT, weights_BT, _ = inputs()
    w = jnp.asarray(w_VD if dims == 'VD' else w_VD.T)
    (value, parts), (dh, dw) = ours_nll(dims, z_coef, softcap)(h_BTD, w, y_BT, weights_BT)
    assert_close(((value, parts), (dh, dw if dims == 'VD' else dw.T)), expected_nll(z_coef, softcap))
    dw_VD = dw if dims == 'VD' else dw.T
    assert np.all(dw_VD[WORDS:] == 0)
    assert np.all(dh[weights_BT == 0] == 0)


@pytest.mark.parametrize(('dims', 'softcap'), [('VD', None), ('VD', 2.0), ('DV', None)])
def test_logp_equals_the_naive_head_for_any_cotangents(chunks, dims, softcap):
    h_BTD, w_VD, y_BT, _, cotangents = inputs()
    out, (dh, dw) = ours_logp(dims, softcap)(h_BTD, jnp.asarray(w_VD if dims == 'VD' else w_VD.T), y_BT, cotangents)
    assert_close((out, (dh, dw if dims == 'VD' else dw.T)), expected_logp(softcap))


@pytest.mark.parametrize('empty', [False, True])
def test_what_weighs_nothing_is_left_out(chunks, mesh, empty):
    """Both entries give what they give without leaving out, where something weighs, and no gradient elsewhere; parts of
    a batch on different devices may need different numbers of chunks, none included."""
    h_BTD, w_VD, y_BT, weights_BT, cotangents = inputs()
    weights_BT = weights_BT.copy()
    weights_BT[:2] = 0  # of half of the rows
    weights_BT[2:, 9:] *= not empty
    asked_BT = weights_BT > 0
    put = lambda d, x: jax.device_put(x, jax.NamedSharding(mesh, sharding.activation_spec(d, x.shape)))
    w_VD = jax.device_put(w_VD, jax.NamedSharding(mesh, sharding.array_spec('VD', w_VD.shape)))
    h_BTD, y_BT, weights_BT, g_BT = put('BTD', h_BTD), put('BT', y_BT), put('BT', weights_BT), put('BT', cotangents[0])
    options = {'vocab_size': WORDS, 'softcap': 2.0}

    def entries(h_BTD, w_VD, y_BT, weights_BT, g_BT, *, leave_out):
        def total(h, w):
            value, parts = head.nll(h, w, y_BT, weights_BT, z_coef=0.3, sparse=leave_out, **options)
            given = (weights_BT,) if leave_out else ()
            logp_BT, lse_BT, _ = head.logp(h, w, y_BT, *given, **options)
            of_logp_BT = jnp.where(weights_BT > 0, (logp_BT + 0.1 * lse_BT) * g_BT, 0)
            return value + jnp.sum(of_logp_BT), (parts, jnp.where(weights_BT > 0, logp_BT, 0))

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(h_BTD, w_VD)

    given = (h_BTD, w_VD, y_BT, weights_BT, g_BT)
    got, expected = (
        jax.device_get(jax.jit(functools.partial(entries, leave_out=leave_out))(*given)) for leave_out in (True, False)
    )
    assert_close(got, expected)
    assert np.all(got[1][0][~asked_BT] == 0) and np.any(got[1][0][asked_BT])


@pytest.mark.parametrize('dims', ['VD', 'DV'])
def test_both_entries_on_every_mesh(chunks, mesh, dims):
    """The vocabulary split over tensor where there is one, its padding on the last device; D over fsdp and seq."""
    if dims == 'DV' and mesh.shape['seq'] != 2:
        pytest.skip('the other layout is tried on the most mixed mesh')
    h_BTD, w_VD, y_BT, weights_BT, cotangents = inputs()
    w = w_VD if dims == 'VD' else w_VD.T
    put = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))
    h_BTD, w = put('BTD', h_BTD, sharding.activation_spec), put(dims, w, sharding.array_spec)
    y_BT, weights_BT, *cotangents = (put('BT', x, sharding.activation_spec) for x in (y_BT, weights_BT, *cotangents))

    def both(h_BTD, w, y_BT, weights_BT, cotangents):
        return ours_nll(dims, 0.3, 2.0)(h_BTD, w, y_BT, weights_BT), ours_logp(dims, 2.0)(h_BTD, w, y_BT, cotangents)

    (sums, (dh, dw)), (out, (dh2, dw2)) = jax.jit(both)(h_BTD, w, y_BT, weights_BT, tuple(cotangents))
    if dims == 'DV':
        dw, dw2 = np.asarray(dw).T, np.asarray(dw2).T
    assert_close((sums, (dh, dw)), expected_nll(0.3, 2.0))
    assert_close((out, (dh2, dw2)), expected_logp(2.0))


@pytest.mark.parametrize('mesh', ['one', 'fsdp2-seq2-tensor2', 'tensor4'], indirect=True)
@pytest.mark.parametrize('dims', ['VD', 'DV'])
def test_kl_equals_the_naive_heads(chunks, mesh, dims):
    """The reference's states and head have no gradient; places that weigh nothing are left out."""
    h_BTD, w_VD, _, weights_BT, cotangents = inputs()
    other_BTD, other_VD = h_BTD[::-1] * 0.5, w_VD[:, ::-1]
    turn = lambda w_VD: jnp.asarray(w_VD if dims == 'VD' else w_VD.T)

    def naive(h, w, q, v):
        p_BTV, q_BTV = (jax.nn.log_softmax(naive_logits(*x, 2.0)) for x in ((h, w), jax.lax.stop_gradient((q, v))))
        return jnp.sum(jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), -1) * weights_BT * cotangents[0])

    def ours(h, w, q, v, weights_BT, g_BT):
        found_BT = head.kl(h, w, q, v, weights_BT, dims=dims, vocab_size=WORDS, softcap=2.0)
        return jnp.sum(jnp.where(weights_BT > 0, found_BT * weights_BT * g_BT, 0))

    put = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))
    states = [put('BTD', x, sharding.activation_spec) for x in (h_BTD, other_BTD)]
    heads = [put(dims, turn(w), sharding.array_spec) for w in (w_VD, other_VD)]
    rows = [put('BT', x, sharding.activation_spec) for x in (weights_BT, cotangents[0])]
    given = (states[0], heads[0], states[1], heads[1], *rows)
    value, (dh, dw, dq, dv) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*given)
    wanted = jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))(h_BTD, w_VD, other_BTD, other_VD)
    assert_close((value, (dh, dw if dims == 'VD' else np.asarray(dw).T)), jax.device_get(wanted))
    assert not np.any(dq) and not np.any(dv)


def test_both_entries_agree_in_value_and_gradient(chunks):
    h_BTD, w_VD, y_BT, weights_BT, _ = inputs()

    def by_logp(h_BTD, w_VD):
        logp_BT, lse_BT, _ = head.logp(h_BTD, w_VD, y_BT, vocab_size=WORDS)
        return jnp.sum(weights_BT * (0.3 * lse_BT**2 - logp_BT))

    nll = lambda h, w: head.nll(h, w, y_BT, weights_BT, vocab_size=WORDS, z_coef=0.3)[0]
    first, second = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h_BTD, jnp.asarray(w_VD)) for f in (nll, by_logp))
    assert_close(first, jax.device_get(second), rtol=1e-6)


def test_chunks_that_weigh_nothing_are_not_even_read(chunks):
    """Two chunks' worth of places weigh something, spread over the batch; the others hold no numbers."""
    h_BTD, w_VD, y_BT, _, _ = inputs()
    weights_BT = np.zeros(B * T, np.float32)
    weights_BT[np.random.default_rng(1).permutation(B * T)[:14]] = 1
    weights_BT = weights_BT.reshape(B, T)
    h_BTD = np.where(weights_BT[..., None] > 0, h_BTD, np.nan)
    y_BT, weights_BT = jnp.asarray(y_BT), jnp.asarray(weights_BT)
    nll = lambda h, w: head.nll(h, w, y_BT, weights_BT, vocab_size=WORDS, sparse=True)[0]
    logp = lambda h, w: -jnp.sum(head.logp(h, w, y_BT, weights_BT, vocab_size=WORDS)[0] * weights_BT)
    first, second = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h_BTD, jnp.asarray(w_VD)) for f in (nll, logp))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((first, second)))
    assert_close(first, jax.device_get(second))


@pytest.mark.parametrize('mesh', ['one', 'fsdp2-seq2-tensor2'], indirect=True)
def test_nothing_that_counts_gives_zero(chunks, mesh):
    """Also where the hidden states of what does not count overflow the logits."""
    h_BTD, w_VD, y_BT, _, _ = inputs()
    value, grads = ours_nll('VD', 0.3, None)(h_BTD * 1e6, jnp.asarray(w_VD), y_BT, np.zeros((B, T), np.float32))
    assert all(np.all(x == 0) for x in jax.tree.leaves(jax.device_get((value, grads))))


@pytest.mark.parametrize('mesh', ['one', 'fsdp2-seq2-tensor2', 'tensor4'], indirect=True)
def test_logits_are_float32_of_the_real_words(mesh):
    h_BTD, w_VD, *_ = inputs()
    put = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))
    h, w = put('BTD', h_BTD, sharding.activation_spec), put('VD', w_VD, sharding.array_spec)
    x_BTV = jax.jit(lambda h, w: head.logits(h, w, vocab_size=WORDS, softcap=2.0))(h, w)
    np.testing.assert_allclose(x_BTV, naive_logits(h_BTD, w_VD, 2.0), atol=1e-5)
    # rounded once, as hidden states, and not again as logits
    h, w = h.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    x_BTV = head.logits(h, w, vocab_size=WORDS)
    assert x_BTV.dtype == jnp.float32
    exact = naive_logits(np.asarray(h, np.float32), np.asarray(w, np.float32), None)
    np.testing.assert_allclose(x_BTV, exact, atol=1e-4)


# ---- memory ----


def temporaries(fn, *args):
    """Bytes of temporaries of the compiled function: compiled, not run."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_at_most_a_quarter_of_the_naive_heads():
    """4096 tokens and 131,072 words, gradients included: for the naive head two or more arrays of 2 GiB."""
    tokens, dim, words = 4096, 64, 131_072
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    h, w, y = shape(1, tokens, dim), shape(words, dim), shape(1, tokens, dtype=jnp.int32)
    weights = shape(1, tokens)

    def naive(h, w, y, weights):
        x = jnp.einsum('BTD,VD->BTV', h, w)
        logp = jnp.take_along_axis(jax.nn.log_softmax(x), y[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * logp)

    def by_logp(h, w, y, weights):
        logp, lse, entropy = head.logp(h, w, y, vocab_size=words)
        return jnp.sum(weights * (logp + lse**2 + entropy))

    nll = lambda *args: head.nll(*args, vocab_size=words, z_coef=1e-4)[0]
    whole, *ours = (temporaries(jax.value_and_grad(f, argnums=(0, 1)), h, w, y, weights) for f in (naive, nll, by_logp))
    assert whole >= 4 * tokens * words, 'the naive head holds its logits'
    assert max(ours) <= whole / 4, (ours, whole)
