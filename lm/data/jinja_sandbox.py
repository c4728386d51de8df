"""Jinja templates of strangers: they come with models, and they are programs.

Jinja's own sandbox keeps them from Python's insides and from changing what they are given, and there are no files that
they could include. What it does not bound is how long they take and how much they make (of loops it bounds `range`
alone), so here each turn of a loop, call, filter and operator that makes something pays out of one budget, in
characters.
"""

import json
import re
import threading
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from datetime import datetime
from functools import lru_cache, update_wrapper
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from lm.errors import UsageError

BUDGET = 1 << 28  # characters of work in one rendering
TURN = 1 << 12  # what a turn of a loop or a call of a macro costs: at most 65,536 of them
LARGEST = 1 << 22  # characters of one value
ITEM = 16  # what an item of a list costs besides
LARGEST_NUMBER = 1 << 16  # that a function is given; and bits of a result
LONGEST_TEMPLATE = 1 << 18
# Those that templates of chats use. Others have wide and slow corners (`center`, `urlize`, `wordwrap`).
FILTERS = {
    'abs', 'capitalize', 'count', 'd', 'default', 'dictsort', 'e', 'escape', 'first', 'float', 'groupby', 'indent',
    'int', 'items', 'join', 'last', 'length', 'list', 'lower', 'map', 'max', 'min', 'reject', 'rejectattr', 'replace',
    'reverse', 'round', 'safe', 'select', 'selectattr', 'sort', 'string', 'title', 'trim', 'unique', 'upper',
}  # fmt: skip
_FREE = ('count', 'd', 'default', 'first', 'last', 'length')  # they make nothing out of what they are given
_WIDE = ('center', 'expandtabs', 'format', 'format_map', 'ljust', 'rjust', 'translate', 'zfill')
_WIDTH = re.compile(r'\d{4}|\*')
_BEGUN = datetime.now()  # one date for all that a process renders


def render(text: str, variables: Mapping[str, Any]) -> str:
    """What the template makes of the variables.

    Where it has {% generation %} blocks, `generation_begin` and `generation_end` of the variables stand around theirs.

    Raises:
      UsageError: the template refuses them (raise_exception), is damaged, or does what no template should.
    """
    template = _compiled(text)
    environment: Any = template.environment
    environment.begin()
    try:
        return template.render(variables)
    except _Refused as e:
        raise UsageError(f'the chat template refuses this conversation: {_line(e)}') from None
    except Exception as e:  # a template is a program, and may raise whatever a program may
        raise _fails(e) from e


@lru_cache(maxsize=16)
def _compiled(text: str) -> Template:
    if len(text) > LONGEST_TEMPLATE:
        raise UsageError(f'the chat template has {len(text):,} characters, and at most {LONGEST_TEMPLATE:,} are run')
    environment = _Environment()
    try:
        return environment.from_string(_Paying(environment).visit(environment.parse(text)))
    except Exception as e:  # Jinja's own, and whatever its compiler meets in a template made to break it
        raise _fails(e) from e


def _fails(error: Exception) -> UsageError:
    told = f'{type(error).__name__}: {_line(error)}' if str(error) else type(error).__name__
    return UsageError(f'the chat template fails ({told}): mend it, or bring another chat_template.jinja')


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]


class _Refused(Exception):
    """The template has called raise_exception."""


# ---- the environment: what Hugging Face's has ----


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant writes."""

    tags = {'generation'}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        mark = lambda name: nodes.Output([nodes.Name(name, 'load')]).set_lineno(line)
        return [mark('generation_begin'), *body, mark('generation_end')]


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(('+', '*', '**', '%'))

    def __init__(self) -> None:
        extensions = ['jinja2.ext.loopcontrols', _Generation]
        # Not optimized: that would compute constants, as wide as they are, before anything is counted.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=self.output
        )
        self._local = threading.local()
        self.filters = {name: self._paid(name, self.filters[name]) for name in FILTERS}
        self.filters['tojson'] = self._paid('tojson', _to_json)
        del self.globals['lipsum']
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    # -- the budget --

    def begin(self) -> None:
        self._local.left = BUDGET

    def pay(self, characters: int) -> None:
        self._local.left -= characters
        if self._local.left < 0:
            raise SecurityError('it makes too much, or loops too often')

    def turn(self) -> bool:
        """Pays for a turn of a loop, or a call of a macro."""
        self.pay(TURN)
        return True

    def output(self, value: Any) -> Any:
        """Pays for what is written, or made into text."""
        self.pay(_weight(value, is_text=True))
        return value

    def joined(self, *values: Any) -> str:
        """The operator ~."""
        self.pay(sum(_weight(value, is_text=True) for value in values))
        return ''.join(map(str, values))

    def container(self, value: Any) -> Any:
        """Pays for a list, tuple or dict that is written in a template: those in each other soon hold very much."""
        self.pay(_weight(value, is_text=False))
        return value

    # -- what makes something --

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902 (kwargs may be any)
        if __obj in (__self.turn, __self.joined, __self.container):
            return __obj(*args)
        owner = [__obj.__self__] if isinstance(__obj, type(''.join)) else []
        given = [value for name, value in kwargs.items() if name not in ('_loop_vars', '_block_vars')]  # Jinja's own
        __self._pay_for([*owner, *args, *given])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ('*', '**'):
            _check_product(operator, left, right)
        if operator == '%' and isinstance(left, str) and _WIDTH.search(left):
            raise SecurityError('it formats with a width of thousands')
        self.pay(_weight(left, is_text=operator == '%') + _weight(right, is_text=operator == '%'))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _WIDE) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja asks this before `is_safe_attribute`, which refuses str.format here."""

    def _pay_for(self, values: Iterable[Any], *, is_text: bool = False) -> None:
        """Pays for a call: by the product of its texts, because a replacement may make that much."""
        cost = 1
        for value in values:
            if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
                raise SecurityError(f'it calls a function with the number {value:.3g}')
            cost *= max(1, _weight(value, is_text=is_text))
        self.pay(cost)

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, paid for. `update_wrapper` keeps what says that Jinja passes it a context."""
        passed = 1 if hasattr(function, 'jinja_pass_arg') else 0

        def paid(*args: Any, **kwargs: Any) -> Any:
            if name not in _FREE:
                self._pay_for([*args[passed:], *kwargs.values()], is_text=True)
            return function(*args, **kwargs)

        return update_wrapper(paid, function)


class _Paying(NodeTransformer):
    """Rewrites a template: loops and macros pay by the turn; ~, lists and the like are calls that are counted."""

    def __init__(self, environment: _Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:  # it is asked of items for which the body is not run
            node.test = nodes.And(self._call('turn', [], node), node.test)
        return self._body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call('joined', node.nodes, node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._container(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._container(node, node.items) if node.ctx == 'load' else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._container(node, [pair.value for pair in node.items])

    def _container(self, node: Any, values: list[nodes.Expr]) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(v, nodes.Const) for v in values) else self._call('container', [node], node)

    def _body(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        turn = nodes.ExprStmt(self._call('turn', [], node))
        node.body.insert(0, turn.set_lineno(node.lineno).set_environment(self.environment))
        return node

    def _call(self, name: str, args: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        call.set_lineno(at.lineno).set_environment(self.environment)
        return call


def _raise_exception(message: str = '') -> NoReturn:
    raise _Refused(message)


def _strftime_now(form: str) -> str:
    if _WIDTH.search(form):
        raise SecurityError('it formats with a width of thousands')
    return _BEGUN.strftime(form)


def _to_json(value: Any, indent: Any = None, separators: Any = None, sort_keys: bool = False, **_: Any) -> str:
    """Not Jinja's, which writes < as an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- sizes ----


def _weight(value: Any, *, is_text: bool) -> int:
    """The characters of a value with all that is in it, and ITEM more for each.

    Raises SecurityError if they are more than LARGEST, or what is made a text holds an object of which nobody knows.
    """
    total, waiting = 0, [value]
    while waiting and total <= LARGEST:
        item, total = waiting.pop(), total + ITEM
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, Mapping):
            waiting.extend([*item, *item.values()])
        elif isinstance(item, list | tuple | set | range | KeysView | ItemsView | ValuesView):
            waiting.extend(item)
        elif is_text and not isinstance(item, float | Undefined | LoopContext | None) and not hasattr(item, '__next__'):
            raise SecurityError(f'it makes a text of a {type(item).__name__}')
    if total > LARGEST:
        raise SecurityError('it makes a value that is too large')
    return total


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Raises SecurityError for * and ** that would make something large."""
    numbers = [x for x in (left, right) if isinstance(x, int)]
    sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
    if len(numbers) == 2:
        bits = [number.bit_length() for number in numbers]
        large = (sum(bits) if operator == '*' else bits[0] * abs(right)) > LARGEST_NUMBER
    else:
        large = bool(numbers and sizes) and sizes[0] * numbers[0] > LARGEST
    if large:
        raise SecurityError('it makes a value that is too large')
