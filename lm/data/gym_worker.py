"""The items of reasoning-gym and what their own scorers say, called in worker processes alone (`lm.workers`).

An item is never read back from JSON to be scored, which some scorers do not survive (tuples become lists): the process
that scores makes it anew from its seed, under the same hash seed.
"""

import inspect
import json
from functools import lru_cache
from typing import Any

import reasoning_gym  # of the extra [gym]; this module is imported by workers alone
from reasoning_gym import factory


@lru_cache(maxsize=8)
def _dataset(name: str, parameters: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(parameters))


@lru_cache(maxsize=4096)
def _item(name: str, parameters: str, seed: int, size: int, index: int) -> dict[str, Any]:
    return _dataset(name, parameters, seed, size)[index]


def known_or_made(what: str, *arguments: Any) -> list[Any]:
    """`known` or `make`, for a worker that does both."""
    return {'known': known, 'make': make}[what](*arguments)


def known(name: str) -> list[Any]:
    """[the names of all sets, the names of this one's parameters or None]."""
    found = factory.DATASETS.get(name)
    own = None if found is None else [p for p in inspect.signature(found[1]).parameters if p not in ('seed', 'size')]
    return [sorted(factory.DATASETS), own]


def make(name: str, parameters: str, seed: int, size: int, start: int, stop: int) -> list[list[Any]]:
    """[question, answer] of each item from start to stop."""
    items = (_dataset(name, parameters, seed, size)[i] for i in range(start, stop))
    return [[item['question'], item['answer']] for item in items]


def score(name: str, parameters: str, seed: int, size: int, index: int, question: str, response: str) -> float:
    """The set's own score of a response to an item; None is 0. Raises ValueError if the item has another question."""
    item = _item(name, parameters, seed, size, index)
    if item['question'] != question:
        raise ValueError('the item has another question in this process')
    return float(_dataset(name, parameters, seed, size).score_answer(response, item) or 0)
