"""What benchmarks share: a batch without data, a fresh state, seconds a call."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import parameters
from lm.model.config import ModelConfig
from lm.training import step as training


def fixed_batch(cfg: ModelConfig, batch_size: int, seq_len: int, *, segments: int | None) -> dict[str, jax.Array]:
    """Random tokens on the current mesh; `segments` equal documents a row, None is one that nothing masks."""
    shape = (batch_size, seq_len)
    tokens_BT = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)
    batch = {'tokens_BT': tokens_BT, 'targets_BT': jnp.roll(tokens_BT, -1, 1), 'weights_BT': jnp.ones(shape)}
    if segments:
        length = -(-seq_len // segments)
        index_BT = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), shape)
        batch |= {'segments_BT': index_BT // length, 'positions_BT': index_BT % length}
    return sharding.shard_batch(jax.device_get(batch))


def fresh_state(cfg: ModelConfig, optimizer: Any) -> training.TrainState:
    """Random parameters and an optimizer at step 0, on the current mesh."""
    params = parameters.init_sharded(jax.random.key(0), cfg)
    return jax.jit(lambda p: training.create({'policy': p}, {}, optimizer, 0))(params)


def seconds(call: Callable[[], Any], rounds: int) -> Iterator[float]:
    """How long each of the rounds took, what it returns being ready."""
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        yield time.perf_counter() - start


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    return statistics.median(seconds(call, rounds))


def copy_bandwidth(gib: float) -> float:
    """Bytes a second that the device reads and writes in a copy of this size: the best of ten."""
    x = jnp.zeros(int(gib * 2**30) // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    return 2 * x.nbytes / min(seconds(lambda: copy(x), 10))
