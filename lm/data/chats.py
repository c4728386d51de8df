"""Conversations as rows to train on: their ids, which of them the assistant wrote, and several to a row.

A store of conversations is a token store (lm/data/store.py) with a file more, `trained.bin`, a byte a token: 1 where
the assistant wrote it and it is to be learned. A conversation that is longer than a row is cut at the row's end; one
that has nothing left to learn then is left out.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.data import bestfit, pipeline
from lm.data.chat_layout import refusal
from lm.data.chat_shape import Tools
from lm.data.chat_template import ChatTemplate
from lm.data.packing import Row, permute
from lm.data.pipeline import Mixture, source_seed
from lm.data.prepare import Form, Prepared, PreparedSource
from lm.data.records import Counts
from lm.data.store import Checksums, TokenStore, token_dtype, verify
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

_FILES = ('tokens.bin', 'offsets.npy', 'trained.bin')
_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class ChatStore:
    """`tokens` as a token store has them, and `trained` [tokens] uint8, memory-mapped."""

    tokens: TokenStore = field(repr=False)
    trained: np.ndarray = field(repr=False)

    @property
    def pad_id(self) -> int:
        return self.tokens.pad_id

    @property
    def conversations(self) -> int:
        return self.tokens.documents

    def __len__(self) -> int:
        return len(self.tokens)

    def conversation(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, trained) of conversation i."""
        start, end = self.tokens.offsets[i : i + 2]
        return self.tokens.tokens[start:end], self.trained[start:end]

    def learned_within(self, longest: int) -> np.ndarray:
        """[conversations] bool, whether one of the first `longest` tokens, the very first aside, is to be learned."""
        starts, ends = (np.asarray(x, np.int64) for x in (self.tokens.offsets[:-1], self.tokens.offsets[1:]))
        ends = np.minimum(ends, starts + longest)
        before = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return before[ends] > before[np.minimum(starts + 1, ends)]


class Question(NamedTuple):
    """What is asked, up to where the assistant is to speak, and what it says in the data, both as ids."""

    prompt: list[int]
    answer: list[int]  # with the end of its turn


def questions(store: ChatStore, count: int, *, longest: int) -> list[Question]:
    """The last answer of each of the first conversations that ends within `longest` tokens, with all that was said
    before it."""
    found = (last_answer(*store.conversation(i), longest) for i in range(min(count, store.conversations)))
    return [question for question in found if question is not None]


def last_answer(ids: np.ndarray, trained: np.ndarray, longest: int) -> Question | None:
    """The last answer of a conversation that ends within `longest` tokens, if there is one."""
    edges = np.diff(np.concatenate([[0], trained, [0]]).astype(np.int8))
    spans = zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True)
    fits = [(begin, end) for begin, end in spans if begin and end <= longest]
    return Question(ids[: fits[-1][0]].tolist(), ids[slice(*fits[-1])].tolist()) if fits else None


# ---- on disk ----


def form(template: ChatTemplate) -> Form:
    """How conversations are kept, in the words of a template."""
    return Form('chat', template.fingerprint, partial(_write, template), open_store, _FILES, partial(_check, template))


def _check(template: ChatTemplate, record: Any, tokenizer: Tokenizer) -> frozenset[str]:
    return template.check(tokenizer, record['messages'], tools=record.get('tools'))


def open_store(directory: epath.Path, tokenizer: Tokenizer, checksums: Checksums) -> ChatStore:
    verify(directory, {'trained.bin': checksums['trained.bin']})
    plain = {name: checksums[name] for name in _FILES[:2]}
    options = {'vocab_size': tokenizer.vocab_size, 'pad_id': tokenizer.pad_id}
    tokens = TokenStore.open(directory, checksums=plain, **options)
    return ChatStore(tokens, np.memmap(directory / 'trained.bin', np.uint8, 'r'))


def _write(
    template: ChatTemplate, directory: epath.Path, contents: Iterator[bytes], tokenizer: Tokenizer, counts: Counts
) -> int:
    found, same = itertools.tee(map(json.loads, contents))
    tools = (c[1] if len(c) > 1 else None for c in same)
    encoded = encode_each(template, tokenizer, (c[0] for c in found), counts, tools=tools)
    return write_encoded(directory, encoded, tokenizer.vocab_size)


def encode_each(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Iterable, counts: Counts, *,
    tools: Iterable[Tools] = itertools.repeat(None),
) -> Iterator[tuple[list[int], list[bool]]]:  # fmt: skip
    """(ids, trained) of each conversation that the template accepts, with its tools; the others are counted and named
    by their number."""
    for number, (messages, theirs) in enumerate(zip(conversations, tools, strict=False), 1):
        try:
            yield template.encode(tokenizer, messages, tools=theirs)
        except UsageError as error:
            counts.drop(refusal(error))
            counts.name(f'conversation {number}: {error}')


def write_encoded(directory: epath.Path, encoded: Iterable[tuple[list[int], list[bool]]], vocab_size: int) -> int:
    """Writes conversations, chunk by chunk, into a store at `directory`; returns how many tokens it holds."""
    directory.mkdir(parents=True)
    lengths, found = [np.zeros(1, np.int64)], iter(encoded)
    with (directory / 'tokens.bin').open('wb') as tokens, (directory / 'trained.bin').open('wb') as trained:
        while chunk := list(itertools.islice(found, _AT_ONCE)):
            tokens.write(np.array([i for ids, _ in chunk for i in ids], token_dtype(vocab_size)).tobytes())
            trained.write(np.array([t for _, mask in chunk for t in mask], np.uint8).tobytes())
            lengths.append(np.array([len(ids) for ids, _ in chunk], np.int64))
    offsets = np.cumsum(np.concatenate(lengths))
    with (directory / 'offsets.npy').open('wb') as f:
        np.save(f, offsets)
    return int(offsets[-1])


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
    def lengths(self) -> np.ndarray:
        """[conversations] int64, places that each takes in a row; 0 for what is left out."""
        lengths = np.minimum(np.diff(self.store.tokens.offsets) - 1, self.seq_len)
        return np.where(self._has_answer, lengths, 0)

    @property
    def cut(self) -> int:
        """How many conversations are cut."""
        return int(np.count_nonzero((np.diff(self.store.tokens.offsets) - 1 > self.seq_len) & self._has_answer))

    @property
    def left_out(self) -> int:
        """How many have no answer within a row."""
        return int(np.count_nonzero(~self._has_answer))

    @cached_property
    def _has_answer(self) -> np.ndarray:
        """[conversations] bool, whether a target within the first seq_len is to be learned."""
        return self.store.learned_within(self.seq_len + 1)

    @cached_property
    def plan(self) -> bestfit.Plan:
        return bestfit.plan(self.lengths, self.seq_len)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.plan)

    def row(self, i: int) -> Row:
        """Row i ≥ 0, the arrays that `PackedRows.row` gives; weights_T is 1 where the target is to be learned."""
        epoch, r = divmod(i, len(self))
        if self.shuffle:
            r = permute(r, len(self), b'%d:%d' % (self.seed, epoch))
        return segments_row([self.store.conversation(c) for c in self.plan[r]], self.seq_len, self.store.pad_id)


def segments_row(found: Iterable[tuple[np.ndarray, np.ndarray]], T: int, pad_id: int) -> Row:
    """A row of T places in which each (ids, trained) is a segment, cut at the end of the row."""
    row = {
        'tokens_T': np.full(T, pad_id, np.int32),
        'targets_T': np.full(T, pad_id, np.int32),
        'weights_T': np.zeros(T, np.float32),
        'segments_T': np.zeros(T, np.int32),
        'positions_T': np.zeros(T, np.int32),
    }
    at = 0
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
    for part, name in (('train', 'training'), ('heldout', 'held-out')):
        if not chat_rows(source, part, seq_len=seq_len).lengths.any():
            raise UsageError(
                f'no {name} conversation of {source.name} has an answer within seq_len={seq_len}: set a longer '
                '--config.seq_len'
            )


@dataclass(frozen=True, eq=False)
class WithReplay:
    """What a stage after pretraining learns from: conversations or pairs, and, so that it does not forget, the text of
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
    if data.text is None or not replay:
        return Mixture(tuple(rows), tuple(s.weight for s in own))
    text = pipeline.mix(data.text, seq_len=seq_len, seed=seed)
    weights = [s.weight * (1 - replay) for s in own] + [w * replay for w in text.weights]
    return Mixture((*rows, *text.rows), tuple(weights))
