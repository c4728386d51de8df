"""Pairs of responses as rows to train on: both sides of a pair in one row, and several pairs to a row.

A store of pairs is a store of conversations (lm/data/chats.py) in which `sides` of them belong together: the prompt
with the chosen response, with the rejected one and, for KTO's baseline, with a response to another prompt; and a table
of each pair's label and margin. The response is what is to be learned. A side that is longer than seq_len is cut there;
a pair of which one side has no response left, or both are then the same, is left out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from etils import epath

from lm.data import bestfit, chats
from lm.data.chat_template import ChatTemplate
from lm.data.chats import ChatStore
from lm.data.packing import permute
from lm.data.pipeline import Mixture, source_seed
from lm.data.prepare import Form, PreparedSource
from lm.data.records import Counts, Message
from lm.data.store import Checksums, verify
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

SIDES = ('chosen', 'rejected', 'mismatched')
MULTIPLE = 128  # of a row's places: attention's blocks and a TPU's vectors divide it
_FILES = ('tokens.bin', 'offsets.npy', 'trained.bin', 'table.npy')
Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class PairStore:
    """`table` [pairs, 2] float32: label and margin; `sequences` has `sides` conversations for each."""

    sequences: ChatStore = field(repr=False)
    table: np.ndarray = field(repr=False)
    sides: int

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def pairs(self) -> int:
        return len(self.table)

    @property
    def sizes(self) -> np.ndarray:
        """[pairs, sides] int64, tokens of each side with its prompt; 0 for the side that a single answer has not."""
        return np.diff(self.sequences.tokens.offsets).reshape(-1, self.sides)

    def answers(self, side: int) -> int:
        """How many pairs have a response on this side."""
        return int(np.count_nonzero(self.sizes[:, side]))

    def pair(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each side of pair i."""
        return [self.sequences.conversation(i * self.sides + side) for side in range(self.sides)]


def questions(store: PairStore, count: int, *, longest: int) -> list[chats.Question]:
    """The prompts of the first pairs, each with its chosen response."""
    chosen = (store.pair(i)[0] for i in range(min(count, store.pairs)))
    return [q for q in (chats.last_answer(*side, longest) for side in chosen) if q is not None]


# ---- on disk ----


def form(template: ChatTemplate, *, sides: int = 2) -> Form:
    """How pairs are kept, in the words of a template."""
    key = [template.fingerprint, sides]
    write, check = partial(_write, template, sides), partial(_check, template)
    return Form('pairs', key, write, partial(_open, sides), _FILES, check)


def _check(template: ChatTemplate, record: Any, tokenizer: Tokenizer) -> frozenset[str]:
    prompt, tools = record['prompt'], record.get('tools')
    sides = [side for side in (record['chosen'], record['rejected']) if side]
    options = {'given': len(prompt), 'tools': tools}
    return frozenset().union(*(template.check(tokenizer, prompt + side, **options) for side in sides))


def _open(sides: int, directory: epath.Path, tokenizer: Tokenizer, checksums: Checksums) -> PairStore:
    verify(directory, {'table.npy': checksums['table.npy']})
    return PairStore(chats.open_store(directory, tokenizer, checksums), np.load(directory / 'table.npy'), sides)


def _write(
    template: ChatTemplate, sides: int, directory: epath.Path, contents: Iterator[bytes], tokenizer: Tokenizer,
    counts: Counts,
) -> int:  # fmt: skip
    del counts  # what cannot be written is never read
    table: list[tuple[float, float]] = []
    encoded = _encoded(template, sides, contents, tokenizer, table)
    written = chats.write_encoded(directory, encoded, tokenizer.vocab_size)
    np.save(directory / 'table.npy', np.array(table, np.float32).reshape(-1, 2))
    return written


def _encoded(
    template: ChatTemplate, sides: int, contents: Iterator[bytes], tokenizer: Tokenizer,
    table: list[tuple[float, float]],
) -> Iterator[tuple[list[int], list[bool]]]:  # fmt: skip
    """The sides of each pair, one after the other (none of a side that there is not); a line of the table a pair."""
    other: list[Message] | None = None  # the response to another prompt
    for prompt, chosen, rejected, label, margin, *tools in map(json.loads, contents):
        options = {'given': len(prompt), 'tools': tools[0] if tools else None}
        encode = lambda side, prompt=prompt, options=options: template.encode(tokenizer, prompt + side, **options)
        yield from (encode(side) if side else ([], []) for side in (chosen, rejected))
        if sides == len(SIDES):
            try:
                yield encode(other or rejected or chosen)
            except UsageError:  # the template does not take it after this prompt
                yield encode(rejected or chosen)
        other = chosen or rejected
        table.append((label, margin))


# ---- as batches ----


@dataclass(frozen=True)
class PairOrder:
    """The usable pairs of a store in an endless sequence: a pure function of (store, seq_len, seed, i)."""

    store: PairStore
    seq_len: int
    seed: int
    shuffle: bool = True

    @cached_property
    def kept(self) -> np.ndarray:
        """The numbers of the pairs that have two different responses within seq_len, or their only one."""
        learned = self.store.sequences.learned_within(self.seq_len).reshape(-1, self.store.sides)
        answered = (learned | (self.store.sizes == 0)).all(axis=1)
        return np.array([i for i in np.flatnonzero(answered).tolist() if not self._same(i)], np.int64)

    def _same(self, i: int) -> bool:
        (chosen, _), (rejected, _) = self.pair(i)[:2]
        return np.array_equal(chosen, rejected)

    @property
    def cut(self) -> int:
        """How many of the usable pairs have a side that is cut."""
        return int(np.count_nonzero((self.store.sizes[self.kept] > self.seq_len).any(axis=1)))

    @property
    def left_out(self) -> int:
        """How many pairs are not usable."""
        return self.store.pairs - len(self.kept)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[pairs] int64, places that each pair takes, usable or not."""
        return np.minimum(self.store.sizes, self.seq_len).sum(axis=1)

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self.kept)

    def number(self, i: int) -> int:
        """The number of the i-th pair; epochs follow each other."""
        epoch, at = divmod(i, len(self))
        return int(self.kept[permute(at, len(self), b'%d:%d' % (self.seed, epoch)) if self.shuffle else at])

    def pair(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each side, cut."""
        return [(ids[: self.seq_len], t[: self.seq_len]) for ids, t in self.store.pair(number)]


@dataclass(frozen=True)
class PairBatches:
    """Batches of `batch_size` pairs: a pure function of what is mixed, batch_size and i.

    All batches of a run have the same shape: as many rows as the fullest of its `steps` batches needs, each of `width`
    places, and room for as many pairs a row as any of its rows has.

    Attributes:
      mixture: of PairOrders.
      limit: where the sequence of pairs ends; a batch beyond has fewer. None: nowhere.
    """

    mixture: Mixture
    batch_size: int
    steps: int
    limit: int | None = None

    @property
    def orders(self) -> tuple[PairOrder, ...]:
        return cast(tuple[PairOrder, ...], self.mixture.rows)

    @property
    def sides(self) -> int:
        return self.orders[0].store.sides

    @cached_property
    def width(self) -> int:
        """Places a row: what the longest pair needs, for a row of many short pairs makes attention look at much that it
        must not see; a multiple of MULTIPLE, and at most sides·seq_len."""
        longest = max(int(order.lengths[order.kept].max()) for order in self.orders)
        return min(-(-longest // MULTIPLE) * MULTIPLE, self.sides * self.orders[0].seq_len)

    def pairs(self, i: int) -> list[tuple[int, int]]:
        """(source, number) of each pair of batch i."""
        last = (i + 1) * self.batch_size
        places = range(i * self.batch_size, last if self.limit is None else min(last, self.limit))
        found = map(self.mixture.locate, places)
        return [(source, self.orders[source].number(place)) for source, place in found]

    def rows(self, i: int) -> list[list[tuple[int, int]]]:
        """The pairs of batch i by row."""
        found = self.pairs(i)
        packed = bestfit.pack([int(self.orders[source].lengths[n]) for source, n in found], self.width)
        return [[found[k] for k in row] for row in packed]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows a batch, pairs a row) that all batches fit in."""
        batches = [self.rows(i) for i in range(self.steps)]
        return max(map(len, batches), default=1), max((len(row) for rows in batches for row in rows), default=1)

    def batch(self, i: int, *, rows: int, reference: Sequence[np.ndarray] | None = None) -> Batch:
        """Batch i: tokens_BT, targets_BT, weights_BT (1 where the target is of a response), segments_BT, positions_BT;
        sequence_BT int32, which of its row's sequences a token is of (pair·sides + side, −1 for none); last_BT, 1 at
        each sequence's last token; and, for each pair, weight_BP (0 for an empty slot), label_BP, margin_BP,
        length_SIDE_BP and reference_SIDE_BP.

        Args:
          rows: at least `shape[0]`; those beyond are empty.
          reference: of each source, [pairs, sides], the reference's log-probs of the responses.
        """
        found = self.rows(i)
        made = [self._row(pairs, reference) for pairs in [*found, *[[]] * (rows - len(found))]]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    def _row(self, pairs: Sequence[tuple[int, int]], reference: Sequence[np.ndarray] | None) -> Batch:
        sequences = [side for source, n in pairs for side in self.orders[source].pair(n)]
        row = _places(sequences, self.width, self.orders[0].store.sequences.pad_id)
        pad = lambda values: np.pad(np.array(values, np.float32), (0, self.shape[1] - len(pairs)))
        row['weight_BP'] = pad([1.0] * len(pairs))
        for k, name in enumerate(('label_BP', 'margin_BP')):
            row[name] = pad([self.orders[source].store.table[n, k] for source, n in pairs])
        for side, name in enumerate(SIDES[: self.sides]):
            row[f'length_{name}_BP'] = pad([t[1:].sum() for _, t in sequences[side :: self.sides]])
            if reference is not None:
                row[f'reference_{name}_BP'] = pad([reference[source][n, side] for source, n in pairs])
        return row


def _places(sequences: Sequence[tuple[np.ndarray, np.ndarray]], T: int, pad_id: int) -> Batch:
    """The arrays [T] of a row in which each sequence has all of its tokens; the last one's target weighs nothing."""
    wide = [(np.append(ids, pad_id), np.append(trained, 0)) for ids, trained in sequences]
    row = {f'{name.removesuffix("T")}BT': x for name, x in chats.segments_row(wide, T, pad_id).items()}
    row['sequence_BT'] = row['segments_BT'] - 1
    row['last_BT'] = np.zeros(T, np.float32)
    sizes = np.array([len(ids) for ids, _ in sequences], np.int64)
    row['last_BT'][np.cumsum(sizes)[sizes > 0] - 1] = 1
    return row


def abstract(rows: int, width: int, pairs: int, *, sides: int, reference: bool) -> dict[str, tuple[Any, Any]]:
    """{name: (shape, dtype)} of what `PairBatches.batch` gives."""
    places = {'tokens': np.int32, 'targets': np.int32, 'weights': np.float32, 'segments': np.int32}
    places |= {'positions': np.int32, 'sequence': np.int32, 'last': np.float32}
    tables = ['weight', 'label', 'margin', *(f'length_{s}' for s in SIDES[:sides])]
    tables += [f'reference_{s}' for s in SIDES[:sides]] if reference else []
    of_places = {f'{k}_BT': ((rows, width), t) for k, t in places.items()}
    return of_places | {f'{k}_BP': ((rows, pairs), np.float32) for k in tables}


def check(source: PreparedSource, *, seq_len: int) -> None:
    """Raises UsageError if a part of a source has no usable pair."""
    for part, store in (('training', source.train), ('held-out', source.heldout)):
        if not len(PairOrder(store, seq_len, seed=0)):
            raise UsageError(
                f'no {part} pair of {source.name} has two different responses within seq_len={seq_len}: set a longer '
                '--config.seq_len'
            )


def mix(sources: Sequence[PreparedSource], *, seq_len: int, seed: int) -> Mixture:
    """The training pairs of sources by their weights."""
    orders = tuple(PairOrder(s.train, seq_len, source_seed(seed, s.name)) for s in sources)
    return Mixture(orders, tuple(s.weight for s in sources))


def in_order(store: PairStore, *, seq_len: int, batch_size: int, most: int | None = None) -> PairBatches:
    """The first `most` usable pairs of a store, one after the other."""
    order = PairOrder(store, seq_len, seed=0, shuffle=False)
    limit = len(order) if most is None else min(most, len(order))
    return PairBatches(Mixture((order,), (1.0,)), batch_size, -(-limit // batch_size), limit)
