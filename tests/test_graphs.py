"""The graph of each family of models against the same written out plainly, from their definitions: numpy, one head and
one query at a time, nothing shared with `lm.model`. And that no reader of the head forgets what stands before it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import BASE, FAMILIES, TOKENS, made

from lm.evals import heldout, likelihood
from lm.model import sequences, transformer
from lm.training.kinds import leaves_of

# Settings in which the real models differ more than the families of `test_families` do.
MORE = {
    'everything': {
        'norms': 'both', 'norm_plus_one': True, 'qk_norm': True, 'qk_norm_joint': True, 'qkv_bias': True, 'window': 3,
        'pattern': 'nope,local,global', 'rope_theta_local': 30.0, 'rope_scaling': 'linear,factor=2', 'tied': False,
        'embed_scale': 2.0, 'residual_scale': 0.5, 'logit_scale': 0.3, 'logit_softcap': 2.0, 'attn_softcap': 4.0,
    },
}  # fmt: skip


def norm(x, weight, cfg):
    scale = weight + 1 if cfg.norm_plus_one else weight
    return x / math.sqrt(np.mean(x**2) + cfg.norm_eps) * scale


def frequencies(cfg, kind):
    """Radians a token of each pair of a head's halves; llama3's by wavelengths, as Llama 3.1's code has it."""
    theta = cfg.rope_theta_local if kind == 'local' and cfg.rope_theta_local else cfg.rope_theta
    found = [theta ** (-2 * i / cfg.head_dim) for i in range(cfg.head_dim // 2)]
    if not cfg.rope_scaling or (kind == 'local' and cfg.pattern):
        return np.array(found)
    name, *pairs = cfg.rope_scaling.split(',')
    s = {key: float(value) for key, value in (pair.split('=') for pair in pairs)}
    if name == 'linear':
        return np.array(found) / s['factor']

    def slowed(f):
        wavelength = 2 * math.pi / f
        if wavelength < s['original'] / s['high']:
            return f
        if wavelength > s['original'] / s['low']:
            return f / s['factor']
        smooth = (s['original'] / wavelength - s['low']) / (s['high'] - s['low'])
        return (1 - smooth) * f / s['factor'] + smooth * f

    return np.array([slowed(f) for f in found])


def turned(x_H, position, frequency):
    half = len(x_H) // 2
    z = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * position * frequency)
    return np.concatenate([z.real, z.imag])


def heads_of(y_D, w, cfg, kind, position):
    """(queries [N, H], keys [K, H], values [K, H]) of one token."""
    q, k, v = (np.tensordot(y_D, w[name], 1) for name in ('wq_DNH', 'wk_DKH', 'wv_DKH'))
    if cfg.qkv_bias:
        q, k, v = q + w['bias_q_NH'], k + w['bias_k_KH'], v + w['bias_v_KH']
    if cfg.qk_norm and cfg.qk_norm_joint:
        q, k = norm(q, w['q_norm_NH'], cfg), norm(k, w['k_norm_KH'], cfg)
    elif cfg.qk_norm:
        q, k = (np.stack([norm(x, w[name], cfg) for x in xs]) for xs, name in ((q, 'q_norm_H'), (k, 'k_norm_H')))
    if kind != 'nope':
        q, k = (np.stack([turned(x, position, frequencies(cfg, kind)) for x in xs]) for xs in (q, k))
    return q, k, v


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def attention(y_TD, w, cfg, kind):
    q, k, v = (np.stack(x) for x in zip(*(heads_of(y, w, cfg, kind, t) for t, y in enumerate(y_TD)), strict=True))
    scale = cfg.query_scale if cfg.query_scale is not None else 1 / math.sqrt(cfg.head_dim)
    out = np.zeros(y_TD.shape)
    for t in range(len(y_TD)):
        first = max(0, t - cfg.window + 1) if kind == 'local' else 0
        for n in range(cfg.heads):
            own = n // (cfg.heads // cfg.kv_heads)
            p = np.exp(capped(k[first : t + 1, own] @ q[t, n] * scale, cfg.attn_softcap))
            out[t] += (p / p.sum()) @ v[first : t + 1, own] @ w['wo_NHD'][n]
    return out


def feed_forward(y_TD, w, cfg):
    gate = y_TD @ w['w_gate_DF']
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gate = gate / (1 + np.exp(-gate)) if cfg.activation == 'silu' else gate * (1 + np.tanh(inner)) / 2
    return gate * (y_TD @ w['w_up_DF']) @ w['w_down_FD']


def plain_logits(params, cfg, tokens_T):
    """[T, vocab_size] of one row, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    words = (cfg.pattern or ('local' if cfg.window else 'global')).split(',')
    rows = lambda x_TD, weight: np.stack([norm(x, weight, cfg) for x in x_TD])
    x_TD = params['embed_VD'][tokens_T] * (cfg.embed_scale or 1)
    for i in range(cfg.layers):
        w, kind = {name: x[i] for name, x in params['layers'].items()}, words[i % len(words)]
        for part in ('attn', 'mlp'):
            y_TD = x_TD if cfg.norms == 'post' else rows(x_TD, w[f'{part}_norm_D'])
            y_TD = attention(y_TD, w, cfg, kind) if part == 'attn' else feed_forward(y_TD, w, cfg)
            y_TD = y_TD if cfg.norms == 'pre' else rows(y_TD, w[f'{part}_post_norm_D'])
            x_TD = x_TD + y_TD * (cfg.residual_scale or 1)
    table_DV = params['embed_VD'].T if cfg.tied else params['head_DV']
    x_TV = rows(x_TD, params['final_norm_D']) @ table_DV[:, : cfg.vocab_size] * (cfg.logit_scale or 1)
    return capped(x_TV, cfg.logit_softcap)


@pytest.mark.parametrize('family', [*FAMILIES, *MORE])
def test_a_familys_graph_is_its_definition(family):
    cfg = dataclasses.replace(BASE, **(FAMILIES | MORE)[family], layers=4)
    params, tokens_T = made(cfg), TOKENS[0, :10]
    forward = jax.jit(lambda p: transformer.logits(p, cfg, transformer.forward(p, cfg, tokens_T[None])))
    wanted = plain_logits(params, cfg, tokens_T)
    np.testing.assert_allclose(forward(params)[0], wanted, atol=1e-5 * np.max(np.abs(wanted)), rtol=0)


def test_no_reader_of_the_head_forgets_the_scale_of_logits(one_device):
    """Each of them against log-softmax of the plain logits."""
    cfg = dataclasses.replace(BASE, **FAMILIES['granite'], layers=1)
    params, T = made(cfg), TOKENS.shape[1]
    ids_T, targets_T = TOKENS[0], TOKENS[1]
    x_TV = plain_logits(params, cfg, ids_T)
    logp_T = np.array([x[y] - np.log(np.sum(np.exp(x))) for x, y in zip(x_TV, targets_T, strict=True)])
    row = {
        'tokens_BT': ids_T[None], 'targets_BT': targets_T[None], 'weights_BT': np.ones((1, T), np.float32),
        'segments_BT': np.ones((1, T), np.int32), 'positions_BT': np.arange(T)[None],
    }  # fmt: skip
    totals = heldout.sums(params, cfg, [row], np.ones(cfg.vocab_size, np.int64))
    assert totals['nll'] == pytest.approx(-logp_T.sum(), rel=1e-5)
    pair = row | {
        'sequence_BT': np.zeros((1, T), np.int32),
        'weight_BP': np.ones((1, 1)),
        'length_chosen_BP': np.full((1, 1), T),
    }
    assert jax.jit(sequences.log_probs, static_argnums=1)(params, cfg, pair)[0][0, 0] == pytest.approx(
        logp_T.sum(), rel=1e-5
    )
    h_BTD = jax.jit(transformer.forward, static_argnums=1)(params, cfg, row['tokens_BT'])
    nll = jax.jit(transformer.nll, static_argnums=1, static_argnames='z_coef')
    _, parts = nll(params, cfg, h_BTD, row['targets_BT'], row['weights_BT'], z_coef=0.0)
    assert parts['nll'] == pytest.approx(-logp_T.sum(), rel=1e-5)
    text, last = [*ids_T.tolist()], np.array(x_TV[-1])
    request = likelihood.Request(text, [int(np.argmax(last))])
    ((logp, greedy),) = likelihood.log_likelihoods(params, cfg, [request], length=64)
    assert greedy and logp == pytest.approx(last.max() - np.log(np.sum(np.exp(last))), rel=1e-5)


def test_a_reward_is_read_before_the_scale_of_logits():
    plain = dataclasses.replace(BASE, layers=1)
    forward = jax.jit(transformer.forward, static_argnums=1)
    params = made(plain) | sequences.init_scores(jax.random.key(2), plain)
    scores = [
        sequences.token_scores(params, forward(params, cfg, TOKENS))
        for cfg in (plain, dataclasses.replace(plain, logit_scale=0.25))
    ]
    np.testing.assert_array_equal(*scores)


def test_norms_and_biases_do_not_decay_and_are_no_matrices():
    cfg = dataclasses.replace(BASE, **MORE['everything'])
    kinds = {leaf.name: leaf.kind for leaf in leaves_of(transformer.init(jax.random.key(0), cfg))}
    small = {name for name in kinds if 'norm' in name or name.startswith('bias_')}
    assert len(small) == 4 + 2 + 3 + 1  # both norms, queries' and keys', biases, the last
    assert all(kinds[name] == (False, False) for name in small)
    assert all(kinds[name].matrix for name in kinds if name.startswith('w'))


def test_norms_start_at_a_factor_of_one_and_biases_at_none():
    for plus_one in (False, True):
        cfg = dataclasses.replace(BASE, **MORE['everything'] | {'norm_plus_one': plus_one})
        params = transformer.init(jax.random.key(0), cfg)
        for name, x in (params['layers'] | {'final_norm_D': params['final_norm_D']}).items():
            if 'norm' in name:
                assert np.all(x == (0 if plus_one else 1)), name
            if name.startswith('bias'):
                assert np.all(x == 0), name


def test_a_token_sees_what_the_kinds_of_layer_let_it():
    """Two layers: a local one of 3 tokens, then another, reach 4 tokens back; a global one after it reaches all."""
    tokens_T = np.random.default_rng(0).permutation(BASE.vocab_size)[:16]

    def seen(pattern):
        cfg = dataclasses.replace(BASE, layers=2, pattern=pattern, window=3, scan=True)
        params = made(cfg)
        r_TD = jax.random.normal(jax.random.key(3), (16, cfg.dim))
        project = lambda e: jnp.sum(transformer.forward({**params, 'embed_VD': e}, cfg, tokens_T[None])[0] * r_TD, 1)
        slope_TVD = jax.jit(jax.jacrev(project))(params['embed_VD'])
        return np.max(np.abs(slope_TVD[:, tokens_T]), -1) != 0

    behind = np.arange(16)[:, None] - np.arange(16)
    np.testing.assert_array_equal(seen('local'), (behind >= 0) & (behind <= 4))
    np.testing.assert_array_equal(seen('local,global'), behind >= 0)
