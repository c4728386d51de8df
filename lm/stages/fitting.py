"""The memory that a run takes of each device, said before it compiles where that can be known, and what would fit."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from lm import presets
from lm.config import Config, base
from lm.errors import RunError, UsageError
from lm.model.config import ModelConfig
from lm.runs import execution, loading
from lm.stages import plan
from lm.training import microbatch
from lm.training.recorder import Recorder
from lm.training.step import TrainState


def check(config: Config, cfg: ModelConfig, state: TrainState) -> None:
    """Raises UsageError where not even what is known without compiling fits a device.

    Args:
      state: as shapes and shardings.
    """
    if why := _misfit(config, cfg, state, at_least(config, cfg, state), 'at least '):
        raise UsageError(why)


def check_compiled(config: Config, cfg: ModelConfig, state: TrainState, compiled: Any) -> None:
    """Raises UsageError where a compiled step does not fit a device."""
    if why := _misfit(config, cfg, state, microbatch.step_bytes(compiled)):
        raise UsageError(why)


def _misfit(config: Config, cfg: ModelConfig, state: TrainState, needed: int, least: str = '') -> str | None:
    """Returns why a step that takes so many bytes of a device does not fit, and what would; None if it fits."""
    limit = execution.memory_limit(_device())
    if not limit or needed <= limit:
        return None
    told = f'{least}{_gib(needed)} per device of {_gib(limit)}'
    return f'does not fit: {told}; what would fit: {", ".join(_ways(config, cfg, state, limit))}'


def at_least(config: Config, cfg: ModelConfig, state: TrainState) -> int:
    """Bytes of one device that the state, a gradient a parameter and what the backward pass keeps of the smallest
    microbatch take; the step itself takes more."""
    mesh = jax.sharding.get_mesh().shape
    rows = max(1, (config.execution.microbatch or 1) // (mesh['data'] * mesh['fsdp']))
    kept = rows * config.seq_len * execution.kept_bytes(cfg, cfg.remat) // (mesh['seq'] * mesh['tensor'])
    return _state_bytes(state) + _bytes(state.trainable) + kept


def _state_bytes(state: TrainState) -> int:
    return sum(map(_bytes, parts_of(state).values()))


def parts_of(state: TrainState) -> dict[str, Any]:
    """Returns what is in memory during the whole run, by name."""
    parts = {'parameters': state.trainable, 'optimizer': state.opt}
    parts |= {} if state.ema is None else {'average': state.ema}
    return parts | dict(state.frozen)


def _bytes(tree: Any) -> int:
    """Bytes of one device's shards."""
    shard = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _device() -> Any:
    return jax.sharding.get_mesh().devices.flat[0]


def _gib(n: float) -> str:
    return f'{n / 2**30:.3g} GiB'


# ---- what would fit ----


def _ways(config: Config, cfg: ModelConfig, state: TrainState, limit: int) -> Iterator[str]:
    """Ways to make it fit, those that do by themselves with their sizes."""
    weights = _state_bytes(state) + _bytes(state.trainable)
    if weights > limit:
        factored = weights - _bytes(state.opt)  # adafactor keeps next to nothing
        if config.optim.name != 'adafactor' and factored <= limit:
            yield f'optim.name=adafactor ({_gib(factored)})'
        yield from _smaller_models(config, state, limit / weights)
    else:
        yield from ('execution.remat=full',) * (cfg.remat != 'full')
        yield from ('a smaller microbatch',) * ((config.execution.microbatch or 1) > 1)
        yield 'a shorter seq_len'
    here = jax.sharding.get_mesh().size
    devices = max(here + 1, math.ceil(1.1 * here * at_least(config, cfg, state) / limit))
    yield f'{devices:,} or more such devices (mesh.fsdp)'  # a tenth for what compiling adds


def _smaller_models(config: Config, state: TrainState, part: float) -> Iterator[str]:
    """The largest of our own sizes with at most this part of the parameters."""
    if config.init_from or config.branch_from:
        return
    most = part * count(state.trainable)
    sizes = ((name, count(loading.shapes(_model_of(name)))) for name in presets.SIZES)
    fitting = [name for name, n in sizes if n <= most]
    yield f'configs/pretrain.py:{fitting[-1]} or smaller' if fitting else f'a model of {most:,.0f} parameters at most'


def _model_of(name: str) -> ModelConfig:
    config = base()
    presets.apply(config, name)
    return ModelConfig(**dict(config.model))


def count(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# ---- a dry run ----


def report_state(recorder: Recorder, config: Config, cfg: ModelConfig, state: TrainState) -> None:
    """Prints what is known before the step is compiled: parameters, mesh, memory per device by part."""
    mesh = jax.sharding.get_mesh()
    recorder.say(
        f'parameters  {count(state.trainable):,} ({cfg.layers} layers, dim {cfg.dim}, vocabulary {cfg.vocab_size})'
    )
    recorder.say(f'mesh        {dict(mesh.shape)} over {mesh.size} × {_device().device_kind}')
    for name, tree in parts_of(state).items():
        recorder.say(f'{name:<11} {_bytes(tree) / 2**30:.3f} GiB per device')
    recorder.say(f'at least    {at_least(config, cfg, state) / 2**30:.3f} GiB per device, with gradients')


def report_plan(
    recorder: Recorder, config: Config, cfg: ModelConfig, state: TrainState, compiled: Any, *, flops: float, tokens: int
) -> None:
    """Prints what the compiled step takes: memory per device, FLOPs, tokens.

    Raises RunError if it does not fit the device's memory.
    """
    total, gib = microbatch.step_bytes(compiled), lambda n: f'{n / 2**30:.3f} GiB'
    recorder.say(f'temporaries {gib(compiled.memory_analysis().temp_size_in_bytes)} per device, compiled, not run')
    recorder.say(f'in all      {gib(total)} per device')
    recorder.say(
        f'FLOPs       {flops:.3e} a step (6N plus the causal half of attention; no padding, every token learned)'
    )
    planned = plan.planned_tokens(config, tokens)
    recorder.say(f'tokens      {planned:,} planned ({config.steps:,} steps of {tokens:,})')
    if why := _misfit(config, cfg, state, total):
        raise RunError(why)
