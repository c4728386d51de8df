"""Runs that learn from verifiers and judges, and what they tell."""

import pytest
import running
from running import lines, measured
from test_data_gym import SMALL, cache  # noqa: F401
from test_online import learn  # noqa: F401

from lm.errors import UsageError


@pytest.mark.slow
def test_a_run_tells_what_failed_and_what_was_exact(learn, tmp_path):  # noqa: F811
    own = {'reward__verify': 'scripted:first_letter', 'reward__judge': 'scripted:judge'}
    learn('grpo', reward_from='none', steps=2, eval__every=2, **own)
    found = measured(tmp_path / 'run')
    assert found[2, 'rl/judge_failed'] == 5 and 0 <= found[2, 'rl/verifier_failed'] <= 16
    assert 0 <= found[2, 'rl/exact'] <= 1 and 0 <= found[2, 'eval/chats.jsonl/exact'] <= 1
    assert 'eval/chats.jsonl/exact_sampled' in lines(tmp_path / 'run')[-1]


@pytest.mark.slow
def test_a_constant_answer_ends_a_run_before_it_begins(learn, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match='the best constant answer'):
        learn('grpo', reward_from='none', reward__verify='scripted:anything')
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


@pytest.mark.slow
def test_a_run_on_a_set_of_reasoning_gym(learn, cache, tmp_path, call):  # noqa: F811
    own = {'data__mixture': SMALL, 'seq_len': 128, 'reward_from': 'none', 'reward__verify': 'gym'}
    learn('grpo', steps=2, eval__every=2, **own)
    found = measured(tmp_path / 'run')
    assert found[2, 'rl/verifier_failed'] == 0 and found[2, 'rl/exact'] == found[2, 'rl/reward']
    assert 0 <= found[2, f'eval/{SMALL}/exact'] <= 1
    status, out, err = call('evaluate', tmp_path / 'run', '--tasks=answers', '--rows=4', '--max_new_tokens=2')
    assert status == 0 and f'eval/{SMALL}/exact' in running.one_object(out), err
