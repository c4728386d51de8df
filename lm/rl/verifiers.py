"""Verifiers: the score of one response by a program, in bounded worker processes.

    reward.verify=gym                      the own scorer of the reasoning-gym set that the prompt belongs to
    reward.verify=package.module:function  yours: (prompt, response, gold answer) -> a number

A call that raises, hangs, dies or gives no finite number is counted, and its response has the score `reward.failed`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lm import workers
from lm.config import Config
from lm.data import gym
from lm.data.chat_template import ChatTemplate
from lm.data.chats import Question
from lm.data.sources import parse_mixture
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.settings import FLOAT32_END

GYM = 'gym'
CONSTANTS, PROMPTS = 6, 128  # answers that are tried on so many prompts before a run
TRICKS = 'nan', '0', '1', 'True', '[]'  # tried beside them: complex_arithmetic of reasoning-gym 0.1.25 pays 1 for nan
MOST = 0.5  # of the reward that an answer may earn which does not look at the prompt


class Verdict(NamedTuple):
    """The scores of responses [N], how many of them failed, and why the first one did."""

    scores: np.ndarray
    failed: int
    problem: str | None

    @property
    def exact(self) -> float:
        """The part of the scores that is exactly 1."""
        return float(np.mean(self.scores == 1))


@dataclass(frozen=True, eq=False)
class Verifier:
    """Scores responses to questions.

    Attributes:
      call: (question, response) -> the arguments of the pool's function.
      round: whether a score is 1 or 0. failed: the score of a response whose call failed.
    """

    name: str
    pool: workers.Pool
    call: Callable[[Question, str], list[Any]]
    round: bool
    failed: float

    def __call__(self, questions: Sequence[Question], responses: Sequence[str]) -> Verdict:
        """Raises UsageError if the function cannot be imported."""
        calls = [self.call(question, text) for question, text in zip(questions, responses, strict=True)]
        found = [checked(outcome) for outcome in self.pool.map(calls)]
        problems = [outcome.problem for outcome in found if outcome.problem]
        scores = np.array([self.failed if o.problem else o.value for o in found], np.float32)
        if self.round:
            scores = (scores == 1).astype(np.float32)
        return Verdict(scores, len(problems), problems[0] if problems else None)


def checked(outcome: workers.Outcome) -> workers.Outcome:
    """The outcome, with a problem where its value is no finite number."""
    value = outcome.value
    if outcome.problem or (isinstance(value, int | float) and abs(value) < FLOAT32_END):
        return outcome
    return workers.Outcome(None, f'it gave {str(value)[:80]}, which is no finite number')


def check(config: Config) -> None:
    """Raises UsageError for settings of verifiers that make no sense, before anything is read."""
    reward = config.reward
    if reward.verify == GYM:
        names = [name for name, _ in parse_mixture(config.data.mixture)]
        if other := next((name for name in names if not gym.is_gym(name)), None):
            raise UsageError(f'reward.verify=gym scores answers to gym:NAME, and data.mixture has {other!r}')
        for name in names:
            gym.parse(name)
    elif reward.partial:
        raise UsageError('reward.partial=true is for reward.verify=gym: your own function gives what it gives')
    for key, value in (('verify', None if reward.verify == GYM else reward.verify), ('judge', reward.judge)):
        if value is None:
            continue
        if not all(value.partition(':')):
            raise UsageError(f'reward.{key}={value} must be package.module:function' + ' or gym' * (key == 'verify'))
        pool = workers.Pool(value, seconds=reward.seconds, size=1, called=f'reward.{key}={value}')
        pool.probe()
        pool.close()


def of_config(config: Config, tokenizer: Tokenizer, template: ChatTemplate, names: tuple[str, ...]) -> Verifier | None:
    """The verifier of a run, if it has one, of answers about these sources."""
    reward = config.reward
    if reward.verify is None:
        return None
    if reward.verify == GYM:
        options = {'partial': reward.partial, 'seconds': reward.seconds, 'failed': reward.failed}
        return of_gym(tokenizer, template, names, **options)
    called = f'reward.verify={reward.verify}'
    pool = workers.Pool(reward.verify, seconds=reward.seconds, called=called)
    call = lambda question, text: [tokenizer.decode(question.prompt), text, tokenizer.decode(question.answer)]
    return Verifier(called, pool, call, round=False, failed=reward.failed)


@lru_cache(maxsize=2)
def of_gym(
    tokenizer: Tokenizer, template: ChatTemplate, names: tuple[str, ...], partial: bool = False, seconds: float = 5,
    failed: float = 0,
) -> Verifier:  # fmt: skip
    """The verifier of sources `gym:NAME`. An item is found by the ids of its prompt."""
    found = {}
    for name in names:
        address = gym.parse(name)
        for item in gym.items(name):
            ids = template.prompt(tokenizer, [{'role': 'user', 'content': item.question}])
            found.setdefault(tuple(ids), (item, address))

    def call(question: Question, text: str) -> list[Any]:
        item, address = found[tuple(question.prompt)]
        return gym.call(item, address, text)

    pool = workers.Pool('lm.data.gym_worker:score', seconds=seconds, called='reward.verify=gym')
    return Verifier('gym', pool, call, round=not partial, failed=failed)


# ---- before a run ----


def baseline(verifier: Verifier, questions: Sequence[Question], tokenizer: Tokenizer) -> str:
    """A line on what answers earn that do not look at the prompt: the best of the commonest gold answers, and none.

    Raises UsageError if one of them earns MOST or more, or every call fails, those with the gold answers too.
    """
    some = [questions[i * len(questions) // PROMPTS] for i in range(PROMPTS)] if len(questions) > PROMPTS else questions
    golds = [tokenizer.decode(q.answer).strip() for q in some]
    common = [text for text, _ in Counter(golds).most_common(CONSTANTS)]
    tried = list(dict.fromkeys(['', *common, *TRICKS]))
    texts = [*golds, *(text for text in tried for _ in some)]
    verdict = verifier([*some] * (len(tried) + 1), texts)
    if verdict.failed == len(texts):
        raise UsageError(f'{verifier.name} fails for every answer, the gold ones too ({verdict.problem})')
    gold, *means = verdict.scores.reshape(-1, len(some)).mean(1).tolist()
    best = max(range(1, len(tried)), key=lambda i: means[i], default=0)
    line = (
        f'{verifier.name}: of {len(some)} prompts the gold answers earn {gold:.2f}, an empty answer {means[0]:.2f}, '
        f'the best constant answer ({tried[best][:40]!r}) {means[best]:.2f}'
    )
    if max(means) >= MOST:
        raise UsageError(f'{line}: a policy would learn to say that and no more; take other data')
    return line + (f'; {verdict.failed:,} of {len(texts):,} calls failed ({verdict.problem})' if verdict.failed else '')
