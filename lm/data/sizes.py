"""How many places the things of a store (conversations, pairs) take in rows of some length.

What it takes to know is computed when a store is written and lies beside it: where each begins, and from where on it
can be learned from. So no token is read here, what there is is read by windows, and the sums are kept in the cache.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files
from lm.data import cache
from lm.data.bestfit import WINDOW

RECIPE = 1  # part of the cache's key: raise it when a survey changes


class Survey(NamedTuple):
    """Sums over all things: how many are used, how many of these are cut, and the places that the longest takes."""

    used: int
    cut: int
    longest: int


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of `count` things, which `bestfit.plan` takes as their lengths.

    Attributes:
      key: JSON-able, stands for all that the sizes depend on.
      measure: (start, stop) -> ([stop - start] places that each takes, 0 for what cannot be learned from; [stop -
        start] bool, whether it is longer than there is room for).
    """

    count: int
    key: Any
    measure: Callable[[int, int], tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.count)
        return self.measure(start, stop)[0]

    @property
    def cut(self) -> int:
        """How many of those that are used are longer than there is room for."""
        return self.survey.cut

    @property
    def left_out(self) -> int:
        """How many cannot be learned from."""
        return self.count - self.survey.used

    @cached_property
    def survey(self) -> Survey:
        directory = cache.build('surveys', {'recipe': RECIPE, 'sizes': self.key}, self._write)
        return Survey(**json.loads((directory / 'survey.json').read_text()))

    def _write(self, directory: epath.Path) -> None:
        used = cut = longest = 0
        for start in range(0, self.count, WINDOW):
            places, longer = self.measure(start, min(start + WINDOW, self.count))
            used += int(np.count_nonzero(places))
            cut += int(np.count_nonzero(longer & (places > 0)))
            longest = max(longest, int(places.max(initial=0)))
        files.write_json(directory / 'survey.json', Survey(used, cut, longest)._asdict())

    def first(self, most: int) -> np.ndarray:
        """The numbers of the first `most` that are used."""
        found, have, start = [np.zeros(0, np.int64)], 0, 0
        while have < most and start < self.count:
            here = start + np.flatnonzero(self[start : start + WINDOW])[: most - have]
            found.append(here)
            have, start = have + len(here), start + WINDOW
        return np.concatenate(found)
