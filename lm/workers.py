"""Worker processes, for programs of strangers and for functions that may hang, die or eat memory.

A worker reads a line of JSON and writes one, so that nothing of it is unpickled. `Process` is any such program; a
`Pool` runs one function in several of them (lm/worker_main.py), each call bounded in time and memory.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lm.errors import UsageError

STARTING = 120  # seconds in which a worker has imported its function
CLOCK = 4  # times as long by the clock as in CPU time: a call may wait, for a busy machine too
GRACE = 5  # seconds after which a call that has switched its limits off is ended from outside
MEBIBYTES = 2048  # that a worker of a pool holds
_MAIN = [sys.executable, '-P', str(Path(__file__).with_name('worker_main.py'))]
# The same hashes in each worker: some programs iterate over sets of strings. No accelerator, and no threads of BLAS.
_ENVIRONMENT = {
    'PYTHONHASHSEED': '0', 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1',
}  # fmt: skip


class Died(Exception):
    """The worker gave no answer: it ended, was ended, or wrote something else."""


class Process:
    """A program that answers each line of JSON with one. It leaves no children behind: all of its session is ended."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            env=None if env is None else {**os.environ, **env},
        )  # fmt: skip

    def ask(self, line: bytes, *, seconds: float | None = None) -> Any:
        """The answer to a request, `json.dumps` of it. Raises Died if there is none within `seconds`; then the worker
        has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        timer = threading.Timer(seconds, self._kill) if seconds else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            stdin.write(line + b'\n')
            stdin.flush()
            return json.loads(stdout.readline())
        except (OSError, ValueError) as error:
            self.end()
            raise Died from error
        except BaseException:  # a signal of ours: the next request must not get the answer to this one
            self.end()
            raise
        finally:
            if timer:
                timer.cancel()

    def end(self) -> None:
        self._kill()
        with contextlib.suppress(OSError, ValueError):
            self._process.communicate()

    def _kill(self) -> None:
        if self._process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class Outcome(NamedTuple):
    """The value of a call, or why there is none."""

    value: Any
    problem: str | None = None


class Pool:
    """Workers that call one function, 'package.module:function', each with its arguments from a line of JSON.

    Each call begins with the random state of its arguments, so that an outcome does not depend on how many workers
    there are, or on which of them is asked. A worker that hangs, dies or runs out of memory is replaced.
    """

    def __init__(
        self, function: str, *, seconds: float, size: int | None = None, mebibytes: int = MEBIBYTES, called: str = ''
    ) -> None:
        """Args:
        seconds: CPU time of a call; by the clock it may take CLOCK times as long.
        size: workers; None: one for each core.
        called: what a message calls the function.

        Raises UsageError if the function cannot be imported, when the first worker starts.
        """
        self.function, self.seconds, self.called = function, seconds, called or function
        self.size = size or cores()
        self._first = {
            'function': function, 'path': sys.path, 'mebibytes': mebibytes, 'seconds': seconds,
            'clock': CLOCK * seconds,
        }  # fmt: skip
        self._idle: queue.SimpleQueue[Process | None] = queue.SimpleQueue()
        for _ in range(self.size):
            self._idle.put(None)
        self.close = weakref.finalize(self, _end_all, self._idle)

    def map(self, requests: Sequence[Sequence[Any]]) -> list[Outcome]:
        """The outcome of each call, in order. Raises UsageError if the function cannot be imported."""
        if not requests:
            return []
        with ThreadPoolExecutor(min(self.size, len(requests))) as threads:
            return list(threads.map(self._call, requests))

    def probe(self) -> None:
        """Raises UsageError if the function cannot be imported: at once, and not with the first call."""
        worker = self._idle.get()
        try:
            worker = worker or self._start()
        finally:
            self._idle.put(worker)

    def _call(self, request: Sequence[Any]) -> Outcome:
        try:
            line = json.dumps(request).encode()
        except (RecursionError, TypeError, ValueError) as error:
            return Outcome(None, f'{type(error).__name__}: {error}')
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            outcome, value = worker.ask(line, seconds=CLOCK * self.seconds + GRACE)
            if outcome == 'dying':
                worker = worker.end()
            return Outcome(value) if outcome == 'value' else Outcome(None, value)
        except (Died, TypeError, ValueError):  # the latter two: what it wrote is no answer
            worker = worker.end() if worker else None
            return Outcome(None, f'it ended, or took over {self.seconds:g} s')
        except BaseException:
            worker = None
            raise
        finally:
            self._idle.put(worker)

    def _start(self) -> Process:
        worker = Process(_MAIN, _ENVIRONMENT)
        try:
            outcome, why = worker.ask(json.dumps(self._first).encode(), seconds=STARTING)
        except Died:
            outcome, why = 'missing', f'its module ends the process, or takes over {STARTING} s to import'
        if outcome != 'ready':
            worker.end()
            raise UsageError(f'{self.called}: {why}')
        return worker


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _end_all(idle: 'queue.SimpleQueue[Process | None]') -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            if worker := idle.get_nowait():
                worker.end()
