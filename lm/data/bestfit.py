"""The places that the things of a store (conversations, pairs) take in rows of some length, and which of them share a
row: best-fit packing, planned once and read from disk.

What it takes to know their sizes is computed when a store is written and lies beside it: where each begins, and from
where on it can be learned from. So no token is read here, what there is is read by windows, and the sums are kept in
the cache.

Things keep the order in which they were stored, which is random; each window of them is packed by best fit, the largest
first (Johnson, 1973), so that a plan of any number of things takes the memory of one window.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files
from lm.data import cache
from lm.data.store import checksums_of, verify
from lm.errors import UsageError

WINDOW = 1 << 18
RECIPE, SURVEY_RECIPE = 3, 1  # parts of the cache's keys: raise one when a plan or how it is kept, or a survey, changes
_FILES = ('order.bin', 'starts.bin')  # int64


class Survey(NamedTuple):
    """Sums over all things: how many are used, how many of these are cut, and the places that the longest takes."""

    used: int
    cut: int
    longest: int


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of `count` things.

    Attributes:
      key: JSON-able, stands for all that the sizes depend on.
      measure: (start, stop) -> ([stop - start] places that each takes, 0 for what cannot be learned from; [stop -
        start] bool, whether it is longer than there is room for).
    """

    count: int
    key: Any
    measure: Callable[[int, int], tuple[np.ndarray, np.ndarray]]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        return self.measure(start, stop)[0]

    def windows(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first thing, what `measure` says) of each window."""
        for start in range(0, self.count, WINDOW):
            yield start, *self.measure(start, min(start + WINDOW, self.count))

    @property
    def cut(self) -> int:
        """The number of those that are used and longer than there is room for."""
        return self.survey.cut

    @property
    def left_out(self) -> int:
        """The number of those that cannot be learned from."""
        return self.count - self.survey.used

    @cached_property
    def survey(self) -> Survey:
        directory = cache.build('surveys', {'recipe': SURVEY_RECIPE, 'sizes': self.key}, self._write)
        return Survey(**json.loads((directory / 'survey.json').read_text()))

    def _write(self, directory: epath.Path) -> None:
        used = cut = longest = 0
        for _, places, longer in self.windows():
            used += int(np.count_nonzero(places))
            cut += int(np.count_nonzero(longer & (places > 0)))
            longest = max(longest, int(places.max(initial=0)))
        files.write_json(directory / 'survey.json', Survey(used, cut, longest)._asdict())

    def first(self, most: int) -> np.ndarray:
        """The numbers of the first `most` that are used."""
        found, left = [np.zeros(0, np.int64)], most
        for start, places, _ in self.windows():
            found.append(start + np.flatnonzero(places)[:left])
            left -= len(found[-1])
            if not left:
                break
        return np.concatenate(found)


# ---- plans ----


@dataclass(frozen=True, eq=False)
class Plan:
    """Row r holds the things `order[starts[r]:starts[r + 1]]`, at most `fullest` of them; what is in no row was left
    out."""

    order: np.ndarray
    starts: np.ndarray
    fullest: int

    @staticmethod
    def of(things: np.ndarray, lengths: np.ndarray, capacity: int) -> 'Plan':
        """The plan of a few things, [things] by number, all in one window; not kept. No row is longer than `capacity`,
        and no length may be."""
        order, sizes = _pack(lengths, capacity)
        return Plan(things[order], np.concatenate([[0], np.cumsum(sizes)]), int(sizes.max(initial=0)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def _pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(places in `lengths` row by row, [rows] how many each row has).

    The largest first, those of one length in their order, each into the fullest row that has room, of these the oldest.
    That row stays the best fit for the next of the same length until it has no more room, so that all things of a
    length and all rows with the same room are dealt with at once.
    """
    descending = np.argsort(-lengths, kind='stable')
    distinct, counts = np.unique(lengths, return_counts=True)
    free: dict[int, np.ndarray] = {}  # room -> the rows that have it, ascending
    rooms = 0  # bit r is set where free[r] has rows
    placed: list[np.ndarray] = []  # the row of each thing, in descending order
    rows = 0
    for length, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // length  # so many take the place that a row has
            wanted = -(-left // each)
            if fitting:
                found, free[room] = free[room][:wanted], free[room][wanted:]
                rooms ^= 0 if len(free[room]) else 1 << room
            else:
                found = np.arange(rows, rows + wanted)
                rows += wanted
            taken = min(left, len(found) * each)  # the last row may take fewer
            placed.append(np.repeat(found, each)[:taken])
            left -= taken
            full = taken // each
            for some, after in ((found[:full], room - each * length), (found[full:], room - taken % each * length)):
                if len(some):
                    free[after] = np.sort(np.concatenate([free.get(after, some[:0]), some]), kind='stable')
                    rooms |= 1 << after
    row_of = np.concatenate([np.zeros(0, np.int64), *placed])
    return descending[np.argsort(row_of, kind='stable')], np.bincount(row_of, minlength=rows)


def plan(sizes: Sizes, capacity: int) -> Plan:
    """The plan of things of these sizes, those of size 0 left out; kept in the cache under what their sizes depend on.

    Raises UsageError if the plan in the cache is damaged.
    """
    key = {'recipe': RECIPE, 'window': WINDOW, 'capacity': capacity, 'lengths': sizes.key}
    directory = cache.build('plans', key, partial(_write, sizes, capacity))
    try:
        index = json.loads((directory / 'index.json').read_text())
        verify(directory, index['checksums'])
        order, starts = (_mapped(directory / name) for name in _FILES)
        return Plan(order, starts, index['fullest'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'the plan of rows in {directory} is damaged ({error}): delete that folder') from None


def _mapped(path: epath.Path) -> np.ndarray:
    return np.memmap(path, np.int64, 'r') if path.stat().length else np.zeros(0, np.int64)  # no empty file can be


def _write(sizes: Sizes, capacity: int, directory: epath.Path) -> None:
    rows, fullest = 0, 0
    with (directory / 'order.bin').open('wb') as order, (directory / 'starts.bin').open('wb') as starts:
        starts.write(np.zeros(1, np.int64).tobytes())
        for first, places, _ in sizes.windows():
            used = np.flatnonzero(places)
            packed, counts = _pack(places[used], capacity)
            order.write((first + used[packed]).astype(np.int64).tobytes())
            starts.write((rows + np.cumsum(counts)).astype(np.int64).tobytes())
            rows, fullest = rows + len(packed), max(fullest, int(counts.max(initial=0)))
    files.write_json(directory / 'index.json', {'fullest': fullest, 'checksums': checksums_of(directory, _FILES)})
