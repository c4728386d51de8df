"""The ways a command ends badly, each with its exit status, and the one line that says why."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from lm import interrupts
from lm.interrupts import Ending, Interrupted


class UsageError(Exception):
    """The user asked for what cannot be done, seen before anything is allocated. Exit status 2."""

    status = 2


class RunError(Exception):
    """Something failed while running. Exit status 1; the last checkpoint is intact."""

    status = 1


class Alarm(RunError):
    """Training goes where nobody wants it to; it stays so until the settings change."""


class Preempted(Ending):
    """SIGTERM or Ctrl-C came; the same command goes on. Exit status 75 (EX_TEMPFAIL)."""

    status = 75


def install(extra: str) -> str:
    """The command that brings an extra of pyproject.toml. It is one of the checkout: the index has a stranger's package
    called lm, and none of ours."""
    return f"pip install -e '.[{extra}]' in the checkout of lm"


class Parser(argparse.ArgumentParser):
    """A command's flags; a mistake in them is one line, as every other mistake is."""

    def __init__(self, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (--help lists the flags)')


def checked(text: str, what: str) -> str:
    """A text of the command line or the terminal. Raises UsageError if it is no UTF-8: Python hides such bytes in lone
    surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f'{what} is not valid UTF-8') from None
    return text


def run_command(command: Callable[[], None]) -> int:
    """Runs an entry point's work and returns its exit status; an error that we know is one line on stderr."""
    try:
        with interrupts.heard():
            command()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # who reads has seen enough: `… | head`
        with contextlib.suppress(OSError), open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0
    except (UsageError, RunError, Ending) as error:
        return _told(str(error), error.status)
    except KeyboardInterrupt:  # a library's
        return _told('interrupted', Interrupted().status)
    except Exception as error:
        text = str(error)
        if isinstance(error, ImportError) and text.startswith('Please install'):  # fsspec's, of a bucket
            return _told(text, UsageError.status)
        if isinstance(error, OSError):  # what is not written or read through `lm.files`
            return _told(text, RunError.status)
        if isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in text:  # XLA's, when the device's memory is full
            hint = 'a smaller execution.microbatch, more mesh.fsdp or execution.remat=full'
            return _told(f'out of memory ({text.splitlines()[0][:200]}): {hint}', RunError.status)
        traceback.print_exc()  # a fault of ours: the interpreter's own end may crash, see `leave`
        return 1


def leave(status: int) -> NoReturn:
    """Ends the process at once. The interpreter's own end would wait for what a failed save of Orbax's left behind
    (0.12.8: threads that wait for a signal which never comes) and for other processes, and crashes where threads of
    XLA's are still at work."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _told(text: str, status: int) -> int:
    print(f'lm: {" ".join(text.split())}', file=sys.stderr)
    return status
