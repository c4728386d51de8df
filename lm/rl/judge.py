"""A judge: scores of a rollout's responses by a model or by people, `reward.judge=package.module:function`.

The function takes (prompts, responses), lists of texts, and gives a list with a score for each, or None where it could
make out none (a model's answer that cannot be parsed). It runs in a worker process, in which it may keep a model, and
has `reward.seconds` a response.
"""

from collections.abc import Sequence

import numpy as np

from lm import workers
from lm.errors import RunError
from lm.rl.verifiers import Verdict, checked

MEBIBYTES = 1 << 16  # a model of its own finds room


class Judge:
    """Asks one worker about all responses of a rollout at once."""

    def __init__(self, function: str, *, seconds: float, failed: float) -> None:
        self.name, self.seconds, self.failed = f'reward.judge={function}', seconds, failed
        self._function, self._pool = function, None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Verdict:
        """Raises RunError if the judge raises, hangs, dies, or gives another number of scores; UsageError if it cannot
        be imported."""
        limit = self.seconds * len(responses)
        if self._pool is None or self._pool.seconds != limit:
            options = {'size': 1, 'mebibytes': MEBIBYTES, 'called': self.name}
            self._pool = workers.Pool(self._function, seconds=limit, **options)
        value, problem = self._pool.map([[prompts, responses]])[0]
        if problem:
            raise RunError(f'{self.name}: {problem}')
        if not isinstance(value, list) or len(value) != len(responses):
            got = f'{len(value)} scores' if isinstance(value, list) else 'no list'
            raise RunError(f'{self.name} gave {got} for {len(responses)} responses')
        found = [checked(workers.Outcome(score)) for score in value]
        problems = [outcome.problem for outcome in found if outcome.problem]
        scores = [self.failed if outcome.problem else outcome.value for outcome in found]
        return Verdict(np.array(scores, np.float32), len(problems), problems[0] if problems else None)
