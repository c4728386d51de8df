"""A teacher that is asked once, before training: its most likely words after each token, and the mass of the others.

The answers lie in the cache, under what they depend on: the teacher's weights, the rows that the run reads, and the
temperature. A token takes for each of its words 2 bytes for an id (4 of a vocabulary over 65,536) and 2 for a log-prob,
and 4 for the mass.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lm import files, progress, sharding
from lm.data import cache, pipeline, store
from lm.data.packing import PackedRows, Row, shuffled
from lm.errors import UsageError
from lm.evals.preferences import rows_shared
from lm.model import head, sequences, transformer
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.runs import loading
from lm.runs.saved_config import Parent
from lm.stages.pairs import PLACES
from lm.stages.spec import Task

RECIPE = 1  # part of the cache's key: raise it when what a teacher is asked changes
NAMES = ('teacher_ids_BTW', 'teacher_logp_BTW', 'teacher_tail_BT')  # in a batch


class Answers(NamedTuple):
    """Answers to some rows of a store: the rows' numbers [N], in order, ids [N, T, W], their log-probs [N, T, W]
    float16, and the log of the mass of all other words [N, T]."""

    rows: np.ndarray
    ids: np.ndarray
    logp: np.ndarray
    tail: np.ndarray


@dataclass(frozen=True)
class AnsweredRows:
    """The rows of a store with the answers to them."""

    rows: PackedRows
    answers: Answers

    @property
    def store(self) -> store.TokenStore:
        return self.rows.store

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> Row:
        """Row i of `rows`, which has to be answered, with `teacher_ids_TW`, `teacher_logp_TW` and `teacher_tail_T`."""
        known = self.answers
        n = int(np.searchsorted(known.rows, _number(self.rows, i)))
        found = known.ids[n].astype(np.int32), known.logp[n].astype(np.float32), np.array(known.tail[n])
        return self.rows.row(i) | {name.replace('_B', '_'): x for name, x in zip(NAMES, found, strict=True)}


def abstract(batch_size: int, seq_len: int, k: int) -> dict[str, Any]:
    """{name: (shape, dtype)} of the answers in a batch."""
    tokens = batch_size, seq_len
    return dict(zip(NAMES, (((*tokens, k), np.int32), ((*tokens, k), np.float32), (tokens, np.float32)), strict=True))


def _number(rows: PackedRows, i: int) -> int:
    """The number in its store of row i of an endless sequence of epochs."""
    return shuffled(i, len(rows), rows.seed if rows.shuffle else None)


def ask(task: Task, cfg: ModelConfig, mixture: pipeline.Mixture, known: Parent | None) -> tuple[list[Answers], Parent]:
    """(the answers to each source's rows in the steps of a run, the teacher).

    Args:
      cfg: of the teacher. known: the teacher of a run that goes on.

    Raises:
      UsageError: the teacher is gone or has changed, and the cache has not what it said, or that is damaged.
    """
    config, say, total = task.config, task.recorder.say, task.config.steps * task.config.batch_size
    load = functools.cache(
        lambda: loading.weights(config.teacher_from, loading.abstract_in_use(config.teacher_from, cfg), warn=say)
    )
    parent = load()[1] if known is None else known

    def compute() -> list[Answers]:
        say(f'asking the teacher {config.teacher_from}')
        weights, now = load()
        loading.check_unchanged(known, weights, now)
        return [_answers(task, weights, cfg, *each) for each in _read(mixture, total)]

    key = {
        'recipe': RECIPE, 'weights': parent.digest, 'teacher': cfg.key, 'data': task.data.fingerprint,
        'seq_len': config.seq_len, 'seed': config.seed, 'rows': total, 'top_k': config.distill.top_k,
        'temperature': config.distill.temperature,
    }  # fmt: skip
    here = cache.find('teacher', key) is not None
    made = [] if all(processes.all_gather(here)) else compute()
    with processes.in_turn():
        folder = cache.build('teacher', key, lambda path: _write(path, made))
    try:
        found = _open(folder, len(mixture.rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'what the teacher said in {folder} is damaged ({error}): delete that folder') from None
    tokens, size = sum(a.tail.size for a in found), sum(x.nbytes for a in found for x in a)
    each = f'{tokens:,} tokens, {config.distill.top_k} each'
    say(f'likeliest words of the teacher after {each}: {size:,} bytes in {folder}')
    return found, parent


class _Some(NamedTuple):
    """Some rows of a store."""

    rows: PackedRows
    numbers: Sequence[int]

    @property
    def store(self) -> store.TokenStore:
        return self.rows.store

    def row(self, i: int) -> Row:
        return self.rows.row(self.numbers[i])


def _read(mixture: pipeline.Mixture, total: int) -> list[_Some]:
    """The rows of each source among the first of a mixture, each once, as they are stored."""
    numbers: list[set[int]] = [set() for _ in mixture.rows]
    for source, i in map(mixture.locate, range(total)):
        numbers[source].add(_number(mixture.rows[source], i))
    stored = [PackedRows(rows.store, rows.seq_len, seed=0, shuffle=False) for rows in mixture.rows]
    return [_Some(rows, sorted(own)) for rows, own in zip(stored, numbers, strict=True)]


@partial(jax.jit, static_argnames=('cfg', 'k', 'temperature'))
def _top_k(params: Any, batch: Mapping[str, jax.Array], *, cfg: ModelConfig, k: int, temperature: float) -> Any:
    h_BTD, w, options = transformer.head_inputs(params, cfg, sequences.hidden(params, cfg, batch)[0])
    return sharding.replicated(head.top_k(h_BTD, w, k, temperature=temperature, **options))


def _answers(task: Task, weights: Any, cfg: ModelConfig, rows: PackedRows, numbers: Sequence[int]) -> Answers:
    """The answers to some rows, made by all processes together."""
    c, T, dtype = task.config.distill, rows.seq_len, store.token_dtype(cfg.vocab_size)
    nothing = np.zeros((0, T, c.top_k), dtype), np.zeros((0, T, c.top_k), np.float16), np.zeros((0, T), np.float32)
    found = [nothing]
    at_once = rows_shared(min(max(1, PLACES // T), max(1, len(numbers))))
    batches = pipeline.InOrder(_Some(rows, numbers), at_once, len(numbers))
    for batch in progress.over(batches, 'rows for the teacher'):
        some = {name: batch[name] for name in ('tokens_BT', 'segments_BT', 'positions_BT')}
        out = _top_k(weights, sharding.shard_batch(some), cfg=cfg, k=c.top_k, temperature=c.temperature)
        ids, logp, tail = jax.device_get(out)
        found.append((ids.astype(dtype), logp.astype(np.float16), tail))
    joined = (np.concatenate(parts)[: len(numbers)] for parts in zip(*found, strict=True))
    return Answers(np.array(numbers, np.int64), *joined)


def _write(directory: epath.Path, made: Sequence[Answers]) -> None:
    names = []
    for i, answers in enumerate(made):
        for name, x in answers._asdict().items():
            names.append(f'{i}-{name}.npy')
            np.save(directory / names[-1], x)
    files.write_json(directory / 'index.json', {'checksums': store.checksums_of(directory, names)})


def _open(folder: epath.Path, sources: int) -> list[Answers]:
    """Raises one of several errors if a file is not as it was written."""
    store.verify(folder, json.loads((folder / 'index.json').read_text())['checksums'])
    load = lambda i: (np.load(folder / f'{i}-{name}.npy', mmap_mode='r') for name in Answers._fields)
    return [Answers(*load(i)) for i in range(sources)]
