"""The recorder of a run: the terminal, log.txt, metrics.jsonl, samples.jsonl, TensorBoard and status.json."""

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
from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2

from lm import files, progress
from lm.multihost import processes

# Their fields are declared at run time, where no type checker sees them.
Event: Any = vars(event_pb2)['Event']
SessionLog: Any = vars(event_pb2)['SessionLog']
Summary: Any = vars(summary_pb2)['Summary']
SummaryMetadata: Any = vars(summary_pb2)['SummaryMetadata']
Tensor: Any = vars(tensor_pb2)['TensorProto']
TensorShape: Any = vars(tensor_shape_pb2)['TensorShapeProto']
SCHEMA = 2  # of a line of metrics.jsonl; 1 had the z-loss in train/cross_entropy, and that without it in train/nll
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
        self.tokens: int | None = None  # that the run has learned from, padding left out
        self.settings: dict[str, Any] = {}  # for TensorBoard
        self._saved: int | None = None
        self._growing: dict[str, files.Growing] = {}  # by their names in the directory
        self._events: files.Growing | None = None
        self._beat = ('', -math.inf)
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
            self._grow('log.txt', text)

    def _grow(self, name: str, line: str) -> None:
        """Adds a line to a file of the directory."""
        if name not in self._growing:
            self._growing[name] = files.Growing(self.folder / name)
        self._growing[name].add_line(line)

    def flush(self) -> None:
        """Has all that was told where a kill does not reach it. Raises RunError if it cannot be written."""
        for file in (*self._growing.values(), *([self._events] if self._events else [])):
            file.flush()

    @contextlib.contextmanager
    def bar(self, *, start: int, steps: int, what: str = 'training') -> Iterator[None]:
        """A progress bar inside."""
        with progress.task(what, steps) as self._bar:
            self._bar.update(start)
            yield

    def advance(self, step: int, steps: int, text: str, what: str = 'step') -> None:
        """Moves the bar; where there is no terminal, a line every PATIENCE seconds, which log.txt has too."""
        if self._bar is not None:
            self._bar.update(step, text)
        if not progress.on_terminal() and time.monotonic() - self._told > PATIENCE:
            self._told = time.monotonic()
            self.say(f'{what} {step}/{steps}: {text}')

    # -- files --

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """A line of metrics.jsonl and the same scalars as TensorBoard events. What is not finite is null."""
        seen = {} if self.tokens is None else {'tokens': self.tokens}
        values = {**seen, **{k: finite(v) for k, v in numbers.items()}}
        self.last |= {'step': step, **values}
        if self.workdir is None:
            return
        self._grow('metrics.jsonl', json.dumps({'schema': SCHEMA, 'step': step, 'time': time.time(), **values}))
        scalars = [Summary.Value(tag=k, simple_value=math.nan if v is None else v) for k, v in values.items()]
        self._event(step=step, summary=Summary(value=scalars))

    def _event(self, **what: Any) -> None:
        """Appends to this process's TensorBoard file. Its first events say where it goes on: TensorBoard then forgets
        later steps of the files before it."""
        if self._events is None:
            folder = self.folder / 'tensorboard'
            folder.mkdir(parents=True, exist_ok=True)
            self._events = files.Growing(folder / f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}')
            self._event(file_version='brain.Event:2')
            self._event(step=self._rewound + 1, session_log=SessionLog(status=SessionLog.START))
            self._event(step=0, summary=Summary(value=[text('settings', json.dumps(self.settings, indent=1))]))
        self._events.add(framed(Event(wall_time=time.time(), **what)))

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl and the same as texts in TensorBoard, each record one with its prompt."""
        if self.workdir is None or not records:
            return
        for record in records:
            self._grow('samples.jsonl', json.dumps(record, ensure_ascii=False))
        values = [text(f'samples/{r["prompt_id"]}/{r["temperature"]}', f'{r["prompt"]}[…]{r["text"]}') for r in records]
        self._event(step=records[0]['step'], summary=Summary(value=values))

    def status(self, state: str, step: int | None = None, **more: Any) -> None:
        """status.json: a heartbeat that says where the run is; without `step`, where it was last."""
        self._step = self._step if step is None else step
        if self.workdir is None:
            return
        before, when = self._beat
        if files.is_bucket(self.workdir) and before == state and time.monotonic() < when + files.BUCKET_SECONDS:
            return
        self._beat = state, time.monotonic()
        told = {'state': state, 'step': self._step, 'saved': self._saved, 'time': time.time()}
        files.write_json(self.workdir / 'status.json', told | more)

    def checkpointed(self, step: int | None) -> None:
        """Notes the newest checkpoint that is whole, for status.json: a run that had one has something to lose."""
        self._saved = step

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
                self._growing.pop(name, None)
        for line in files.read_json_lines(self.workdir / 'metrics.jsonl'):
            self.last |= {k: v for k, v in line.items() if k not in ('schema', 'time')}
        self._rewound = step


def text(tag: str, content: str) -> Any:
    """A text as TensorBoard's text plugin reads it: Markdown, here a block that is shown as it is."""
    shown = ''.join(f'    {line}\n' for line in content.splitlines())
    plugin = SummaryMetadata.PluginData(plugin_name='text')
    tensor = Tensor(
        dtype='DT_STRING', string_val=[shown.encode()], tensor_shape=TensorShape(dim=[TensorShape.Dim(size=1)])
    )
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


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
