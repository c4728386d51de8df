"""Rewards: (prompts, responses) -> a float score of each response."""

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lm import sharding
from lm.config import Config, split_run
from lm.data.chats import Question
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.runs import reward_scale, rundir, saved_config
from lm.runs.reward_scale import Scale
from lm.sampling.generate import Drawn

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


class Model(NamedTuple):
    """A reward model in use: a row has `width` tokens at most, and `rows` of them are in memory at once."""

    params: Any
    cfg: ModelConfig
    scale: Scale
    width: int
    rows: int


def check_model(run: str, *, tokenizer: str, beside: str) -> Mapping[str, Any]:
    """The config.json of a reward model. Raises UsageError if it is none, or its tokenizer has not the fingerprint of
    that of the run which it is to score."""
    saved = rundir.read_config(run)
    if saved_config.about(saved).output != 'scores':
        raise UsageError(f'reward_from={run} is no reward model: name a run that gives scores')
    if saved.get('tokenizer') not in (None, tokenizer):
        raise UsageError(f'reward_from={run} has another tokenizer than {beside}')
    return saved


def read_scale(run: str, step: int) -> Scale:
    """The scale of the scores of a reward run's checkpoint."""
    return reward_scale.read(epath.Path(split_run(run)[0]), step)


def scores(
    config: Config, tokenizer: Tokenizer, asked: Sequence[Question], drawn: Sequence[Drawn], model: Model | None
) -> np.ndarray:
    """The score of each response by all sources that a config has, float32 [N]. Of several processes one asks the
    user's function, and tells the others.

    Args:
      model: that of `reward_from`, if there is one.
    """
    total, prompts = np.zeros(len(drawn), np.float32), [tokenizer.decode(q.prompt) for q in asked]
    if model is not None:
        ids = [[*q.prompt, *d.ids] for q, d in zip(asked, drawn, strict=True)]
        found = of_model(model.params, model.cfg, model.scale, ids, width=model.width, rows=model.rows)
        total += checked(found, prompts, config.reward_from)
    if config.reward.fn:
        told, name = None, f'reward.fn={config.reward.fn}'
        if processes.first():
            said = [tokenizer.decode(d.ids[:-1] if d.ended else d.ids) for d in drawn]
            wanted = [tokenizer.decode(q.answer) for q in asked]
            try:
                given = function(config.reward.fn)(prompts, said, wanted)
            except (Exception, SystemExit) as error:  # a user's own code
                raise RunError(f'{name}: {type(error).__name__}: {error}') from error
            told = checked(given, prompts, name).tolist()
        total += np.asarray(processes.all_gather(told)[0], np.float32)
    return total


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
