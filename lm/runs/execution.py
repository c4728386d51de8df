"""The execution of a model, where the settings leave it open: one decision of (architecture, platform, memory).

Nothing of it changes a model, and of its updates the rounding alone: another machine may decide otherwise for the same
run. How many sequences are in memory at once is measured once the step is known: `lm.training.microbatch`.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import config as configs
from lm import sharding
from lm.model import attention_kernels, parameters
from lm.model.config import ModelConfig
from lm.multihost import processes

# Layers one after the other are faster than in a scan, which copies what it keeps for the backward pass, and keeps more
# unless told to keep products alone: of 12 on an H200 they were 1.16 times as fast as a scan with remat=dots, 1.5 times
# as a scan without. They compile in proportion: 24 in a minute there, and a CPU compiles no faster than it trains.
UNROLLED, UNROLLED_ELSEWHERE = {'cpu': 8}, 24
# The part of a device's memory that a step may take. A CPU's is not ours alone; the rest of an accelerator's is for
# batches under way, evaluation and what does not fit between two arrays.
USED, USED_ELSEWHERE = {'cpu': 0.5}, 0.9
TOKENS = 8192  # that are in memory at once where a matrix product is as fast as it gets
STATE_BYTES = 16  # of a parameter: it, its gradient and AdamW's two moments in float32
CONTAINER_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')  # cgroups 2 and 1


class Execution(NamedTuple):
    """The decision: the settings `execution.*`, the microbatch aside."""

    dtype: str
    attention: attention_kernels.Choice
    scan: bool
    remat: str


def resolve(config: Mapping[str, Any], *, training: bool = True) -> Execution:
    """Decides on the current mesh for a config (a ConfigDict, or a saved one).

    Args:
      training: there is a backward pass. Else what a run was trained with is not asked for: this platform may lack it.

    Raises:
      UsageError: an attention that the platform lacks.
    """
    asked, platform = configs.base().execution.to_dict() | dict(config['execution']), sharding.platform()
    dtype = asked['dtype'] or ('float32' if platform == 'cpu' else 'bfloat16')  # which a CPU emulates
    attention = _attention(config['model'], dtype, asked['attention'] if training else None)
    deep = config['model']['layers'] > UNROLLED.get(platform, UNROLLED_ELSEWHERE)
    scan = deep if asked['scan'] is None else asked['scan']
    chosen = Execution(dtype, attention, scan, 'none')
    if not training:
        return chosen
    return chosen._replace(remat=_remat(config, chosen) if asked['remat'] == 'auto' else asked['remat'])


def _attention(model: Mapping[str, Any], dtype: str, asked: str | None) -> attention_kernels.Choice:
    needs = {'dtype': dtype, 'head_dim': model['head_dim'], 'softcap': model['attn_softcap']}
    return attention_kernels.choose(attention_kernels.this_device(), asked=asked, **needs)


def told(config: Mapping[str, Any], cfg: ModelConfig) -> str:
    """Returns what was decided for a model, in words: 'blocks (cpu)', and more where it is not the plain way."""
    choice = _attention(config['model'], cfg.dtype, config['execution']['attention'])
    more = ', layers scanned' * cfg.scan + f', remat={cfg.remat}' * (cfg.remat != 'none')
    return f'{choice.name} ({choice.why}){more}'


def model_config(config: Mapping[str, Any], *, training: bool = True) -> ModelConfig:
    """The frozen shape of the model that a config describes, as this platform runs it; see `resolve`.

    Raises UsageError for sizes that do not fit each other, too.
    """
    return _model_config(config, resolve(config, training=training))


def _model_config(config: Mapping[str, Any], e: Execution) -> ModelConfig:
    return ModelConfig(**dict(config['model']), scan=e.scan, remat=e.remat, attention=e.attention.name, dtype=e.dtype)


def _remat(config: Mapping[str, Any], chosen: Execution) -> str:
    """The one that computes least again among those that leave room for `TOKENS`, as far as memory is known."""
    ways = ('dots', 'names', 'full') if chosen.scan else ('none', 'names', 'full')
    memory, mesh = least_memory(sharding.first_device()), jax.sharding.get_mesh().shape
    if memory is None:
        return ways[0]
    cfg = _model_config(config, chosen)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(parameters.shapes(cfg)))
    state = STATE_BYTES * count // (mesh.get('fsdp', 1) * mesh.get('tensor', 1))
    tokens = max(TOKENS, config['seq_len'] // mesh.get('seq', 1))
    left = memory * used(sharding.platform()) - state
    fits = lambda way: 2 * tokens * kept_bytes(cfg, way) // mesh.get('tensor', 1) <= left  # twice: what has no name
    return next(filter(fits, ways), 'full')


def kept_bytes(cfg: ModelConfig, remat: str) -> int:
    """Bytes that the backward pass keeps of a token at least: of each layer the residual stream, and by its name what
    comes out of attention and the gated feed-forward, or of every product with a weight."""
    attention = cfg.heads * cfg.head_dim
    products = attention + 2 * cfg.kv_heads * cfg.head_dim + 2 * cfg.ffn_dim
    width = {'full': 0, 'names': attention + cfg.ffn_dim, 'dots': products, 'none': products}[remat]
    return cfg.layers * (cfg.dim + width) * np.dtype(cfg.dtype).itemsize


# ---- memory ----


def used(platform: str) -> float:
    """The part of a device's memory that a step may take."""
    return USED.get(platform, USED_ELSEWHERE)


def least_memory(device: Any) -> int | None:
    """`memory_limit` of the process that has the least: they may be unequal, and run one program."""
    return min((m for m in processes.all_gather(memory_limit(device)) if m), default=None)


def memory_limit(device: Any) -> int | None:
    """Bytes that one device has: its share of main memory for CPU devices, None if the platform does not tell."""
    if device.platform == 'cpu':
        whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        return min(whole, _container_limit() or whole) // max(1, jax.local_device_count())
    stats = device.memory_stats()
    return stats.get('bytes_limit') if stats else None


def _container_limit() -> int | None:
    """Bytes that this process's container may have, where it says so."""
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # 'max' is no number
            return int(Path(file).read_text())
    return None
