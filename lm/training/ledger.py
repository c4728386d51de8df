"""A ledger of a run's time."""

import contextlib
import time
from collections.abc import Iterator

PARTS = ('prepare', 'compile', 'data', 'step', 'eval', 'checkpoint')


class Ledger:
    """Seconds by part. Parts do not nest; what none of them covers counts in the total alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.started = time.monotonic()
        self._open: tuple[str, float] | None = None

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        self._open = part, start
        try:
            yield
        finally:
            self._open = None
            self.seconds[part] += time.monotonic() - start

    def spent(self, *parts: str) -> float:
        """Seconds in these parts so far, the one under way included."""
        part, start = self._open or ('', 0.0)
        return sum(self.seconds[p] for p in parts) + (time.monotonic() - start if part in parts else 0.0)

    @property
    def total(self) -> float:
        return time.monotonic() - self.started

    @property
    def goodput(self) -> float:
        """The part of the time since the start that went into training steps."""
        return self.spent('step') / max(self.total, 1e-9)

    def line(self) -> str:
        return ' · '.join(f'{part} {s:.1f} s' for part, s in self.seconds.items()) + f' · total {self.total:.1f} s'
