"""Verifiers and judges: what each response earns, what fails, and what is refused before a run."""

import numpy as np
import pytest
from test_data_gym import SMALL, cache  # noqa: F401

from lm import settings, workers
from lm.config import base, check, override
from lm.data import gym
from lm.data.chat_template import ChatTemplate
from lm.data.chats import Question
from lm.data.tokenizer import train_tokenizer
from lm.errors import RunError, UsageError
from lm.rl import verifiers
from lm.rl.judge import Judge
from lm.stages import online


class Letters:
    """A tokenizer whose ids are characters."""

    def decode(self, ids):
        return ''.join(map(chr, ids))


def asked(prompt, gold):
    return Question([ord(c) for c in prompt], [ord(c) for c in gold])


def own(name, **options):
    """The verifier of a function here."""
    decode = Letters().decode
    pool = workers.Pool(f'scripted:{name}', seconds=1, size=2)
    call = lambda question, text: [decode(question.prompt), text, decode(question.answer)]
    return verifiers.Verifier(f'reward.verify={name}', pool, call, **({'round': False, 'failed': -1.0} | options))


def test_what_is_no_finite_number_is_counted():
    verdict = own('by_length')([asked('q', 'a')] * 7, ['x' * n for n in range(7)])
    assert verdict.scores.tolist() == [0.25, -1, -1, -1, 1, -1, 1] and verdict.failed == 4
    assert verdict.problem == 'it gave nan, which is no finite number' and verdict.exact == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('anything', "an empty answer 0.00, the best constant answer .'a0'. 1.00: a policy would learn"),
        ('nothing', 'an empty answer 1.00'),
        ('not_a_number', "the best constant answer .'nan'. 1.00"),
        ('broken', "fails for every answer, the gold ones too .KeyError: 'gold'."),
    ],
)
def test_a_reward_for_no_skill_is_refused(name, wanted):
    with pytest.raises(UsageError, match=wanted):
        verifiers.baseline(own(name), [asked('q', f'a{i}') for i in range(4)], Letters())


def test_what_the_best_constant_earns_is_told():
    line = verifiers.baseline(own('first_letter'), [asked('q', letter) for letter in 'aaabcdef'], Letters())
    assert (
        'the gold answers earn 1.00, an empty answer 0.00, the best constant answer (' in line and "'a') 0.38" in line
    )


@pytest.mark.slow
def test_a_set_s_own_scorer(cache):  # noqa: F811
    ours = train_tokenizer([f'State the final answer: {i}\n' for i in range(200)], vocab_size=300)
    template, items = ChatTemplate(), [item for item in gym.items(SMALL) if not item.heldout][:3]
    items += [item for item in gym.items(SMALL) if item.heldout][:1]
    prompts = [template.prompt(ours, [{'role': 'user', 'content': item.question}]) for item in items]
    questions = [Question(ids, []) for ids in prompts]
    texts = [items[0].answer, f'it is {items[1].answer}', '', f'{items[3].answer}.0']
    exact = verifiers.of_gym(ours, template, (SMALL,))(questions, texts)
    partial = verifiers.of_gym(ours, template, (SMALL,), partial=True)(questions, texts)
    assert exact.scores.tolist() == [1, 0, 0, 1] and exact.failed == partial.failed == 0
    assert 0 < partial.scores[1] < 1 and partial.scores[[0, 3]].tolist() == [1, 1]
    other = items[0]._replace(question='What?')
    pool = workers.Pool('lm.data.gym_worker:score', seconds=5, size=1)
    problem = pool.map([gym.call(other, gym.parse(SMALL), '1')])[0].problem
    assert problem == 'ValueError: the item has another question in this process'


# ---- judges ----


def test_a_judge_may_have_no_score():
    found = Judge('scripted:judge', seconds=5, failed=-2.0)
    verdict = found(['q'] * 4, list('abcd'))
    np.testing.assert_allclose(verdict.scores, [0, 0.1, -2, 0.3], rtol=1e-6)
    assert verdict.failed == 1


def test_a_judge_s_scores_are_looked_at():
    verdict = Judge('scripted:moody', seconds=5, failed=0.0)(['q'] * 4, list('abcd'))
    assert verdict.scores.tolist() == [0, 1, 0, 0.5] and verdict.failed == 2


@pytest.mark.parametrize(
    ('mood', 'wanted'),
    [
        ('sleep', 'it ended, or took over 0.2 s'),
        ('die', 'it ended, or took over 0.2 s'),
        ('exit', 'SystemExit: no such model'),
        ('few', 'gave 1 scores for 2 responses'),
        ('text', 'gave no list for 2 responses'),
    ],
)
def test_a_judge_that_fails_ends_the_run(mood, wanted):
    with pytest.raises(RunError, match=wanted):
        Judge('scripted:moody', seconds=0.1, failed=0.0)([mood] * 2, ['a', 'b'])


# ---- in a run ----


def grpo(*values):
    """The settings of a run that is scored by a verifier alone."""
    config = base(settings.Grpo)
    config.init_from = 'runs/sft'
    for key, text in (('data.mixture', 'chats.jsonl'), *values):
        override(config, key, text)
    return config


@pytest.mark.parametrize(
    ('values', 'wanted'),
    [
        ([('reward.verify', 'gym')], "scores answers to gym:NAME, and data.mixture has 'chats.jsonl'"),
        ([('reward.verify', 'gym'), ('data.mixture', 'gym:coin_flip')], 'is refused: one answer to everything'),
        ([('reward.verify', 'gymm')], 'reward.verify=gymm must be package.module:function or gym'),
        ([('reward.verify', 'nowhere.at:all')], 'reward.verify=nowhere.at:all: ModuleNotFoundError'),
        ([('reward.judge', 'gym')], 'reward.judge=gym must be package.module:function'),
        ([('reward.judge', 'math:nothing')], 'reward.judge=math:nothing: AttributeError'),
        ([('reward.fn', 'math:sin'), ('reward.partial', 'true')], 'reward.partial=true is for reward.verify=gym'),
        ([], 'needs a reward: set reward_from=DIR, or reward.fn, reward.verify'),
    ],
)
def test_settings_that_cannot_be(values, wanted):
    with pytest.raises(UsageError) as refused:
        online.check(grpo(*values))
    assert wanted in str(refused.value)


@pytest.mark.parametrize(('key', 'value'), [('seconds', '0'), ('failed', 'nan'), ('failed', 'inf'), ('seconds', 'nan')])
def test_bounds(key, value):
    with pytest.raises(UsageError, match=f'reward.{key}'):
        check(grpo((f'reward.{key}', value)))
