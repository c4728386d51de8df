"""Rewards: a float score of each response, from one source or several with their weights."""

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
from lm.config import Config, nearest, split_run
from lm.data.chats import Question
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.runs import reward_scale, rundir, saved_config
from lm.runs.reward_scale import Scale
from lm.sampling.generate import Drawn
from lm.settings import FLOAT32_END

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


WAYS = 'reward_from=DIR, or reward.fn, reward.verify or reward.judge=package.module:function, or reward.verify=gym'
ROUND = 32  # tokens to which widths are rounded up, so that few shapes are compiled


class Texts(NamedTuple):
    """Responses as text: the prompts with the marks of their conversation, what was drawn, and the data's own answers.

    A response has no end-of-turn token; one that has ended and one that has not read the same.
    """

    prompts: list[str]
    responses: list[str]
    answers: list[str]


# ---- several sources ----


def sources(config: Config) -> tuple[str, ...]:
    """Names of the sources that a config has: `model` (reward_from), and those of its group `reward`."""
    own = ('fn', 'verify', 'judge')
    return ('model',) * bool(config.reward_from) + tuple(name for name in own if config.reward[name])


def weights(config: Config) -> dict[str, float]:
    """{source: weight}, 1 where nothing is said. Raises UsageError for a name that is no source, or what is no
    number."""
    names = sources(config)
    found, text = dict.fromkeys(names, 1.0), config.reward.weights
    for part in (text or '').split(',') if text else ():
        name, _, number = part.strip().partition(':')
        if name not in names:
            raise UsageError(f'reward.weights={text}: {name!r}{nearest(name, names)} is not one of {", ".join(names)}')
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise UsageError(f'reward.weights={text}: the weight of {name} must be a number, as in {name}:1')
    return found


def combined(found: Mapping[str, np.ndarray], config: Config, *, normalise: bool | None = None) -> np.ndarray:
    """Σ weight × score, float32 [N]. With `normalise` (None: as the config says) each source has mean 0 and standard
    deviation 1 over the N first, so that one of a larger scale does not drown the others (GDPO, arXiv 2601.05242, does
    so within each group)."""
    total = np.zeros(len(next(iter(found.values()))), np.float32)
    for name, weight in weights(config).items():
        score = found[name]
        if config.reward.normalise if normalise is None else normalise:
            score = (score - score.mean()) / (score.std() or 1)
        total += np.float32(weight) * score
    return total


def of_texts(config: Config, texts: Texts) -> dict[str, np.ndarray]:
    """{source: scores [N]} of the sources that read text. One process asks them, and tells the others."""
    told = {}
    if processes.first() and config.reward.fn:
        name = f'reward.fn={config.reward.fn}'
        try:
            given = function(config.reward.fn)(*texts)
        except (Exception, SystemExit) as error:  # a user's own code
            raise RunError(f'{name}: {type(error).__name__}: {error}') from error
        told['fn'] = checked(given, texts.prompts, name).tolist()
    return {name: np.asarray(x, np.float32) for name, x in processes.all_gather(told)[0].items()}


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
) -> dict[str, np.ndarray]:
    """{source: the score of each response}, float32 [N], of the reward model and the user's function, as far
    as a config has them.

    Args:
      model: that of `reward_from`, if there is one.
    """
    texts = Texts(
        [tokenizer.decode(q.prompt) for q in asked],
        [tokenizer.decode(d.ids[:-1] if d.ended else d.ids) for d in drawn],
        [tokenizer.decode(q.answer) for q in asked],
    )
    found = {}
    if model is not None:
        ids = [[*q.prompt, *d.ids] for q, d in zip(asked, drawn, strict=True)]
        told = of_model(model.params, model.cfg, model.scale, ids, width=model.width, rows=model.rows)
        found['model'] = checked(told, texts.prompts, config.reward_from)
    return found | of_texts(config, texts)


# ---- one source ----


def checked(scores: Any, prompts: Sequence[str], name: str) -> np.ndarray:
    """The scores as float32 [N]. Raises RunError for another number of them, None or what is not finite, by its
    prompt."""
    found = list(scores) if isinstance(scores, Sequence | np.ndarray) else None
    if found is None or len(found) != len(prompts):
        got = 'no list' if found is None else f'{len(found)} scores'
        raise RunError(f'{name} gave {got} for {len(prompts)} responses: it must give a number for each')
    for score, prompt in zip(found, prompts, strict=True):
        value = score.item() if isinstance(score, np.number) else score  # a float32's range ends below the bound
        if not isinstance(value, int | float) or not abs(value) < FLOAT32_END:
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
      ids: of each, all at most `width`. rows: how many are in memory at once, those of like length together; a part of
        N that the mesh can share.
    """
    length_B, raw_B = np.array([len(own) for own in ids], np.int32), np.zeros(len(ids), np.float32)
    order_B, unit = np.argsort(length_B, kind='stable'), ROUND * jax.sharding.get_mesh().shape.get('seq', 1)
    for some in (order_B[at : at + rows] for at in range(0, len(ids), rows)):
        tokens_BT = np.zeros((len(some), min(width, math.ceil(length_B[some].max() / unit) * unit)), np.int32)
        for row_T, i in zip(tokens_BT, some, strict=True):
            row_T[: length_B[i]] = ids[i]
        placed = sharding.shard_batch({'tokens_BT': tokens_BT})
        raw_B[some] = np.asarray(_last_scores(params, placed['tokens_BT'], length_B[some], cfg=cfg))
    return (raw_B - scale.mean) / np.float32(scale.std)
