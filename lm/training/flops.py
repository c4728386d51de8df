"""Model FLOPs, what the device could do, and so MFU."""

import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding

# Dense peak of one device in FLOP/s, bfloat16, from the makers' data sheets; the first name that fits counts.
PEAK = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'TPU7x': 2307e12, 'TPU v6 lite': 918e12, 'TPU v5 lite': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
    'TPU v4': 275e12,
}  # fmt: skip


def per_token(sizes: Mapping[str, int], *, windows: Sequence[int | None], seq_len: int) -> float:
    """FLOPs of a training step per token: 6N plus the causal half of attention.

    N counts what is multiplied: the layers' matrices and the head, not the embedding's rows nor the norms. Attention is
    6·H·N·T a layer: two products, forward and backward twice, over the half of T that is seen (less under a window).
    Recomputation (remat) is not counted, as in PaLM, appendix B.

    Args:
      windows: of each layer, how far it sees; None: all.
    """
    D, N, K, H, F, V = (sizes[d] for d in 'DNKHFV')
    matrices = len(windows) * (D * N * H * 2 + D * K * H * 2 + 3 * D * F) + V * D
    reaches = [min(window or seq_len, seq_len) for window in windows]
    seen = sum(reach - reach * reach / (2 * seq_len) for reach in reaches)  # keys, on average: a triangle, then a band
    return 6 * matrices + 12 * N * H * seen


def peak(device: Any) -> float:
    """FLOP/s of one device: the data sheet's for accelerators, measured for a CPU (shared by its fake devices)."""
    if device.platform == 'cpu':
        return cached_product() / max(1, jax.local_device_count())
    for name, value in PEAK.items():
        if name in device.device_kind:
            return value
    return float('nan')


def measure_product() -> float:
    """Best float32 matrix product of 1024³ in a quarter of a second, in FLOP/s: a CPU takes a while to speed up."""
    n, best = 1024, float('inf')
    with sharding.use_mesh(devices=jax.local_devices()[:1]):
        product, x = jax.jit(lambda a: a @ a), jnp.ones((n, n), jnp.float32)
        begun = time.perf_counter()
        while (start := time.perf_counter()) < begun + 0.25:
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


cached_product = cache(measure_product)
