"""XLA's settings by platform, each with its reason: the one place for them.

They are set before JAX starts, for the platform that it will take; the person's own XLA_FLAGS and LIBTPU_INIT_ARGS win.
XLA ends a process that names a flag it does not know, so each one here was tried with jaxlib 0.10.2 and 0.12.0
(XLA_FLAGS) and libtpu 0.0.42 (LIBTPU_INIT_ARGS).
"""

import importlib.util
import os
from pathlib import Path

import jax

# {platform: {flag: (value, reason)}}; what helps on CPU is memory that stays with the process: `lm.runtime`
FLAGS: dict[str, dict[str, tuple[str, str]]] = {
    'gpu': {
        'xla_gpu_enable_latency_hiding_scheduler': ('true', 'gathers and sums of FSDP run beside the products'),
        'xla_gpu_enable_pipelined_all_gather': ('true', "in a scan over layers: the next layer's weights come early"),
        'xla_gpu_enable_pipelined_reduce_scatter': ('true', "in a scan over layers: gradients leave a layer late"),
    },
    'tpu': {
        'xla_tpu_enable_async_collective_fusion': ('true', 'collectives run beside the products'),
        'xla_tpu_enable_async_collective_fusion_fuse_all_gather': ('true', "the gathers of FSDP's weights, too"),
        'xla_tpu_enable_async_collective_fusion_multiple_steps': ('true', 'and over more than one product'),
        'xla_tpu_overlap_compute_collective_tc': ('true', 'the tensor cores need not wait for them'),
        'xla_enable_async_all_gather': ('true', 'a gather is a start and an end, with work between'),
        'xla_tpu_enable_data_parallel_all_reduce_opt': ('true', 'sums of gradients wait for the last of the backward'),
        'xla_tpu_data_parallel_opt_different_sized_ops': ('true', 'and are joined though their sizes differ'),
    },
}  # fmt: skip


def platform() -> str:
    """cpu, gpu or tpu: what JAX will take, without starting it."""
    asked = (jax.config.values['jax_platforms'] or '').split(',')[0]
    if asked:
        return {'cuda': 'gpu', 'rocm': 'gpu'}.get(asked, asked)
    if _installed('libtpu') and (any(Path('/dev').glob('accel[0-9]*')) or Path('/dev/vfio/0').exists()):
        return 'tpu'
    if any(map(_installed, ('jax_cuda13_plugin', 'jax_cuda12_plugin'))) and Path('/dev/nvidiactl').exists():
        return 'gpu'
    return 'cpu'


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def setup() -> None:
    """Adds the platform's flags to the environment, before JAX starts. A flag that stands there already is left."""
    name = platform()
    variable, flags = 'LIBTPU_INIT_ARGS' if name == 'tpu' else 'XLA_FLAGS', FLAGS.get(name, {})
    words = os.environ.get(variable, '').split()
    named = {word.lstrip('-').partition('=')[0] for word in words}
    added = [f'--{flag}={value}' for flag, (value, _) in flags.items() if flag not in named]
    if added:
        os.environ[variable] = ' '.join(words + added)


def lines() -> list[str]:
    """The flags that XLA is told, for the log: 'xla: gpu XLA_FLAGS=--…', or 'xla: cpu, its defaults'; then why, a line
    for each flag of ours."""
    name = platform()
    words = {variable: os.environ.get(variable, '').split() for variable in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')}
    told = ''.join(f' {variable}={" ".join(own)}' for variable, own in words.items() if own)
    ours = {f'--{flag}={value}': reason for flag, (value, reason) in FLAGS.get(name, {}).items()}
    why = [f'  {word}: {reason}' for word, reason in ours.items() if word in sum(words.values(), [])]
    return [f'xla: {name}{told or ", its defaults"}', *why]
