"""The microbatch: how many sequences are in memory at once, where the user left that to us.

Every microbatch gives the same update up to rounding, so this is about memory and time alone. An accelerator is
quickest with the most sequences that fit, and the compiled step tells how much it takes before anything is allocated.
A CPU has memory enough, but not in its caches: there the quickest of three is found by trying.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import files
from lm.data import cache
from lm.errors import UsageError

# Fewer tokens at a time were never quicker: on two cores 1,024 cost 12 % more than 2,048, and 32,768 cost the same.
MIN_TOKENS = 2048
ACCELERATOR_TOKENS = 16_384  # an estimate of the same, not measured; only where batches are filled in part
QUICKER = 0.95  # of the time that the whole batch takes; what gains less than that is noise
SECONDS = 1.0  # for timing, after one step of each


class Choice(NamedTuple):
    """A microbatch, and why it is this one."""

    microbatch: int
    why: str


def options(batch_size: int, parts: int) -> list[int]:
    """The microbatches that there are, ascending: divisors of the batch that `parts` devices can share."""
    return [m for m in range(parts, batch_size + 1, parts) if batch_size % m == 0]


def candidates(found: Sequence[int], seq_len: int) -> list[int]:
    """Up to three options worth timing, the whole batch first: it, and the nearest to a quarter and a sixteenth."""
    whole = found[-1]
    near = lambda part: min(found, key=lambda m: abs(math.log(m * part / whole)))
    return [whole, *(m for m in dict.fromkeys((near(4), near(16))) if m < whole and m * seq_len >= MIN_TOKENS)]


def largest(found: Sequence[int], bytes_of: Callable[[int], float], limit: float) -> int:
    """The largest option whose step takes at most `limit` bytes; the smallest if none does.

    Each question costs a compile. Memory grows about linearly, so the first guesses are where the line through the two
    nearest answers meets the limit, which mostly takes four questions in all; what is then left is halved.

    Args:
      bytes_of: microbatch -> bytes, math.inf if it does not even compile; does not fall.
    """
    low, high = 0, len(found) - 1
    if low == high or (top := bytes_of(found[high])) <= limit:
        return found[high]
    if (bottom := bytes_of(found[low])) > limit:
        return found[low]
    guesses = 0
    while high - low > 1:
        middle, guesses = (low + high) // 2, guesses + 1
        if guesses <= 3 and math.isfinite(top):
            meets = found[low] + (limit - bottom) / (top - bottom) * (found[high] - found[low])
            middle = min(max(low + 1, sum(m <= meets for m in found) - 1), high - 1)
        size = bytes_of(found[middle])
        if size <= limit:
            low, bottom = middle, size
        else:
            high, top = middle, size
    return found[low]


def fastest(seconds: Mapping[int, float]) -> int:
    """The quickest of what was timed, the whole batch unless another is clearly quicker."""
    whole, best = max(seconds), min(seconds, key=lambda m: seconds[m])
    return best if seconds[best] < QUICKER * seconds[whole] else whole


def choose(
    found: Sequence[int], build: Callable[[int], Any], *, limit: float | None, seq_len: int,
    time_them: Callable[[Mapping[int, Any]], Mapping[int, float]] | None = None,
) -> Choice:  # fmt: skip
    """Chooses among `options`.

    Args:
      build: microbatch -> the compiled step.
      limit: bytes that a step may take on one device; None if nobody knows.
      time_them: {microbatch: step} -> {microbatch: seconds a step}; None takes the largest that fits.
    """
    known = math.inf if limit is None else limit
    few = candidates(found, seq_len) if time_them else []
    fit = [m for m in few if bytes_of(build, m) <= known] if len(few) > 1 else []
    if time_them and len(fit) > 1:
        seconds = time_them({m: build(m) for m in fit})
        told = ', '.join(f'{s:.3g} s with {m}' for m, s in seconds.items())
        return Choice(fastest(seconds), f'seconds a step: {told}')
    m = largest(found, lambda m: bytes_of(build, m), known)
    return Choice(m, 'the whole batch' if m == found[-1] else f'of {found[-1]}, what fits {known / 2**30:.1f} GiB')


def bytes_of(build: Callable[[int], Any], m: int) -> float:
    """`step_bytes` of the step for a microbatch; math.inf if the compiler finds by itself that memory is short."""
    try:
        return step_bytes(build(m))
    except RuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return math.inf


def step_bytes(compiled: Any) -> int:
    """Bytes that a compiled step takes on one device: state, batch and temporaries, what is donated once."""
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return whole - memory.alias_size_in_bytes


def time_steps(steps: Mapping[int, Any], abstract: Any, batches: Mapping[int, Any]) -> dict[int, float]:
    """{microbatch: seconds of its best step} on a batch for each and a state that is thrown away.

    They take turns, so that what else the machine does slows all of them down.
    """
    fill = lambda a: np.full(a.shape, 0.01 if jnp.issubdtype(a.dtype, jnp.floating) else 0, a.dtype)
    state = jax.tree.map(lambda a: jax.device_put(fill(a), a.sharding), abstract)

    def lap(m: int) -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(steps[m](state, batches[m]))
        del metrics
        return time.perf_counter() - start

    for m in steps:  # the first of each takes new memory from the system
        lap(m)
    end = time.perf_counter() + SECONDS
    best = {m: lap(m) for m in steps}
    while time.perf_counter() < end:
        best = {m: min(best[m], lap(m)) for m in steps}
    return best


def remembered(key: Mapping[str, Any], decide: Callable[[], Choice]) -> Choice:
    """Returns what `decide` said when it was first asked on this machine: the same run, done again, is the same run."""
    write = lambda folder: files.write_json(folder / 'choice.json', decide()._asdict())
    folder = cache.build('microbatch', dict(key), write)
    try:
        return Choice(**json.loads((folder / 'choice.json').read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f'what was measured in {folder} is damaged ({error}): delete that folder') from None
