"""What a run tells: the terminal, log.txt, metrics.jsonl, samples.jsonl, TensorBoard and status.json."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tensorboardX
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm import files

SCHEMA = 1  # of a line of metrics.jsonl


class Recorder:
    """Writes into a run's directory, and speaks on stderr (stdout is kept for the last JSON line).

    Before `open` it speaks and keeps what it said for log.txt: a run that is refused leaves no directory behind.
    """

    def __init__(self) -> None:
        self.workdir: epath.Path | None = None
        self.last: dict[str, Any] = {}
        self._said: list[str] = []
        self._console = Console(stderr=True, highlight=False)
        self._events: tensorboardX.SummaryWriter | None = None
        self._bar: Progress | None = None

    def open(self, workdir: epath.Path) -> None:
        """From now on everything is written into `workdir`, too."""
        workdir.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        for line in self._said:
            files.append_line(workdir / 'log.txt', line)

    # -- words --

    def say(self, text: str, style: str | None = None) -> None:
        """One line on the terminal and in log.txt."""
        self._console.print(text, style=style, markup=False, soft_wrap=True)
        if self.workdir is None:
            self._said.append(text)
        else:
            files.append_line(self.workdir / 'log.txt', text)

    @contextlib.contextmanager
    def bar(self, *, start: int, steps: int) -> Iterator[None]:
        """A progress bar inside; on something that is not a terminal, nothing moves and the lines of `say` remain."""
        columns = (BarColumn(24), MofNCompleteColumn(), TextColumn('{task.fields[text]}'), TimeRemainingColumn())
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bar:
            self._bar, task = bar, bar.add_task('train', total=steps, completed=start, text='')
            self._task = task
            try:
                yield
            finally:
                self._bar = None

    def advance(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)

    # -- files --

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the same scalars as TensorBoard events. What is not finite is null in the line."""
        self.last = {**self.last, 'step': step, **values}
        if self.workdir is None:
            return
        line = {'schema': SCHEMA, 'step': step, **{k: finite(v) for k, v in values.items()}}
        files.append_line(self.workdir / 'metrics.jsonl', json.dumps(line))
        if self._events is None:
            self._events = tensorboardX.SummaryWriter(str(self.workdir / 'tensorboard'), flush_secs=20)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        if self.workdir is not None:
            for record in records:
                files.append_line(self.workdir / 'samples.jsonl', json.dumps(record, ensure_ascii=False))

    def status(self, state: str, step: int, **more: Any) -> None:
        """status.json: a heartbeat that says where the run is."""
        if self.workdir is not None:
            files.write_json(self.workdir / 'status.json', {'state': state, 'step': step, 'time': time.time(), **more})

    def rewind(self, step: int) -> None:
        """Forgets what was written after `step`, so that a resumed run's files read as if it had never stopped."""
        for name in ('metrics.jsonl', 'samples.jsonl'):
            if self.workdir is not None and (self.workdir / name).exists():
                kept = [r for r in files.read_json_lines(self.workdir / name) if r['step'] <= step]
                text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in kept)
                files.write_text(self.workdir / name, text)
                for record in kept if name == 'metrics.jsonl' else ():
                    self.last |= {k: v for k, v in record.items() if k != 'schema'}

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
