"""What a rollout of PPO and GRPO is made into, on rows made by hand, against NumPy in float64."""

import math
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from running import ROOT

from lm import config, settings
from lm.data.chats import Question
from lm.errors import RunError
from lm.rl import rewards
from lm.runs import checkpoint, loading
from lm.runs.saved_config import Parent
from lm.sampling.generate import Drawn
from lm.stages import grpo, held_out, online, ppo
from lm.stages.spec import Task

SCORE = np.float32([1, -0.5, 2, 0.25])
PLACE = np.arange(8)
MASK = np.array([(a <= PLACE) & (b > PLACE) for a, b in ((1, 4), (3, 8), (0, 2), (2, 3))])


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)


def rows(mask=MASK):
    """Per-token arrays as a rollout has them: nothing beside the responses."""
    draw = np.random.default_rng(0)
    names = ('old_BT', 'reference_BT', 'value_BT')
    return {'weights_BT': mask.astype(np.float32)} | {
        name: (draw.normal(size=mask.shape) * mask).astype(np.float32) for name in names
    }


def task_of(stage, kind, **rl):
    """A task without data or model, with these settings of rl."""
    task = object.__new__(stage)
    task.config = config.base(kind)
    for name, value in rl.items():
        task.config.rl[name] = value
    (ppo if kind is settings.Ppo else grpo).settle(task.config)
    task.health = np.full(len(task.measures), np.nan, np.float32)
    return task


# ---- PPO ----


def rewards_of(given, score, beta):
    """[the rewards of its tokens] of each response, in deviations of all of them."""
    out = []
    for i, own in enumerate(given['weights_BT'] > 0):
        earned = -beta * (given['old_BT'][i, own].astype(np.float64) - given['reference_BT'][i, own])
        if len(earned):
            earned[-1] += score[i]
        out.append(earned)
    return [earned / np.concatenate(out).std() for earned in out]


def ahead(earned, value, lam):
    """Σ (λ)^k δ_{t+k} of each token, the sum written out."""
    delta = earned + np.append(value[1:], 0)[: len(value)] - value
    return [sum(lam**k * x for k, x in enumerate(delta[t:])) for t in range(len(delta))]


def estimates(given, earned, lam):
    """[B, T]: the sums of `ahead` at the tokens of the responses."""
    out = np.zeros(given['weights_BT'].shape)
    for i, own in enumerate(given['weights_BT'] > 0):
        out[i, own] = ahead(earned[i], given['value_BT'][i, own].astype(np.float64), lam)
    return out


def of_ppo(lam=None, critic_lam=1.0, **rl):
    task = task_of(ppo.Ppo, settings.Ppo, **rl)
    task.config.lam, task.config.critic.lam, task.config.critic.warmup = lam, critic_lam, 2
    return task


def test_the_score_is_earned_at_the_last_token_of_a_response():
    """Before it every token has the whole of it to come; after it there is nothing."""
    given = rows()
    given['value_BT'][:] = 0
    found = of_ppo(kl='none').weigh(given, SCORE, 5, 0.0)['return_BT']
    at_last = np.zeros(MASK.shape)
    at_last[range(4), [3, 7, 1, 2]] = SCORE
    close(found, MASK * SCORE[:, None] / at_last[MASK].std())


def test_a_token_that_the_reference_likes_less_earns_less():
    """By β log π/π_ref, in deviations of the rewards."""
    given = rows(MASK[1:2])
    given['value_BT'][:] = 0
    given['old_BT'][0, 3:], given['reference_BT'][0, 3:] = [-1, -1, -1, -1, -2], [-3, -1, -0.5, -1, -2]
    found = of_ppo(kl='reward').weigh(given, np.float32([3]), 5, 0.5)['return_BT'][0, 3:]
    earned = np.array([-1, 0, 0.25, 0, 3])
    close(found, np.cumsum(earned[::-1])[::-1] / earned.std())


@pytest.mark.parametrize(('kl', 'beta'), [('none', 0.0), ('reward', 0.3)])
@pytest.mark.parametrize(('lam', 'wanted'), [(None, 0.95), (0.6, 0.6)])
def test_the_critic_and_the_policy_each_have_a_lambda(kl, beta, lam, wanted):
    """A response that is left out has no part in means and deviations."""
    given = rows(np.concatenate([MASK, np.zeros((1, 8), bool)]))
    score = np.append(SCORE, np.float32(50))
    found = of_ppo(lam, 0.8, kl=kl).weigh(given, score, 5, beta)
    earned, own = rewards_of(given, score, beta), given['weights_BT'] > 0
    close(found['return_BT'], estimates(given, earned, 0.8) + given['value_BT'])
    advantage = estimates(given, earned, wanted)
    close(found['advantage_BT'], (advantage - advantage[own].mean()) / advantage[own].std() * own)


def test_the_policy_has_no_advantage_while_the_critic_warms_up():
    """In the first two rollouts the critic learns what it would anyway."""
    task, given = of_ppo(kl='reward'), rows()
    first, second, third = (task.weigh(given, SCORE, rollout, 0.1) for rollout in range(3))
    assert not first['advantage_BT'].any() and not second['advantage_BT'].any()
    assert third['advantage_BT'][MASK].all()
    np.testing.assert_array_equal(first['return_BT'], third['return_BT'])


def test_what_the_critic_explains_is_told():
    task, given = of_ppo(kl='reward'), rows()
    task.weigh(given, SCORE, 5, 0.1)
    left = estimates(given, rewards_of(given, SCORE, 0.1), 1.0)[MASK]
    close(task.told()['rl/explained_variance'], 1 - left.var() / (left + given['value_BT'][MASK]).var())


@pytest.mark.parametrize('reward', ['runs/reward', None])
def test_the_critic_begins_as_the_reward_model_and_expects_nothing(one_device, tiny, monkeypatch, reward):
    """Without a reward model, as the policy."""
    task = of_ppo()
    task.cfg, task.recorder = tiny, SimpleNamespace(say=print)
    task.config.init_from, task.config.reward_from = 'runs/sft', reward
    body = Parent('runs/any', 7, 'digest')
    monkeypatch.setattr(Task, 'begin', lambda self, abstract, frozen: ({'policy': 'weights'}, {'policy': 'run'}))
    monkeypatch.setattr(loading, 'weights', lambda run, wanted, warn: (dict.fromkeys(wanted, run), body))
    abstract = loading.abstract_params(tiny, 'critic')
    weights, parents = task.begin({'critic': abstract}, {})
    assert weights.keys() == parents.keys() == {'policy', 'critic'} and parents['critic'] is body
    critic, heads = weights['critic'], ('score_D', 'bias_score')
    assert critic.keys() == abstract.keys()
    assert {x for name, x in critic.items() if name not in heads} == {reward or 'runs/sft'}
    for name in heads:
        assert isinstance(critic[name], jax.Array) and critic[name].sharding == abstract[name].sharding
        assert critic[name].shape == abstract[name].shape and not np.asarray(critic[name]).any()


# ---- GRPO ----


def of_grpo(advantage='group', **rl):
    task = task_of(grpo.Grpo, settings.Grpo, prompts=2, group=2, **rl)
    task.config.advantage = advantage
    return task


def test_a_response_that_the_reference_likes_less_is_worth_less():
    """By β log π/π_ref of the whole of it, before groups are compared."""
    given = rows()
    given['old_BT'][~MASK] = 7
    found = of_grpo(kl='reward').weigh(given, SCORE, 0, 0.4)
    apart = [
        np.sum(given['old_BT'][i, own] - given['reference_BT'][i, own].astype(float)) for i, own in enumerate(MASK)
    ]
    left = (SCORE - 0.4 * np.array(apart)).reshape(2, 2)
    close(found['advantage_BT'], (left - left.mean(1, keepdims=True)).reshape(4, 1) * MASK)
    np.testing.assert_array_equal(found['weights_BT'], MASK)


def test_a_leash_that_is_no_part_of_the_reward_leaves_the_scores():
    found = of_grpo(kl='k3').weigh(rows(), SCORE, 0, 0.4)
    close(found['advantage_BT'], np.array([0.75, -0.75, 0.875, -0.875])[:, None] * MASK)


@pytest.mark.parametrize(
    ('advantage', 'kl', 'kept'),
    [
        ('group', 'none', [0, 0, 1, 1]),
        ('reinforce++', 'none', [1, 1, 1, 1]),
        ('group', 'k3', [1, 1, 1, 1]),
        ('group', 'full', [1, 1, 1, 1]),
        ('group', 'reward', [1, 1, 1, 1]),
    ],
)
def test_a_group_whose_scores_do_not_differ_weighs_nothing(advantage, kl, kept):
    """Unless the batch is what responses are compared with, or a leash pulls at them."""
    task = of_grpo(advantage, kl=kl)
    found = task.weigh(rows(), np.float32([1, 1, 0, 3]), 0, 0.1)
    np.testing.assert_array_equal(found['weights_BT'], np.array(kept)[:, None] * MASK)
    assert task.told()['rl/groups_without_variance'] == 0.5
    compared = kl == 'reward' or advantage == 'reinforce++'
    assert [found['advantage_BT'][i].any() for i in (0, 2)] == [compared, True]


# ---- rollouts ----


class Given(online.Online):
    """Draws what it is given, one list after the other; an advantage is the score."""

    source, failures = 'fn', 2

    def draw(self, policy, asked, seed):
        self.seeds.append(list(seed))
        return self.given[len(self.seeds) - 1][0]

    def scores(self, models, asked, drawn):
        return {self.source: np.float32(self.given[len(self.seeds) - 1][1])}, Counter(judge_failed=self.failures)

    def measured(self, models, rows):
        return {'old_BT': rows['sampler_BT']}

    def weigh(self, rows, score, rollout, beta):
        return {'advantage_BT': score[:, None] * rows['weights_BT']}


def rolled(given, *, group, **rl):
    """(the task, the rows of its rollout 3) whose prompt j, drawn for the n-th time again, is [100 + 10n + j]."""
    own = {'kl': 'none', 'prompts': len(given[0][1]) // group, 'group': group, 'resample': 0, 'truncated': 'score'}
    task = task_of(Given, settings.Grpo, max_new_tokens=10, **(own | rl))
    task.config.reward[Given.source], task.config.seed = 'of:nobody', 5
    task.given, task.seeds, task.width, task.means = given, [], 12, np.full(6, np.nan, np.float32)
    first = 3 * own['prompts']
    task.asked = SimpleNamespace(at=lambda j, again: (0, Question([100 + 10 * again + j - first], [9])))
    task.data = SimpleNamespace(own=SimpleNamespace(sources=[SimpleNamespace(train=SimpleNamespace(pad_id=0))]))
    return task, task.roll_out(SimpleNamespace(trainable={'policy': None}, frozen={}), 3)


def responses(*lengths, ended):
    return [Drawn([i + 1] * n, [-1.0] * n, end) for i, (n, end) in enumerate(zip(lengths, ended, strict=True))]


@pytest.mark.parametrize(
    ('truncated', 'wanted', 'learned'),
    [
        ('score', [0.5, 0.25, 0.75, 2], [1, 1, 1, 1]),
        ('penalty', [0.5, 0.25, -1, -1], [1, 1, 1, 1]),
        ('rising', [0.5, -0.25, -0.25, 1], [1, 1, 1, 1]),
        ('mask', [0.5, 0.25, 0.75, 2], [1, 1, 0, 0]),
    ],
)
def test_a_response_without_an_end_of_turn_is_treated_as_was_said(truncated, wanted, learned):
    """What is told of the rollout is of all responses, and of their own scores."""
    drawn = responses(4, 9, 10, 10, ended=[True, True, False, False])
    task, found = rolled([(drawn, [0.5, 0.25, 0.75, 2])], group=2, truncated=truncated)
    mask = (np.arange(12) < np.array([[4], [9], [10], [10]])) * np.array(learned)[:, None]
    np.testing.assert_array_equal(found['weights_BT'], mask)
    close(found['advantage_BT'], np.array(wanted)[:, None] * mask)
    told = task.told()
    assert (told['rl/reward'], told['rl/length'], told['rl/ended']) == (0.875, 8.25, 0.5) and task.means[-1] == 0.875


SAME = [
    [1, 1, 0, 1, 2, 2],
    [3, 3, 4, 5, 6, 6],
    [7, 7, 7, 7, 8, 9],
    [1, 2, 3, 4, 5, 6],
]


@pytest.mark.parametrize(
    ('resample', 'wanted', 'prompts'),
    [
        (0, [1, 1, 0, 1, 2, 2], [100, 101, 102]),
        (1, [4, 5, 0, 1, 2, 2], [111, 101, 102]),
        (3, [4, 5, 0, 1, 8, 9], [111, 101, 122]),
    ],
)
def test_groups_whose_scores_do_not_differ_are_drawn_anew(resample, wanted, prompts):
    """With other prompts and another seed each time, until there is none or it was done often enough."""
    given = [(responses(*[2] * 6, ended=[True] * 6), score) for score in SAME]
    task, found = rolled(given, group=2, resample=resample)
    assert found['advantage_BT'][:, 0].tolist() == wanted
    assert found['tokens_BT'][::2, 0].tolist() == found['tokens_BT'][1::2, 0].tolist() == prompts
    assert task.seeds == [[5, 3], [5, 3, 1], [5, 3, 2]][: resample + 1]
    assert task.told()['rl/reward'] == pytest.approx(np.mean(wanted))


def test_what_is_told_of_a_rollout_is_of_what_it_became(monkeypatch):
    """The exact answers of the groups that stayed, the failures of all draws, scores before they are normalised."""
    monkeypatch.setattr(Given, 'source', 'verify')
    given = [(responses(*[2] * 4, ended=[True] * 4), score) for score in ([1, 1, 1, 0], [0, 0, 0, 0])]
    task, found = rolled(given, group=2, resample=1)
    assert task.told()['rl/exact'] == task.told()['rl/reward'] == 0.75
    assert task.told()['rl/judge_failed'] == 4
    task.config.reward.normalise, task.seeds, task.failures = True, [], 0
    found = task.roll_out(SimpleNamespace(trainable={'policy': None}, frozen={}), 3)
    close(found['advantage_BT'][:, 0], (np.array([1, 1, 1, 0]) - 0.75) / np.std([1, 1, 1, 0]))
    assert task.told()['rl/reward'] == task.means[-1] == 0.75 and task.told()['rl/judge_failed'] == 0


def test_a_beta_that_was_set_anew_begins_anew():
    task = task_of(Given, settings.Grpo, kl='reward', beta=0.5, kl_target=2.0)
    task.moved_beta, task.means, task.rows = np.float32(0.25), np.zeros(6, np.float32), {}
    saved = task.state_dict()
    for beta, wanted in ((0.5, 0.25), (2.0, 2.0)):
        again = task_of(Given, settings.Grpo, kl='reward', beta=beta, kl_target=2.0)
        again.moved_beta = np.float32(beta)
        again.load(saved)
        assert again.beta == wanted


@pytest.mark.parametrize('path', ['configs/ppo.py', 'configs/grpo.py'])
@pytest.mark.parametrize(
    ('said', 'wanted'),
    [
        ({'rl.kl': 'none'}, {'rl.kl': 'none', 'rl.beta': 0.0}),
        ({'rl.beta': '0'}, {'rl.kl': 'none', 'rl.beta': 0.0}),
        ({'rl.clip': 'cispo'}, {'rl.clip_high': 5.0}),
        ({'rl.clip': 'dppo'}, {'rl.clip_high': 0.2}),
        ({'rl.clip': 'cispo', 'rl.clip_high': '3'}, {'rl.clip_high': 3.0}),
        ({'rl.clip_low': 'none', 'rl.truncated': 'none'}, {'rl.clip_low': 0.2}),
    ],
)
def test_what_is_said_on_the_command_line_settles_the_rest(path, said, wanted):
    c, _ = config.load(str(ROOT / path), list(said.items()))
    (ppo if c.stage == 'ppo' else grpo).settle(c)
    found = dict(config.leaves(c))
    assert {key: found[key] for key in wanted} == wanted
    assert all(found[key] is not None for key in settings.PPO if key.startswith('rl.'))


@pytest.mark.parametrize('score', [np.float64(1e39), 10**400, math.inf])
def test_a_score_that_float32_does_not_hold_is_named_by_its_prompt(score):
    with pytest.raises(RunError, match="for an answer to 'two': a score must be a finite number"):
        rewards.checked([0.5, score], ['one', 'two'], 'mine')


def test_a_beginning_that_has_other_weights_now_is_none_to_compare_with(monkeypatch):
    said = []
    monkeypatch.setattr(loading, 'abstract_params', lambda cfg: None)
    monkeypatch.setattr(loading, 'weights', lambda *_, **__: ({}, Parent('runs/sft', 2, 'other')))
    monkeypatch.setattr(checkpoint, 'digest', lambda params: 'other')
    task = SimpleNamespace(
        config=SimpleNamespace(init_from='runs/sft'), cfg=None, began=Parent('runs/sft', 1, 'own'),
        recorder=SimpleNamespace(say=said.append), data=SimpleNamespace(own=SimpleNamespace(sources=['one', 'two'])),
    )  # fmt: skip
    assert held_out._of_the_beginning(task, {}) == [{}, {}]
    assert 'runs/sft has other weights than when this run began' in said[0]
