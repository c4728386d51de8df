"""Stages that learn from what their policy draws: draws are the trainer's, and a run that dies is the run that did
not."""

import math
import shutil
import signal

import faults
import jax
import numpy as np
import pytest
import running
from running import measured, one_object, params, signal_at, status

from lm import config, settings, sharding
from lm.data.chats import Question
from lm.errors import Preempted, RunError, UsageError
from lm.evals import gains
from lm.losses import policy
from lm.rl import rewards, rollouts
from lm.runs import rundir, saved_config
from lm.sampling.generate import Drawn
from lm.stages import grpo, ppo
from lm.training import step

OWN = {
    'steps': 8, 'batch_size': 8, 'data__mixture': 'chats.jsonl', 'rl__prompts': 4, 'rl__group': 4,
    'rl__max_new_tokens': 8, 'log__every': 1, 'eval__every': 4, 'optim__lr': 1e-3, 'optim__warmup': 0,
}  # fmt: skip
OF_PPO = {'rl__group': 2, 'rl__prompts': 8, 'critic__warmup': 1}


def short(prompts, responses):
    """The shorter the better."""
    return [-len(response) / 10 for response in responses]


def like(prompts, responses, answers):
    assert len(prompts) == len(responses) == len(answers) and all(isinstance(a, str) and a for a in answers)
    return [float(r[:1] == a[:1]) for r, a in zip(responses, answers, strict=True)]


def nan(prompts, responses):
    return [math.nan if i == 3 else 0.0 for i in range(len(responses))]


def few(prompts, responses):
    return [0.0]


def nothing(prompts, responses):
    return [None] * len(responses)


def below(prompts, responses):
    return [-float(i) for i in range(len(responses))]


def raises(prompts, responses):
    raise KeyError('no such verifier')


@pytest.fixture
def learn(dialogues, tmp_path):
    """learn(stage, workdir, **settings) trains it, through the command."""

    def train(stage, workdir='run', *words, **settings):
        own = OWN | {'init_from': str(dialogues.run('sft'))}
        own |= OF_PPO if stage == 'ppo' else {}
        own['reward_from'] = 'none' if 'reward__fn' in settings else str(dialogues.run('reward'))
        return dialogues.train(stage, tmp_path / workdir, *words, **(own | settings))

    return train


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_it_dies_between_two_steps_of_a_rollout_and_goes_on_as_if_it_had_not(learn, tmp_path, monkeypatch, stage):
    learn(stage, 'whole')
    found = measured(tmp_path / 'whole')
    assert max(found[step, 'rl/mismatch_max'] for step in (4, 8)) < 2e-5
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 2, signal.SIGTERM)
        learn(stage)
    assert status(tmp_path / 'run')['saved'] == 3
    learn(stage)
    assert measured(tmp_path / 'run') == found
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / 'run'), params(tmp_path / 'whole'))


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_fifteen_deaths_at_random_moments_leave_the_run_as_it_was(dialogues, tmp_path, stage):
    """In rollouts, updates and saves; with the reward model, and in PPO's critic."""
    start = {'init_from': str(dialogues.run('sft')), 'reward_from': str(dialogues.run('reward'))}
    own = {'critic__warmup': 2} if stage == 'ppo' else {}
    argv = lambda workdir: dialogues.argv(stage, workdir, **faults.DRAWN, **start, **own)
    seen = faults.drawn(argv, dialogues.lab.folder, tmp_path, seed=len(stage), count=15)
    for state in faults.STATES:
        assert any(what.startswith(state) for what in seen), f'nothing at {state}: {seen}'
    assert seen['in the middle of a rollout'], seen


def test_what_is_saved_stays_as_it_was_though_the_task_writes_on(one_device):
    """Else a checkpoint, written in the background, has not what its checksums are of."""
    memory = np.zeros(2 << 10, np.uint8)  # aligned, as memory that JAX shares has to be
    health = memory[-memory.ctypes.data % 64 :][:1024].view(np.float32)
    saved = sharding.whole(health)
    health[0] = 1
    assert saved[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_two_processes_draw_and_learn_what_one_does(learn, dialogues, tmp_path, stage):
    """Each has half of a batch's rows; one asks the user's function."""
    reward = str(dialogues.run('reward'))
    own = {'reward__fn': 'test_online:short', 'reward_from': reward, 'rl__kl': 'reward', 'rl__beta': 0.1}
    own |= {'steps': 4, 'checkpoint__every': 3}
    learn(stage, 'one', **own)
    go = 'import os, sys\nfrom lm import errors, main\nos.chdir(sys.argv.pop())\nsys.path.insert(0, sys.argv.pop())\n'
    given = OWN | {'init_from': str(dialogues.run('sft'))} | (OF_PPO if stage == 'ppo' else {}) | own
    settings, two = dialogues.settings(stage, **given), tmp_path / 'two'

    def train():
        several = [f'--coordinator={running.coordinator()}', '--num_processes=2']
        words = [str(running.ROOT / 'tests'), str(dialogues.lab.folder)]
        start = lambda i: dialogues.lab.start(
            two, *several, f'--process_id={i}', *words, devices=4, code=f'{go}errors.leave(main.main())', **settings
        )
        told = running.ended([start(i) for i in range(2)])
        assert [code for code, _, _ in told] == [0, 0], told
        running.assert_measured_alike(two, tmp_path / 'one')

    train()
    before = measured(two)
    shutil.rmtree(two / 'checkpoints' / '4')
    train()
    assert measured(two) == before, 'resumed in the middle of a rollout'


@pytest.mark.slow
def test_what_is_rewarded_comes_more_often(learn, tmp_path):
    learn('grpo', reward__fn='test_online:short', steps=32, eval__every=8, optim__lr=1e-2, rl__prompts=8, batch_size=32)
    found = measured(tmp_path / 'run')
    assert found[32, 'rl/reward'] > found[1, 'rl/reward'] + 0.1


@pytest.mark.slow
def test_the_critic_learns_first_and_the_policy_waits(learn, tmp_path, dialogues):
    learn('ppo', steps=4, critic__warmup=2)
    jax.tree.map(np.testing.assert_array_equal, params(tmp_path / 'run'), params(dialogues.run('sft')))
    found = measured(tmp_path / 'run')
    assert found[4, 'train/value'] != found[1, 'train/value'] and found[4, 'rl/kl'] == 0


@pytest.mark.slow
def test_a_reward_may_ask_for_the_data_s_own_answers(learn, tmp_path):
    learn('grpo', reward__fn='test_online:like', steps=2, rl__kl='k3', rl__beta=0.1)
    assert 0 <= measured(tmp_path / 'run')[2, 'rl/reward'] <= 1


@pytest.mark.slow
def test_reward_that_rises_beside_a_policy_that_runs_away_ends_the_run(learn, tmp_path):
    with pytest.raises(RunError, match=r'from the reference, rl.kl_budget=.*: stopped at step'):
        learn('grpo', reward__fn='test_online:short', steps=64, rl__kl_budget=1e-3, optim__lr=1e-2, checkpoint__every=2)
    assert 'being hacked' in status(tmp_path / 'run')['reason']
    with pytest.raises(RunError, match=r'nothing has changed since'):
        learn('grpo', reward__fn='test_online:short', steps=64, rl__kl_budget=1e-3, optim__lr=1e-2, checkpoint__every=2)
    before = status(tmp_path / 'run')['saved']
    learn('grpo', reward__fn='test_online:short', steps=before + 2, rl__kl_budget=100.0, optim__lr=1e-2)


@pytest.mark.slow
def test_without_a_leash_the_reward_model_is_hacked_and_the_alarm_notices(learn, tmp_path):
    """PPO by one reward model: held near the reference it comes to its end, without β it is stopped."""
    own = {'steps': 48, 'optim__lr': 5e-3, 'rl__prompts': 16, 'batch_size': 32, 'rl__kl_budget': 2.0, 'eval__every': 48}
    learn('ppo', 'held', **own, rl__beta=3.0)
    with pytest.raises(RunError, match=r'from the reference, rl.kl_budget=.*: stopped at step'):
        learn('ppo', 'free', **own, rl__beta=0.0)
    held, free = measured(tmp_path / 'held'), measured(tmp_path / 'free')
    last = max(step for step, name in free if name == 'rl/kl')
    assert free[last, 'rl/kl'] > 2 > held[48, 'rl/kl']
    assert free[last, 'rl/reward'] > free[1, 'rl/reward']


@pytest.mark.parametrize(
    ('fn', 'wanted'),
    [
        ('nan', 'gave nan for an answer to'),
        pytest.param('few', 'gave 1 scores for 16 responses', marks=pytest.mark.slow),
        pytest.param('nothing', 'gave None for an answer to', marks=pytest.mark.slow),
        ('raises', "KeyError: 'no such verifier'"),
    ],
)
def test_a_reward_that_is_no_number_ends_the_run_before_the_step(learn, tmp_path, fn, wanted):
    with pytest.raises(RunError, match=wanted):
        learn('grpo', reward__fn=f'test_online:{fn}')
    assert not list((tmp_path / 'run' / 'checkpoints').glob('*'))


@pytest.mark.parametrize(
    ('settings', 'wanted'),
    [
        ({'rl__group': 1, 'rl__prompts': 16}, 'rl.group=1: advantage=group compares responses'),
        ({'rl__prompts': 3}, 'is not a multiple of batch_size=8'),
        ({'rl__kl': 'reward'}, 'rl.kl=reward with rl.beta=0 is no leash'),
        ({'rl__max_new_tokens': 48}, 'leaves no room for a prompt in seq_len=48'),
        ({'rl__max_new_tokens': 47}, 'no prompt leaves room for rl.max_new_tokens=47'),
        ({'reward__fn': 'nowhere.at:all'}, 'reward.fn=nowhere.at:all: ModuleNotFoundError: No module named'),
        ({'reward__fn': 'short'}, 'must be package.module:function'),
        ({'data__replay': 0.2}, 'this stage replays no text'),
        ({'reward__fn': ':short'}, 'must be package.module:function'),
        ({'reward__fn': 'builtins:__doc__'}, 'is no function'),
        ({'rl__beta': 0.5}, 'rl.beta=0.5 with rl.kl=none does nothing'),
        ({'advantage': 'max_rl', 'reward__fn': 'test_online:below'}, 'advantage=max_rl takes scores of at least 0'),
        ({'advantage': 'max_rl', 'rl__truncated': 'penalty'}, 'and rl.truncated=penalty takes from them'),
        ({'rl__mismatch_ratio': 'sequence'}, 'rl.mismatch_ratio=sequence with rl.mismatch=none does nothing'),
        ({'rl__kl_target': 3.0}, 'rl.kl_target=3.0 moves the beta of rl.kl=reward, not of none'),
        ({'advantage': 'reinforce++', 'rl__group': 1, 'rl__prompts': 16, 'rl__resample': 1}, 'rl.resample=1 compares'),
        ({'variant': 'drgrpo'}, 'variant=drgrpo (did you mean dr_grpo?)'),
        ({'reward__weights': 'fm:1'}, "reward.weights=fm:1: 'fm' is not one of model"),
        ({'reward__weights': 'model:one'}, 'the weight of model must be a number, as in model:1'),
        ({'advantage': 'groups'}, 'advantage=groups (did you mean group?)'),
    ],
)
def test_settings_that_cannot_be_are_refused(learn, settings, wanted):
    with pytest.raises((UsageError, RunError)) as refused:
        learn('grpo', **settings)
    assert wanted in str(refused.value)


def test_a_reward_from_what_gives_no_scores_is_refused(learn, dialogues):
    with pytest.raises(UsageError, match='is no reward model: name a run that gives scores'):
        learn('grpo', reward_from=str(dialogues.run('sft')))


@pytest.mark.slow
def test_one_response_a_prompt_is_compared_with_the_batch(learn, tmp_path):
    learn('grpo', reward__fn='test_online:short', advantage='reinforce++', rl__group=1, rl__prompts=16, steps=2)
    assert measured(tmp_path / 'run')[1, 'train/grad_norm'] > 0


@pytest.mark.slow
def test_the_commands_know_the_run(learn, tmp_path, call, dialogues, monkeypatch):
    learn('ppo', steps=2)
    run = tmp_path / 'run'
    assert saved_config.about(rundir.read_config(str(run))).output == 'answers'
    assert set(saved_config.parents(rundir.read_config(str(run)))) == {'policy', 'critic', 'reference', 'reward'}
    monkeypatch.chdir(dialogues.lab.folder)
    status, out, _ = call('chat', run, '--prompt=the bucket', '--max_new_tokens=2')
    assert status == 0 and out
    status, out, err = call('evaluate', run, '--rows=4', '--max_new_tokens=2')
    assert status == 0 and one_object(out)['stage'] == 'ppo', err
    own = {'data__mixture': 'chats.jsonl', 'init_from': str(dialogues.run('sft'))}
    words = dialogues.argv('ppo', None, **own, reward_from=str(dialogues.run('reward')), rl__max_new_tokens=8)
    status, out, err = call('inspect', *words, '--rows=1')
    assert status == 0 and 'prompt 0 of' in out and "the data's answer: " in out, err


# ---- what a rollout is made into ----


@pytest.mark.parametrize('variant', settings.VARIANTS)
def test_a_variant_sets_what_nobody_said(variant):
    c = config.base(settings.Grpo)
    c.variant, c.rl.clip_low = variant, 0.123
    grpo.settle(c)
    wanted = settings.VARIANTS[variant] | {'rl.clip_low': 0.123}
    found = dict(config.leaves(c))
    assert {key: found[key] for key in wanted} == wanted
    c.init_from, c.reward_from = 'runs/sft', 'runs/reward'
    c.rl.prompts = c.batch_size
    grpo.check(c)


def of_scores(*scores, length=1):
    """Scored responses to as many questions, of which the i-th asks [i]."""
    asked = [Question([i], [9]) for i in range(len(scores))]
    drawn = [Drawn([i] * length, [0.0] * length, True) for i in range(len(scores))]
    return rollouts.Scored(asked, drawn, {'fn': np.array(scores, np.float32)})


def test_groups_that_teach_nothing_give_way_to_others_in_their_order():
    own, others = of_scores(1, 1, 0, 1, 0, 0), of_scores(5, 5, 2, 3, 7, 8)
    found = own.filled(np.array([True, False, True]), others, np.array([False, True, True]), 2)
    assert found.scores['fn'].tolist() == [2, 3, 0, 1, 7, 8]
    assert [q.prompt for q in found.asked] == [[2], [3], [2], [3], [4], [5]] == [d.ids for d in found.drawn]
    few = own.filled(np.array([True, False, True]), others, np.array([False, False, True]), 2)
    assert few.scores['fn'].tolist() == [7, 8, 0, 1, 0, 0]


def test_the_penalty_rises_over_the_last_fifth():
    assert rollouts.overlong([1, 80, 85, 100], 100).tolist() == [0, 0, -0.25, -1]


def weighed(**own):
    c = config.base(settings.Grpo)
    c.reward_from, c.reward.fn = 'runs/reward', 'test_online:short'
    for name, value in own.items():
        c.reward[name] = value
    return rewards.combined({'model': np.float32([1, 3]), 'fn': np.float32([100, 0])}, c).tolist()


def test_scores_of_several_sources_are_added_by_their_weights():
    assert weighed() == [101, 3]
    assert weighed(weights='fn:0.5') == [51, 3]
    assert weighed(weights='model:2,fn:0') == [2, 6]
    assert weighed(normalise=True) == [0, 0] and weighed(normalise=True, weights='model:1, fn:-1') == [-2, 2]


def test_what_is_gained_is_measured_within_prompts():
    before = np.array([[0, 2], [100, 102]])  # far apart, and each prompt's spread is √2
    found = gains.metrics(np.array([3.0, 101.0]), before)
    assert found['reward'] == 52 and found['reward_before'] == 51 and found['win_rate'] == 0.75
    assert math.isclose(found['reward_gain'], 1 / math.sqrt(2))
    assert gains.metrics(np.ones(2), np.ones((2, 2))) == {'reward': 1, 'reward_before': 1, 'win_rate': 0.5}


def test_beta_moves_towards_its_target(monkeypatch):
    task = object.__new__(ppo.Ppo)
    task.config = config.base(settings.Ppo)
    task.config.rl.kl_target, task.moved_beta = 2.0, np.float32(0.1)
    for kl, error in ((2.1, 0.05), (9.0, 0.2), (0.0, -0.2)):
        monkeypatch.setattr(ppo.Ppo, 'told', lambda self, kl=kl: {'rl/kl': kl})
        before = task.beta
        task._move_beta()
        assert math.isclose(task.beta, before * (1 + error * 256 / 10_000), rel_tol=1e-6)


def test_the_lambda_of_a_policy_grows_with_the_length():
    np.testing.assert_allclose(ppo.by_length(jax.numpy.array([10, 400, 800])), [0.95, 0.95, 0.975])


# ---- several responses to a row ----


def drawn_rows():
    """Per-token arrays [5, 12] of responses of several lengths after prompts of several lengths."""
    draw, rows = np.random.default_rng(0), {}
    lengths, prompts = [12, 7, 3, 5, 4], [3, 2, 1, 4, 0]
    place = np.arange(12)
    used = np.array([place < n for n in lengths])
    rows['segments_BT'] = used.astype(np.int32)
    learned = np.array([place >= p for p in prompts]) & used
    rows['weights_BT'] = learned.astype(np.float32)
    for name in ('logp_BT', 'old_BT', 'sampler_BT', 'advantage_BT'):
        rows[name] = (draw.normal(size=used.shape) * 0.3 * learned).astype(np.float32)
    return rows


def losses_of(rows, ratio, aggregation):
    mask, own = rows['weights_BT'], {'segments_BT': rows['segments_BT']}
    weight = policy.token_weights(mask, aggregation, **own)
    weight *= policy.mismatch_weights(rows['old_BT'], rows['sampler_BT'], mask, how='mask', cap=1.3, ratio=ratio, **own)
    clip = policy.Clip('clip', 0.1, 0.1)
    loss, _ = policy.surrogate(
        rows['logp_BT'], rows['old_BT'], rows['advantage_BT'], mask, ratio=ratio, clip=clip, **own
    )
    return np.sum(weight * loss) / policy.denominator(mask, aggregation, most=5 * 9, **own)


@pytest.mark.parametrize('ratio', ['token', 'sequence'])
@pytest.mark.parametrize('aggregation', ['tokens', 'constant', 'response'])
def test_packed_responses_give_the_loss_of_responses_alone(ratio, aggregation):
    rows = drawn_rows()
    packing = rollouts.Packing.of([12, 7, 3, 5, 4], 12)
    assert sorted(n for row in packing.rows for *_, n in row) == [3, 4, 5, 7, 12] and len(packing.rows) == 3
    packed = packing.lay(rows)
    np.testing.assert_allclose(losses_of(packed, ratio, aggregation), losses_of(rows, ratio, aggregation), rtol=1e-6)
    np.testing.assert_array_equal(packing.unpack(packed['logp_BT'], 5), rows['logp_BT'])


def test_a_row_has_no_more_responses_than_can_be_told_apart():
    packing = rollouts.Packing.of([1] * 40, 64)
    assert [len(row) for row in packing.rows] == [16, 16, 8]
    assert packing.lay({'segments_BT': np.ones((40, 64), np.int32)})['segments_BT'].max() == policy.RESPONSES


def test_microbatches_after_the_last_token_are_left_out():
    segments = np.zeros((6, 2), np.int32)  # rows 0, 2, 4 are of microbatch 0 of two
    assert int(step.holding({'segments_BT': jax.numpy.asarray(segments)}, 2)) == 0
    segments[4, 1] = 1
    assert int(step.holding({'segments_BT': jax.numpy.asarray(segments)}, 2)) == 1
    segments[1, 0] = 1
    assert int(step.holding({'segments_BT': jax.numpy.asarray(segments)}, 2)) == 2
    assert int(step.holding({'segments_BT': jax.numpy.asarray(segments)}, 3)) == 2  # rows 1 and 4
