"""Batches: rows of several sources mixed by weight, in an order that is a pure function of (seed, i).

Which source the i-th row of the mixture comes from, and which of its rows it is, is arithmetic: no state is carried,
any batch can be asked for first, and hosts take slices of the same batch. Grain prefetches in background threads.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import grain
import numpy as np

from lm.data.growth import Growth
from lm.data.packing import PackedRows, Row
from lm.data.prepare import Prepared, PreparedSource
from lm.data.sources import PERIOD
from lm.errors import UsageError

_THREADS = 2
_PREFETCH = 8
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources as one endless sequence, each source's rows spread evenly by its share of PERIOD."""

    rows: tuple[Any, ...]  # each with a length, an epoch's, and a `row(i)` for i without end
    weights: tuple[float, ...]

    @cached_property
    def shares(self) -> np.ndarray:
        """[sources] int64, rows of each source in a period, at least 1, summing to PERIOD (largest remainders)."""
        exact = np.asarray(self.weights, np.float64) / sum(self.weights) * PERIOD
        shares = np.maximum(1, np.floor(exact)).astype(np.int64)
        for _ in range(abs(PERIOD - int(shares.sum()))):
            step = 1 if shares.sum() < PERIOD else -1
            shares[np.argmax(step * (exact - shares))] += step
        return shares

    @cached_property
    def schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """([PERIOD] source of each row, [PERIOD] how many rows of that source precede it in the period)."""
        source = np.repeat(np.arange(len(self.shares)), self.shares)
        rank = np.concatenate([np.arange(n) for n in self.shares])
        order = np.argsort((rank + 0.5) / self.shares[source], kind='stable')
        return source[order], rank[order]

    def locate(self, i: int) -> tuple[int, int]:
        """(source, that source's row) of row i of the mixture."""
        period, place = divmod(i, PERIOD)
        source = int(self.schedule[0][place])
        return source, period * int(self.shares[source]) + int(self.schedule[1][place])

    def row(self, i: int) -> Row:
        source, row = self.locate(i)
        return self.rows[source].row(row)

    def rows_in_epoch(self) -> int:
        """The rows before the first source would begin again."""
        return min(self._first_repeat(source) for source in range(len(self.rows)))

    def _first_repeat(self, source: int) -> int:
        period, rank = divmod(len(self.rows[source]), int(self.shares[source]))
        return period * PERIOD + int(np.flatnonzero(self.schedule[0] == source)[rank])


def mix(prepared: Prepared, *, seq_len: int, seed: int) -> Mixture:
    """The training rows of prepared data."""
    rows = tuple(PackedRows(s.train, seq_len, source_seed(seed, s.name)) for s in prepared.sources)
    return Mixture(rows, tuple(s.weight for s in prepared.sources))


def batches(
    mixture: Mixture, *, batch_size: int, start: int, rows: Sequence[int] | None = None, growth: Growth | None = None
) -> Iterator[Batch]:
    """Batches start, start + 1, … without end: arrays [B, T] under tokens_BT, targets_BT, weights_BT, segments_BT and
    positions_BT, where B counts this host's `rows` of the batch (None: all).

    Args:
      growth: of the batch, in its first steps. None: it is full from the start.
    """
    if batch_size < 1:
        raise UsageError(f'batch_size={batch_size} must be at least 1')
    places = range(batch_size) if rows is None else rows
    return prefetched(partial(_batch, mixture, growth or Growth(batch_size, 1, 0), places), start)


def _batch(mixture: Mixture, growth: Growth, rows: Sequence[int], step: int) -> Batch:
    """The batch of a step, this host's rows of it. While the batch grows, what it will have and does not yet have is
    rows of weight 0, which fill whole microbatches (row p of a batch is of microbatch p mod n)."""
    n, first, count = growth.microbatches, growth.first(step), growth.count(step)
    places = [divmod(p, n) for p in rows]
    empty = empty_like(mixture.row(first), mixture.rows[0].store.pad_id) if count < n else {}
    return stack([mixture.row(first + k * count + j) if j < count else empty for k, j in places])


def prefetched(batch: Callable[[int], Batch], start: int) -> Iterator[Batch]:
    """batch(start), batch(start + 1), … without end, made ahead in the background."""
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
    return iter(grain.MapDataset.range(start, sys.maxsize).map(batch).to_iter_dataset(options))


def rows_in_epoch(prepared: Prepared, seq_len: int) -> int:
    """The rows of the mixture until its first source is used up: one epoch."""
    return mix(prepared, seq_len=seq_len, seed=0).rows_in_epoch()


@dataclass(frozen=True)
class InOrder:
    """Batches of the first `count` of rows, one after the other; the last is filled up with rows of weight 0."""

    rows: Any
    batch_size: int
    count: int

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.batch_size):
            found = [self.rows.row(i) for i in range(start, min(start + self.batch_size, self.count))]
            yield stack(found + [empty_like(found[0], self.rows.store.pad_id)] * (self.batch_size - len(found)))


def heldout_batches(source: PreparedSource, *, batch_size: int, seq_len: int, max_rows: int | None = None) -> InOrder:
    """The held-out rows of a source of text, `in_order`. Documents were shuffled when they were written, so the first
    rows are a random sample.
    """
    rows = PackedRows(source.heldout, seq_len, seed=0, shuffle=False)
    return in_order(rows, batch_size=batch_size, max_rows=max_rows)


def in_order(rows: Any, *, batch_size: int, max_rows: int | None = None) -> InOrder:
    """Batches of the first `max_rows` of rows."""
    return InOrder(rows, batch_size, len(rows) if max_rows is None else min(max_rows, len(rows)))


def stack(rows: Sequence[Row]) -> Batch:
    """Arrays of several rows, [T] and others, with a dimension B before theirs: tokens_T becomes tokens_BT."""
    of_batch = lambda name: '_B'.join(name.rsplit('_', 1))
    return {of_batch(name): np.stack([row[name] for row in rows]) for name in rows[0]}


def empty_like(row: Row, pad_id: int) -> Row:
    """A row that weighs nothing: padding in it, no segment and no sequence."""
    fill = {'tokens_T': pad_id, 'targets_T': pad_id, 'sequence_T': -1}
    return {name: np.full_like(value, fill.get(name, 0)) for name, value in row.items()}


def source_seed(seed: int, name: str) -> int:
    """The seed of a source; each is shuffled by its own name: adding one leaves the others' order alone."""
    return int.from_bytes(hashlib.blake2b(f'{seed}:{name}'.encode(), digest_size=8).digest(), 'little')
