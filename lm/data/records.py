"""Sources, the records that they give, and what they count."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

Kind = Literal['text', 'chat', 'pairs']
Role = Literal['system', 'user', 'assistant', 'tool']
# So many of the records that are dropped for one reason are named, by file and line.
_NAMED = 3


class Record(TypedDict):
    """One document. `bytes` is the length of `text` in UTF-8."""

    id: str
    source: str
    text: str
    bytes: int
    meta: dict[str, Any]


class ToolCall(TypedDict):
    """A function that an assistant calls: {'name', 'arguments'}, the arguments an object."""

    id: NotRequired[str]
    type: Literal['function']
    function: dict[str, Any]


class Message(TypedDict):
    """One side's words. `content` is text as it was typed: a marker in it is no marker.

    An assistant's may have thoughts and tool calls, and `train` False: it is read and not learned. A tool's answers the
    call `tool_call_id`.
    """

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    train: NotRequired[Literal[False]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


class Chat(TypedDict):
    """One conversation: at most a system message, then user and assistant in turn; the last word is the assistant's.
    After an assistant's message there may be a tool's, and after these the assistant's again.

    `bytes` is the length of all contents in UTF-8, `place` where it was read ('FILE:LINE'), and `tools` the functions
    that the assistant may call.
    """

    id: str
    source: str
    messages: list[Message]
    bytes: int
    meta: dict[str, Any]
    place: str
    tools: NotRequired[list[dict[str, Any]]]


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
    place: str
    tools: NotRequired[list[dict[str, Any]]]


@dataclass
class Counts:
    """Records read, and dropped by reason.

    `changed` counts, by what was changed, records that are kept; `named` says of the first that are dropped for a
    reason where they are and what is wrong with them. `unused` has, by their keys, the fields that nothing is made of:
    [in how many records, where the first of these is].
    """

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    unused: dict[str, list[Any]] = field(default_factory=dict)

    def drop(self, reason: str, problem: str | None = None, *, number: int = 1) -> None:
        """Counts records that are left out; `problem`: 'FILE:LINE: what is wrong'."""
        self.dropped[reason] = self.dropped.get(reason, 0) + number
        if problem is not None and self.dropped[reason] <= _NAMED:
            self.named.append(problem)

    def change(self, what: str, number: int = 1) -> None:
        self.changed[what] = self.changed.get(what, 0) + number

    def leave_unused(self, key: str, place: str) -> None:
        """Counts a record of which a field is not used."""
        self.unused.setdefault(key, [0, place])[0] += 1


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
    """All that is learned from a record, as bytes: two records with the same are duplicates. Of conversations a JSON
    list: [messages] or [prompt, chosen, rejected, label, margin], and the tools where there are some."""
    if 'text' in record:
        return record['text'].encode()
    keys = ('messages',) if 'messages' in record else ('prompt', 'chosen', 'rejected', 'label', 'margin')
    tools = [record['tools']] if 'tools' in record else []
    return json.dumps([*(_ordered(record[key]) for key in keys), *tools]).encode()


def _ordered(value: Any) -> Any:
    """Messages with their keys in one order; the arguments of a tool call stay in their own, which is shown."""
    return [dict(sorted(part.items())) for part in value] if isinstance(value, list) else value


def split_content(record: Any) -> bytes:
    """The part of a record that decides whether it is held out: of a pair its prompt, so that training sees no held-out
    prompt."""
    return json.dumps(_ordered(record['prompt'])).encode() if 'prompt' in record else content(record)


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
