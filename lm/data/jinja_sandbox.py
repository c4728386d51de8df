"""Jinja templates of strangers: they come with models, and they are programs.

Jinja's own sandbox keeps them from Python's insides and from changing what they are given, and there are no files that
they could include. What it does not bound is how long they take and how much they make: so they run in a process of
their own (lm/data/jinja_worker.py), which has a second for each rendering and 256 MiB, and which may die.
"""

import json
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm import workers
from lm.errors import UsageError

LONGEST_TEMPLATE = 1 << 18
# Each worker is told the same time, so that a template with a date in it makes one text as long as the program runs.
_COMMAND = [sys.executable, '-P', str(Path(__file__).with_name('jinja_worker.py')), str(time.time())]
_lock = threading.Lock()
_worker: workers.Process | None = None  # one for all renderings, until it dies


def render(text: str, variables: Mapping[str, Any]) -> str:
    """The text that the template makes of the variables.

    Where it has {% generation %} blocks, `generation_begin` and `generation_end` of the variables stand around theirs.

    Raises:
      UsageError: the template refuses them (raise_exception), is damaged, or does what no template should.
    """
    if len(text) > LONGEST_TEMPLATE:
        raise UsageError(f'the chat template has {len(text):,} characters, and at most {LONGEST_TEMPLATE:,} are run')
    outcome, said = _ask(text, variables)
    if outcome == 'refused':
        raise UsageError(f'the chat template refuses this conversation: {said}')
    if outcome == 'failed':
        raise UsageError(f'the chat template fails ({said}): mend it, or bring another chat_template.jinja')
    return said


def _ask(*request: Any) -> tuple[str, str]:
    """(outcome, text) of the worker's for (template, variables)."""
    global _worker
    try:
        line = json.dumps(request).encode()
    except (RecursionError, TypeError, ValueError) as error:  # no conversation of ours is no JSON
        return 'failed', f'{type(error).__name__}: {error}'
    with _lock:
        worker = _worker or workers.Process(_COMMAND)
        _worker = None  # whatever comes between, the next request is not answered with the answer to this
        try:
            outcome, said = worker.ask(line)
        except workers.Died:
            return 'failed', 'it takes too long, or too much memory'
        _worker = worker
        return outcome, said
