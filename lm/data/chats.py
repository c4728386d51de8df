"""Conversations as rows to train on: their ids, which of them the assistant wrote, and several to a row.

A store of conversations is a token store (lm/data/store.py) with two files more: `trained.bin`, a byte a token, 1 where
the assistant wrote it and it is to be learned; and `first.npy` (uint32), the place in each conversation of the first
such token, its very first aside, which is no target. A conversation that is longer than a row is cut at the row's end;
one that has nothing left to learn then is left out.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.data import bestfit, pipeline
from lm.data.bestfit import Sizes
from lm.data.cache import fingerprint
from lm.data.chat_layout import refusal
from lm.data.chat_template import ChatTemplate
from lm.data.packing import Row, blank_row, shuffled
from lm.data.pipeline import Mixture, source_seed
from lm.data.prepare import Form, Prepared, PreparedSource
from lm.data.records import Counts
from lm.data.store import Checksums, TokenStore, read, token_dtype
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

_FILES = ('tokens.bin', 'offsets.npy', 'trained.bin', 'first.npy')
LAYOUT = 2  # of a store of conversations or pairs; part of its key in the cache and of a run's fingerprint
NEVER = 2**32 - 1  # the place of what is nowhere


@dataclass(frozen=True, eq=False, kw_only=True)
class ChatStore(TokenStore):
    """A token store whose documents are conversations, with `trained` [tokens] uint8 and `first` [conversations]
    uint32, memory-mapped; `fingerprint` stands for their sizes."""

    trained: np.ndarray = field(repr=False)
    first: np.ndarray = field(repr=False)
    fingerprint: str

    @classmethod
    def open(cls, directory: epath.Path, *, vocab_size: int, pad_id: int, checksums: Checksums) -> 'ChatStore':
        """Raises OSError or ValueError unless the files have the checksums that they had when they were written."""
        own = {name: checksums[name] for name in _FILES}
        store = TokenStore.open(directory, vocab_size=vocab_size, pad_id=pad_id, checksums=own)
        trained, first = np.memmap(directory / 'trained.bin', np.uint8, 'r'), directory / 'first.npy'
        sizes = fingerprint([own['offsets.npy'], own['first.npy']])
        return cls(**vars(store), trained=trained, first=np.load(first, mmap_mode='r'), fingerprint=sizes)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained) of conversation i."""
        start, end = self.offsets[i : i + 2]
        return self.tokens[start:end], self.trained[start:end]

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] int64, the tokens of these conversations."""
        return np.diff(read(self.offsets, start, stop + 1))


class Question(NamedTuple):
    """A question, up to where the assistant is to speak, and what it says in the data, both as ids."""

    prompt: list[int]
    answer: list[int]  # with the end of its turn


def questions(store: ChatStore, count: int, *, longest: int) -> list[Question]:
    """The last answer of each of the first conversations that ends within `longest` tokens, with all that was said
    before it."""
    found = (last_answer(*store.conversation(i), longest) for i in range(min(count, store.documents)))
    return [question for question in found if question is not None]


def last_answer(ids: np.ndarray, trained: np.ndarray, longest: int) -> Question | None:
    """The last answer of a conversation that ends within `longest` tokens, if there is one."""
    edges = np.diff(np.concatenate([[0], trained, [0]]).astype(np.int8))
    spans = zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True)
    fits = [(begin, end) for begin, end in spans if begin and end <= longest]
    return Question(ids[: fits[-1][0]].tolist(), ids[slice(*fits[-1])].tolist()) if fits else None


# ---- on disk ----


def form(template: ChatTemplate) -> Form:
    """The form of a store of conversations, in the words of a template."""
    key = [LAYOUT, template.fingerprint]
    return Form('chat', key, partial(_write, template), ChatStore.open, _FILES, partial(_check, template))


def _check(template: ChatTemplate, record: Any, tokenizer: Tokenizer) -> frozenset[str]:
    return template.check(tokenizer, record['messages'], tools=record.get('tools'))


def _write(
    template: ChatTemplate, directory: epath.Path, contents: Iterator[bytes], tokenizer: Tokenizer, counts: Counts
) -> int:
    return write_encoded(directory, _encoded(template, contents, tokenizer, counts), tokenizer.vocab_size)


def _encoded(
    template: ChatTemplate, contents: Iterable[bytes], tokenizer: Tokenizer, counts: Counts
) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, trained) of each conversation that the template accepts, with its tools; the others are counted and named
    by their number."""
    for number, (messages, *tools) in enumerate(map(json.loads, contents), 1):
        try:
            yield template.encode(tokenizer, messages, tools=tools[0] if tools else None)
        except UsageError as error:
            counts.drop(refusal(error), f'conversation {number}: {error}')


def write_encoded(directory: epath.Path, encoded: Iterable[tuple[list[int], list[bool]]], vocab_size: int) -> int:
    """Writes conversations, one by one, into a store at `directory`; returns how many tokens it holds."""
    directory.mkdir(parents=True)
    dtype, offsets, first = token_dtype(vocab_size), array('q', [0]), array('I')
    with (directory / 'tokens.bin').open('wb') as tokens, (directory / 'trained.bin').open('wb') as trained:
        for ids, mask in encoded:
            tokens.write(np.array(ids, dtype).tobytes())
            trained.write(bytes(mask))
            offsets.append(offsets[-1] + len(ids))
            first.append(mask.index(True, 1) if True in mask[1:] else NEVER)
    np.save(directory / 'offsets.npy', np.array(offsets, np.int64))
    np.save(directory / 'first.npy', np.array(first, np.uint32))
    return offsets[-1]


# ---- as rows ----


@dataclass(frozen=True)
class ChatRows:
    """Random access to rows of whole conversations, each a segment: a pure function of (store, seq_len, seed, i).

    Which of them share a row is the same in each epoch; the order of the rows is not.
    """

    store: ChatStore
    seq_len: int
    seed: int
    shuffle: bool = True

    @cached_property
    def sizes(self) -> Sizes:
        """Sizes of the conversations in rows of seq_len; those without an answer there are left out."""
        return Sizes(self.store.documents, [self.store.fingerprint, self.seq_len], self._measure)

    def _measure(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        targets = self.store.lengths(start, stop) - 1
        answered = read(self.store.first, start, stop) <= self.seq_len
        return np.where(answered, np.minimum(targets, self.seq_len), 0), targets > self.seq_len

    @cached_property
    def plan(self) -> bestfit.Plan:
        return bestfit.plan(self.sizes, self.seq_len)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.plan)

    def row(self, i: int) -> Row:
        """Row i ≥ 0, the arrays that `PackedRows.row` gives; weights_T is 1 where the target is to be learned."""
        r = shuffled(i, len(self), self.seed if self.shuffle else None)
        return segments_row([self.store.conversation(c) for c in self.plan[r]], self.seq_len, self.store.pad_id)


def segments_row(found: Iterable[tuple[np.ndarray, np.ndarray]], T: int, pad_id: int) -> Row:
    """A row of T places in which each (ids, trained) is a segment, cut at the end of the row."""
    row, at = blank_row(T, pad_id), 0
    for segment, (ids, trained) in enumerate(found, 1):
        n = min(len(ids) - 1, T - at)
        place = slice(at, at + n)
        row['tokens_T'][place] = ids[:n]
        row['targets_T'][place] = ids[1 : n + 1]
        row['weights_T'][place] = trained[1 : n + 1]
        row['segments_T'][place] = segment
        row['positions_T'][place] = np.arange(n)
        at += n
    return row


def chat_rows(source: PreparedSource, part: str, *, seq_len: int, seed: int = 0, shuffle: bool = True) -> ChatRows:
    """The rows of a source's `part`, 'train' or 'heldout'."""
    return ChatRows(source.train if part == 'train' else source.heldout, seq_len, seed, shuffle)


def check(source: PreparedSource, *, seq_len: int) -> None:
    """Raises UsageError if a part of a source has nothing to learn in rows of seq_len."""
    sizes = lambda store: ChatRows(store, seq_len, seed=0).sizes
    check_parts(source, sizes, 'conversation', f'an answer within seq_len={seq_len}')


def check_parts(source: PreparedSource, sizes: Callable[[Any], Sizes], record: str, wanted: str) -> None:
    """Raises UsageError if a part of a source has no usable record by its store's sizes, which says what is wanted."""
    for part, store in (('training', source.train), ('held-out', source.heldout)):
        if not sizes(store).survey.used:
            raise UsageError(f'no {part} {record} of {source.name} has {wanted}: set a longer --config.seq_len')


@dataclass(frozen=True, eq=False)
class WithReplay:
    """The data of a stage after pretraining: conversations or pairs, and, so that it does not forget, the text of
    pretraining (None: none is known)."""

    own: Prepared
    text: Prepared | None
    template: ChatTemplate

    @property
    def tokenizer(self) -> Tokenizer:
        return self.own.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.template.stop_ids(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        return '+'.join([self.own.fingerprint, *([self.text.fingerprint] if self.text else [])])


def mix(data: WithReplay, *, seq_len: int, seed: int, replay: float) -> Mixture:
    """The training rows of conversations, and of pretraining's text for the share `replay` of all rows."""
    own = data.own.sources
    rows = [chat_rows(s, 'train', seq_len=seq_len, seed=source_seed(seed, s.name)) for s in own]
    text = pipeline.mix(data.text, seq_len=seq_len, seed=seed) if data.text else None
    return with_replay(Mixture(tuple(rows), tuple(s.weight for s in own)), text, replay)


def with_replay(own: Mixture, text: Mixture | None, replay: float) -> Mixture:
    """A mixture in which the rows of `text`, if there is one, are the share `replay` of all rows."""
    if text is None or not replay:
        return own
    shared = lambda mixture, share: [share * w / sum(mixture.weights) for w in mixture.weights]
    return Mixture((*own.rows, *text.rows), (*shared(own, 1 - replay), *shared(text, replay)))
