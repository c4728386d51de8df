"""Messages as the formats of the field write them: one list of them, with what each says and has beside that.

A content is a text, or parts of one. Beside it an assistant's message may have thoughts (`reasoning_content`), tool
calls, and whether it is to be learned (OpenAI's `weight`, axolotl's `train`, verl's `loss_mask`). What else messages
have is counted by its key.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.records import Message, Role, ToolCall

_ROLES: dict[str, Role] = {
    'system': 'system', 'developer': 'system', 'user': 'user', 'human': 'user', 'prompter': 'user',
    'assistant': 'assistant', 'gpt': 'assistant', 'model': 'assistant', 'chatgpt': 'assistant',
    'function_call': 'assistant', 'tool': 'tool', 'function': 'tool', 'observation': 'tool', 'ipython': 'tool',
}  # fmt: skip
_THOUGHTS = ('reasoning_content', 'reasoning', 'thinking')
_LEARNED = ('weight', 'train', 'loss_mask', 'loss')
_CALLS = ('tool_calls', 'function_call')
_READ = {'role', 'from', 'content', 'value', 'name', 'tool_call_id', *_THOUGHTS, *_LEARNED, *_CALLS}
_TEXT_PARTS = ('text', 'input_text', 'output_text')
_THOUGHT_PARTS = ('thinking', 'reasoning')
_DIALOGUE = re.compile(r'(?:^|\n)\n(Human|Assistant):')
Unused = Callable[[str], None]  # is told each key that nothing is made of


class Malformed(Exception):
    """A record that cannot be used: the reason it is counted under, and a sentence about it."""

    def __init__(self, reason: str, what: str):
        super().__init__(what)
        self.reason = reason


def read_messages(value: Any, key: str, unused: Unused) -> list[Message]:
    """The messages of a list, or of its JSON text, or of the columns that TFDS makes of it. Raises Malformed."""
    if isinstance(value, str):
        value = _parsed(value, 'not_messages', f'{key} is a text, and no list of messages')
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Malformed('not_messages', f'{key} is no list of messages')
    if None in value:
        raise Malformed('null', f'message {list(value).index(None) + 1} is null')
    if not all(isinstance(m, Mapping) for m in value):
        raise Malformed('not_messages', f'{key} is no list of messages')
    return [_message(m, i, unused) for i, m in enumerate(value, 1)]


def read_tools(value: Any, key: str) -> list[dict[str, Any]]:
    """The functions that an assistant may call, each as {'type': 'function', 'function': {'name', …}}."""
    what = f'{key} is no list of functions with names'
    value = _parsed(value, 'tools', what) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise Malformed('tools', what)
    tools = [without_nulls(tool if 'function' in tool else {'type': 'function', 'function': tool}) for tool in value]
    if not all(_is_function(tool.get('function')) for tool in tools):
        raise Malformed('tools', what)
    return tools


def without_nulls(value: Any) -> Any:
    """A JSON value without the keys that have none: tables fill up what one row has and another has not."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def is_empty(value: Any) -> bool:
    """Tells whether a field says nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, str | Mapping | Sequence) and not len(value))


# ---- messages ----


def _message(message: Mapping[str, Any], number: int, unused: Unused) -> Message:
    role = next((message[key] for key in ('role', 'from') if message.get(key) is not None), None)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise Malformed('unknown_role', f'message {number} has the role {role!r}, not system, user, assistant or tool')
    ours = _ROLES[role.lower()]
    said = next((message[key] for key in ('content', 'value') if message.get(key) is not None), None)
    is_call = role.lower() == 'function_call'
    calls = _tool_calls(message, said if is_call else None, number)
    content, thoughts = _content('' if calls and (said is None or is_call) else said, number)
    made = Message(role=ours, content=content)
    for key in message.keys() - (_READ if ours == 'assistant' else _READ.difference(_THOUGHTS, _CALLS)):
        if not is_empty(message[key]):
            unused(key)
    if ours == 'assistant':
        _add_answer(made, message, thoughts, calls, number, unused)
    for key in ('name', 'tool_call_id'):
        if isinstance(text := message.get(key), str) and text:
            made[key] = text
    return made


def _add_answer(
    made: Message, message: Mapping[str, Any], thoughts: str, calls: list[ToolCall], number: int, unused: Unused
) -> None:
    """Adds what only an assistant's message has."""
    for key in _THOUGHTS:
        value = message.get(key)
        if isinstance(value, str):
            thoughts = thoughts or value
        elif not is_empty(value):
            unused(key)
    if thoughts.strip():
        made['reasoning_content'] = thoughts
    if calls:
        made['tool_calls'] = calls
    if not _is_learned(message, number):
        made['train'] = False


def _is_learned(message: Mapping[str, Any], number: int) -> bool:
    told = {key: message[key] for key in _LEARNED if message.get(key) is not None}
    for key, value in told.items():
        if value not in (True, False):
            raise Malformed(key, f'{key} of message {number} is {value!r}, neither 0 nor 1')
    return all(told.values())


def _content(value: Any, number: int) -> tuple[str, str]:
    """(the text of a content, the thoughts among its parts)."""
    if value is None:
        raise Malformed('not_text', f'message {number} has no content, or a null')
    parts = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(parts, Sequence):
        raise Malformed('not_text', f'message {number} has a content that is no text')
    texts, thoughts = [], []
    for part in parts:
        kind, text = ('text', part) if isinstance(part, str) else _part(part, number)
        (thoughts if kind in _THOUGHT_PARTS else texts).append(text)
    return ''.join(texts), ''.join(thoughts)


def _part(part: Any, number: int) -> tuple[str, str]:
    """(its type, its text) of a part of a content."""
    kind = part.get('type', 'text') if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and kind in (*_TEXT_PARTS, *_THOUGHT_PARTS):
        text = next((part[key] for key in (kind, 'text') if isinstance(part.get(key), str)), None)
        if text is not None:
            return kind, text
    raise Malformed('not_text', f'message {number} has a content with a part of type {kind}: only text is read')


def _tool_calls(message: Mapping[str, Any], said: Any, number: int) -> list[ToolCall]:
    """The calls of a message; `said` is a call in place of a content."""
    value = next((message[key] for key in _CALLS if not is_empty(message.get(key))), said)
    if is_empty(value):
        return []
    what = f'message {number} has tool calls that are no list of functions with names'
    value = _parsed(value, 'tool_calls', what) if isinstance(value, str) else value
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise Malformed('tool_calls', what)
    return [_tool_call(call, what) for call in calls]


def _tool_call(call: Mapping[str, Any], what: str) -> ToolCall:
    """A call with its arguments as an object, which templates write as JSON."""
    function = call.get('function', call)
    if not _is_function(function):
        raise Malformed('tool_calls', what)
    arguments = function.get('arguments', {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or '{}', 'tool_calls', f'{what}: the arguments are no JSON')
    made = ToolCall(type='function', function={'name': function['name'], 'arguments': without_nulls(arguments or {})})
    if isinstance(call.get('id'), str):
        made['id'] = call['id']
    return made


def _is_function(function: Any) -> bool:
    return isinstance(function, Mapping) and isinstance(function.get('name'), str) and bool(function['name'])


def _parsed(text: str, reason: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed(reason, what) from None


# ---- fields of a record ----


def side_of(have: Mapping[str, Any], key: str, role: Role, unused: Unused, *, dialogue: bool = False) -> list[Message]:
    """The messages of a field: a text is one message of `role`, or a `dialogue`; a single message is a list of one."""
    value = have[key]
    if isinstance(value, Mapping) and ('content' in value or 'value' in value):
        value = [value]
    if not isinstance(value, str):
        return read_messages(value, key, unused)
    return (_dialogue(value) if dialogue else []) or [Message(role=role, content=value)]


def _dialogue(text: str) -> list[Message]:
    """The messages of '\\n\\nHuman: …\\n\\nAssistant: …', none of another text. A last one without words is a cue."""
    if not text.startswith('\n\nHuman:'):
        return []
    _, *parts = _DIALOGUE.split(text)
    messages = [
        Message(role='user' if who == 'Human' else 'assistant', content=said.strip())
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return messages if messages[-1]['content'] else messages[:-1]


def text_of(have: Mapping[str, Any], key: str) -> str:
    if not isinstance(have[key], str):
        raise Malformed('not_text', f'{key} is no text')
    return have[key]


def number_of(have: Mapping[str, Any], key: str) -> float:
    try:
        number = float(have[key])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Malformed('not_number', f'{key} is {have[key]!r}, no number')
    return number
