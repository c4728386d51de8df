"""Rewards: (prompts, responses) -> a float score of each response."""

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.errors import RunError, UsageError
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.runs.reward_scale import Scale

# (prompts, responses, answers) -> scores; answers are the data's own.
Function = Callable[[Sequence[str], Sequence[str], Sequence[str]], Any]


def function(name: str) -> Function:
    """A user's own reward, 'package.module:function'. Raises UsageError if there is none."""
    module, _, attribute = name.partition(':')
    if not module or not attribute:
        raise UsageError(f'reward.fn={name}: must be package.module:function')
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever a person's own module does
        raise UsageError(f'reward.fn={name}: {type(error).__name__}: {" ".join(str(error).split())[:200]}') from error
    if not callable(found):
        raise UsageError(f'reward.fn={name} is no function')
    with contextlib.suppress(ValueError, TypeError):  # one of C, whose parameters nobody knows
        if 'answers' in inspect.signature(found).parameters:
            return lambda prompts, responses, answers: found(prompts, responses, answers=answers)
    return lambda prompts, responses, answers: found(prompts, responses)


def checked(scores: Any, prompts: Sequence[str], name: str) -> np.ndarray:
    """The scores as float32 [N]. Raises RunError for another number of them, None or what is not finite, by its
    prompt."""
    found = list(scores) if isinstance(scores, Sequence | np.ndarray) else None
    if found is None or len(found) != len(prompts):
        got = 'no list' if found is None else f'{len(found)} scores'
        raise RunError(f'{name} gave {got} for {len(prompts)} responses: it must give a number for each')
    for score, prompt in zip(found, prompts, strict=True):
        number = isinstance(score, int | float | np.number) and math.isfinite(float(score))
        if not number:
            raise RunError(f'{name} gave {score!r} for an answer to {prompt[:80]!r}: a score must be a finite number')
    return np.asarray(found, np.float32)


@partial(jax.jit, static_argnames='cfg')
def _last_scores(params: Any, tokens_BT: jax.Array, length_B: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return sharding.replicated(sequences.last_scores(params, cfg, tokens_BT, length_B))


def of_model(
    params: Any, cfg: ModelConfig, scale: Scale, ids: Sequence[Sequence[int]], *, width: int, rows: int
) -> np.ndarray:
    """A reward model's normalised scores of prompts with their responses, float32 [N].

    Args:
      ids: of each, all at most `width`. rows: how many are in memory at once; a part of N that the mesh can share.
    """
    tokens_BT, length_B = np.zeros((len(ids), width), np.int32), np.array([len(own) for own in ids], np.int32)
    for row_T, own in zip(tokens_BT, ids, strict=True):
        row_T[: len(own)] = own
    raw = []
    for part in (slice(at, at + rows) for at in range(0, len(ids), rows)):
        placed = sharding.shard_batch({'tokens_BT': tokens_BT[part]})
        raw.append(np.asarray(_last_scores(params, placed['tokens_BT'], length_B[part], cfg=cfg)))
    return (np.concatenate(raw) - scale.mean) / np.float32(scale.std)
