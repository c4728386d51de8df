"""The one training loop of all stages."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.errors import Preempted, RunError
from lm.runtime import StopRequest
from lm.training.checkpoint import Writer
from lm.training.ledger import Ledger
from lm.training.recorder import Recorder
from lm.training.step import TrainState

PROFILED_STEPS = 3


class Hooks(NamedTuple):
    """What happens around the steps, and how often. `evaluate(state, step, final)` returns metrics."""

    recorder: Recorder
    ledger: Ledger
    writer: Writer
    evaluate: Callable[[TrainState, int, bool], Mapping[str, float]]
    rates: np.ndarray  # [steps] learning rates
    tokens: int  # tokens a step
    flops: float  # model FLOPs a step
    peak: float  # FLOP/s of all devices
    log_every: int
    eval_every: int
    save_every: int
    max_skips: int
    profile: int | None


def run_loop(
    state: TrainState, source: Callable[[TrainState, int], Mapping[str, Any]], step: Callable, *, steps: int, stop: StopRequest, hooks: Hooks
) -> TrainState:
    """Trains from state.step to `steps`.

    Step i+1 is dispatched before the metrics of step i are fetched, so the device never waits for the host. At an
    evaluation or a checkpoint everything up to it is written first: a checkpoint's existence says that the metrics up to
    its step are on disk.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      RunError: more than `max_skips` non-finite steps in a row, nothing saved since; or a save failed.
    """
    meter = Meter(hooks)
    i = int(jax.device_get(state.step))
    pending: tuple[int, Any] | None = None
    with hooks.recorder.bar(start=i, steps=steps):
        while i < steps:
            with _profiled(hooks, i), jax.transfer_guard('disallow'):
                with hooks.ledger('data'):
                    batch = source(state, i)
                with hooks.ledger('step'):
                    state, metrics = step(state, batch)
                    if pending is not None:
                        meter.read(*pending, steps=steps)
                i, pending = i + 1, (i + 1, metrics)
            evaluates, saves = i % hooks.eval_every == 0 or i == steps, i % hooks.save_every == 0 or i == steps
            if evaluates or saves or stop:
                with hooks.ledger('step'):
                    meter.read(*pending, steps=steps)
                pending = None
            if evaluates:
                with hooks.ledger('eval'):
                    hooks.recorder.metrics(i, hooks.evaluate(state, i, i == steps))
            if saves or stop:
                save(state, i, hooks)
            if stop and i < steps:
                with hooks.ledger('checkpoint'):
                    hooks.writer.wait()
                raise Preempted(f'saved at step {i} after {stop.signal}: run the same command again to go on')
    with hooks.ledger('checkpoint'):
        hooks.writer.wait()
    return state


def save(state: TrainState, step: int, hooks: Hooks) -> None:
    """Begins a checkpoint of what resuming needs: the state without `frozen`, and the data's position."""
    with hooks.ledger('checkpoint'):
        hooks.writer.save(step, saved(state), data=step)


def saved(state: TrainState) -> dict[str, Any]:
    """The part of a state that a checkpoint holds."""
    return {'step': state.step, 'trainable': state.trainable, 'opt': state.opt, 'rng': state.rng}


class Meter:
    """Turns fetched metrics into lines, and counts skipped steps."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._skipped_in_a_row = 0
        self._skipped = 0
        self._steps_since, self._seconds_before = 0, self._busy()

    def _busy(self) -> float:
        """Seconds that went into steps and their data so far; the step under way included."""
        seconds = self._hooks.ledger.seconds
        return seconds['step'] + seconds['data']

    def read(self, step: int, metrics: Any, *, steps: int) -> None:
        """Fetches a step's metrics and writes a line if one is due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._count(step, values)
        self._steps_since += 1
        if step % self._hooks.log_every and step != steps:
            return
        hooks, busy = self._hooks, self._busy()
        seconds = max(busy - self._seconds_before, 1e-9)
        rate = hooks.tokens * self._steps_since / seconds
        mfu = hooks.flops * self._steps_since / seconds / hooks.peak
        self._steps_since, self._seconds_before = 0, busy
        line = {f'train/{k}': v for k, v in values.items()} | {'train/lr': float(hooks.rates[step - 1])}
        perf = {'perf/tokens_per_s': rate, 'perf/mfu': mfu, 'perf/goodput': hooks.ledger.goodput}
        hooks.recorder.metrics(step, line | perf)
        left = (steps - step) * hooks.tokens / rate
        hooks.recorder.status('training', step, steps=steps, seconds_left=round(left), tokens_per_s=round(rate))
        hooks.recorder.advance(step, f'loss {values["loss"]:.3f} · {rate:,.0f} tokens/s · MFU {mfu:.0%}')

    def _count(self, step: int, values: Mapping[str, float]) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values['skipped'] else 0
        if values['skipped']:
            self._hooks.recorder.say(f'step {step} skipped: loss {values["loss"]}, gradient norm {values["grad_norm"]}')
        if self._skipped_in_a_row > self._hooks.max_skips:
            raise RunError(
                f'{self._skipped_in_a_row} non-finite steps in a row up to step {step}: lower optim.lr or look at the '
                'data there; the last checkpoint is from before them'
            )


@contextlib.contextmanager
def _profiled(hooks: Hooks, i: int) -> Iterator[None]:
    """Traces PROFILED_STEPS steps from `hooks.profile` on into DIR/profile."""
    first, folder = hooks.profile, hooks.recorder.workdir
    if first is None or folder is None or not first <= i < first + PROFILED_STEPS:
        yield
        return
    if i == first:
        jax.profiler.start_trace(str(folder / 'profile'))
    yield
    if i == first + PROFILED_STEPS - 1:
        jax.profiler.stop_trace()
        hooks.recorder.say(f'profile of steps {first} to {i} in {folder / "profile"}')


