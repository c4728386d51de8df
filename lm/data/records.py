"""What a source gives, and what it counts."""

from dataclasses import dataclass, field
from typing import Any, TypedDict


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
