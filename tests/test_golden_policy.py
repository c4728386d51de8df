"""The losses and advantages of the GRPO family against the numbers that TRL's own trainers gave for the same responses
(tests/golden/make_policy.py, which says where TRL's conventions differ)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from lm import advantages
from lm.losses import policy
from lm.losses.policy import Clip
from lm.model import sequences

GOLDEN = json.loads((tiny_llama.FOLDER / 'policy.json').read_text())
SETTINGS, BATCH, LOSSES = GOLDEN['settings'], GOLDEN['batch'], GOLDEN['losses']
CASES, BETA, LONGEST = SETTINGS['cases'], SETTINGS['beta'], SETTINGS['longest']
MASK, LOGP, OLD, NEAR, REFERENCE = (
    np.asarray(BATCH[name], np.float32) for name in ('completion_mask', 'logp', 'old', 'near', 'reference')
)
ADVANTAGE = np.asarray(BATCH['advantages'], np.float32)[:, None] * MASK
REWARDS = np.asarray(GOLDEN['rewards'], np.float32)
AGGREGATIONS = {'grpo': 'response', 'bnpo': 'tokens', 'dapo': 'tokens', 'dr_grpo': 'constant', 'cispo': 'tokens'}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def settings_of(case):
    """(ratio, clip, aggregation) that TRL's settings stand for; its epsilon is .2 where it is not said."""
    low, high = (case.get(name) for name in ('epsilon', 'epsilon_high'))
    low = 0.2 if low is None else low
    kind = 'cispo' if case['loss_type'] == 'cispo' else 'clip'
    ratio = case.get('importance_sampling_level', 'token')
    return ratio, Clip(kind, low, low if high is None else high), AGGREGATIONS[case['loss_type']]


def surrogate_of(case, logp, rows=slice(None), mask=MASK):
    """Each token's loss, weighed and divided."""
    ratio, clip, aggregation = settings_of(case)
    mask = mask[rows]
    loss, _ = policy.surrogate(logp, OLD[rows], ADVANTAGE[rows], mask, ratio=ratio, clip=clip)
    weight = policy.token_weights(mask, aggregation) / policy.denominator(mask, aggregation, most=len(mask) * LONGEST)
    return jnp.sum(weight * loss), weight


def assert_same(found, expected, factor=1.0):
    """Loss and gradient are those of TRL, times a factor."""
    value, gradient = found
    close(value, factor * expected['loss'])
    close(gradient, factor * np.asarray(expected['gradient']))


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if 'beta' not in case])
def test_the_loss_and_its_gradient_are_those_of_trl(name):
    found = jax.value_and_grad(lambda x: surrogate_of(CASES[name], x)[0])(jnp.asarray(LOGP))
    assert_same(found, LOSSES[name])


@pytest.mark.parametrize('name', ['grpo', 'two_sided', 'cispo', 'gspo', 'gspo_tokens'])
def test_the_clip_of_each_case_bites(name):
    """Else the tests above would hold without it."""
    ratio, clip, _ = settings_of(CASES[name])
    clipped = policy.surrogate(LOGP, OLD, ADVANTAGE, MASK, ratio=ratio, clip=clip)[1]['clipped']
    assert 0 < float(jnp.sum(clipped)) < MASK.sum()


@pytest.mark.parametrize('name', ['k3', 'k3_plain'])
def test_the_leash_is_k3_times_the_importance_ratio_and_without_it_k3(name):
    def loss(x):
        of_tokens, weight = surrogate_of(CASES[name], x)
        leash = policy.k3_loss(x, NEAR, OLD, MASK) if name == 'k3' else policy.k3(x, NEAR) * MASK
        return of_tokens + BETA * jnp.sum(weight * leash)

    assert_same(jax.value_and_grad(loss)(jnp.asarray(LOGP)), LOSSES[name])


def test_the_leash_of_a_response_s_ratio_is_times_that_ratio_there_and_times_the_token_s_here():
    case = CASES['gspo_k3']

    def loss(x, kind):
        of_tokens, weight = surrogate_of(case, x)
        ratio = jnp.exp(policy.log_ratio(x, OLD, MASK, kind))
        if kind == 'sequence':  # there one number a response, whose gradient every token of it has
            mean = jnp.sum((x - OLD) * MASK, 1, keepdims=True) / MASK.sum(1, keepdims=True)
            ratio = jnp.exp(mean)
        return of_tokens + BETA * jnp.sum(weight * ratio * policy.k3(x, NEAR) * MASK)

    theirs, ours = (
        jax.value_and_grad(functools.partial(loss, kind=k))(jnp.asarray(LOGP)) for k in ('sequence', 'token')
    )
    assert_same(theirs, LOSSES['gspo_k3'])
    assert abs(float(ours[0]) - LOSSES['gspo_k3']['loss']) > 1e-2
    weight = surrogate_of(case, LOGP)[1]
    close(ours[0], surrogate_of(case, LOGP)[0] + BETA * jnp.sum(weight * policy.k3_loss(LOGP, NEAR, OLD, MASK)))


def test_steps_of_one_batch_are_divided_by_its_mean_tokens_there_and_by_their_own_here():
    G = SETTINGS['group']
    for rows, expected in zip((slice(G), slice(G, None)), GOLDEN['halves'], strict=True):
        found = jax.value_and_grad(lambda x, rows=rows: surrogate_of(CASES['dapo'], x, rows)[0])(
            jnp.asarray(LOGP[rows])
        )
        factor = MASK.sum() / 2 / MASK[rows].sum()
        assert factor != 1
        assert_same(found, expected, factor)


@pytest.mark.parametrize(('name', 'factor'), [('grpo', len(MASK) / (len(MASK) - 1)), ('dr_grpo', 1.0)])
def test_a_masked_response_is_in_the_divisor_there_and_only_in_a_constant_one_here(name, factor):
    mask = MASK * (np.arange(len(MASK)) > 0)[:, None]
    found = jax.value_and_grad(lambda x: surrogate_of(CASES[name], x, mask=mask)[0])(jnp.asarray(LOGP))
    assert_same(found, LOSSES['masked'][name], factor)


# ---- advantages ----


@pytest.mark.parametrize(('name', 'theirs'), [('group_std', 'group'), ('batch_std', 'batch'), ('group', 'none')])
def test_an_advantage_of_a_group_is_trl_s(name, theirs):
    found = advantages.OF_GROUPS[name](jnp.asarray(REWARDS.reshape(-1, SETTINGS['group'])))
    close(found.reshape(-1), GOLDEN['advantages'][theirs])


def test_rloo_with_k1_in_the_reward_is_trl_s():
    score = REWARDS - BETA * np.sum(policy.k1(LOGP, REFERENCE) * MASK, 1)
    found = advantages.rloo(jnp.asarray(score.reshape(-1, SETTINGS['group'])))
    close(found.reshape(-1), GOLDEN['advantages']['rloo'])


def test_where_nothing_has_moved_rloo_s_gradient_is_that_of_the_surrogate():
    """TRL's loss there is −the mean advantage of the responses."""
    advantage = np.asarray(GOLDEN['advantages']['rloo'], np.float32)[:, None] * MASK
    loss = lambda x: (
        jnp.sum(policy.surrogate(x, LOGP, advantage, MASK, ratio='token', clip=Clip('clip', 0.2, 0.2))[0]) / len(MASK)
    )
    close(jax.grad(loss)(jnp.asarray(LOGP)), LOSSES['rloo']['gradient'])


# ---- the log-probs themselves ----


@pytest.mark.parametrize(('name', 'wanted'), [('policy', 'logp'), ('reference', 'reference')])
def test_log_probs_and_entropy_at_a_temperature_are_trl_s(name, wanted):
    cfg, params = tiny_llama.model(name)
    ids, real = (np.asarray(BATCH[key]) for key in ('input_ids', 'attention_mask'))
    pad = ids.shape[1] - LONGEST
    weights = np.pad(MASK, ((0, 0), (pad - 1, 0)))
    rows = {
        'tokens_BT': ids[:, :-1], 'targets_BT': ids[:, 1:], 'segments_BT': real[:, :-1], 'weights_BT': weights,
        'positions_BT': np.maximum(np.cumsum(real, 1) - 1, 0)[:, :-1],
    }  # fmt: skip
    logp, entropy, _ = jax.jit(sequences.token_log_probs, static_argnums=(1, 3))(
        params, cfg, rows, SETTINGS['temperature']
    )
    close(logp[:, pad - 1 :], np.asarray(BATCH[wanted]) * MASK, rtol=1e-5, atol=1e-5)
    if name == 'policy':
        close(entropy[:, pad - 1 :], np.asarray(BATCH['entropy']) * MASK, rtol=1e-5, atol=1e-5)
