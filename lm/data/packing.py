"""Rows of fixed length out of a token store: a plan that is computed, never held.

The store is one stream of documents. Row r of an epoch is the window [rT, rT + T] of it: windows overlap by one token,
so each token but the first is a target exactly once. A row is found by a search in memory-mapped offsets and an epoch
is shuffled by a keyed permutation, so row i costs O(log documents) time and O(1) memory however long the stream is.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from lm.data.store import TokenStore
from lm.errors import UsageError

_ROUNDS = 4
Row = dict[str, np.ndarray]


def permute(i: int, n: int, key: bytes) -> int:
    """The image of i under a permutation of range(n) that `key` selects.

    A Feistel network over the even number of bits that n needs, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): on average fewer than four steps. Our own, because the order of a run's
    data must outlive any library's version.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for r in range(_ROUNDS):
            mixed = hashlib.blake2b(b'%d:%d' % (r, right), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, 'little') & mask)
        i = left << half | right
        if i < n:
            return i


def shuffled(i: int, n: int, seed: int | None) -> int:
    """The i-th row where epochs of n rows follow each other, each in an order of its own; without a seed as stored."""
    epoch, r = divmod(i, n)
    return r if seed is None else permute(r, n, b'%d:%d' % (seed, epoch))


@dataclass(frozen=True)
class PackedRows:
    """Random access to the rows of a store. A pure function of (store, seq_len, seed, shuffle, i)."""

    store: TokenStore
    seq_len: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UsageError(f'seq_len={self.seq_len} must be at least 1')
        if len(self.store) < 2:
            raise UsageError('a token store needs two tokens or more')

    def __len__(self) -> int:
        """Rows in an epoch; only the last of the stream may be short."""
        return -(-(len(self.store) - 1) // self.seq_len)

    def row(self, i: int) -> Row:
        """Row i ≥ 0, where epochs follow each other, with T = seq_len:

        tokens_T int32; targets_T int32, the next token; weights_T float32, 1 where the target is of the token's own
        document, else 0; segments_T int32, 1… for each document in the row and 0 for padding; positions_T int32, from 0
        at each document's start in the row.
        """
        T, store = self.seq_len, self.store
        start = T * shuffled(i, len(self), self.seed if self.shuffle else None)
        tokens = np.asarray(store.tokens[start : start + T + 1]).astype(np.int32)
        real = len(tokens) - 1
        first = int(np.searchsorted(store.offsets, start, side='right'))
        last = int(np.searchsorted(store.offsets, start + real, side='right'))
        # Where documents begin in the window, the row's own first token and the last target aside.
        starts = np.asarray(store.offsets[first:last]).astype(np.int64) - start
        return _row(tokens, starts, T, store.pad_id)


def _row(tokens: np.ndarray, starts: np.ndarray, T: int, pad_id: int) -> Row:
    """`tokens` is [≤ T + 1]; `starts` are the places in 1..len(tokens) - 1 where a new document begins."""
    real = len(tokens) - 1
    begins = np.concatenate([[0], starts[starts < real]])
    segment = np.searchsorted(begins, np.arange(real), side='right')  # [real], 1… by the order of the documents
    row = blank_row(T, pad_id)
    row['tokens_T'][:real] = tokens[:-1]
    row['targets_T'][:real] = tokens[1:]
    row['weights_T'][:real] = 1.0
    row['weights_T'][starts - 1] = 0.0
    row['segments_T'][:real] = segment
    row['positions_T'][:real] = np.arange(real) - begins[segment - 1]
    return row


def blank_row(T: int, pad_id: int) -> Row:
    """The arrays of a row of T places in which there is nothing."""
    row = {name: np.full(T, pad_id, np.int32) for name in ('tokens_T', 'targets_T')}
    row |= {'weights_T': np.zeros(T, np.float32)}
    return row | {name: np.zeros(T, np.int32) for name in ('segments_T', 'positions_T')}
