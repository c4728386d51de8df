"""Which things share a row: best-fit packing, planned once and read from disk.

Things (conversations, pairs) keep the order in which they were stored, which is random; each window of them is packed
by best fit, the largest first (Johnson, 1973), so that a plan of any number of things takes the memory of one window.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from etils import epath

from lm import files
from lm.data import cache
from lm.data.store import checksums_of, verify
from lm.errors import UsageError

WINDOW = 1 << 18
RECIPE = 3  # part of the cache's key: raise it when a plan, or how it is kept, changes
_FILES = ('order.bin', 'starts.bin')  # int64


class Lengths(Protocol):
    """[things] integers, how many places each takes, 0 for what is left out: an array, or what is read by windows."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """Row r holds the things `order[starts[r]:starts[r + 1]]`, at most `fullest` of them; what is in no row was left
    out."""

    order: np.ndarray
    starts: np.ndarray
    fullest: int

    @staticmethod
    def of(things: np.ndarray, lengths: np.ndarray, capacity: int) -> 'Plan':
        """The plan of a few things, [things] by number, all in one window; not kept."""
        order, sizes = _pack(lengths, capacity)
        return Plan(things[order], np.concatenate([[0], np.cumsum(sizes)]), int(sizes.max(initial=0)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The rows, as lists of places in `lengths`; no row is longer than `capacity`, and no length may be."""
    order, sizes = _pack(np.asarray(lengths), capacity)
    return [row.tolist() for row in np.split(order, np.cumsum(sizes)[:-1])] if len(sizes) else []


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


def plan(lengths: Lengths, capacity: int, *, key: Any = None) -> Plan:
    """The plan of things of these lengths, those of length 0 left out; kept in the cache.

    It depends on the lengths and nothing else: the same texts in other words (another tokenizer, another template) have
    another plan.

    Args:
      key: JSON-able, stands for the lengths, so that they need not be read to find their plan. None: all are read.

    Raises UsageError if the plan in the cache is damaged.
    """
    key = {'recipe': RECIPE, 'window': WINDOW, 'capacity': capacity, 'lengths': key or _digest(lengths)}
    directory = cache.build('plans', key, lambda path: _write(path, lengths, capacity))
    try:
        index = json.loads((directory / 'index.json').read_text())
        verify(directory, index['checksums'])
        order, starts = (_mapped(directory / name) for name in _FILES)
        return Plan(order, starts, index['fullest'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'the plan of rows in {directory} is damaged ({error}): delete that folder') from None


def _mapped(path: epath.Path) -> np.ndarray:
    return np.memmap(path, np.int64, 'r') if path.stat().length else np.zeros(0, np.int64)  # no empty file can be


def _write(directory: epath.Path, lengths: Lengths, capacity: int) -> None:
    rows, fullest = 0, 0
    with (directory / 'order.bin').open('wb') as order, (directory / 'starts.bin').open('wb') as starts:
        starts.write(np.zeros(1, np.int64).tobytes())
        for things, sizes in _windows(lengths, capacity):
            order.write(things.astype(np.int64).tobytes())
            starts.write((rows + np.cumsum(sizes)).astype(np.int64).tobytes())
            rows, fullest = rows + len(things), max(fullest, int(sizes.max(initial=0)))
    files.write_json(directory / 'index.json', {'fullest': fullest, 'checksums': checksums_of(directory, _FILES)})


def _windows(lengths: Lengths, capacity: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(things row by row, [rows] how many each row has) of each window."""
    for start in range(0, len(lengths), WINDOW):
        found = np.asarray(lengths[start : start + WINDOW])
        used = np.flatnonzero(found)
        order, sizes = _pack(found[used], capacity)
        yield start + used[order], sizes


def _digest(lengths: Lengths) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for start in range(0, len(lengths), WINDOW):
        hashed.update(np.ascontiguousarray(lengths[start : start + WINDOW], np.int64).tobytes())
    return hashed.hexdigest()
