"""The graph of each family of models against the plain decoder. And that no reader of the head forgets what stands
before it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_decoder
import pytest
from families import BASE, FAMILIES, TOKENS, made

from lm.evals import heldout, likelihood
from lm.model import parameters, sequences, transformer
from lm.training.param_groups import infos_of

# Settings in which the real models differ more than the families of `test_families` do.
MORE = {
    'everything': {
        'norms': 'both', 'norm_plus_one': True, 'qk_norm': True, 'qk_norm_joint': True, 'qkv_bias': True, 'window': 3,
        'pattern': 'nope,local,global', 'rope_theta_local': 30.0, 'rope_scaling': 'linear,factor=2', 'tied': False,
        'embed_scale': 2.0, 'residual_scale': 0.5, 'logit_scale': 0.3, 'logit_softcap': 2.0, 'attn_softcap': 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize('family', [*FAMILIES, *MORE])
def test_a_familys_graph_is_its_definition(family):
    cfg = dataclasses.replace(BASE, **{'layers': 4, **(FAMILIES | MORE)[family]})
    params, tokens_T = made(cfg), TOKENS[0, :10]
    forward = jax.jit(lambda p: transformer.logits(p, cfg, transformer.forward(p, cfg, tokens_T[None])[0]))
    wanted = plain_decoder.logits(params, cfg, tokens_T)
    np.testing.assert_allclose(forward(params)[0], wanted, atol=1e-5 * np.max(np.abs(wanted)), rtol=0)


def test_no_reader_of_the_head_forgets_the_scale_of_logits(one_device):
    """Each of them against log-softmax of the plain logits."""
    cfg = dataclasses.replace(BASE, **FAMILIES['granite'], layers=1)
    params, T = made(cfg), TOKENS.shape[1]
    ids_T, targets_T = TOKENS[0], TOKENS[1]
    x_TV = plain_decoder.logits(params, cfg, ids_T)
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
    h_BTD, _ = jax.jit(transformer.forward, static_argnums=1)(params, cfg, row['tokens_BT'])
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
    params = made(plain) | parameters.init_scores(jax.random.key(2), plain)
    scores = [
        sequences.token_scores(params, forward(params, cfg, TOKENS)[0])
        for cfg in (plain, dataclasses.replace(plain, logit_scale=0.25))
    ]
    np.testing.assert_array_equal(*scores)


def test_norms_and_biases_do_not_decay_and_are_no_matrices():
    cfg = dataclasses.replace(BASE, **MORE['everything'])
    infos = {info.name: info for info in infos_of(parameters.init(jax.random.key(0), cfg))}
    small = {name for name in infos if 'norm' in name or name.startswith('bias_')}
    assert len(small) == 4 + 2 + 3 + 1  # both norms, queries' and keys', biases, the last
    assert not any(infos[name].decays or infos[name].matrix for name in small)
    assert all(infos[name].matrix for name in infos if name.startswith('w'))


def test_norms_start_at_a_factor_of_one_and_biases_at_none():
    for plus_one in (False, True):
        cfg = dataclasses.replace(BASE, **MORE['everything'] | {'norm_plus_one': plus_one})
        params = parameters.init(jax.random.key(0), cfg)
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
        project = lambda e: jnp.sum(transformer.forward({**params, 'embed_VD': e}, cfg, tokens_T[None])[0][0] * r_TD, 1)
        slope_TVD = jax.jit(jax.jacrev(project))(params['embed_VD'])
        return np.max(np.abs(slope_TVD[:, tokens_T]), -1) != 0

    behind = np.arange(16)[:, None] - np.arange(16)
    np.testing.assert_array_equal(seen('local'), (behind >= 0) & (behind <= 4))
    np.testing.assert_array_equal(seen('local,global'), behind >= 0)
