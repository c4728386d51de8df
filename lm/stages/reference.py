"""The reference of preference optimisation: the run that it starts from.

What that run says of the pairs is computed once and kept in the cache under all that it depends on, so that the step
holds one model. config.json keeps a digest of its weights: a run goes on by what is in the cache when its parent is
gone, and never with another reference than it began with.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files
from lm.config import Config
from lm.data import cache, store
from lm.data import pairs as pair_data
from lm.data.prepare import PreparedSource
from lm.errors import UsageError
from lm.evals import answers, preferences
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.runs import loading
from lm.runs.saved_config import Parent
from lm.stages import language, pairs
from lm.stages.pairs import PairData, PairTask
from lm.stages.spec import Say

RECIPE = 2  # part of the cache's key: raise it when what the reference says changes


class Measured(NamedTuple):
    """A model's measurements on held-out pairs: log-probs [pairs, sides], and how it answers their prompts."""

    log_probs: np.ndarray
    answered: dict[str, float]


def measure(task: PairTask, params: Any) -> list[Measured]:
    """Measures each source's held-out pairs, the first config.eval.rows."""
    config, cfg = task.config, task.cfg
    return [
        Measured(
            preferences.log_probs(params, cfg, pairs.in_order(config, s.heldout, config.eval.rows), s.heldout.pairs),
            _answered(task, params, s),
        )
        for s in task.data.own.sources
    ]


def _answered(task: PairTask, params: Any, s: PreparedSource) -> dict[str, float]:
    questions = pair_data.questions(s.heldout, task.config.eval.rows, longest=task.config.seq_len)
    if not questions:  # all of them are single answers, and bad ones
        return {}
    return answers.metrics(language.answered(task, params, questions))


def of_training(task: PairTask, params: Any) -> list[Measured]:
    """Measures the log-probs of each source's training pairs."""
    measure = lambda s: preferences.log_probs(params, task.cfg, pairs.in_order(task.config, s), s.pairs)
    return [Measured(measure(s.train), {}) for s in task.data.own.sources]


def add(task: PairTask, parents: Mapping[str, Parent]) -> tuple[PairData, Parent]:
    """(the data with what the reference makes of the held-out pairs and, if the loss takes it from the cache, of the
    training pairs; the run that is the reference).

    Args:
      parents: those of a run that goes on.

    Raises:
      UsageError: the run that it starts from is gone or has changed, and the cache has not what it said.
    """
    config, cfg, data, say = task.config, task.cfg, task.data, task.recorder.say
    load = functools.cache(lambda: _load(config, cfg, say, goes_on='reference' in parents))
    known = parents.get('reference') or load()[1]

    def params() -> Any:
        say('what the reference makes of the pairs')
        weights, now = load()
        loading.check_unchanged(known, weights, now)
        return weights

    key = {
        'recipe': RECIPE, 'weights': known.digest, 'data': data.own.fingerprint, 'model': cfg.key,
        'seq_len': config.seq_len,
    }  # fmt: skip
    if task.cached:
        kept = _kept(key, lambda: of_training(task, params()))
        data = dataclasses.replace(data, reference=tuple(m.log_probs for m in kept))
    key |= {'rows': config.eval.rows, 'max_new_tokens': config.eval.max_new_tokens}
    before = _kept(key, lambda: measure(task, params()))
    return dataclasses.replace(data, before=tuple(before)), known


def _load(config: Config, cfg: ModelConfig, say: Say, *, goes_on: bool) -> tuple[Any, Parent]:
    try:
        return loading.weights(config.init_from, loading.abstract_params(cfg), warn=say)
    except UsageError as error:
        if not goes_on:
            raise
        raise UsageError(
            f'{error}, and the cache has not all that this run needs of it: restore {config.init_from} or the cache'
        ) from None


def _kept(key: Mapping[str, Any], compute: Callable[[], Sequence[Measured]]) -> list[Measured]:
    """Returns what the cache has under a key, else what all processes compute together and keep there."""
    here = cache.find('reference', dict(key)) is not None
    made = [] if all(processes.all_gather(here)) else compute()
    with processes.in_turn():
        folder = cache.build('reference', dict(key), lambda path: _write(path, made))
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'what the reference said in {folder} is damaged ({error}): delete that folder') from None


def _write(directory: epath.Path, made: Sequence[Measured]) -> None:
    for i, measured in enumerate(made):
        np.save(directory / f'{i}.npy', measured.log_probs)
    names = [f'{i}.npy' for i in range(len(made))]
    index = {'answered': [m.answered for m in made], 'checksums': store.checksums_of(directory, names)}
    files.write_json(directory / 'index.json', index)


def _read(folder: epath.Path) -> list[Measured]:
    index = json.loads((folder / 'index.json').read_text())
    store.verify(folder, index['checksums'])
    return [Measured(np.load(folder / f'{i}.npy', mmap_mode='r'), told) for i, told in enumerate(index['answered'])]
