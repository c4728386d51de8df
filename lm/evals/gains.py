"""Gains of a policy in reward over the one that it began as."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

BASELINE = 8  # responses of the earlier policy to each prompt


def scores(answer: Callable[[Sequence[Any], int], Any], asked: Sequence[Any], *, rows: int) -> Any:
    """The scores of a response to each question, arrays [N]: `answer(questions, number of the first)` draws and scores
    as many as `rows`. The last of them are filled up, so that all have one shape."""
    found = []
    for at in range(0, len(asked), rows):
        found.append(answer([asked[i % len(asked)] for i in range(at, at + rows)], at))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(asked)], *found)


def metrics(now: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Metrics of scores of one response to each prompt, [P], beside several of the earlier policy, [P, n].

    A reward model is free to shift its scores from prompt to prompt (Bradley and Terry, 1952: only differences count),
    so a spread over prompts is mostly between them. Scores are therefore centred on the earlier policy's of the same
    prompt, and their unit is its standard deviation within a prompt.

    reward, reward_before    mean scores
    reward_gain              the mean of (score − the earlier policy's mean)/its standard deviation within a prompt
    win_rate                 how often a response scores higher than one of the earlier policy; equal ones count half
    """
    spread = float(np.sqrt(np.mean(np.var(before, axis=1, ddof=1))))
    above = now[:, None] - before
    found = {
        'reward': float(now.mean()), 'reward_before': float(before.mean()),
        'win_rate': float(np.mean((above > 0) + (above == 0) / 2)),
    }  # fmt: skip
    return found | ({'reward_gain': float(above.mean()) / spread} if spread else {})
