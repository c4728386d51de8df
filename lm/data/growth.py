"""A batch that grows at the start of a run: in whole microbatches, as a pure function of the step."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Growth:
    """From one microbatch at step 0 evenly to all of them at step `steps` and after (McCandlish et al., 2018: early
    gradients agree, so that few rows say what many would)."""

    microbatch: int  # rows
    microbatches: int  # in a full batch
    steps: int  # 0: full from the start

    @cached_property
    def counts(self) -> np.ndarray:
        """[steps + 1] int32, microbatches of each step; the last is full, and is every later step's."""
        i = np.arange(self.steps + 1, dtype=np.int64)
        return (1 + (self.microbatches - 1) * i // self.steps if self.steps else i + self.microbatches).astype(np.int32)

    @cached_property
    def _before(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts[:-1], dtype=np.int64)])

    def count(self, step: int) -> int:
        """Microbatches of a step."""
        return int(self.counts[min(step, self.steps)])

    def first(self, step: int) -> int:
        """The row that a step begins with: the rows of all steps before it."""
        grown = max(0, step - self.steps)
        return self.microbatch * (int(self._before[min(step, self.steps)]) + grown * self.microbatches)

    def steps_in(self, rows: int) -> int:
        """The number of whole steps in so many rows."""
        if rows < self.first(self.steps):
            return int(np.searchsorted(self._before * self.microbatch, rows, side='right')) - 1
        return self.steps + (rows - self.first(self.steps)) // (self.microbatch * self.microbatches)
