"""The losses of SFT, reward models and preference optimisation, against the numbers that TRL and transformers gave for
the same weights and token ids (tests/golden/make_preference.py, which says where TRL's conventions differ)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_llama import GOLDEN, arrays, model

from lm.losses import preference, reward
from lm.losses.objective import objective
from lm.losses.preference import Pairs, Response
from lm.model import head, transformer

SETTINGS = GOLDEN['settings']
T = 16  # ids are padded to it: one compiled function for all batches
close = functools.partial(pytest.approx, rel=1e-5)


def padded(rows):
    rows = np.asarray(rows)
    return np.pad(rows, ((0, 0), (0, T - rows.shape[1])))


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, ids_BT, cotangent_BT, weights_BT):
    """(log p of each token but the first, weighted sum of their NLL, norm of the parameters' gradient of that sum plus
    that of cotangent·log p): both heads in one compiled function."""

    def total(params):
        h_BTD, _ = transformer.forward(params, cfg, ids_BT[:, :-1])
        w, dims = transformer.head_weight(params, cfg)
        logp_BT, _, _ = head.logp(h_BTD, w, ids_BT[:, 1:], dims=dims, vocab_size=cfg.vocab_size)
        nll, _ = transformer.nll(params, cfg, h_BTD, ids_BT[:, 1:], weights_BT, z_coef=0.0)
        return jnp.sum(cotangent_BT * logp_BT) + nll, (logp_BT, nll)

    (_, (logp_BT, nll)), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return logp_BT, nll, optax.tree.norm(gradient)


ZEROS_BT = np.zeros((len(GOLDEN['pairs']['batch']['input_ids']), T - 1), np.float32)


def token_logp(name, ids_BT):
    return run(*model(name), ids_BT, ZEROS_BT, ZEROS_BT)[0]


def measured(loss, name, ids_BT):
    """(value, norm of the gradient in the model's parameters) of a function of the tokens' log-probs."""
    value, cotangent_BT = jax.value_and_grad(loss)(token_logp(name, ids_BT))
    return float(value), float(run(*model(name), ids_BT, cotangent_BT, ZEROS_BT)[2])


PAIRS = GOLDEN['pairs']['batch']
IDS_BT, MASK_BT = padded(PAIRS['input_ids']), padded(PAIRS['completion_mask'])[:, 1:]
REAL_BT = padded(PAIRS['attention_mask'])[:, 1:]
LENGTH_B = MASK_BT.sum(1)
COUNT = len(LENGTH_B) // 2  # the chosen ones first


def summed(name, ids_BT=IDS_BT, mask_BT=MASK_BT):
    return np.asarray(jnp.sum(token_logp(name, ids_BT) * mask_BT, axis=1))


def settings(name):
    return preference.settle(name, {key: SETTINGS[key] for key in preference.LOSSES[name].settings})


def pair_loss(name, reference='reference', **more):
    """The objective of a loss as a function of the tokens' log-probs."""
    reference_B = summed(reference) if preference.LOSSES[name].reference else None
    weight = np.ones(COUNT, np.float32)

    def side(part, logp_B):
        return Response(logp_B[part], LENGTH_B[part], None if reference_B is None else reference_B[part])

    def loss(logp_BT):
        logp_B = jnp.sum(logp_BT * MASK_BT, axis=1)
        pairs = Pairs(side(slice(COUNT), logp_B), side(slice(COUNT, None), logp_B))
        terms, _ = preference.sums(name, pairs, weight, settings=settings(name), **more)
        weights = preference.weights(name, weight, LENGTH_B[:COUNT], LENGTH_B[COUNT:])
        return objective(terms, weights, preference.coefficients(name))

    return loss


@pytest.mark.parametrize('name', ['policy', 'reference'], ids=['untied', 'tied'])
def test_log_probs_of_responses_are_those_of_transformers(name):
    assert list(summed(name)) == close(GOLDEN['pairs']['logp'][name])


@pytest.mark.parametrize('name', ['dpo', 'ipo', 'robust', 'simpo'])
def test_losses_of_pairs_and_their_gradients_are_those_of_trl(name):
    expected = GOLDEN['losses'][name]
    assert measured(pair_loss(name), 'policy', IDS_BT) == (close(expected['loss']), close(expected['grad_norm']))


def test_cdpo_has_the_formula_of_trl():
    loss = pair_loss('cdpo')(token_logp('policy', IDS_BT))
    assert float(loss) == close(GOLDEN['losses']['cdpo']['loss'])
    assert float(loss) != pytest.approx(GOLDEN['losses']['robust']['loss'], rel=1e-2), 'they are different formulas'


def test_orpo_is_trls_odds_and_an_nll_of_the_response():
    """And with TRL's NLL, which is of the prompt too, the whole is TRL's, gradient included."""
    expected, whole = GOLDEN['losses']['orpo'], pair_loss('orpo')
    chosen = np.arange(len(IDS_BT)) < COUNT
    nll = lambda logp_BT, mask_BT: -jnp.sum(logp_BT * mask_BT * chosen[:, None]) / mask_BT[chosen].sum()
    response, text = (functools.partial(nll, mask_BT=mask) for mask in (MASK_BT, REAL_BT))
    logp_BT = token_logp('policy', IDS_BT)
    assert float(whole(logp_BT)) == close(expected['odds'] + GOLDEN['losses']['nll']['loss'])
    assert float(text(logp_BT)) == close(expected['nll'])
    as_theirs = lambda logp_BT: whole(logp_BT) - response(logp_BT) + text(logp_BT)
    assert measured(as_theirs, 'policy', IDS_BT) == (close(expected['loss']), close(expected['grad_norm']))


@pytest.mark.parametrize(('name', 'policy', 'reference'), [
    ('kto', 'policy', 'reference'), ('kto_turned', 'reference', 'policy'),
])  # fmt: skip
def test_kto_its_baseline_and_its_gradient_are_those_of_trl(name, policy, reference):
    """One has a baseline above 0, the other one that is clamped."""
    expected, batch = GOLDEN['losses'][name], GOLDEN['examples']['batch']
    kl = [padded(batch[key]) for key in ('KL_input_ids', 'KL_completion_mask')]
    kl_logp = {model: summed(model, kl[0], kl[1][:, 1:]) for model in (policy, reference)}
    mismatched = Response(kl_logp[policy], kl[1].sum(1), kl_logp[reference])
    z0 = preference.baseline(preference.baseline_sums(mismatched, np.ones(2 * COUNT, np.float32)))
    assert float(z0) == close(expected['z0'], abs=1e-5) and (expected['z0'] > 0) == (name == 'kto_turned')
    assert batch['label'] == [True] * COUNT + [False] * COUNT
    np.testing.assert_array_equal(padded(batch['input_ids']), IDS_BT)
    found = measured(pair_loss('kto', reference, z0=z0), policy, IDS_BT)
    assert found == (close(expected['loss']), close(expected['grad_norm']))


def test_sft_loss_and_gradient_are_those_of_trl_and_transformers():
    """Assistant tokens alone, of ragged conversations."""
    batch, rows = GOLDEN['sft']['batch'], ((0, len(ZEROS_BT) - len(GOLDEN['sft']['batch']['labels'])), (0, 0))
    ids_BT = np.pad(padded(batch['input_ids']), rows)
    weights_BT = np.pad(padded(np.asarray(batch['labels']) != -100)[:, 1:], rows)
    _, loss, norm = run(*model('policy'), ids_BT, ZEROS_BT, np.float32(weights_BT / weights_BT.sum()))
    assert [float(loss)] * 2 == close([GOLDEN['sft']['trl']['loss'], GOLDEN['sft']['transformers']])
    assert float(norm) == close(GOLDEN['sft']['trl']['grad_norm'])


def test_reward_loss_scores_and_gradient_are_those_of_trl():
    """A scalar head that reads the last real token, with margins and centring."""
    batch, (cfg, params) = GOLDEN['reward']['batch'], model('policy')
    ids_BT, last_B = padded(batch['input_ids']), np.sum(batch['attention_mask'], axis=1) - 1
    margin, weight = np.asarray(batch['margin'], np.float32), np.ones(COUNT, np.float32)

    def loss(trainable):
        h_BTD, _ = transformer.forward(trainable['body'], cfg, ids_BT)
        score_B = h_BTD[np.arange(len(last_B)), last_B] @ trainable['score_D']
        terms, metrics = reward.sums(score_B[:COUNT], score_B[COUNT:], weight, margin=margin)
        coefs = {'bradley_terry': 1.0, 'centring': SETTINGS['centring']}
        return objective(terms, reward.weights(weight), coefs), (score_B, metrics)

    trainable = {'body': params, 'score_D': jnp.asarray(arrays()['score_D'])}
    (value, (score_B, metrics)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)
    assert list(np.asarray(score_B)) == close(GOLDEN['reward']['scores'], abs=1e-6)
    assert float(value) == close(GOLDEN['reward']['trl']['loss'])
    assert float(optax.tree.norm(gradient)) == close(GOLDEN['reward']['trl']['grad_norm'])
    assert float(metrics['accuracy']) / COUNT == close(GOLDEN['reward']['accuracy'])
