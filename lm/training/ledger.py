"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator

PARTS = ('prepare', 'compile', 'data', 'step', 'eval', 'checkpoint')


class Ledger:
    """Seconds by part. Parts do not nest; what none of them covers counts in the total alone."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.started = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - start

    @property
    def total(self) -> float:
        return time.monotonic() - self.started

    @property
    def goodput(self) -> float:
        """The part of the time since the start that went into training steps."""
        return self.seconds['step'] / max(self.total, 1e-9)

    def line(self) -> str:
        return ' · '.join(f'{part} {s:.1f} s' for part, s in self.seconds.items()) + f' · total {self.total:.1f} s'
