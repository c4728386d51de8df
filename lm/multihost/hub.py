"""The connections between several processes: lines of JSON, the hub in process 0, and the relay to JAX's service.

See `lm/multihost/processes.py` for what they are for.
"""

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

from lm.errors import RunError, UsageError

KEEPALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4, 'TCP_USER_TIMEOUT': 30_000}  # 30 s of silence
LOOPBACK = ('localhost', '127.0.0.1', '::1')
Message = dict[str, Any]


# ---- a line of JSON, there and back ----


class Line:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in KEEPALIVE.items():
            if name in vars(socket):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
        self._connection, self._reader, self._sending = connection, connection.makefile('rb'), threading.Lock()

    def send(self, **message: Any) -> None:
        """To somebody who is gone it says nothing: its absence is noticed by who reads."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> Message | None:
        """The next message; None when the other side is gone, or speaks something else."""
        try:
            message = json.loads(self._reader.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._reader.close()
        self._connection.close()


# ---- process 0 ----


class Hub:
    """Passes on what the processes say, and tells all when one is gone. Its threads live in process 0.

    Every message is handled under one lock, so each process sees the same order.
    """

    def __init__(self, coordinator: str, count: int) -> None:
        host, port = address(coordinator)
        self._count, self._lock = count, threading.Lock()
        self._lines: dict[int, Line] = {}
        self._hellos: dict[int, Message] = {}
        self._given: dict[int, dict[int, Any]] = {}
        self._at: dict[int, int] = {}
        self._ended: set[int] = set()
        self._stopping = self._over = False
        self._refusal: str | None = None
        try:
            self._listener = listen(host, port)
        except OSError as error:
            raise UsageError(f'--coordinator={coordinator}: process 0 cannot listen there ({error.strerror})') from None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(Line(connection),), daemon=True).start()

    def close(self) -> None:
        """Lets nobody in any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, line: Line) -> None:
        with contextlib.closing(line):
            hello = line.receive()
            if hello is None or hello.get('lm') != 'hello':  # somebody else's, e.g. a scan of ports
                return
            index = hello['index']
            with self._lock:
                if not self._welcome(index, hello, line):
                    return
            while (message := line.receive()) is not None:
                with self._lock:
                    self._handle(index, **message)
                if message['lm'] == 'bye':
                    return
            with self._lock:
                self._lost(index, None, RunError.status)

    def _tell(self, **message: Any) -> None:
        """To all, process 0 last: it may end as soon as it knows."""
        for index in sorted(self._lines, reverse=True):
            self._lines[index].send(**message)

    def _welcome(self, index: int, hello: Message, line: Line) -> bool:
        if self._over:
            line.send(lm='refused', line=self._refusal or 'the run has begun without this process: start all again')
            return False
        if index in self._lines:
            both = ' and '.join(h['name'] for h in (self._hellos[index], hello))
            line.send(lm='refused', line=(text := f'two processes came with --process_id={index} ({both})'))
            self.refuse(text)
            return False
        self._lines[index], self._hellos[index] = line, hello
        if hello['count'] != self._count:
            self.refuse(
                f'process {index} was started with --num_processes={hello["count"]}, process 0 with {self._count}'
            )
        elif len(self._lines) == self._count:
            self._begin()
        return True

    def _begin(self) -> None:
        hellos = [self._hellos[i] for i in range(self._count)]
        ours = hellos[0]['facts']
        for index, theirs in enumerate(hello['facts'] for hello in hellos):
            if keys := sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)):
                more, key = f' (and in {len(keys) - 1} more)' if keys[1:] else '', keys[0]
                told = f'process {index} has {key}={theirs.get(key)}, process 0 has {ours.get(key)}{more}'
                return self.refuse(f'{told}: start all of them alike')
        self._over = True
        self._tell(lm='begin', port=free_port(), names=[hello['name'] for hello in hellos])

    def missing(self) -> None:
        """Refuses to wait any longer."""
        with self._lock:
            if not self._over:
                ids = ', '.join(str(i) for i in range(self._count) if i not in self._lines)
                self.refuse(f'of {self._count} processes these did not come: {ids}; start them with the same command')

    def refuse(self, line: str) -> None:
        self._over, self._refusal = True, line
        self._tell(lm='refused', line=line)

    def _handle(self, index: int, *, lm: str, **said: Any) -> None:
        if lm == 'give':
            given = self._given.setdefault(said['number'], {})
            given[index] = said['value']
            if len(given) == self._count:
                values = self._given.pop(said['number'])
                self._tell(lm='given', number=said['number'], values=[values[i] for i in range(self._count)])
        elif lm == 'stop' and not self._stopping:
            self._stopping = True
            self._tell(lm='freeze', why=f'{said["signal"]} to process {index}')
        elif lm == 'at':
            self._at[index] = said['step']
            if len(self._at) == self._count:
                self._tell(lm='stop_after', step=max(self._at.values()) + 1)
        elif lm == 'end':
            self._ended.add(index)
            if len(self._ended) == self._count:
                self._tell(lm='end')
        elif lm == 'bye':
            self._lost(index, said['reason'], said['status'])

    def _lost(self, index: int, reason: str | None, status: int) -> None:
        self._lines.pop(index, None)
        if len(self._ended) < self._count:
            self._tell(lm='lost', index=index, reason=reason, status=status)


# ---- sockets ----


def address(coordinator: str) -> tuple[str, int]:
    """'HOST:PORT' -> (HOST, PORT); an IPv6 address stands in brackets."""
    host, _, port = coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def listen(host: str, port: int) -> socket.socket:
    """Listens at a loopback address, or on all of this machine's: a cluster's names for it are not always its own."""
    if host in LOOPBACK:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(('', port), backlog=128)


def free_port() -> int:
    with listen('', 0) as probe:
        return probe.getsockname()[1]


def relay(host: str, port: int) -> int:
    """The local port of a relay to that address. It passes bytes both ways, and never that the other side is gone."""
    listener = listen('127.0.0.1', 0)

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_pass_on, args=(near, (host, port)), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def _pass_on(near: socket.socket, target: tuple[str, int]) -> None:
    """Until the near side closes; once the far side is gone the near one is only held open."""
    far = None
    while far is None:
        try:
            far = socket.create_connection(target)
        except OSError:  # process 0 is still starting its service
            time.sleep(0.05)
    gone = False
    while True:
        for ready in select.select([near] if gone else [near, far], [], [])[0]:
            data = b''
            with contextlib.suppress(OSError):
                data = ready.recv(1 << 16)
                if data and not gone:
                    (far if ready is near else near).sendall(data)
            if not data and ready is near:
                near.close()
                return far.close()
            gone = gone or not data
