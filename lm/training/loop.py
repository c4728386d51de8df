"""The one training loop of all stages."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lm import progress, sharding
from lm.errors import Alarm, Preempted, RunError
from lm.runs.checkpoint import Writer
from lm.runtime import StopRequest
from lm.training.flops import Ceiling, Cost
from lm.training.ledger import Ledger
from lm.training.recorder import Recorder
from lm.training.step import TrainState

PROFILED_STEPS = 3


class Hooks(NamedTuple):
    """The work around the steps, and how often it is done. `evaluate(state, step)` returns metrics."""

    recorder: Recorder
    ledger: Ledger
    writer: Writer
    evaluate: Callable[[TrainState, int], Mapping[str, float]]
    cost: Cost
    ceiling: Ceiling
    log_every: int
    eval_every: int
    save_every: int
    max_skips: int
    profile: int | None
    batches: Callable[[int], float] = float  # full batches' worth of the first i steps
    alarm: Callable[[Mapping[str, float]], str | None] = lambda metrics: None  # why to end now
    told: Callable[[], Mapping[str, float]] = dict  # metrics of what the next step learns from
    panel: Callable[[], str] = str  # the same in a few words
    state_dict: Callable[[], dict[str, Any]] = dict  # arrays of the task that resuming needs


def run_loop(
    state: TrainState,
    source: Callable[[TrainState, int], Mapping[str, Any]],
    step: Callable,
    *,
    steps: int,
    stop: StopRequest,
    hooks: Hooks,
) -> TrainState:
    """Trains from state.step to `steps`.

    Step i+1 is dispatched before the metrics of step i are fetched, so the device never waits for the host. At an
    evaluation or a checkpoint everything up to it is written first: a checkpoint's existence says that the metrics up
    to its step are on disk. Transfers between host and device that nobody asked for are an error in the step.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; the state is saved.
      RunError: more than `max_skips` non-finite steps in a row, nothing saved since and what was saved just before
        them set aside, because its parameters may be the cause; the task's alarm; or a save failed.
    """
    stop.patient = True
    meter, profile = Meter(hooks), Profile(hooks)
    i = int(jax.device_get(state.step))
    pending: tuple[int, Any, Mapping[str, float]] | None = None
    with hooks.recorder.bar(start=i, steps=steps):
        while i < steps:
            profile.before(i)
            with hooks.ledger('data'):
                batch = source(state, i)
            with hooks.ledger('step'):
                with jax.transfer_guard('disallow'):
                    state, metrics = step(state, batch)
                if pending is not None:
                    meter.read(*pending, steps=steps)
            i, pending = i + 1, (i + 1, metrics, hooks.told())
            hooks.writer.check()
            evaluates, saves = i % hooks.eval_every == 0 or i == steps, i % hooks.save_every == 0 or i == steps
            # The signal is asked for once: one that comes below is for the next step.
            stops = stop.after(i) and i < steps
            if evaluates or saves or stops:
                with hooks.ledger('step'):
                    meter.read(*pending, steps=steps)
                pending = None
            if evaluates:
                with hooks.ledger('eval'), progress.task(f'evaluating at step {i}'):
                    found = hooks.evaluate(state, i)
                    hooks.recorder.metrics(i, found)
                    meter.listen(i, found)
                    hooks.ceiling.refresh()
            if (saves or stops) and not meter.skipping:  # what gives no finite loss does not push out what did
                save(state, i, hooks)
            if stops:
                with hooks.ledger('checkpoint'), progress.task('saving'):
                    hooks.writer.wait()
                kept = 'stopped among skipped steps' if meter.skipping else 'saved'
                raise Preempted(f'{kept} at step {i} after {stop.signal}: run the same command again to go on')
    profile.stop()
    with hooks.ledger('checkpoint'), progress.task('saving'):
        hooks.writer.wait()
    return state


def save(state: TrainState, step: int, hooks: Hooks) -> None:
    """Begins a checkpoint of what resuming needs; the step is the position in the data, too."""
    with hooks.ledger('checkpoint'), progress.task('saving'):
        hooks.recorder.flush()
        own = jax.tree.map(sharding.whole, hooks.state_dict())
        hooks.writer.save(step, saved(state, own), tokens=hooks.recorder.tokens)


def saved(state: TrainState, task: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The part of a state that a checkpoint holds, and what the task keeps beside it."""
    more = {} if state.ema is None else {'ema': state.ema}
    more |= {'task': task} if task else {}
    return {'step': state.step, 'trainable': state.trainable, 'opt': state.opt, 'rng': state.rng, **more}


class Meter:
    """Turns fetched metrics into lines, and counts tokens and skipped steps."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._skipped_in_a_row = 0
        self._start_anew()

    def _start_anew(self) -> None:
        """Begins to count for the next line."""
        self._tokens = self._targets = self._batches = 0.0
        self._seconds_before = self._hooks.ledger.spent('step', 'data')

    def read(self, step: int, metrics: Any, told: Mapping[str, float], *, steps: int) -> None:
        """Fetches a step's metrics and writes a line if one is due, with what was `told` of its batch."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        hooks, tokens = self._hooks, int(values.pop('tokens'))
        hooks.recorder.tokens = (hooks.recorder.tokens or 0) + tokens
        self._tokens += tokens
        self._targets += int(values.pop('targets'))
        self._batches += hooks.batches(step) - hooks.batches(step - 1)
        self._count(step, values)
        self.listen(step, values)
        if step % hooks.log_every and step != steps:
            return
        seconds = max(hooks.ledger.spent('step', 'data') - self._seconds_before, 1e-9)
        rate, batches_per_s = self._tokens / seconds, self._batches / seconds
        mfu = hooks.ceiling.mfu(hooks.cost.of(self._tokens, self._targets) / seconds)
        self._start_anew()
        known = values if values['skipped'] else {k: v for k, v in values.items() if not math.isnan(v)}
        line = {f'train/{k}': v for k, v in known.items()}  # without what this batch has none of
        perf = {'perf/tokens_per_s': rate, 'perf/mfu': mfu, 'perf/goodput': hooks.ledger.goodput}
        hooks.recorder.metrics(step, {**line, **told, **perf})
        left = (hooks.batches(steps) - hooks.batches(step)) / batches_per_s
        hooks.recorder.status('training', step, steps=steps, seconds_left=round(left), tokens_per_s=round(rate))
        shown = hooks.panel() or f'loss {values["loss"]:.3f}'
        hooks.recorder.advance(step, steps, f'{shown} · {rate:,.0f} tokens/s · MFU {mfu:.0%}')

    def listen(self, step: int, metrics: Mapping[str, float]) -> None:
        """Asks the task whether these metrics are a reason to end. Nothing that came of them is saved: whoever goes on
        from the last checkpoint comes here again."""
        if (why := self._hooks.alarm(metrics)) is not None:
            raise Alarm(f'{why}: stopped at step {step}; the last checkpoint is from before it')

    def _count(self, step: int, values: Mapping[str, float]) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values['skipped'] else 0
        if values['skipped']:
            self._hooks.recorder.say(f'step {step} skipped: loss {values["loss"]}, gradient norm {values["grad_norm"]}')
        if self._skipped_in_a_row > self._hooks.max_skips:
            self._hooks.writer.set_aside(after=step - self._skipped_in_a_row - 1)
            raise RunError(
                f'{self._skipped_in_a_row} non-finite steps in a row up to step {step}: lower optim.lr or look at the '
                'data there; the last checkpoint is from before them'
            )

    @property
    def skipping(self) -> bool:
        """True if the last step that was read was skipped."""
        return self._skipped_in_a_row > 0


class Profile:
    """Traces PROFILED_STEPS steps from `hooks.profile` on, or those of them that this process takes."""

    def __init__(self, hooks: Hooks) -> None:
        self._recorder, first = hooks.recorder, hooks.profile
        if self._recorder.workdir is None:  # of several processes the first alone is traced
            first = None
        self._steps = range(0) if first is None else range(first, first + PROFILED_STEPS)
        self._tracing = False

    def before(self, i: int) -> None:
        """Starts or stops the trace, as step i+1 needs it."""
        if i in self._steps and not self._tracing:
            jax.profiler.start_trace(str(self._recorder.folder / 'profile'))
            self._tracing = True
        elif i not in self._steps:
            self.stop()

    def stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            self._recorder.say(f'profile in {self._recorder.folder / "profile"}')
