"""What a source is, what it gives, and what it counts."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

Kind = Literal['text', 'chat', 'pairs']
Role = Literal['system', 'user', 'assistant']
# So many of the records that are dropped are named, by file and line.
_NAMED = 3


class Record(TypedDict):
    """One document. `bytes` is the length of `text` in UTF-8."""

    id: str
    source: str
    text: str
    bytes: int
    meta: dict[str, Any]


class Message(TypedDict):
    """What one side says. `content` is text as it was typed: a marker in it is no marker."""

    role: Role
    content: str


class Chat(TypedDict):
    """One conversation: at most a system message, then user and assistant in turn; the last word is the assistant's.

    `bytes` is the length of all contents in UTF-8.
    """

    id: str
    source: str
    messages: list[Message]
    bytes: int
    meta: dict[str, Any]


class Pair(TypedDict):
    """Two ways to go on from one prompt. The prompt ends with a user's message, each side with the assistant's.

    `label` is the probability that `chosen` is the better one, from above 0.5 to 1, and `margin` by how much it is
    better, in the units of its source (0: not said). An unpaired answer, as KTO takes them, is a pair whose other side
    has no messages: one with a good answer has no `rejected`, one with a bad answer no `chosen`.
    """

    id: str
    source: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float
    label: float
    bytes: int
    meta: dict[str, Any]


@dataclass
class Counts:
    """Records read, and dropped by reason.

    `changed` counts, by what was changed, records that are kept; `named` says of the first malformed ones where they
    are and what is wrong with them.
    """

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)

    def drop(self, reason: str, number: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + number

    def change(self, what: str, number: int = 1) -> None:
        self.changed[what] = self.changed.get(what, 0) + number

    def name(self, problem: str) -> None:
        """Keeps a sentence 'FILE:LINE: what is wrong', the first few alone."""
        if len(self.named) < _NAMED:
            self.named.append(problem)


@dataclass(frozen=True)
class Source:
    """A named source. `state` is JSON-able and differs when what would be read differs; `read` counts as it goes.

    `check` raises UsageError for what shows without reading the documents; it is asked of every source before the
    first one is read. `read` gives a Record, a Chat or a Pair, as `kind` says.

    `split(record, share)` says whether a record is held out, where the source has a reason of its own; None: the digest
    of its `split_content` decides.
    """

    name: str
    state: Any
    read: Callable[[Counts], Iterator[Any]]
    check: Callable[[], None] = lambda: None
    kind: Kind = 'text'
    split: Callable[[Any, float], bool] | None = None


def content(record: Any) -> bytes:
    """All that is learned from a record, as bytes: two records with the same are duplicates."""
    if 'text' in record:
        return record['text'].encode()
    keys = ('messages',) if 'messages' in record else ('prompt', 'chosen', 'rejected', 'label', 'margin')
    return json.dumps([record[key] for key in keys], sort_keys=True).encode()


def split_content(record: Any) -> bytes:
    """What of a record decides whether it is held out: of a pair its prompt, so that a held-out prompt is unseen."""
    return json.dumps(record['prompt'], sort_keys=True).encode() if 'prompt' in record else content(record)


def record(name: str, key: str, text: Any, counts: Counts, *, column: str = 'text', meta: Any = None) -> list[Record]:
    """The record of what a source `name` holds under `key`, or none of what is no text, counted by reason.

    `text` is what stands in `column`: a str, the bytes of one, or something else. JSON can write lone surrogates, which
    UTF-8 cannot.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        size = len(text.encode()) if isinstance(text, str) else None
    except UnicodeError:
        counts.drop('not_utf8')
        return []
    if size is None or not text.strip():
        counts.drop(f'no_{column}' if size is None else 'empty')
        return []
    return [Record(id=key, source=name, text=text, bytes=size, meta=meta or {})]
