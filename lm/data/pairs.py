"""Pairs of responses as rows to train on: both sides of a pair in one row, and several pairs to a row.

A store of pairs is a store of conversations (lm/data/chats.py) in which `sides` of them belong together: the prompt
with the chosen response, with the rejected one and, for KTO's baseline, with a response to another prompt; a table of
each pair's label and margin; and `differs.npy` (uint32), the place from which on chosen and rejected are not the same.
The response is what is to be learned. A side that is longer than seq_len is cut there; a pair of which one side has no
response left, or both are then the same, is left out.

Which pairs share a row is planned once for the whole store, as of conversations, so that a row, a batch and its shape
are pure functions of the data, whatever the steps.
"""

import dataclasses
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from etils import epath

from lm.data import bestfit, chats, pipeline
from lm.data.bestfit import Sizes
from lm.data.cache import fingerprint
from lm.data.chat_template import ChatTemplate
from lm.data.chats import ChatStore
from lm.data.packing import PackedRows, Row, shuffled
from lm.data.pipeline import Batch, Mixture, source_seed
from lm.data.prepare import Form, PreparedSource
from lm.data.records import Counts, Message
from lm.data.sources import PERIOD
from lm.data.store import Checksums, TokenStore, read, verify
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

SIDES = ('chosen', 'rejected', 'mismatched')
MULTIPLE = 128  # of a row's places: attention's blocks and a TPU's vectors divide it
_FILES = ('tokens.bin', 'offsets.npy', 'trained.bin', 'first.npy', 'table.npy', 'differs.npy')


@dataclass(frozen=True, eq=False)
class PairStore:
    """`table` [pairs, 2] float32: label and margin; `differs` [pairs] uint32, the first place in which chosen and
    rejected differ, or one of them ends; `sequences` has `sides` conversations for each. `fingerprint` stands for their
    sizes."""

    sequences: ChatStore = field(repr=False)
    table: np.ndarray = field(repr=False)
    differs: np.ndarray = field(repr=False)
    sides: int
    fingerprint: str

    @staticmethod
    def open(directory: epath.Path, *, sides: int, vocab_size: int, pad_id: int, checksums: Checksums) -> 'PairStore':
        """Raises OSError or ValueError unless the files have the checksums that they had when they were written."""
        verify(directory, {name: checksums[name] for name in ('table.npy', 'differs.npy')})
        sequences = ChatStore.open(directory, vocab_size=vocab_size, pad_id=pad_id, checksums=checksums)
        table, differs = (np.load(directory / f'{name}.npy', mmap_mode='r') for name in ('table', 'differs'))
        sizes = fingerprint([sequences.fingerprint, checksums['differs.npy'], sides])
        return PairStore(sequences, table, differs, sides, sizes)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def pairs(self) -> int:
        return len(self.table)

    @property
    def pad_id(self) -> int:
        return self.sequences.pad_id

    def answers(self, side: int) -> int:
        """The number of pairs with a response on this side."""
        there = lambda start: self.tokens_of(start, min(start + bestfit.WINDOW, self.pairs))[:, side]
        return sum(int(np.count_nonzero(there(start))) for start in range(0, self.pairs, bestfit.WINDOW))

    def tokens_of(self, start: int, stop: int) -> np.ndarray:
        """[stop - start, sides] int64, tokens of each side with its prompt; 0 for the side that a single answer has
        not."""
        return self.sequences.lengths(start * self.sides, stop * self.sides).reshape(-1, self.sides)

    def pair(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each side of pair i."""
        return [self.sequences.conversation(i * self.sides + side) for side in range(self.sides)]


def questions(store: PairStore, count: int, *, longest: int) -> list[chats.Question]:
    """The prompts of the first pairs, each with its chosen response."""
    chosen = (store.pair(i)[0] for i in range(min(count, store.pairs)))
    return [q for q in (chats.last_answer(*side, longest) for side in chosen) if q is not None]


# ---- on disk ----


def form(template: ChatTemplate, *, sides: int = 2) -> Form:
    """The form of a store of pairs, in the words of a template."""
    key = [chats.LAYOUT, template.fingerprint, sides]
    write, check = partial(_write, template, sides), partial(_check, template)
    return Form('pairs', key, write, partial(PairStore.open, sides=sides), _FILES, check)


def _check(template: ChatTemplate, record: Any, tokenizer: Tokenizer) -> frozenset[str]:
    prompt, tools = record['prompt'], record.get('tools')
    sides = [side for side in (record['chosen'], record['rejected']) if side]
    options = {'given': len(prompt), 'tools': tools}
    return frozenset().union(*(template.check(tokenizer, prompt + side, **options) for side in sides))


def _write(
    template: ChatTemplate, sides: int, directory: epath.Path, contents: Iterator[bytes], tokenizer: Tokenizer,
    counts: Counts,
) -> int:  # fmt: skip
    del counts  # what cannot be written is never read
    table, differs = array('f'), array('I')
    encoded = _encoded(template, sides, contents, tokenizer, table, differs)
    written = chats.write_encoded(directory, encoded, tokenizer.vocab_size)
    write_tables(directory, table, differs)
    return written


def write_tables(directory: epath.Path, table: Sequence[float], differs: Sequence[int]) -> None:
    """Writes label and margin of each pair, one after the other, and where its responses begin to differ."""
    np.save(directory / 'table.npy', np.array(table, np.float32).reshape(-1, 2))
    np.save(directory / 'differs.npy', np.array(differs, np.uint32))


def first_difference(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The first place in which two sequences differ, or one of them ends; chats.NEVER if they are the same."""
    if chosen == rejected:
        return chats.NEVER
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    return next(differ, min(len(chosen), len(rejected)))


def _encoded(
    template: ChatTemplate, sides: int, contents: Iterator[bytes], tokenizer: Tokenizer,
    table: array, differs: array,
) -> Iterator[tuple[list[int], list[bool]]]:  # fmt: skip
    """The sides of each pair, one after the other (none of a side that there is not); a line of the tables a pair."""
    other: list[Message] | None = None  # the response to another prompt
    for prompt, chosen, rejected, label, margin, *tools in map(json.loads, contents):
        options = {'given': len(prompt), 'tools': tools[0] if tools else None}
        encode = lambda side, prompt=prompt, options=options: template.encode(tokenizer, prompt + side, **options)
        found = [encode(side) if side else ([], []) for side in (chosen, rejected)]
        yield from found
        if sides == len(SIDES):
            try:
                yield encode(other or rejected or chosen)
            except UsageError:  # the template does not take it after this prompt
                yield encode(rejected or chosen)
        other = chosen or rejected
        table.extend((label, margin))
        differs.append(first_difference(*(ids for ids, _ in found)))


# ---- as rows ----


def sizes(store: PairStore, seq_len: int) -> Sizes:
    """The sizes of the pairs, all sides together; those without two different responses within seq_len, or their only
    one, are left out."""

    def measure(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        whole = store.tokens_of(start, stop)
        first = read(store.sequences.first, start * store.sides, stop * store.sides).reshape(whole.shape)
        answered = ((first < seq_len) | (whole == 0)).all(axis=1)
        usable = answered & (read(store.differs, start, stop) < seq_len)
        return np.where(usable, np.minimum(whole, seq_len).sum(axis=1), 0), whole.max(axis=1) > seq_len

    return Sizes(store.pairs, [store.fingerprint, seq_len], measure)


def width_of(longest: int, *, sides: int, seq_len: int) -> int:
    """Places a row: what the longest pair needs, for a row of many short pairs makes attention look at much that it
    must not see; a multiple of MULTIPLE, and at most sides·seq_len."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, sides * seq_len)


@dataclass(frozen=True, eq=False)
class PairRows:
    """Random access to rows of whole pairs: a pure function of (store, seq_len, plan, seed, i).

    Which pairs share a row is the same in each epoch; the order of the rows is not.

    Attributes:
      width: places a row.
      slots: room for so many pairs a row.
      plan: the numbers of the pairs of each row.
      reference: [pairs, sides], the reference's log-probs of the responses; None: no row has them.
    """

    store: PairStore
    seq_len: int
    width: int
    slots: int
    plan: bestfit.Plan
    seed: int = 0
    shuffle: bool = True
    reference: np.ndarray | None = None

    @property
    def pairs(self) -> int:
        """Pairs in an epoch."""
        return len(self.plan.order)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.plan)

    @cached_property
    def empty(self) -> Row:
        """A row without pairs."""
        return pipeline.empty_like(self.row(0), self.store.pad_id)

    def numbers(self, i: int) -> np.ndarray:
        """The numbers of the pairs of row i ≥ 0; epochs follow each other."""
        return self.plan[shuffled(i, len(self), self.seed if self.shuffle else None)]

    def pair(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each side, cut."""
        return [(ids[: self.seq_len], t[: self.seq_len]) for ids, t in self.store.pair(number)]

    def row(self, i: int) -> Row:
        """Row i: tokens_T, targets_T, weights_T (1 where the target is of a response), segments_T, positions_T;
        sequence_T int32, which of the row's sequences a token is of (pair·sides + side, −1 for none); last_T, 1 at each
        sequence's last token; and, for each pair, weight_P (0 for an empty slot), label_P, margin_P, length_SIDE_P and
        reference_SIDE_P."""
        numbers = self.numbers(i)
        sequences = [side for n in numbers.tolist() for side in self.pair(n)]
        row = _places(sequences, self.width, self.store.pad_id)
        pad = lambda values: np.pad(np.array(values, np.float32), (0, self.slots - len(numbers)))
        row |= {'weight_P': pad(np.ones(len(numbers)))}
        row |= {f'{name}_P': pad(self.store.table[numbers, k]) for k, name in enumerate(('label', 'margin'))}
        for side, name in enumerate(SIDES[: self.store.sides]):
            row[f'length_{name}_P'] = pad([t[1:].sum() for _, t in sequences[side :: self.store.sides]])
            if self.reference is not None:
                row[f'reference_{name}_P'] = pad(self.reference[numbers, side])
        return row


def in_order(store: PairStore, *, seq_len: int, most: int | None = None) -> PairRows:
    """The rows of the first `most` usable pairs of a store, None: of all of them."""
    of = sizes(store, seq_len)
    if most is None or most >= of.survey.used:
        return _rows([store], seq_len=seq_len, seeds=[0], shuffle=False)[0]
    numbers = of.first(most)
    lengths = np.array([of[n : n + 1][0] for n in numbers.tolist()], np.int64)
    width = width_of(int(lengths.max(initial=0)), sides=store.sides, seq_len=seq_len)
    plan = bestfit.Plan.of(numbers, lengths, width)
    return PairRows(store, seq_len, width, plan.fullest, plan, shuffle=False)


def _rows(stores: Sequence[PairStore], *, seq_len: int, seeds: Sequence[int], shuffle: bool = True) -> list[PairRows]:
    """The rows of stores, all of one shape."""
    of = [sizes(store, seq_len) for store in stores]
    width = width_of(max(s.survey.longest for s in of), sides=stores[0].sides, seq_len=seq_len)
    plans = [bestfit.plan(s, width) for s in of]
    rows = partial(PairRows, seq_len=seq_len, width=width, slots=max(plan.fullest for plan in plans), shuffle=shuffle)
    return [rows(store, plan=plan, seed=seed) for store, plan, seed in zip(stores, plans, seeds, strict=True)]


@dataclass(frozen=True, eq=False)
class TextRows:
    """Rows of text among rows of pairs: as many of pretraining's rows as have room in `like`'s, none longer than its
    seq_len, no one's documents seen by another's. They have no sequence and no pair."""

    text: PackedRows
    like: PairRows

    @staticmethod
    def of(text: PackedRows, like: PairRows) -> 'TextRows':
        """Rows of the text of other rows, as long as fit."""
        pieces = -(-like.width // like.seq_len)
        return TextRows(dataclasses.replace(text, seq_len=like.width // pieces), like)

    @property
    def store(self) -> TokenStore:
        return self.text.store

    @property
    def _pieces(self) -> int:
        return self.like.width // self.text.seq_len

    def __len__(self) -> int:
        """Rows in an epoch."""
        return max(1, len(self.text) // self._pieces)

    def row(self, i: int) -> Row:
        """Row i ≥ 0, the arrays that `PairRows.row` gives; weights_T is 1 where the target is of a token's document."""
        row, T, segments = {name: x.copy() for name, x in self.like.empty.items()}, self.text.seq_len, 0
        for k in range(self._pieces):
            piece = self.text.row(i * self._pieces + k)
            piece['segments_T'][piece['segments_T'] > 0] += segments
            segments = max(segments, piece['segments_T'].max())
            for name, x in piece.items():
                row[name][k * T : (k + 1) * T] = x
        return row


# ---- as batches ----


@dataclass(frozen=True, eq=False)
class PairBatches:
    """Batches of about `batch_size` pairs: a pure function of what is mixed, batch_size and i.

    All batches have the same shape, as many rows as batch_size pairs take on average, each of `width` places and with
    room for `slots` pairs; a row of text, where there are such rows, comes beside them.

    Attributes:
      mixture: of PairRows and, after them, of TextRows.
    """

    mixture: Mixture
    batch_size: int

    @property
    def width(self) -> int:
        return self.mixture.rows[0].width

    @property
    def slots(self) -> int:
        return self.mixture.rows[0].slots

    @cached_property
    def rows(self) -> int:
        """Rows a batch, those that are filled up with nothing aside."""
        shares = zip(self.mixture.rows, self.mixture.shares / PERIOD, strict=True)
        a_row = sum(share * r.pairs / len(r) for r, share in shares if isinstance(r, PairRows))
        return max(1, round(self.batch_size / a_row))

    @property
    def epoch(self) -> int:
        """Batches in one epoch."""
        return self.mixture.rows_in_epoch() // self.rows

    def batch(self, i: int, places: Sequence[int]) -> Batch:
        """The rows of batch i at these places, those from `rows` on empty: the arrays of `PairRows.row`, tokens_T as
        tokens_BT and weight_P as weight_BP."""
        row = lambda p: self.mixture.row(i * self.rows + p) if p < self.rows else self.mixture.rows[0].empty
        return pipeline.stack([row(p) for p in places])


def _places(sequences: Sequence[tuple[np.ndarray, np.ndarray]], T: int, pad_id: int) -> Row:
    """The arrays [T] of a row in which each sequence has all of its tokens; the last one's target weighs nothing."""
    wide = [(np.append(ids, pad_id), np.append(trained, 0)) for ids, trained in sequences]
    row = chats.segments_row(wide, T, pad_id)
    row['sequence_T'] = row['segments_T'] - 1
    row['last_T'] = np.zeros(T, np.float32)
    sizes = np.array([len(ids) for ids, _ in sequences], np.int64)
    row['last_T'][np.cumsum(sizes)[sizes > 0] - 1] = 1
    return row


def abstract(rows: int, width: int, pairs: int, *, sides: int, reference: bool) -> dict[str, tuple[Any, Any]]:
    """{name: (shape, dtype)} of what `PairBatches.batch` gives."""
    places = dict.fromkeys(('tokens', 'targets', 'segments', 'positions', 'sequence'), np.int32)
    places |= dict.fromkeys(('weights', 'last'), np.float32)
    of_sides = ('length', 'reference') if reference else ('length',)
    tables = ['weight', 'label', 'margin', *(f'{name}_{side}' for name in of_sides for side in SIDES[:sides])]
    of_places = {f'{k}_BT': ((rows, width), t) for k, t in places.items()}
    return of_places | {f'{k}_BP': ((rows, pairs), np.float32) for k in tables}


def check(source: PreparedSource, *, seq_len: int) -> None:
    """Raises UsageError if a part of a source has no usable pair."""
    wanted = f'two different responses within seq_len={seq_len}'
    chats.check_parts(source, partial(sizes, seq_len=seq_len), 'pair', wanted)


def mix(
    data: chats.WithReplay, *, seq_len: int, seed: int, replay: float, reference: Sequence[np.ndarray] | None = None
) -> Mixture:
    """The training pairs of sources by their weights, and rows of pretraining's text for the share `replay` of all.

    Args:
      reference: of each source, [pairs, sides], the reference's log-probs of the responses.
    """
    sources = data.own.sources
    seeds = [source_seed(seed, s.name) for s in sources]
    rows = _rows([s.train for s in sources], seq_len=seq_len, seeds=seeds)
    if reference is not None:
        rows = [dataclasses.replace(r, reference=known) for r, known in zip(rows, reference, strict=True)]
    # A weight is a share of the pairs, of which one source has more in a row than another.
    own = Mixture(tuple(rows), tuple(s.weight * len(r) / r.pairs for s, r in zip(sources, rows, strict=True)))
    text = pipeline.mix(data.text, seq_len=seq_len, seed=seed) if data.text else None
    fit = text and Mixture(tuple(TextRows.of(r, rows[0]) for r in text.rows), text.weights)
    return chats.with_replay(own, fit, replay)
