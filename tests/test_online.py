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

from lm import sharding
from lm.errors import Preempted, RunError, UsageError
from lm.runs import rundir, saved_config

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
    assert found[32, 'rl/reward'] > found[8, 'rl/reward'] + 0.1


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
        learn('grpo', reward__fn='test_online:short', steps=64, rl__kl_budget=1e-3, optim__lr=1e-2)
    assert 'being hacked' in status(tmp_path / 'run')['reason']


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
