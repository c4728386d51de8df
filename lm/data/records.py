"""What a source is, what it gives, and what it counts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from lm.errors import UsageError


class Record(TypedDict):
    """One document. `bytes` is the length of `text` in UTF-8."""

    id: str
    source: str
    text: str
    bytes: int
    meta: dict[str, Any]


@dataclass
class Counts:
    """Documents read, and dropped by reason."""

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, number: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + number


@dataclass(frozen=True)
class Source:
    """A named source. `state` is JSON-able and differs when what would be read differs; `read` counts as it goes.

    `check` raises UsageError for what shows without reading the documents; it is asked of every source before the
    first one is read.
    """

    name: str
    state: Any
    read: Callable[[Counts], Iterator[Record]]
    check: Callable[[], None] = lambda: None


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


def choose_column(place: str, wanted: str | None, texts: Sequence[str], columns: Sequence[str]) -> str:
    """The column that holds the documents: `wanted`, or `text`, or the only one of `texts`, those that can be text.

    Raises UsageError, naming the place and its columns, if there is no such column.
    """
    if wanted is None and 'text' not in texts and len(texts) == 1:
        return texts[0]
    column = wanted or 'text'
    if column not in texts:
        problem = 'that is text' if column in columns else ''
        why = f'{place} has no column {column!r} {problem}'.rstrip()
        raise UsageError(f'{why}: it has {", ".join(columns) or "none"}; name one as in SOURCE#COLUMN')
    return column
