"""What a run tells: the terminal, log.txt, metrics.jsonl, samples.jsonl, TensorBoard and status.json."""

import contextlib
import json
import math
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2, summary_pb2

from lm import files, processes, progress

# Their fields are declared at run time, where no type checker sees them.
Event: Any = vars(event_pb2)['Event']
SessionLog: Any = vars(event_pb2)['SessionLog']
Summary: Any = vars(summary_pb2)['Summary']
SCHEMA = 1  # of a line of metrics.jsonl
PATIENCE = 15  # seconds


class Recorder:
    """Writes into a run's directory, and speaks on stderr (stdout is kept for the last JSON line).

    Before `open` it speaks and keeps what it said for log.txt: a run that is refused leaves no directory behind. Of
    several processes, the first alone speaks and writes.
    """

    def __init__(self) -> None:
        self.workdir: epath.Path | None = None
        self.last: dict[str, Any] = {}
        self._said: list[str] = []
        self._events: epath.Path | None = None
        self._step = self._rewound = 0
        self._bar: progress.Task | None = None
        self._told = -math.inf

    def open(self, workdir: epath.Path) -> None:
        """From now on everything is written into `workdir`, too."""
        if not processes.first():
            return
        files.sweep(workdir)
        self.workdir = workdir
        for line in self._said:
            self.note(line)

    @property
    def folder(self) -> epath.Path:
        """The run's directory, once it is open."""
        assert self.workdir is not None
        return self.workdir

    # -- words --

    def say(self, text: str, style: str | None = None) -> None:
        """One line on the terminal and in log.txt."""
        progress.say(text, style)
        self.note(text)

    def note(self, text: str) -> None:
        """One line in log.txt alone."""
        if self.workdir is None:
            self._said.append(text)
        else:
            files.append_line(self.workdir / 'log.txt', text)

    @contextlib.contextmanager
    def bar(self, *, start: int, steps: int) -> Iterator[None]:
        """A progress bar inside."""
        with progress.task('training', steps) as self._bar:
            self._bar.update(start)
            yield

    def advance(self, step: int, steps: int, text: str) -> None:
        """Moves the bar; where there is no terminal, a line every PATIENCE seconds, which log.txt has too."""
        if self._bar is not None:
            self._bar.update(step, text)
        if not progress.on_terminal() and time.monotonic() - self._told > PATIENCE:
            self._told = time.monotonic()
            self.say(f'step {step}/{steps}: {text}')

    # -- files --

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the same scalars as TensorBoard events. What is not finite is null."""
        values = {k: finite(v) for k, v in numbers.items()}
        self.last |= {'step': step, **values}
        if self.workdir is None:
            return
        files.append_line(self.workdir / 'metrics.jsonl', json.dumps({'schema': SCHEMA, 'step': step, **values}))
        scalars = [Summary.Value(tag=k, simple_value=math.nan if v is None else v) for k, v in values.items()]
        self._event(step=step, summary=Summary(value=scalars))

    def _event(self, **what: Any) -> None:
        """Appends to this process's TensorBoard file. Its first events say where it goes on: TensorBoard then forgets
        later steps of the files before it."""
        if self._events is None:
            folder = self.folder / 'tensorboard'
            folder.mkdir(parents=True, exist_ok=True)
            self._events = folder / f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'
            self._event(file_version='brain.Event:2')
            self._event(step=self._rewound + 1, session_log=SessionLog(status=SessionLog.START))
        files.append_bytes(self._events, framed(Event(wall_time=time.time(), **what)))

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl."""
        if self.workdir is not None:
            for record in records:
                files.append_line(self.workdir / 'samples.jsonl', json.dumps(record, ensure_ascii=False))

    def status(self, state: str, step: int | None = None, **more: Any) -> None:
        """status.json: a heartbeat that says where the run is; without `step`, where it was last."""
        self._step = self._step if step is None else step
        if self.workdir is not None:
            files.write_json(
                self.workdir / 'status.json', {'state': state, 'step': self._step, 'time': time.time(), **more}
            )

    def rewind(self, step: int) -> None:
        """Forgets what was written after `step`, so that a resumed run's files read as if it had never stopped."""
        if self.workdir is None:
            return
        for name in ('metrics.jsonl', 'samples.jsonl'):
            if (self.workdir / name).exists():
                records = files.read_json_lines(self.workdir / name, warn=self.say)
                kept = [r for r in records if r['step'] <= step]
                text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in kept)
                files.write_text(self.workdir / name, text)
        for line in files.read_json_lines(self.workdir / 'metrics.jsonl'):
            self.last |= {k: v for k, v in line.items() if k != 'schema'}
        self._rewound = step


def framed(event: Any) -> bytes:
    """A protocol buffer as a TFRecord: length, its checksum, the bytes, theirs."""

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    return length + masked(length) + data + masked(data)


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
