"""The process that calls a function for `lm.workers.Pool`, each time within its CPU time, its time and its memory.

It is run as a file and imports nothing of ours by itself. The first line of stdin says which function and which limits;
each line after it holds the arguments of a call. It writes [outcome, value] to stdout, a line of JSON each; the outcome
is 'value', 'failed', or 'dying' where the process is no longer to be used. The system ends it when a call takes too
long. (macOS holds no process to its memory, only to its time.) What the function itself prints goes nowhere.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any


def call(function: Callable[..., Any], line: str) -> tuple[str, Any]:
    """(outcome, the value of the function or why there is none)."""
    random.seed(line)
    if numpy := sys.modules.get('numpy'):
        numpy.random.seed(list(line.encode()[-512:]))
    try:
        return 'value', json.loads(json.dumps(function(*json.loads(line)), default=_number))
    except MemoryError as error:
        return 'dying', _told(error)
    except (Exception, SystemExit) as error:  # whatever a person's own function may raise
        return 'failed', _told(error)


def _number(value: Any) -> Any:
    """A Python number of an array's only element, as numpy, JAX and PyTorch have it."""
    if not hasattr(value, 'item'):
        raise TypeError(f'{type(value).__name__} is no number')
    return value.item()


def _told(error: BaseException) -> str:
    text = ' '.join(str(error).split())[:200]
    return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _loaded(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(':')
    found = getattr(importlib.import_module(module), attribute)
    if not callable(found):
        raise TypeError('it is no function')
    return found


def _limit(seconds: float, clock: float) -> None:
    """Sets the timers, whose signals nobody handles; 0: off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, clock)


def serve() -> None:
    """Answers until stdin ends."""
    # Apart from stdin and stdout, which are then the function's to read and to print to.
    lines, out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    answer = lambda *found: print(json.dumps(found), file=out, flush=True)
    first = json.loads(lines.readline())
    size = first['mebibytes'] << 20
    with contextlib.suppress(ValueError, OSError):  # the limit is lower
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    sys.path[:] = first['path']
    try:
        function = _loaded(first['function'])
    except (Exception, SystemExit) as error:
        return answer('missing', _told(error))
    answer('ready', '')
    for line in lines:
        _limit(first['seconds'], first['clock'])
        outcome, value = call(function, line)
        _limit(0, 0)
        answer(outcome, value)
        if outcome == 'dying':
            return None


if __name__ == '__main__':
    serve()
