"""Which things share a row: best-fit packing, planned once and read from disk.

Things (conversations, pairs) keep the order in which they were stored, which is random; each window of them is packed
by best fit, the largest first (Johnson, 1973), so that a plan of any number of things takes the memory of one window.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from lm.data import cache

WINDOW = 4096
RECIPE = 2  # part of the cache's key: raise it when a plan changes


@dataclass(frozen=True, eq=False)
class Plan:
    """Row r holds the things `order[starts[r]:starts[r + 1]]`; what is in no row was left out."""

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The rows, as lists of places in `lengths`; no row is longer than `capacity`, and no length may be."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is free, row), ascending
    for thing in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[thing], -1))
        free, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(thing)
        bisect.insort(room, (free - lengths[thing], row))
    return rows


def plan(lengths: np.ndarray, capacity: int) -> Plan:
    """The plan of things of these lengths, those of length 0 left out; kept in the cache.

    It depends on the lengths and nothing else: the same texts in other words (another tokenizer, another template) have
    another plan.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(lengths, np.int64).tobytes(), digest_size=16).hexdigest()
    key = {'recipe': RECIPE, 'window': WINDOW, 'capacity': capacity, 'lengths': digest}
    directory = cache.build('plans', key, lambda path: _write(path, lengths, capacity))
    return Plan(*(np.load(directory / f'{name}.npy', mmap_mode='r') for name in ('order', 'starts')))


def _write(directory: epath.Path, lengths: np.ndarray, capacity: int) -> None:
    rows = list(_rows(lengths, capacity))
    sizes = np.array([0, *map(len, rows)], np.int64)
    np.save(directory / 'order.npy', np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64))
    np.save(directory / 'starts.npy', np.cumsum(sizes))


def _rows(lengths: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    for start in range(0, len(lengths), WINDOW):
        kept = start + np.flatnonzero(lengths[start : start + WINDOW])
        for row in pack(lengths[kept].tolist(), capacity):
            yield kept[row]
