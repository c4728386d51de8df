"""The losses of preference optimisation and of reward models: what holds of each whatever the model."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import sharding
from lm.losses import preference, reward
from lm.losses.objective import objective
from lm.losses.preference import LOSSES, Pairs, Response
from lm.training import step as training

LN2 = np.float32(math.log(2))
SETTINGS = {'beta': 0.3, 'label_smoothing': 0.1, 'margin': 0.7, 'lambda_d': 1.0, 'lambda_u': 1.5}
EXTREMES = (-1e4, -1.0, 0.0, 1e4)
JUNK = (0.0, math.nan, math.inf, 1e30)


def settings(name, **change):
    own = LOSSES[name].settings
    return preference.settle(name, {k: v for k, v in (SETTINGS | change).items() if k in own})


def make_pairs(n=64, seed=0, *, label=None):
    """Log-probs of about −2 a token, and labels of all kinds."""
    rng = np.random.default_rng(seed)

    def response():
        length = rng.integers(1, 20, n).astype(np.float32)
        return Response(*(jnp.float32(x) for x in (-length * rng.exponential(2.0, n), length, -2 * length)))

    soft = rng.choice([0.0, 0.3, 0.5, 1.0], n)
    return Pairs(response(), response(), jnp.asarray(soft if label is None else np.full(n, label), jnp.float32))


def loss_of(name, pairs, *, z0=0.4, **change):
    given = {'z0': jnp.float32(z0)} if LOSSES[name].baseline else {}
    return LOSSES[name].loss(pairs, **settings(name, **change), **given)


def turned(pairs):
    return Pairs(pairs.rejected, pairs.chosen, 1 - pairs.label)


# ---- what the losses say ----


@pytest.mark.parametrize('name', ['dpo', 'cdpo', 'robust'])
def test_a_policy_that_is_its_reference_has_a_loss_of_ln_2(name):
    pairs = make_pairs(label=1.0)
    same = lambda r: r._replace(reference=r.logp)
    loss = np.asarray(loss_of(name, Pairs(same(pairs.chosen), same(pairs.rejected), pairs.label)))
    np.testing.assert_allclose(loss, LN2, rtol=2e-7)
    assert name != 'dpo' or np.all(loss == LN2), 'to the bit'


@pytest.mark.parametrize('name', LOSSES)
def test_swapping_the_responses_and_turning_the_label_changes_nothing(name):
    pairs = make_pairs()
    np.testing.assert_allclose(loss_of(name, pairs), loss_of(name, turned(pairs)), rtol=1e-6)
    weight = jnp.ones(64)
    z0 = {'z0': jnp.float32(0.4)} if LOSSES[name].baseline else {}
    found, swapped = (
        preference.sums(name, p, weight, settings=settings(name), **z0)[1] for p in (pairs, turned(pairs))
    )
    for one, other in [
        ('accuracy', 'accuracy'), ('accuracy_per_token', 'accuracy_per_token'),
        ('reward_chosen', 'reward_rejected'), ('logp_chosen', 'logp_rejected'),
    ]:  # fmt: skip
        if one in found or not LOSSES[name].baseline:  # with a baseline answers are not compared with each other
            assert found[one] == pytest.approx(float(swapped[other]), rel=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_a_soft_label_is_the_mean_of_two_hard_ones(name):
    soft, hard = make_pairs(label=0.3), make_pairs(label=1.0)
    expected = 0.3 * loss_of(name, hard) + 0.7 * loss_of(name, hard._replace(label=jnp.zeros(64)))
    np.testing.assert_allclose(loss_of(name, soft), expected, rtol=1e-5)


def test_smoothing_by_nothing_is_dpo_and_by_something_two_different_losses():
    pairs = make_pairs()
    expected = loss_of('dpo', pairs)
    for name in ('cdpo', 'robust'):
        np.testing.assert_array_equal(loss_of(name, pairs, label_smoothing=0.0), expected)
        assert np.max(np.abs(loss_of(name, pairs) - expected)) > 0.1
    assert np.max(np.abs(loss_of('cdpo', pairs) - loss_of('robust', pairs))) > 0.1


def test_the_robust_loss_of_flipped_labels_is_dpos_of_the_true_ones():
    """On average over flips of one in ten (Chowdhury et al., 2024, section 3)."""
    pairs = make_pairs()
    flipped = pairs._replace(label=1 - pairs.label)
    mean = 0.9 * loss_of('robust', pairs) + 0.1 * loss_of('robust', flipped)
    np.testing.assert_allclose(mean, loss_of('dpo', pairs), rtol=1e-5, atol=1e-5)


def test_the_conservative_loss_is_least_where_the_margin_says_how_often_labels_are_right():
    slope = jax.jit(jax.grad(lambda h: preference.cdpo(one_pair(h / 0.3), beta=0.3, label_smoothing=0.1)))
    assert slope(math.log(0.9 / 0.1)) == pytest.approx(0, abs=1e-6) and slope(2.0) < -0.01 < 0.01 < slope(2.4)


def one_pair(ratio, length=1.0, label=1.0):
    """A pair whose chosen response has this log-ratio and whose rejected one has none."""
    return Pairs(Response(ratio, length, 0.0), Response(jnp.float32(0), length, 0.0), label)


def test_length_is_divided_out_where_the_paper_or_practice_has_it():
    """Twice the tokens with the same log-prob each: another DPO loss, the same SimPO, IPO and ORPO."""
    pairs = make_pairs()
    double = lambda r: Response(*(2 * x for x in r))
    longer = Pairs(double(pairs.chosen), double(pairs.rejected), pairs.label)
    for name in LOSSES:
        same = np.allclose(loss_of(name, longer), loss_of(name, pairs), rtol=1e-5)
        assert same == (name in ('simpo', 'ipo', 'orpo'))


def test_ipo_is_least_at_its_target_and_simpo_moves_by_its_margin():
    slope = jax.jit(jax.grad(lambda ratio: preference.ipo(one_pair(ratio, 4.0), beta=0.3)))
    assert slope(4 / 0.6) == pytest.approx(0, abs=1e-6) and slope(5.0) < 0 < slope(8.0)
    led = preference.simpo(one_pair(jnp.float32(0.35)), beta=2.0, margin=0.7)
    assert led == pytest.approx(LN2), 'a lead of β·0.35 is the margin'


def test_log_odds_are_right_from_certainty_to_nothing():
    mean = -np.geomspace(2e-7, 80, 50)
    expected = mean - np.log(-np.expm1(mean))
    found = preference.log_odds(Response(jnp.float32(3 * mean), jnp.float32(3)))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_kto_weighs_gains_and_losses_against_its_baseline():
    example = Response(jnp.float32([2.0, -1.0, 0.5]), jnp.ones(3), jnp.zeros(3))
    options = {'z0': jnp.float32(0.5), 'beta': 0.3, 'lambda_d': 1.2, 'lambda_u': 1.5}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    gain = 0.3 * (np.array([2.0, -1.0, 0.5]) - 0.5)
    good, bad = (preference.kto_example(example, label, **options) for label in (1, 0))
    np.testing.assert_allclose(good, 1.2 * (1 - sigmoid(gain)), rtol=1e-6)
    np.testing.assert_allclose(bad, 1.5 * (1 - sigmoid(-gain)), rtol=1e-6)


@pytest.mark.parametrize(('ratios', 'expected'), [([3.0, -1.0, math.nan], 1.0), ([-3.0, 1.0, math.nan], 0.0)])
def test_ktos_baseline_is_a_mean_clamped_at_0_without_gradient(ratios, expected):
    weight = jnp.float32([1, 1, 0])  # the third slot is empty
    z0 = lambda logp: preference.baseline(preference.baseline_sums(Response(logp, weight, jnp.zeros(3)), weight))
    assert z0(jnp.float32(ratios)) == expected
    np.testing.assert_array_equal(jax.grad(z0)(jnp.float32(ratios)), 0)
    assert preference.baseline({'kl': jnp.float32(0), 'kl_weight': jnp.float32(0)}) == 0


def test_a_loss_with_a_reference_says_so_when_it_gets_none():
    pairs = make_pairs()
    bare = Pairs(*(r._replace(reference=None) for r in pairs[:2]), pairs.label)
    for name, entry in LOSSES.items():
        if entry.reference:
            with pytest.raises(ValueError, match='reference'):
                loss_of(name, bare)
        else:
            np.testing.assert_array_equal(loss_of(name, bare), loss_of(name, pairs))


# ---- extremes ----


@pytest.mark.parametrize('name', LOSSES)
def test_values_and_gradients_are_finite_whatever_comes(name):
    columns = itertools.product(EXTREMES, EXTREMES, (0.0, 1.0, 300.0), (-1e4, 0.0, 1e4), (0.0, 0.3, 1.0))
    chosen, rejected, length, reference, label = (jnp.float32(c) for c in zip(*columns, strict=True))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(chosen, rejected):
        pairs = Pairs(Response(chosen, length, reference), Response(rejected, 2 * length, -reference), label)
        return jnp.sum(loss_of(name, pairs, z0=1e4))

    loss, gradients = total(chosen, rejected)
    assert np.isfinite(loss) and all(np.all(np.isfinite(g)) for g in gradients)


def test_reward_gradients_are_finite_whatever_comes():
    chosen, rejected, margin = (jnp.float32(c) for c in zip(*itertools.product(*[EXTREMES] * 3), strict=True))
    value = lambda c, r: jnp.sum(reward.bradley_terry(c, r, margin=margin, label=0.3) + reward.centring(c, r))
    loss, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(chosen, rejected)
    assert np.isfinite(loss) and all(np.all(np.isfinite(g)) for g in gradients)


# ---- sums and weights ----


def value_of(name, pairs, weight, weights):
    """(objective, all sums) of a batch, or of a part of one whose weights are these."""
    z0 = {'z0': jnp.float32(0.4)} if LOSSES[name].baseline else {}
    terms, metrics = preference.sums(name, pairs, weight, settings=settings(name), **z0)
    assert set(terms) | set(metrics) == set(weights), 'every sum has a weight'
    return objective(terms, weights, preference.coefficients(name, nll=0.2)), terms | metrics


value_and_grad = jax.jit(jax.value_and_grad(value_of, argnums=1, has_aux=True), static_argnums=0)


def weights_of(name, pairs, weight):
    return preference.weights(name, weight, pairs.chosen.length, pairs.rejected.length)


def assert_close(found, expected, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected)


@pytest.mark.parametrize('name', LOSSES)
def test_what_is_masked_is_as_if_it_was_not_there_and_parts_add_up(name):
    """Value, sums and gradient, whatever stands in the empty slots."""
    pairs, kept, junk = make_pairs(), np.arange(64) % 3 > 0, np.resize(JUNK, 64)
    weight = np.float32(kept * np.linspace(0.5, 2, 64))
    spoiled = jax.tree.map(lambda x: jnp.where(kept, x, junk), pairs)
    alone = jax.tree.map(lambda x: x[kept], pairs)
    weights = weights_of(name, pairs, weight)
    assert weights == weights_of(name, alone, weight[kept])
    (value, sums), gradient = value_and_grad(name, spoiled, weight, weights)
    expected, among = value_and_grad(name, alone, weight[kept], weights)
    assert_close((value, sums), expected, rtol=1e-5)
    for found, own in ((gradient.chosen.logp, among.chosen.logp), (gradient.rejected.logp, among.rejected.logp)):
        assert_close(found[kept], own)
        assert np.all(found[~kept] == 0) and np.any(own != 0)
    parts = [
        value_and_grad(name, spoiled, weight * part, weights) for part in (np.arange(64) < 20, np.arange(64) >= 20)
    ]
    assert_close(jax.tree.map(lambda a, b: a + b, *parts), ((value, sums), gradient))
    (nothing, _), _ = value_and_grad(name, spoiled, 0 * weight, jax.tree.map(jnp.zeros_like, weights))
    assert nothing == 0


def test_the_sums_are_what_they_say():
    """By hand, with a tie, and a label that says the rejected response is better."""
    chosen = Response(jnp.float32([-4, -6, -3]), jnp.float32([2, 3, 1]), jnp.float32([-5, -6, -1]))
    rejected = Response(jnp.float32([-3, -8, -4]), jnp.float32([1, 2, 4]), jnp.float32([-3, -8, -4]))
    pairs, weight = Pairs(chosen, rejected, jnp.float32([1, 1, 0.2])), jnp.float32([1, 2, 1])
    terms, found = preference.sums('dpo', pairs, weight, settings={'beta': 0.5})
    weights = preference.weights('dpo', weight, chosen.length, rejected.length)
    assert terms['chosen_nll'] == 4 + 2 * 6 + 3 and weights['chosen_nll'] == 2 + 2 * 3 + 1
    assert found['reward_chosen'] == found['margin'] == 0.5 + 0 - 1 and found['reward_rejected'] == 0
    assert found['accuracy'] == 1 + 2 * 0.5 + 1 and weights['accuracy'] == 4
    assert found['accuracy_per_token'] == 1 + 2 * 1 + 1  # −2 > −3; −2 > −4; −3 < −1, as the label has it
    assert (found['logp_chosen'], weights['logp_chosen']) == (-19, 9)
    assert (found['logp_rejected'], weights['logp_rejected']) == (-3 - 16 - 4, 1 + 4 + 4)


def test_the_sums_of_a_reward_model_are_what_they_say():
    chosen, rejected = jnp.float32([1, 0, 2, 5]), jnp.float32([0, 0, 3, 5])
    weight, margin, label = jnp.float32([1, 1, 2, 0]), jnp.float32([0.5, 0, 0, 0]), jnp.float32([1, 1, 0.3, 1])
    terms, found = reward.sums(chosen, rejected, weight, margin=margin, label=label)
    ell = lambda x: math.log1p(math.exp(-x))
    assert terms['bradley_terry'] == pytest.approx(ell(0.5) + ell(0) + 2 * (0.3 * ell(-1) + 0.7 * ell(1)), rel=1e-6)
    assert terms['centring'] == 1 + 0 + 2 * 25 and reward.weights(weight)['centring'] == 4
    assert found['accuracy'] == 1 + 0.5 + 2 and found['margin'] == 1 - 2
    swapped, _ = reward.sums(rejected, chosen, weight, margin=margin, label=1 - label)
    assert jax.tree.map(float, swapped) == pytest.approx(jax.tree.map(float, terms), rel=1e-6)


def test_a_reward_model_does_not_look_at_empty_slots():
    score, weight = jnp.float32([1, 2, *JUNK]), jnp.float32([1, 1, 0, 0, 0, 0])

    @jax.jit
    @jax.value_and_grad
    def value(chosen, weight):
        terms, _ = reward.sums(chosen, 0.5 * chosen, weight)
        return objective(terms, reward.weights(weight), {'bradley_terry': 1.0, 'centring': 0.01})

    alone = value(score[:2], weight[:2])
    found, gradient = value(score, weight)
    assert found == alone[0]
    np.testing.assert_array_equal(gradient, np.append(alone[1], np.zeros(4)))
    assert value(score, jnp.zeros(6))[0] == 0


def test_settings_are_the_papers_where_none_is_given_and_refused_where_they_do_nothing():
    nothing = dict.fromkeys(SETTINGS)
    assert preference.settle('dpo', nothing | {'beta': 0.5}) == {'beta': 0.5}
    assert preference.settle('simpo', nothing) == {'beta': 2.0, 'margin': 1.0}
    assert preference.settle('cdpo', nothing | {'label_smoothing': 0.0}) == {'beta': 0.1, 'label_smoothing': 0.0}
    with pytest.raises(ValueError, match="margin=0.5: loss='dpo' takes beta alone"):
        preference.settle('dpo', nothing | {'margin': 0.5})
    with pytest.raises(ValueError, match='label_smoothing=0.5'):
        preference.settle('robust', nothing | {'label_smoothing': 0.5})
    with pytest.raises(ValueError, match='beta=0'):
        preference.settle('ipo', nothing | {'beta': 0.0})
    with pytest.raises(ValueError, match='not one of dpo'):
        preference.settle('dopo', nothing)
    assert preference.coefficients('orpo')['chosen_nll'] == 1.0 and preference.coefficients('dpo')['chosen_nll'] == 0.0
    assert preference.coefficients('orpo', nll=0.0)['chosen_nll'] == 0.0


# ---- in the step ----


def step_loss(name):
    """Of a policy whose log-probs are minus the squares of something linear in its weights."""

    def response(models, batch, side):
        logp_BP = -jnp.square(jnp.einsum('BPD,D->BP', batch[f'{side}_BPD'], models['policy']))
        return Response(logp_BP, batch[f'{side}_length_BP'], batch[f'{side}_reference_BP'])

    def pre_pass(models, batch, key):
        return preference.baseline_sums(response(models, batch, 'mismatched'), batch['weight_BP'])

    def terms(models, batch, key, *given):
        pairs = Pairs(*(response(models, batch, s) for s in ('chosen', 'rejected')), batch['label_BP'])
        z0 = {'z0': preference.baseline(given[0])} if given else {}
        return preference.sums(name, pairs, batch['weight_BP'], settings=settings(name), **z0)

    def denominators(batch):
        return preference.weights(name, *(batch[f'{x}_BP'] for x in ('weight', 'chosen_length', 'rejected_length')))

    coefs = preference.coefficients(name, nll=0.2)
    return training.Loss(terms, denominators, coefs, pre_pass if LOSSES[name].baseline else None)


def step_batch(rows=8, pairs=3):
    rng = np.random.default_rng(0)
    shape = (rows, pairs)
    batch = {
        'label_BP': rng.choice([0.3, 1.0], shape),
        'weight_BP': rng.random(shape) * (rng.random(shape) < 0.6),
    }
    for side in ('chosen', 'rejected', 'mismatched'):
        batch[f'{side}_BPD'] = rng.standard_normal((*shape, 2))
        batch[f'{side}_length_BP'] = rng.integers(1, 9, shape)
        batch[f'{side}_reference_BP'] = -3 * rng.random(shape)
    batch['weight_BP'][1::4] = 0  # one of four microbatches is empty
    batch['mismatched_reference_BP'] -= np.array([[4], [-3]] * (rows // 2))  # z0 is above 0, not so that of every part
    return {name: x.astype(np.float32) for name, x in batch.items()}


def updated(loss, batch, **options):
    optimizer = optax.sgd(0.1)
    state = training.create({'policy': jnp.float32([1.0, -0.5])}, {}, optimizer, 0)
    step = training.make_step(loss, optimizer, clip=None, **options)
    state, metrics = jax.jit(step)(state, batch)
    return np.asarray(state.trainable['policy']), jax.tree.map(float, metrics)


@functools.cache
def ktos_update():
    return updated(step_loss('kto'), step_batch())


@pytest.mark.parametrize('microbatches', [2, 4])
def test_any_number_of_microbatches_gives_the_same_update_of_kto(microbatches):
    """Its baseline is not that of a microbatch."""
    (w_D, metrics), (other_D, same) = ktos_update(), updated(step_loss('kto'), step_batch(), microbatches=microbatches)
    assert np.max(np.abs(w_D - [1.0, -0.5])) > 5e-3 and metrics['skipped'] == 0 and metrics['z0'] > 0.1
    np.testing.assert_allclose(other_D, w_D, rtol=1e-6)
    assert same == pytest.approx(metrics, rel=1e-5)


def test_ktos_baseline_is_that_of_all_devices():
    with sharding.use_mesh({'data': 2, 'fsdp': 2}, jax.devices()[:4]):
        w_D, metrics = updated(step_loss('kto'), sharding.shard_batch(step_batch()), microbatches=2)
    np.testing.assert_allclose(w_D, ktos_update()[0], rtol=1e-6)
    assert metrics == pytest.approx(ktos_update()[1], rel=1e-5)


def test_what_is_made_before_has_no_gradient_and_only_the_microbatches_that_count():
    """The loss is s²·w², s the sum of x, of which one w is made before: the derivative is s²·w and not twice that."""
    terms = lambda m, part, key, given: ({'fit': jnp.sum(part['x_B']) * m['policy'][0] * given['total']}, {})
    first = lambda m, part, key: {'total': jnp.sum(part['x_B']) * m['policy'][0]}
    loss = training.Loss(terms, lambda batch: {'fit': jnp.float32(1)}, {'fit': 1.0}, first)
    x_B = np.array([1, 2, math.nan, math.nan] * 2, np.float32)
    w_D, metrics = updated(loss, {'x_B': x_B}, microbatches=4, counts=np.array([2], np.int32))
    assert metrics['loss'] == 36 and w_D[0] == pytest.approx(1 - 0.1 * 36)


def test_each_microbatch_has_the_same_key_before_as_in_the_loss():
    terms = lambda models, part, key, given: (
        {'fit': 0 * models['policy'][0]}, {'own': jax.random.uniform(key), 'given': given['sum'] / 2},
    )  # fmt: skip
    loss = training.Loss(
        terms, lambda batch: dict.fromkeys(('fit', 'own', 'given'), jnp.float32(1)), {'fit': 1.0},
        lambda models, part, key: {'sum': jax.random.uniform(key)},
    )  # fmt: skip
    _, metrics = updated(loss, step_batch(), microbatches=2)
    assert metrics['own'] == pytest.approx(metrics['given'])


def test_only_a_loss_that_asks_for_it_has_a_first_pass():
    state = training.create({'policy': jnp.zeros(2)}, {}, optax.sgd(0.1), 0)

    def loops(name):
        step = training.make_step(step_loss(name), optax.sgd(0.1), clip=None, microbatches=2)
        return str(jax.make_jaxpr(step)(state, step_batch())).count(' scan[')

    assert (loops('dpo'), loops('kto')) == (1, 2)
