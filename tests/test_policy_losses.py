"""PPO's and the GRPO family's losses and advantages, against NumPy in float64 and against what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import advantages
from lm.losses import policy
from lm.losses.policy import Clip

DRAW = np.random.default_rng(0)
B, T = 6, 9
MASK = (np.arange(T) < DRAW.integers(2, T + 1, (B, 1))).astype(np.float64)
MASK[:, 0] = 0  # the prompt
OLD = DRAW.normal(-2, 1, (B, T))
LOGP = OLD + DRAW.normal(0, 0.4, (B, T))
ADVANTAGE = DRAW.normal(size=(B, 1)) * np.ones((B, T))
SCORES = DRAW.normal(size=(5, 4))


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64():
        yield


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-10)


# ---- advantages ----


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('group', lambda r, m, s: r - m),
        ('group_std', lambda r, m, s: (r - m) / (s + 1e-4)),
        ('rloo', lambda r, m, s: r - (r.sum(1, keepdims=True) - r) / 3),
        ('batch_std', lambda r, m, s: (r - m) / (r.std(ddof=1) + 1e-4)),
        ('max_rl', lambda r, m, s: np.where(m > 0, (r - m) / np.where(m > 0, m, 1), 0)),
        ('reinforce++', lambda r, m, s: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
    ],
)
def test_an_advantage_of_a_group_is_its_paper_s(name, wanted):
    mean, std = SCORES.mean(1, keepdims=True), SCORES.std(1, keepdims=True, ddof=1)
    close(advantages.OF_GROUPS[name](jnp.asarray(SCORES)), wanted(SCORES, mean, std))


def test_a_group_without_variance_teaches_nothing():
    scores = jnp.asarray([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    assert advantages.same(scores).tolist() == [True, False]
    for name in ('group', 'group_std', 'rloo', 'max_rl', 'batch_std'):
        assert np.all(advantages.OF_GROUPS[name](scores)[0] == 0)
    assert np.all(advantages.max_rl(jnp.zeros((2, 3))) == 0)


@pytest.mark.parametrize('lam', [0.0, 0.95, 1.0, DRAW.random((B, 1))])
def test_gae_is_the_sum_of_discounted_errors(lam):
    reward, value, gamma = DRAW.normal(size=(B, T)), DRAW.normal(size=(B, T)), 0.9
    lams, wanted = np.broadcast_to(lam, (B, 1))[:, 0], np.zeros((B, T))
    for b in range(B):
        own = np.flatnonzero(MASK[b])
        for i, t in enumerate(own):
            for k, s in enumerate(own[i:]):
                ahead = value[b, s + 1] if s != own[-1] else 0.0
                wanted[b, t] += (gamma * lams[b]) ** k * (reward[b, s] + gamma * ahead - value[b, s])
    found = advantages.gae(
        jnp.asarray(reward), jnp.asarray(value), jnp.asarray(MASK), gamma=gamma, lam=jnp.asarray(lam)
    )
    close(found, wanted)


def test_whitening_is_over_what_counts():
    white = np.asarray(advantages.whiten(jnp.asarray(OLD), jnp.asarray(MASK)))
    own = white[MASK > 0]
    assert own.mean() == pytest.approx(0, abs=1e-12) and own.std() == pytest.approx(1, abs=1e-6)
    assert np.all(white[MASK == 0] == 0)


def test_whitened_rewards_do_not_pay_for_short_responses():
    """Responses of other lengths and one score earn the same in all; their order stays that of the scores."""
    mask = (np.arange(9) < np.array([[2], [5], [9]])).astype(np.float64)
    last = mask * (mask.cumsum(1) == mask.sum(1, keepdims=True))
    earned = np.asarray(advantages.whiten(jnp.asarray(last * 0.7), jnp.asarray(mask), centre=False)).sum(1)
    assert earned == pytest.approx(earned[0], rel=1e-12) and earned[0] > 0


# ---- the surrogate ----


def loss_of(logp, **options):
    return policy.surrogate(logp, jnp.asarray(OLD), jnp.asarray(ADVANTAGE), jnp.asarray(MASK), **options)


def sequence(x):
    return np.exp((x * MASK).sum(1, keepdims=True) / MASK.sum(1, keepdims=True)) * np.ones((B, T))


@pytest.mark.parametrize('ratio', ('token', 'sequence'))
def test_the_clipped_surrogate_is_ppo_s(ratio):
    found, told = loss_of(jnp.asarray(LOGP), ratio=ratio, clip=Clip('clip', 0.2, 0.28))
    r = np.exp(LOGP - OLD) if ratio == 'token' else sequence(LOGP - OLD)
    wanted = -np.minimum(r * ADVANTAGE, np.clip(r, 0.8, 1.28) * ADVANTAGE) * MASK
    close(found, wanted)
    cut = ((r < 0.8) & (ADVANTAGE < 0) | (r > 1.28) & (ADVANTAGE > 0)) * MASK
    close(told['clipped'], cut)
    assert 0 < cut.sum() < MASK.sum()


def test_gspo_s_gradient_is_the_response_s():
    """With one advantage a response, the sum over its tokens is length × its own ratio's gradient."""
    whole = lambda x: jnp.sum(loss_of(x, ratio='sequence', clip=Clip('clip', 9.0, 9.0))[0])
    wanted = -ADVANTAGE * sequence(LOGP - OLD) * MASK
    close(jax.grad(whole)(jnp.asarray(LOGP)), wanted)


def test_cispo_keeps_a_gradient_of_every_token():
    whole = lambda x: jnp.sum(loss_of(x, ratio='token', clip=Clip('cispo', 0, 1.1))[0])
    r = np.exp(LOGP - OLD)
    close(jax.grad(whole)(jnp.asarray(LOGP)), -np.minimum(r, 1.1) * ADVANTAGE * MASK)
    assert np.any(r * MASK > 1.1)


def test_dppo_drops_what_moved_in_the_direction_of_its_advantage():
    found, told = loss_of(jnp.asarray(LOGP), ratio='token', clip=Clip('dppo', 0, 0.02))
    moved = (np.exp(LOGP) - np.exp(OLD)) * np.sign(ADVANTAGE) > 0.02
    close(told['clipped'], moved * MASK)
    close(found, np.where(moved, 0, -np.exp(LOGP - OLD) * ADVANTAGE) * MASK)
    assert 0 < (moved * MASK).sum() < MASK.sum()


def test_the_gradient_on_policy_is_the_policy_gradient_whatever_the_clip():
    for ratio, clip in ((r, c) for r in ('token', 'sequence') for c in (Clip('clip', 0.2, 0.2), Clip('cispo', 0, 5.0))):
        grad = jax.grad(lambda x, o=(ratio, clip): jnp.sum(loss_of(x, ratio=o[0], clip=o[1])[0]))(jnp.asarray(OLD))
        close(grad, -ADVANTAGE * MASK)


@pytest.mark.parametrize(
    ('aggregation', 'wanted'),
    [
        ('tokens', lambda x: (x * MASK).sum() / MASK.sum()),
        ('constant', lambda x: (x * MASK).sum() / (B * 20)),
        ('response', lambda x: ((x * MASK).sum(1) / MASK.sum(1)).mean()),
    ],
)
def test_an_aggregation_is_what_its_name_says(aggregation, wanted):
    mask = jnp.asarray(MASK)
    total = jnp.sum(policy.token_weights(mask, aggregation) * LOGP)
    close(total / policy.denominator(mask, aggregation, most=B * 20), wanted(LOGP))


def test_a_row_without_a_response_is_no_response():
    mask = jnp.asarray(MASK).at[0].set(0)
    assert policy.denominator(mask, 'response', most=B * 20) == B - 1
    assert policy.denominator(mask, 'constant', most=B * 20) == B * 20  # what is left out leaves it as it is


def test_importance_weights_are_capped_or_cut():
    sampler = OLD + DRAW.normal(0, 0.8, (B, T))
    of = lambda how: np.asarray(policy.mismatch_weights(*map(jnp.asarray, (OLD, sampler, MASK)), how=how, cap=2.0))
    r = np.exp((OLD - sampler) * MASK)
    close(of('none'), np.ones((B, T)))
    close(of('truncate'), np.minimum(r, 2))
    close(of('mask'), np.where((r > 2) | (r < 0.5), 0, r))


def test_the_value_is_clipped_around_what_it_was():
    value, before, target = DRAW.normal(size=(3, B, T))
    near = before + np.clip(value - before, -0.2, 0.2)
    wanted = np.maximum((value - target) ** 2, (near - target) ** 2) / 2
    close(policy.value_loss(*map(jnp.asarray, (value, before, target)), clip=0.2), wanted)


# ---- gradients, in closed form ----


def gradient(of):
    """That of a function of the log-probs at LOGP, summed."""
    return np.asarray(jax.grad(lambda x: jnp.sum(of(x)))(jnp.asarray(LOGP)))


@pytest.mark.parametrize('ratio', ('token', 'sequence'))
def test_the_clipped_surrogate_has_no_gradient_where_the_clip_is_the_lesser(ratio):
    found = gradient(lambda x: loss_of(x, ratio=ratio, clip=Clip('clip', 0.2, 0.28))[0])
    r = np.exp(LOGP - OLD) if ratio == 'token' else sequence(LOGP - OLD)
    cut = (r < 0.8) & (ADVANTAGE < 0) | (r > 1.28) & (ADVANTAGE > 0)
    close(found, np.where(cut, 0, -r * ADVANTAGE) * MASK)


def test_dppo_has_no_gradient_of_what_it_drops():
    found = gradient(lambda x: loss_of(x, ratio='token', clip=Clip('dppo', 0, 0.02))[0])
    moved = (np.exp(LOGP) - np.exp(OLD)) * np.sign(ADVANTAGE) > 0.02
    close(found, np.where(moved, 0, -np.exp(LOGP - OLD) * ADVANTAGE) * MASK)


def test_the_leash_and_its_gradient():
    """k3 = e^−d − 1 + d with d = log π/π_ref has the gradient 1 − e^−d; times the ratio ρ, ρ·(k3 + 1 − e^−d) = ρ·d."""
    reference, d = OLD + 0.5 * ADVANTAGE, LOGP - OLD - 0.5 * ADVANTAGE
    k3 = np.exp(-d) - 1 + d
    close(policy.k1(jnp.asarray(LOGP), jnp.asarray(reference)), d)
    close(policy.k3(jnp.asarray(LOGP), jnp.asarray(reference)), k3)
    close(gradient(lambda x: policy.k3(x, jnp.asarray(reference))), 1 - np.exp(-d))
    loss = lambda x: policy.k3_loss(x, *map(jnp.asarray, (reference, OLD, MASK)))
    close(loss(jnp.asarray(LOGP)), np.exp(LOGP - OLD) * k3 * MASK)
    close(gradient(loss), np.exp(LOGP - OLD) * d * MASK)


@pytest.mark.parametrize('aggregation', ('tokens', 'constant', 'response'))
def test_a_token_weighs_as_much_in_the_gradient(aggregation):
    mask = jnp.asarray(MASK)
    divisor = policy.denominator(mask, aggregation, most=B * 20)
    found = gradient(lambda x: policy.token_weights(mask, aggregation) * x / divisor)
    each = {'tokens': 1 / MASK.sum(), 'constant': 1 / (B * 20), 'response': 1 / MASK.sum(1, keepdims=True) / B}
    close(found, MASK * each[aggregation])


@pytest.mark.parametrize('how', ('none', 'truncate', 'mask'))
def test_importance_weights_have_no_gradient(how):
    sampler = jnp.asarray(OLD) + 0.1
    close(gradient(lambda x: policy.mismatch_weights(x, sampler, jnp.asarray(MASK), how=how, cap=2.0)), 0)


def test_the_value_has_no_gradient_where_the_clip_is_the_worse():
    value, before, target = np.random.default_rng(1).normal(size=(3, B, T))
    near = before + np.clip(value - before, -0.2, 0.2)
    loss = lambda x: jnp.sum(policy.value_loss(x, jnp.asarray(before), jnp.asarray(target), clip=0.2))
    stuck = ((near - target) ** 2 > (value - target) ** 2) & (np.abs(value - before) > 0.2)
    close(jax.grad(loss)(jnp.asarray(value)), np.where(stuck, 0, value - target))
    assert 0 < stuck.sum() < stuck.size


@pytest.mark.parametrize('centre', (False, True))
def test_whitening_is_by_the_mean_and_the_std_of_what_counts(centre):
    own = OLD[MASK > 0]
    wanted = (OLD - centre * own.mean()) / np.sqrt(own.var() + 1e-8)
    close(advantages.whiten(jnp.asarray(OLD), jnp.asarray(MASK), centre=centre), wanted * MASK)
