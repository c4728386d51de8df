"""The verifier and the judge of a run, as its rollouts and its evaluations ask them: one process asks, and tells the
others."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lm.config import Config
from lm.data import gym
from lm.data.chat_template import ChatTemplate
from lm.data.chats import Question
from lm.data.prepare import Prepared
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.multihost import processes
from lm.rl import rewards, verifiers
from lm.rl.judge import Judge
from lm.rl.verifiers import Verdict, Verifier
from lm.sampling.generate import Drawn

# Of a rollout: the part of responses with a score of exactly 1, and how many got none from the verifier or the judge.
MEASURES = ('exact', 'verifier_failed', 'judge_failed')


def check(config: Config) -> None:
    """Raises UsageError for a config without a reward, or with one of any kind that makes no sense."""
    if not rewards.sources(config):
        raise UsageError(f'stage={config.stage} needs a reward: set {rewards.WAYS}')
    verifiers.check(config)
    if config.reward.fn:
        rewards.function(config.reward.fn)
    rewards.weights(config)


class Verified:
    """The scores that a verifier and a judge give the responses of a run."""

    def __init__(self, config: Config, tokenizer: Tokenizer, template: ChatTemplate, names: Sequence[str]) -> None:
        """`names` are those of the sources that are asked about."""
        reward, self._config, self._tokenizer, self._asked = config.reward, config, tokenizer, (template, tuple(names))
        self._judge = Judge(reward.judge, seconds=reward.seconds, failed=reward.failed) if reward.judge else None

    @cached_property
    def verifier(self) -> Verifier | None:
        return verifiers.of_config(self._config, self._tokenizer, *self._asked)

    def baseline(self, questions: Sequence[Question]) -> str | None:
        """`verifiers.baseline` of the verifier, if there is one."""
        if self.verifier is None:
            return None
        line = verifiers.baseline(self.verifier, questions, self._tokenizer) if processes.first() else None
        return processes.all_gather(line)[0]

    def scores(
        self, questions: Sequence[Question], drawn: Sequence[Drawn]
    ) -> tuple[dict[str, np.ndarray], Counter[str]]:
        """({'verify', 'judge'}: the score of each response, float32 [N], where there is one; how many got none, by the
        names of MEASURES)."""
        found, failed, decode = {}, Counter(), self._tokenizer.decode
        ids = [d.ids[:-1] if d.ended else d.ids for d in drawn]
        if verifier := self.verifier:
            verdict = _by_first(lambda: verifier(questions, [decode(own) for own in ids]))
            found['verify'] = verdict.scores
            failed['verifier_failed'] = verdict.failed
        if judge := self._judge:
            verdict = _by_first(lambda: judge([decode(q.prompt) for q in questions], [decode(own) for own in ids]))
            found['judge'] = verdict.scores
            failed['judge_failed'] = verdict.failed
        return found, failed


def _by_first(ask: Callable[[], Verdict]) -> Verdict:
    """The verdict that process 0 comes to, in every process."""
    verdict = ask() if processes.first() else None
    told: list[Any] = processes.all_gather(verdict and [verdict.scores.tolist(), *verdict[1:]])[0]
    return Verdict(np.array(told[0], np.float32), *told[1:])


# ---- evaluation ----


def own_verifier(tokenizer: Tokenizer, template: Any, prepared: Prepared, source: str) -> Verifier | None:
    """The verifier that a source brings along: that of gym:NAME."""
    if not gym.is_gym(source):
        return None
    return verifiers.of_gym(tokenizer, template, tuple(s.name for s in prepared.sources if gym.is_gym(s.name)))


def accuracy(verifier: Verifier, questions: Sequence[Question], texts: Sequence[str]) -> float:
    """The part of answers that a verifier gives exactly 1; 0 of none."""
    return _by_first(lambda: verifier(questions, texts)).exact if questions else 0.0
