"""A line editor for a conversation at a terminal: history, several lines, pasting, commands that begin with a slash."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from lm import interrupts

try:
    import termios
    import tty
except ImportError:  # no Unix
    termios = tty = None

PASTE_ON, PASTE_OFF = '\x1b[?2004h', '\x1b[?2004l'  # the terminal says where a paste begins and ends


class Editor:
    """Reads what is said: Enter sends, Alt-Enter begins a line, Ctrl-C clears, a paste is one text with all its lines.

    Args:
      commands: {'/name': its meaning}, completed by Tab.
      history: the file that remembers what was typed, readable by its owner alone.
    """

    def __init__(self, commands: Mapping[str, str], history: Path) -> None:
        words = WordCompleter(list(commands), meta_dict=dict(commands), sentence=True)
        self._session: PromptSession[str] = PromptSession(
            '> ', history=_history(history), completer=words, complete_while_typing=False, key_bindings=_keys(),
            prompt_continuation='  ', enable_suspend=True, placeholder=[('fg:ansibrightblack', 'a message, or /help')],
        )  # fmt: skip

    def read(self) -> str:
        """The next text. Raises EOFError at Ctrl-D."""
        try:
            return self._session.prompt()
        finally:
            interrupts.rearm()  # the editor's event loop took the signals for itself


class _Remembered(FileHistory):
    """A history that is not kept where it cannot be written."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history(file: Path) -> History:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return InMemoryHistory()
    return _Remembered(str(file))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    def clear(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text('\n')

    keys.add('c-c')(clear)
    keys.add(Keys.SIGINT)(clear)
    keys.add('escape', 'enter')(new_line)
    return keys


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """Inside, what is typed or pasted waits, unseen, for the next time that the editor reads; Ctrl-C is a signal."""
    if termios is None or tty is None or not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)
    print(PASTE_ON, end='', flush=True)
    try:
        yield
    finally:
        print(PASTE_OFF, end='', flush=True)
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def forget_typed() -> None:
    """Drops what was typed or pasted and not read: else the shell would run it."""
    if termios is not None and sys.stdin.isatty():
        with contextlib.suppress(termios.error):
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
