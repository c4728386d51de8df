"""The process that renders chat templates, each within a second and little memory; see lm/data/jinja_sandbox.py.

It is run as a file, with the time that is now for all templates, and imports nothing of ours. It reads [template,
variables] from stdin and writes [outcome, text] to stdout, a line of JSON each; the outcome is 'rendered', 'refused' or
'failed'. The system ends it when a rendering takes too long. (macOS holds no process to its memory, only to its time.)
"""

import contextlib
import json
import re
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

COMPILING, RENDERING = 3, 1  # seconds of CPU time; the longest template that is run compiles in two
MEBIBYTES = 256  # that the process holds


class Refused(Exception):
    """The template has called raise_exception."""


def render(text: str, variables: Mapping[str, Any]) -> tuple[str, str]:
    """(the outcome, the rendered text or the reason why there is none)."""
    try:
        signal.setitimer(signal.ITIMER_PROF, COMPILING)  # whose signal nobody handles
        compiled = _compiled(text)
        signal.setitimer(signal.ITIMER_PROF, RENDERING)
        return 'rendered', compiled.render(variables)
    except Refused as error:
        return 'refused', _line(error)
    except Exception as error:  # a template is a program, and may raise whatever a program may
        return 'failed', f'{type(error).__name__}: {_line(error)}' if str(error) else type(error).__name__


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]


# ---- the environment: Hugging Face's ----


@lru_cache(maxsize=16)
def _compiled(text: str) -> Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _Generation]
    )
    environment.filters['tojson'] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    # What they make is another text each time.
    del environment.filters['random'], environment.globals['lipsum']
    return environment.from_string(text)


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Raises at once: Jinja's own is nothing, in silence, until it is used."""
        raise SecurityError(f'access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.')


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant writes."""

    tags = {'generation'}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        mark = lambda name: nodes.Output([nodes.Name(name, 'load')]).set_lineno(line)
        return [mark('generation_begin'), *body, mark('generation_end')]


def _raise_exception(message: str = '') -> NoReturn:
    raise Refused(message)


def _strftime_now(form: str) -> str:
    if re.search(r'\d{4}', form):
        raise SecurityError('it formats with a width of thousands')
    return datetime.fromtimestamp(float(sys.argv[1])).strftime(form)


def _to_json(value: Any, indent: Any = None, separators: Any = None, sort_keys: bool = False, **_: Any) -> str:
    """Not Jinja's, which writes < as an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- the process ----


def serve() -> None:
    """Answers until stdin ends."""
    with contextlib.suppress(ValueError):  # the limit is lower
        resource.setrlimit(resource.RLIMIT_DATA, (MEBIBYTES << 20, MEBIBYTES << 20))
    for line in sys.stdin:
        template, variables = json.loads(line)
        answer = json.dumps(render(template, variables))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == '__main__':
    serve()
