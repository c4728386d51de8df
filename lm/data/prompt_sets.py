"""Prompts out of a mixture of conversations, to draw answers to: some of them at random, and always the same ones."""

import hashlib
import heapq
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm import progress
from lm.data.heldout import is_heldout
from lm.data.records import Chat, Counts, Source, split_content
from lm.data.sources import open_source, parse_mixture
from lm.data.store import digest
from lm.errors import UsageError


class _Pool(NamedTuple):
    """The chosen conversations of a source, by a key at random; `size`: of how many."""

    chosen: list[tuple[int, Chat]]
    size: int


def choose(
    mixture: str, *, count: int, seed: int, heldout: float, strict: bool, usable: Callable[[Chat], bool],
    say: Callable[[str], None],
) -> list[Chat]:  # fmt: skip
    """`count` conversations, or all there are, of those that a stage would train on: no two end with an answer to the
    same prompt, and none is held out. A source has its weight in them, or without weights its size.

    Reads the sources once, and has at most `count` conversations of each in memory.

    Args:
      usable: tells whether a prompt can be asked.

    Raises:
      UsageError: no conversation is left.
    """
    parts = parse_mixture(mixture)
    sources = [open_source(name, 'chat', strict=strict) for name, _ in parts]
    for source in sources:
        source.check()
    seen: set[bytes] = set()
    pools = [_read(s, seen, count=count, seed=seed, heldout=heldout, usable=usable, say=say) for s in sources]
    weights = [pool.size if weight is None else weight for pool, (_, weight) in zip(pools, parts, strict=True)]
    quotas = _quotas([len(pool.chosen) for pool in pools], weights, count)
    found = [item for pool, quota in zip(pools, quotas, strict=True) for item in pool.chosen[:quota]]
    if not found:
        raise UsageError(f'data.mixture={mixture} has no prompt that can be asked within seq_len: name other data')
    return [chat for _, chat in sorted(found, key=lambda item: item[0])]


def _read(
    source: Source, seen: set[bytes], *, count: int, seed: int, heldout: float, usable: Callable[[Chat], bool],
    say: Callable[[str], None],
) -> _Pool:  # fmt: skip
    """The usable conversations of a source with the least keys, of those whose prompt is not among `seen`."""
    counts, size, heap = Counts(), 0, []
    decide = source.split or (lambda record, share: is_heldout(digest(split_content(record)), share))
    for record in progress.over(source.read(counts), f'reading {source.name}'):
        prompt = digest(json.dumps([record['messages'][:-1], record.get('tools')]).encode())
        if prompt in seen or decide(record, heldout):
            continue
        seen.add(prompt)
        size += 1
        hashed = hashlib.blake2b(prompt, digest_size=8, key=seed.to_bytes(8, 'big'))
        key = int.from_bytes(hashed.digest(), 'big')
        if (len(heap) < count or key < -heap[0][0]) and usable(record):
            heapq.heappush(heap, (-key, size, record))
            if len(heap) > count:
                heapq.heappop(heap)
    for problem in counts.named:
        say(f'left out: {problem}')
    return _Pool(sorted(((-key, record) for key, _, record in heap), key=lambda item: item[0]), size)


def _quotas(sizes: Sequence[int], weights: Sequence[float], count: int) -> list[int]:
    """Returns how many of each to take, in proportion to the weights; what one has not, the others give as far as they
    can."""
    quotas = [0] * len(sizes)
    for _ in range(min(count, sum(sizes))):
        open_ones = [i for i, size in enumerate(sizes) if quotas[i] < size]
        quotas[min(open_ones, key=lambda i: (quotas[i] + 1) / max(weights[i], 1e-12))] += 1
    return quotas


def to_json(chat: Chat) -> dict[str, Any]:
    """The part of a conversation that a file of prompts keeps."""
    return {key: value for key, value in chat.items() if key in ('source', 'messages', 'tools')}
