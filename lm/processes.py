"""Several processes that train one run: how they find each other, agree, and notice that one is gone.

Arrays travel by JAX's collectives. Everything else goes over one TCP connection from each process to process 0, whose
hub passes it on: what each was started with (compared before anything is allocated), values that all must know, the
step after which to stop, and who has died. A connection ends when its process does, and the system's keep-alive finds
out about a machine that is gone, so nobody needs a heartbeat.

JAX's own service could carry most of it, but its clients answer any death, and first of all process 0's, by aborting
from C++ with a stack trace (jaxlib 0.10 to 0.12; the callback that would prevent it fails with std::bad_cast). So a
client here reaches the service through a relay in its own process, which keeps quiet when the service is gone: the
connection to the hub, gone at the same moment, says so in one line.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lm import interrupts
from lm.errors import Preempted, RunError, UsageError
from lm.hub import LOOPBACK, Hub, Line, Message, address, relay

GRACE = 2.0  # seconds in which a process that has an error of its own may tell it, before another's is told for it
JAX_HEARTBEAT_SECONDS = 24 * 3600  # ours is the connection: a long compile under the interpreter's lock is no death


@dataclass(frozen=True)
class Place:
    """Which process this is to be."""

    coordinator: str  # HOST:PORT of process 0's hub
    count: int
    index: int
    local_devices: Sequence[int] | None = None  # None: all of this machine's


# ---- where this process stands ----


def place(coordinator: str | None, count: int | None, index: int | None, *, wait: int) -> Place | None:
    """What the command line says, or with 'auto' what the cluster does (Cloud TPU, Slurm, Open MPI, Kubernetes); None
    for a process that is alone. Raises UsageError if a part is missing."""
    if coordinator is None:
        if count is not None or index is not None:
            raise UsageError('--num_processes and --process_id need --coordinator=HOST:PORT, the same for all of them')
        return None
    if coordinator == 'auto':
        found = detect(wait)
    elif count is None or index is None:
        raise UsageError('--coordinator=HOST:PORT needs --num_processes=N and --process_id=I, I from 0 to N-1')
    else:
        found = Place(coordinator, count, index)
    if found.count < 1:
        raise UsageError(f'--num_processes={found.count} must be at least 1')
    if not 0 <= found.index < found.count:
        raise UsageError(f'--process_id={found.index} must be from 0 to {found.count - 1}, --num_processes less one')
    _, colon, port = found.coordinator.rpartition(':')
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f'--coordinator={coordinator} must be HOST:PORT of process 0, or auto')
    return found if found.count > 1 else None


def detect(wait: int) -> Place:
    """What JAX finds out from the cluster it runs in. Raises UsageError if it knows none."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks; its answer has no public name

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, wait)
    if address is None or count is None or index is None:
        raise UsageError(
            '--coordinator=auto: this is no cluster that JAX knows (Cloud TPU, Slurm, Open MPI, Kubernetes): give '
            '--coordinator=HOST:PORT --num_processes=N --process_id=I'
        )
    return Place(address, count, index, devices)


_member: 'Member | None' = None


def first() -> bool:
    """Whether this process writes what one process writes for all; true for a process that is alone."""
    return _member is None or _member.place.index == 0


def exchange(value: Any) -> list[Any]:
    """Every process's value (JSON), by process; each waits for all of them, and all call it at the same places."""
    return [value] if _member is None else _member.exchange(value)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 does what is inside before the others begin."""
    if not first():
        exchange('turn')
    yield
    if first():
        exchange('turn')


def same(what: str, value: Any) -> None:
    """Raises UsageError, in every process, unless all have the same value (JSON)."""
    for other, theirs in enumerate(values := exchange(value)):
        if theirs != values[0]:
            raise UsageError(f'process {other} has {what} {theirs}, process 0 has {values[0]}: make them the same')


def agreed(error: Exception | None) -> str | None:
    """What went wrong in any of the processes, or None: so that all take the same way after a failure of one."""
    told = exchange(None if error is None else str(error))
    if _member is None:
        return told[0]
    return next((f'process {i}: {text}' for i, text in enumerate(told) if text is not None), None)


def stops_after(step: int, signal: str | None) -> str | None:
    """Why to stop after `step`, the same step in every process, if one of them had a signal; None to go on."""
    return signal if _member is None else _member.stops_after(step, signal)


def settle(error: BaseException) -> None:
    """Before an error is told: one that another process's death caused is not, because that one is told instead, and
    this process ends here. A death shows first as an error of a collective; which process died, the hub knows."""
    if _member is not None and not isinstance(error, UsageError | Preempted | KeyboardInterrupt):
        time.sleep(GRACE)


def last_words(say: Callable[[str], None]) -> None:
    """From now on `say(line)` is called before this process is ended because of another."""
    if _member is not None:
        _member.last_words = say


@contextlib.contextmanager
def joined(place: Place | None, facts: Mapping[str, Any], *, wait: int) -> Iterator[None]:
    """Inside, this process is one of several, and JAX sees the devices of all.

    Args:
      facts: {name: JSON value} that must be the same in all processes.
      wait: seconds until all of them must have come.

    Raises:
      UsageError: one did not come, came twice, or differs in a fact.
    """
    global _member
    if place is None:
        yield
        return
    if wait < 1:
        raise UsageError(f'--wait={wait} must be at least 1 second')
    member = Member(place, wait)
    try:
        port = member.enter(facts)
        _member = member
        member.watch()
        with interrupts.undoing(member.leave):
            _initialize(place, port, wait)
            yield
        member.end()
    except BaseException as error:
        member.leave(error)
        raise
    finally:
        _member = None


def _initialize(place: Place, port: int, wait: int) -> None:
    """JAX's own service, on a port that process 0 chose, behind a relay in the others."""
    host, _ = address(place.coordinator)
    own = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
    seen = own if place.index == 0 else f'127.0.0.1:{relay(host, port)}'
    _keep_stdout()
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        seen, place.count, place.index, place.local_devices, initialization_timeout=wait,
        heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS, cluster_detection_method='deactivate',
        coordinator_bind_address=own if host in LOOPBACK else None,
    )  # fmt: skip


def _keep_stdout() -> None:
    """Standard output is for a command's one object: what Gloo prints there when it connects goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file, e.g. under a test
        return
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    sys.stdout = os.fdopen(kept, 'w')


# ---- this process among the others ----


class Member:
    """This process among the others: a line to the hub, and a thread that reads it."""

    def __init__(self, place: Place, wait: int) -> None:
        self.place, self._wait = place, wait
        self.last_words: Callable[[str], None] | None = None
        self._hub = Hub(place.coordinator, place.count) if place.index == 0 else None
        self._names: list[str] = []
        self._changed = threading.Condition()
        self._given: dict[int, list[Any]] = {}
        self._exchanges = 0
        self._step, self._frozen, self._stop_after, self._why = -1, False, sys.maxsize, None
        self._asked = self._leaving = False
        self._line: Line | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)

    # -- coming --

    def enter(self, facts: Mapping[str, Any]) -> int:
        """Meets the others: the port of JAX's service. Raises UsageError if they do not come, or do not fit, and what
        the other has if one ends while all wait."""
        self._line = Line(self._connect())
        name = f'{socket.gethostname()}, pid {os.getpid()}'
        hello = {'index': self.place.index, 'count': self.place.count, 'name': name, 'facts': dict(facts)}
        self._line.send(lm='hello', **hello)
        if self._hub is not None:
            timer = threading.Timer(self._wait, self._hub.missing)
            timer.daemon = True
            timer.start()
        answer = self._line.receive()
        if answer is None:
            raise UsageError(f'process 0 at {self.place.coordinator} ended, or it is another program: look at its log')
        if answer['lm'] != 'begin':
            if self._hub is not None:
                time.sleep(GRACE)  # those who are still starting shall hear it, too
            if answer['lm'] == 'refused':
                raise UsageError(answer['line'])
            kind = {UsageError.status: UsageError, Preempted.status: Preempted}.get(answer['status'], RunError)
            raise kind(self._told_of(answer))
        self._names = answer['names']
        return answer['port']

    def _connect(self) -> socket.socket:
        end = time.monotonic() + self._wait
        while True:
            try:
                connection = socket.create_connection(address(self.place.coordinator), timeout=5)
                connection.settimeout(None)
                return connection
            except OSError as error:
                if time.monotonic() > end:
                    why = error.strerror or error
                    raise UsageError(
                        f'process 0 was not to be reached at {self.place.coordinator} for {self._wait} s ({why}): '
                        'start it, or correct --coordinator'
                    ) from None
                time.sleep(0.2)

    # -- being there --

    def watch(self) -> None:
        self._thread.start()

    def _listen(self) -> None:
        assert self._line is not None
        while (message := self._line.receive()) is not None:
            if message['lm'] == 'end':
                return
            if message['lm'] == 'lost':
                self._end(message)
            with self._changed:
                self._take(**message)
                self._changed.notify_all()
        self._end({'index': 0, 'reason': None, 'status': RunError.status})

    def _take(self, *, lm: str, **said: Any) -> None:
        if lm == 'given':
            self._given[said['number']] = said['values']
        elif lm == 'freeze':
            self._frozen, self._why = True, said['why']
            self._send(lm='at', step=self._step)
        elif lm == 'stop_after':
            self._frozen, self._stop_after = False, said['step']

    def _send(self, **message: Any) -> None:
        assert self._line is not None
        self._line.send(**message)

    def exchange(self, value: Any) -> list[Any]:
        self._exchanges += 1
        self._send(lm='give', number=self._exchanges, value=value)
        with self._changed:
            self._changed.wait_for(lambda: self._exchanges in self._given)
            return self._given.pop(self._exchanges)

    def stops_after(self, step: int, signal: str | None) -> str | None:
        """When a process has a signal, all of them wait here until the hub knows how far each one is; they stop one
        step after the furthest. Without a signal nothing is sent and nobody waits."""
        if signal and not self._asked:
            self._asked = True
            self._send(lm='stop', signal=signal)
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen)
            self._step = step
            return self._why if step >= self._stop_after else None

    # -- going --

    def end(self) -> None:
        """Waits until all of them have come to their end. What they leave open after it is nobody's death."""
        jax.distributed.shutdown()
        self._send(lm='end')
        self._thread.join()

    def leave(self, error: BaseException) -> None:
        """Tells the others why this process ends, unless they all end for the same reason."""
        if self._line is None or self._thread.ident is not None and not self._thread.is_alive():
            return
        if isinstance(error, Preempted) and self._step >= self._stop_after:
            return self.end()
        settle(error)
        self._leaving = True
        known = isinstance(error, UsageError | RunError | Preempted)
        reason = ' '.join(f'{"" if known else type(error).__name__} {error}'.split())
        self._send(lm='bye', status=error.status if known else RunError.status, reason=reason)
        if self._thread.is_alive():
            self._thread.join(GRACE)  # the hub has passed it on, and closes the line

    def _told_of(self, lost: Message) -> str:
        index = lost['index']
        if lost['reason'] is not None:
            return f'process {index}: {lost["reason"]}'
        name = f' ({self._names[index]})' if self._names else ''
        return (
            f'process {index} of {self.place.count}{name} has died: start all of them again, they go on from the last '
            'checkpoint'
        )

    def _end(self, lost: Message) -> None:
        """Ends this process because of another one, unless it is about to end by itself."""
        if lost['reason'] is not None:
            time.sleep(GRACE / 2)
        if self._leaving:
            return
        line = self._told_of(lost)
        if self.last_words is not None:
            self.last_words(line)
        print(f'lm: {line}', file=sys.stderr, flush=True)
        os._exit(lost['status'])
