"""This process among the others: a line to the hub, and a thread that reads it."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lm.errors import Preempted, RunError, UsageError
from lm.multihost.hub import Hub, Line, Message, address

GRACE = 2.0  # seconds in which a process that has an error of its own may tell it, before another's is told for it


@dataclass(frozen=True)
class Topology:
    """The place of this process among the others, and where their hub is."""

    coordinator: str  # HOST:PORT of process 0's hub
    count: int
    index: int
    local_devices: Sequence[int] | None = None  # None: all of this machine's


class Rank:
    """This process among the others."""

    def __init__(self, topology: Topology, wait: int) -> None:
        self.topology, self._wait = topology, wait
        self.farewell: Callable[[str], None] | None = None
        self._hub = Hub(topology.coordinator, topology.count) if topology.index == 0 else None
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
        hello = {'index': self.topology.index, 'count': self.topology.count, 'name': name, 'facts': dict(facts)}
        self._line.send(lm='hello', **hello)
        if self._hub is not None:
            timer = threading.Timer(self._wait, self._hub.missing)
            timer.daemon = True
            timer.start()
        answer = self._line.receive()
        if answer is None:
            raise UsageError(
                f'process 0 at {self.topology.coordinator} ended, or it is another program: look at its log'
            )
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
                connection = socket.create_connection(address(self.topology.coordinator), timeout=5)
                connection.settimeout(None)
                return connection
            except OSError as error:
                if time.monotonic() > end:
                    why = error.strerror or error
                    raise UsageError(
                        f'process 0 was not to be reached at {self.topology.coordinator} for {self._wait} s ({why}): '
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

    def all_gather(self, value: Any) -> list[Any]:
        self._exchanges += 1
        self._send(lm='give', number=self._exchanges, value=value)
        with self._changed:
            self._changed.wait_for(lambda: self._exchanges in self._given)
            return self._given.pop(self._exchanges)

    def stops_after(self, step: int, signal: str | None) -> str | None:
        """Returns why to stop after `step`, or None. When a process has a signal, all of them wait here until the hub
        knows how far each one is; they stop one step after the furthest. Without a signal nothing is sent and nobody
        waits."""
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
        grace(error)
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
            f'process {index} of {self.topology.count}{name} has died: start all of them again, they go on from the '
            'last checkpoint'
        )

    def _end(self, lost: Message) -> None:
        """Ends this process because of another one, unless it is about to end by itself."""
        if lost['reason'] is not None:
            time.sleep(GRACE / 2)
        if self._leaving:
            return
        line = self._told_of(lost)
        if self.farewell is not None:
            self.farewell(line)
        print(f'lm: {line}', file=sys.stderr, flush=True)
        os._exit(lost['status'])


def grace(error: BaseException) -> None:
    """Waits before an error is told: one that another process's death caused is not, because that one is told instead,
    and this process ends here. A death shows first as an error of a collective; which process died, the hub knows."""
    if not isinstance(error, UsageError | Preempted | KeyboardInterrupt):
        time.sleep(GRACE)
