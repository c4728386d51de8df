"""Held-out rewards of stages that learn from what their policy draws, beside those of the policy as it began."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data import chats
from lm.data.chats import Question
from lm.data.prepare import PreparedSource
from lm.errors import UsageError
from lm.evals import gains
from lm.model.roles import Roles, assemble
from lm.rl import rewards
from lm.runs import loading
from lm.training import step as training

HELD_OUT = 128  # prompts of each source at most that are answered for a score


def gained(task: Any, state: training.TrainState) -> list[dict[str, float]]:
    """Returns the gains of each source: the scores of responses to its held-out prompts beside those of the policy as
    it began."""
    models, found = {**assemble(state.trainable, state.frozen), 'policy': state.models['policy']}, []
    task.before = task.before or _of_the_beginning(task, models)
    for s, before in zip(task.data.own.sources, task.before, strict=True):
        if not before:
            found.append({})
            continue
        now, count = _scores(task, models, s), len(questions(task, s))
        both = rewards.combined({k: np.concatenate([before[k], x]) for k, x in now.items()}, task.config)
        found.append(gains.metrics(both[-count:], both[:-count].reshape(gains.BASELINE, count).T))
    return found


def _of_the_beginning(task: Any, models: Roles) -> list[dict[str, np.ndarray]]:
    """Scores BASELINE responses to each held-out prompt by the run that this one starts from, for each source; nothing
    where that run is gone or has other weights now."""
    if 'reference' in models:
        first = models['reference']
    else:
        try:
            own = task.config.init_from, loading.abstract_params(task.cfg), task.began
            first, _ = loading.read_unchanged(*own, warn=task.recorder.say)
        except UsageError as error:
            task.recorder.say(f'nothing to compare held-out scores with: {error}')
            return [{} for _ in task.data.own.sources]
    began = {**models, 'policy': first}
    return [_scores(task, began, s, gains.BASELINE) for s in task.data.own.sources]


def questions(task: Any, s: PreparedSource) -> list[Question]:
    """The first held-out prompts of a source that leave room for a response."""
    room = task.width - task.config.rl.max_new_tokens
    found = chats.questions(s.heldout, min(HELD_OUT, task.config.eval.rows), longest=task.config.seq_len)
    return [q for q in found if len(q.prompt) <= room]


def _scores(task: Any, models: Roles, s: PreparedSource, each: int = 1) -> dict[str, np.ndarray]:
    """{source of scores: those of so many responses to each held-out prompt}; {} where there is none."""

    def answer(some: Sequence[Question], at: int) -> dict[str, np.ndarray]:
        return task.scores(models, some, task.draw(models['policy'], some, [task.config.seed, at, HELD_OUT]))[0]

    asked = questions(task, s) * each
    return gains.scores(answer, asked, rows=task.responses) if asked else {}
