"""Ctrl-C and SIGTERM: one handler for every command, from its first line on, before the imports that take seconds.

A command leaves at once and from within the handler, after what it has half done was undone. Nothing is raised: an
exception can be dropped by a destructor or a callback of JAX's garbage collector, and the command would go on; and an
interpreter that ends while threads of XLA's are at work crashes. Where something is to be done instead (training saves,
a conversation stops its answer) a `Reaction` takes the handler's place.

Python runs a handler between two instructions of the main thread, which may be minutes away while XLA compiles. So a
thread listens as well, and acts where the main thread does not come to it.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

try:
    import termios
except ImportError:  # no Unix
    termios = None

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 0.3  # seconds in which the main thread comes to a signal, unless it is in a library's code


class Ending(BaseException):
    """A signal's end of the command: the line that is said. No Exception, as KeyboardInterrupt is none: whoever handles
    a damaged file must not take this for one."""

    status = 1


class Interrupted(Ending, KeyboardInterrupt):
    """Left by a signal, with nothing saved. Exit status 128 and the signal's number, as a shell has it."""

    def __init__(self, line: str = 'interrupted', *, status: int = 128 + signal.SIGINT) -> None:
        super().__init__(line)
        self.status = status


# How a signal of this name ends the command; None: it goes on.
Reaction = Callable[[str], Ending | None]


def _leaves(name: str) -> Interrupted:
    """The reaction of commands that have none of their own."""
    words = 'interrupted' if name == 'SIGINT' else f'stopped by {name}'
    return Interrupted(f'{words}{_meaning}', status=128 + signal.Signals[name])


_reaction: Reaction = _leaves
_raises = False  # whether the main thread is left by an exception
_meaning = ''  # what is lost, or kept
_undo: list[Callable[[Ending], object]] = []
_pipe: tuple[int, int] | None = None  # what Python writes a signal's number to, and where it is read
_spared = 0  # signals that the thread took before the main thread came to them
_raised: Ending | None = None  # the last one by which the main thread was to leave
_dropped: Ending | None = None  # one that has to be raised again
_leaving = False
_lock = threading.RLock()  # the handler can interrupt itself
_terminal: list[Any] | None = None  # how it was found


# ---- being heard ----


def install() -> None:
    """Hears signals from now on, and for good: the first line of a command."""
    global _terminal
    with contextlib.suppress(Exception):  # it is no terminal
        _terminal = termios.tcgetattr(sys.stdin.fileno()) if termios else None
    _listen()
    threading.Thread(target=_watch, daemon=True, name='signals').start()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Hears signals inside, if nobody does yet."""
    global _pipe
    if _pipe is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, report = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    _listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = report
        for descriptor in _pipe or ():
            os.close(descriptor)
        _pipe = None


def rearm() -> None:
    """Has the thread hear signals again, after an event loop took them for itself."""
    if _pipe is not None:
        signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)


def _listen() -> None:
    global _pipe
    _pipe = os.pipe()
    for descriptor in _pipe:
        os.set_blocking(descriptor, False)
    rearm()
    for number in SIGNALS:
        signal.signal(number, _handle)
    report = sys.unraisablehook
    sys.unraisablehook = lambda dropped: _report(dropped, report)


# ---- what a signal does ----


@contextlib.contextmanager
def reacting(reaction: Reaction, *, raises: bool = False) -> Iterator[None]:
    """Inside, a signal does what `reaction` says.

    Args:
      raises: the ending is raised where the main thread is, as soon as it comes to it, instead of leaving at once.
    """
    global _reaction, _raises
    before = _reaction, _raises
    _reaction, _raises = reaction, raises
    try:
        yield
    finally:
        _reaction, _raises = before


@contextlib.contextmanager
def means(words: str) -> Iterator[None]:
    """Inside, a command that is left says so: 'interrupted: WORDS'."""
    global _meaning
    before, _meaning = _meaning, f': {words}'
    try:
        yield
    finally:
        _meaning = before


@contextlib.contextmanager
def undoing(action: Callable[[Ending], object]) -> Iterator[None]:
    """Inside, `action(ending)` is called before the command is left without an exception, the last one first."""
    _undo.append(action)
    try:
        yield
    finally:
        _undo.remove(action)


def say(line: str) -> None:
    """A line on stderr, past all that the interrupted thread may hold."""
    start = '\n' if sys.stderr is not None and os.isatty(2) else ''  # after ^C, or a progress bar
    with contextlib.suppress(OSError):
        os.write(2, f'{start}lm: {" ".join(line.split())}\n'.encode())


def leave(ending: Ending) -> NoReturn:
    """Says why, undoes what is half done and ends the process; called again meanwhile, it ends at once."""
    global _leaving
    if not _leaving:
        _leaving = True
        say(str(ending))
        for action in reversed(_undo[:]):
            with contextlib.suppress(BaseException):
                action(ending)
        _restore_terminal()
    os._exit(ending.status)


def _restore_terminal() -> None:
    """As it was found: a line editor leaves it raw, a progress bar hides the cursor."""
    if _terminal is None or termios is None:
        return
    with contextlib.suppress(Exception):
        os.write(2, b'\x1b[?25h\x1b[?2004l')
        termios.tcsetattr(0, termios.TCSANOW, _terminal)


# ---- who acts ----


def _take(heard: Sequence[int]) -> Ending | None:
    """Returns how the command ends because of these signals, None if it goes on."""
    global _dropped
    ending = None
    for number in heard:
        if _dropped is not None:
            ending, _dropped = _dropped, None
        else:
            ending = _reaction(signal.Signals(number).name) or ending
    return ending


def _read() -> list[int]:
    """The signals that came since the last call."""
    if _pipe is None:
        return []
    with contextlib.suppress(BlockingIOError):
        return [number for number in os.read(_pipe[0], 64) if number in SIGNALS]
    return []


def _handle(number: int, frame: Any) -> None:
    """Called in the main thread."""
    global _spared, _raised
    del frame
    with _lock:
        heard, spared, _spared = _read(), _spared, 0
        if spared and not heard:  # the thread was quicker
            return
        ending = _take(heard or [number])  # none: an event loop reads in our place
    if ending is None:
        return
    if not _raises:
        leave(ending)
    _raised = ending
    raise ending


def _watch() -> None:
    """Acts for a main thread that does not come to its signals."""
    global _spared
    assert _pipe is not None
    while True:
        select.select([_pipe[0]], [], [])
        time.sleep(PATIENCE)
        with _lock:
            heard = _read()
            _spared += len(heard)
            ending = _take(heard)
        if ending is not None:
            leave(ending)


def _report(dropped: Any, report: Callable[[Any], object]) -> None:
    """A destructor or a callback of the garbage collector cannot be left by an exception, Python drops it: ours is
    raised again, a little later."""
    global _dropped
    if dropped.exc_value is None or dropped.exc_value is not _raised:
        report(dropped)
        return
    _dropped = _raised
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
