"""Model FLOPs, what the device could do, and so MFU."""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import parameters
from lm.model.config import ModelConfig

AGAIN = 30.0  # seconds between two measurements of a CPU
# Dense peak of one device in FLOP/s, bfloat16, from the makers' data sheets; the first name that fits counts.
PEAK = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
    'TPU7x': 2307e12, 'TPU v6 lite': 918e12, 'TPU v5 lite': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
    'TPU v4': 275e12,
}  # fmt: skip


class Cost(NamedTuple):
    """Model FLOPs of a training step, for each of its tokens and for each of its targets: the tokens whose log-prob is
    asked for. Padding is neither."""

    token: float
    target: float

    def of(self, tokens: float, targets: float) -> float:
        return tokens * self.token + targets * self.target


def cost(cfg: ModelConfig, *, seq_len: int, head: bool = True, forwards: int = 0, factors: int | None = None) -> Cost:
    """6N a token plus the causal half of attention, N what is multiplied: the layers' parameters that have contracted
    letters, and for a target the head; not the embedding's rows nor the norms.

    Attention is 6·H·N·T a layer: two products, forward and backward twice, over the half of T that is seen (less under
    a window). What is computed again (remat, the logits of `head.logp`) is not counted, as in PaLM, appendix B.

    Args:
      seq_len: tokens a row.
      head: whether there is one over the vocabulary; a reward model has none.
      forwards: how often more the tokens pass a model forward only, as the live reference of DPO.
      factors: parameters of an adapter; the model under it then has no gradient, and its products two passes of three.
    """
    D, N, H, V = (cfg.sizes[d] for d in 'DNHV')
    _, layer = parameters.rows(cfg)
    matrices = cfg.layers * sum(math.prod(row.shape(cfg.sizes)) for row in layer if row.contracted)
    reaches = [min(window or seq_len, seq_len) for window in cfg.windows]
    seen = sum(reach - reach * reach / (2 * seq_len) for reach in reaches)  # keys, on average: a triangle, then a band
    scores = 12 * N * H * seen
    forward, backward = (2, 4) if factors is None else (2, 2)
    token = (forward * (1 + forwards) + backward) * matrices + (1 + forwards / 3) * scores + 6 * (factors or 0)
    return Cost(token, (forward * (1 + forwards) + backward) * V * D if head else 0.0)


def per_token(cfg: ModelConfig, *, seq_len: int) -> float:
    """Model FLOPs of a step of pretraining per token, each of which is a target."""
    return sum(cost(cfg, seq_len=seq_len))


class Ceiling:
    """The FLOP/s that the devices can do together.

    That of CPUs is the best matrix product that was seen, since something else may have the cores at any one moment: it
    is tried again now and then, while nothing of ours runs, and what a step has reached counts, too.
    """

    def __init__(self, known: float | None = None, *, measure: Callable[[], float] = lambda: 0.0) -> None:
        """`known`: of accelerators, the data sheet's. `measure`: without it."""
        self._known, self._measure = known, measure
        self._best, self._due = 0.0, -math.inf

    def refresh(self) -> None:
        """Measures, if that is due."""
        if self._known is None and time.monotonic() >= self._due:
            self._best = max(self._best, self._measure())
            self._due = time.monotonic() + AGAIN

    def mfu(self, reached: float) -> float:
        """Model FLOPs utilisation of a step that reached so many FLOP/s."""
        if self._known is not None:
            return reached / self._known
        self._best = max(self._best, reached)
        return reached / self._best


@cache
def _cpu_ceiling() -> Ceiling:
    return Ceiling(measure=lambda: measure_product() * jax.process_count())


def ceiling() -> Ceiling:
    """That of all devices of this run."""
    mesh = jax.sharding.get_mesh()
    devices = jax.devices() if mesh.empty else mesh.devices.flat
    found = _cpu_ceiling() if sharding.platform() == 'cpu' else Ceiling(sum(map(peak, devices)))
    found.refresh()
    return found


def peak(device: Any) -> float:
    """FLOP/s of an accelerator, by its data sheet; NaN if we have none."""
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
