"""Conversations and pairs out of the formats of the field, told apart by their fields; every record is checked.

    chat    messages | conversations                   [{role, content}] or [{from, value}], or JSON text of such a list
            prompt, completion                         a text, or such a list
            instruction, output [, input]              and Dolly's instruction, response [, context]
    pairs   chosen, rejected [, prompt]                answers to the prompt, or whole conversations that share one:
                                                       lists, or '\\n\\nHuman: … \\n\\nAssistant: …'
            context, response1, response2, overall_preference
            prompt, completion, label                  one answer, good or bad

A pair may have `margin`, or `score_chosen` and `score_rejected`, whose difference is the margin, and `label`, the
probability that the chosen one is the better one. A text `system` is the first message where there is no other. What
else a record has goes into its meta, where it is a number or a text.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import FLOAT32_END
from lm.data.records import Chat, Counts, Kind, Message, Pair, Role
from lm.errors import UsageError

# Part of what a source is: raise it when other records come out of the same rows.
RECIPE = 2
_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'chat': (
        ('messages',), ('conversations',), ('prompt', 'completion'), ('instruction', 'output'),
        ('instruction', 'response'),
    ),
    'pairs': (
        ('chosen', 'rejected'), ('context', 'response1', 'response2', 'overall_preference'),
        ('prompt', 'completion', 'label'),
    ),
}  # fmt: skip
_CALLED = {'text': 'text is', 'chat': 'conversations are', 'pairs': 'pairs of answers are'}
_STAGES = {'text': 'configs/pretrain.py', 'chat': 'configs/sft.py', 'pairs': 'configs/reward.py or configs/dpo.py'}
_OPTIONAL = ('id', 'system', 'input', 'margin', 'score_chosen', 'score_rejected')
_FIELDS = {*_OPTIONAL, *(field for forms in _FORMS.values() for form in forms for field in form)}
_ROLES: dict[str, Role] = {
    'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant',
}  # fmt: skip
_SHOWN = 12  # of the fields of a record that has none of ours
_DIALOGUE = re.compile(r'(?:^|\n)\n(Human|Assistant):')


class Row(NamedTuple):
    """What a source holds at one place ('FILE:LINE'): fields, or the reason why there are none."""

    place: str
    key: str
    value: Mapping[str, Any]
    problem: str | None = None


class Reading(NamedTuple):
    """What rows are read as. `strict`: the first malformed one is a UsageError. `unpaired`: single answers, good or
    bad, are let through as pairs with an empty side.
    """

    kind: Kind
    strict: bool = False
    unpaired: bool = False

    @property
    def state(self) -> list[Any]:
        """What the records depend on besides the rows."""
        return [RECIPE, self.kind, self.unpaired]


class _Malformed(Exception):
    """A record that cannot be used: the reason it is counted under, and a sentence about it."""

    def __init__(self, reason: str, what: str):
        super().__init__(what)
        self.reason = reason


class _LeftOut(Exception):
    """A sound record that is not for this use; counted, and no mistake of anybody's."""


_PROBLEMS = {'malformed': 'is no JSON object', 'not_utf8': 'is not UTF-8'}


def read_rows(
    name: str, reading: Reading, rows: Iterable[Row], counts: Counts, *, column: str | None = None
) -> Iterator[Chat | Pair]:
    """The records of a source's rows. What cannot be used is counted by reason; the first few are named in `counts`.

    `column` holds a conversation, in place of `messages`. Raises UsageError at a malformed row if `reading.strict`.
    """
    for row in rows:
        counts.read += 1
        try:
            if row.problem:
                raise _Malformed(row.problem, _PROBLEMS[row.problem])
            changed: set[str] = set()
            chat = reading.kind == 'chat'
            yield _chat(name, row, changed, column) if chat else _pair(name, row, changed, reading.unpaired)
            for what in changed:
                counts.change(what)
        except _LeftOut as left:
            counts.drop(str(left))
        except _Malformed as wrong:
            problem = f'{row.place}: {wrong}'
            if reading.strict:
                raise UsageError(f'{problem}: repair it, or set data.strict=false to leave it out') from None
            counts.drop(wrong.reason)
            counts.name(problem)


def check_columns(place: str, kind: Kind, columns: Sequence[str], column: str | None) -> None:
    """Raises UsageError, naming the columns, if they hold no format of this kind."""
    if column is not None and kind == 'pairs':
        raise UsageError(f'{place}: pairs are told by their fields: leave out #{column}')
    if column is not None and column not in columns:
        raise UsageError(f'{place} has no column {column!r}: it has {", ".join(columns) or "none"}')
    if column is None and not _form(kind, columns):
        raise UsageError(f'{place} {_no_form(kind, columns)}')


def choose_column(place: str, wanted: str | None, texts: Sequence[str], columns: Sequence[str]) -> str:
    """The column that holds the documents: `wanted`, or `text`, or the only one of `texts`, those that can be text.

    Raises UsageError, naming the place and its columns, if there is no such column.
    """
    kind = kind_of(columns) if wanted is None and 'text' not in texts else None
    if wanted is None and 'text' not in texts and len(texts) == 1 and kind is None:
        return texts[0]
    column = wanted or 'text'
    if column not in texts:
        problem = 'that is text' if column in columns else ''
        why = f'{place} has no column {column!r} {problem}'.rstrip()
        hint = belongs(kind) if kind else '; name one as in SOURCE#COLUMN'
        raise UsageError(f'{why}: it has {", ".join(columns) or "none"}{hint}')
    return column


def kind_of(fields: Iterable[str]) -> Kind | None:
    """What these fields make: a pair, a conversation, or nothing that is known."""
    have = set(fields)
    if have.issuperset(_FORMS['pairs'][0]):
        return 'pairs'
    return next((kind for kind in ('chat', 'pairs') if _form(kind, have)), None)


def belongs(kind: Kind) -> str:
    """The end of a sentence on data of a kind that was given to a stage of another: which stage takes it."""
    return f'; {_CALLED[kind]} for --config={_STAGES[kind]}'


def without_text(fields: Mapping[str, Any], column: str) -> str:
    """A sentence on a record that has no text in a column."""
    kind = kind_of(key for key, value in fields.items() if value is not None)
    return f'has no {column}, but {_names(fields)}{belongs(kind) if kind else "; name one as in FILE#FIELD"}'


def _form(kind: Kind, fields: Iterable[str]) -> tuple[str, ...] | None:
    """The first format of this kind whose fields are all there."""
    have = set(fields)
    return next((form for form in _FORMS[kind] if have.issuperset(form)), None)


def _no_form(kind: Kind, fields: Collection[str]) -> str:
    wanted = '; or '.join(', '.join(form) for form in _FORMS[kind])
    what = 'a conversation' if kind == 'chat' else 'a pair'
    other: Kind | None = 'text' if set(fields) & {'text'} else kind_of(fields)
    hint = belongs(other) if other and other != kind else ''
    return f'has the fields {_names(fields)}, but {what} has {wanted}{hint}'


def _names(fields: Iterable[str]) -> str:
    """The first names of fields. JSON can write lone surrogates, which no terminal takes."""
    have = [field.encode(errors='replace').decode() for field in fields]
    more = f' and {len(have) - _SHOWN} more' if len(have) > _SHOWN else ''
    return f'{", ".join(have[:_SHOWN]) or "(none)"}{more}'


# ---- conversations ----


def _chat(name: str, row: Row, changed: set[str], column: str | None) -> Chat:
    if column:
        row = row._replace(value={**row.value, 'messages': row.value.get(column)})
    have = {key: value for key, value in row.value.items() if value is not None}
    form = _form('chat', have)
    if form is None:
        raise _Malformed('no_fields', _no_form('chat', row.value))
    messages = _without_last_user(_with_system(_conversation(have, form), have, changed), changed)
    _check_turns(messages)
    if not any(m['role'] == 'assistant' for m in messages):
        raise _Malformed('no_response', "no message is the assistant's")
    key = str(have.get('id', row.key))
    return Chat(id=key, source=name, messages=messages, bytes=_size(messages), meta=_meta(have, column))


def _conversation(have: Mapping[str, Any], form: tuple[str, ...]) -> list[Message]:
    if len(form) == 1:
        return _messages(have[form[0]], form[0])
    if form[0] == 'prompt':
        if have.get('label', True) in (False, 0):
            raise _LeftOut('bad_answer')
        return _side(have, 'prompt', 'user') + _side(have, 'completion', 'assistant')
    # Alpaca and Dolly: what the instruction is about stands below it.
    parts = [_text(have, key) for key in ('instruction', 'input', 'context') if key in have]
    asked = '\n\n'.join(part for part in parts if part.strip())
    return [Message(role='user', content=asked), Message(role='assistant', content=_text(have, form[1]))]


def _with_system(messages: list[Message], have: Mapping[str, Any], changed: set[str]) -> list[Message]:
    """With the record's own system message first, and without an empty one."""
    system = have.get('system')
    if isinstance(system, str) and system.strip() and not any(m['role'] == 'system' for m in messages):
        messages = [Message(role='system', content=system), *messages]
    if messages and messages[0]['role'] == 'system' and not messages[0]['content'].strip():
        changed.add('empty_system')
        messages = messages[1:]
    return messages


def _without_last_user(messages: list[Message], changed: set[str]) -> list[Message]:
    """Up to the assistant's last word: what the user says after it has no answer to learn."""
    end = len(messages)
    while end and messages[end - 1]['role'] == 'user':
        end -= 1
        changed.add('trailing_user')
    return messages[:end]


def _check_turns(messages: Sequence[Message]) -> None:
    """Raises _Malformed unless user and assistant alternate, user first, after at most one system message."""
    start = 1 if messages and messages[0]['role'] == 'system' else 0
    for i, message in enumerate(messages):
        role = message['role']
        if role != ('system' if i < start else 'user' if (i - start) % 2 == 0 else 'assistant'):
            before = messages[i - 1]['role'] if i else 'nothing'
            raise _Malformed('role_order', f'message {i + 1} is of role {role} after {before}')
        if not message['content'].strip():
            reason = 'empty_response' if role == 'assistant' else 'empty_prompt'
            raise _Malformed(reason, f'message {i + 1}, of role {role}, is empty')


# ---- pairs ----


class _Sides(NamedTuple):
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    label: float = 1.0
    margin: float = 0.0


def _pair(name: str, row: Row, changed: set[str], unpaired: bool) -> Pair:
    have = {key: value for key, value in row.value.items() if value is not None}
    form = _form('pairs', have)
    if form is None:
        raise _Malformed('no_fields', _no_form('pairs', row.value))
    if form[0] == 'prompt':
        if not unpaired:
            raise _LeftOut('unpaired')
        sides = _single(have)
    else:
        sides = _paired(have) if form[0] == 'chosen' else _compared(have)
    if sides.margin >= FLOAT32_END:
        raise _Malformed('margin', f'margin is {sides.margin:g}, which float32 has no room for')
    prompt = _with_system(sides.prompt, have, changed)
    if not any(m['role'] == 'user' for m in prompt):
        raise _Malformed('empty_prompt', 'there is no prompt')
    chosen, rejected = (_without_last_user(side, changed) for side in (sides.chosen, sides.rejected))
    for side in filter(None, (chosen, rejected)):
        _check_turns([*prompt, *side])
    if not (chosen or rejected) or (form[0] != 'prompt' and not (chosen and rejected)):
        raise _Malformed('empty_response', f'{"rejected" if chosen else "chosen"} has no messages')
    if chosen == rejected:
        raise _Malformed('equal_sides', 'chosen and rejected are equal')
    return _as_pair(name, str(have.get('id', row.key)), prompt, chosen, rejected, sides, _meta(have), changed)


def _paired(have: Mapping[str, Any]) -> _Sides:
    """`chosen` and `rejected`: answers to a prompt, or whole conversations."""
    label, margin = _judgement(have)
    chosen, rejected = (_side(have, key, 'assistant', dialogue=True) for key in ('chosen', 'rejected'))
    if _is_whole(chosen) and _is_whole(rejected):
        length = _shared(chosen, rejected)
        return _Sides(chosen[:length], chosen[length:], rejected[length:], label, margin)
    place = next((key for key in ('prompt', 'conversations') if key in have), None)
    if place is None:
        raise _Malformed('empty_prompt', 'chosen and rejected are answers alone, and there is no prompt')
    return _Sides(_side(have, place, 'user', dialogue=True), chosen, rejected, label, margin)


def _compared(have: Mapping[str, Any]) -> _Sides:
    """HelpSteer: `overall_preference` is below 0 where the first response is better; its size says by how much."""
    preference = _number(have, 'overall_preference')
    if not preference:
        raise _LeftOut('tie')
    first, second = (_side(have, key, 'assistant') for key in ('response1', 'response2'))
    sides = (first, second) if preference < 0 else (second, first)
    return _Sides(_side(have, 'context', 'user'), *sides, margin=abs(preference))


def _single(have: Mapping[str, Any]) -> _Sides:
    """KTO: one answer, good or bad."""
    if have['label'] not in (True, False):
        raise _Malformed('label', f'label is {have["label"]!r}, neither true nor false')
    prompt, answer = _side(have, 'prompt', 'user', dialogue=True), _side(have, 'completion', 'assistant')
    return _Sides(prompt, answer, []) if have['label'] else _Sides(prompt, [], answer)


def _judgement(have: Mapping[str, Any]) -> tuple[float, float]:
    """(label, margin) of a record with two sides."""
    label = _number(have, 'label') if 'label' in have else 1.0
    if not 0 <= label <= 1:
        raise _Malformed('label', f'label is {label:g}, no probability')
    if 'score_chosen' in have and 'score_rejected' in have:
        margin = _number(have, 'score_chosen') - _number(have, 'score_rejected')
        if not margin:
            raise _LeftOut('tie')
        if margin < 0:
            raise _Malformed('scores', 'score_chosen is below score_rejected')
    else:
        margin = 0.0
    if label == 0.5:
        raise _LeftOut('tie')
    margin = _number(have, 'margin') if 'margin' in have else margin
    if margin < 0:
        raise _Malformed('margin', f'margin is {margin:g}, below 0')
    return label, margin


def _is_whole(side: Sequence[Message]) -> bool:
    """Whether a side is a conversation from its start, and no answer."""
    return bool(side) and side[0]['role'] != 'assistant'


def _shared(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many first messages two conversations share, up to the last one of a user; raises _Malformed if none."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while length and a[length - 1]['role'] != 'user':
        length -= 1
    if not length:
        raise _Malformed('no_shared_prompt', 'chosen and rejected do not begin with the same message')
    return length


def _as_pair(
    name: str, key: str, prompt: list[Message], chosen: list[Message], rejected: list[Message], sides: _Sides,
    meta: dict[str, Any], changed: set[str],
) -> Pair:  # fmt: skip
    """The better side is `chosen`: where the label says that the other one is, they change places."""
    label = sides.label
    if label < 0.5:
        chosen, rejected, label = rejected, chosen, 1 - label
        changed.add('sides_swapped')
    return Pair(
        id=key, source=name, prompt=prompt, chosen=chosen, rejected=rejected, margin=sides.margin, label=label,
        bytes=_size([*prompt, *chosen, *rejected]), meta=meta,
    )  # fmt: skip


# ---- fields ----


def _side(have: Mapping[str, Any], key: str, role: Role, *, dialogue: bool = False) -> list[Message]:
    """What a field says: a text is one message of `role`, or a `dialogue`; a single message is a list of one."""
    value = have[key]
    if isinstance(value, Mapping) and ('content' in value or 'value' in value):
        value = [value]
    if not isinstance(value, str):
        return _messages(value, key)
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


def _messages(value: Any, key: str) -> list[Message]:
    """The messages of a list, or of its JSON text, or of the columns that TFDS makes of it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Malformed('not_messages', f'{key} is a text, and no list of messages') from None
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, Sequence) or not all(isinstance(m, Mapping) for m in value):
        raise _Malformed('not_messages', f'{key} is no list of messages')
    return [_message(m, i) for i, m in enumerate(value, 1)]


def _message(message: Mapping[str, Any], number: int) -> Message:
    role, content = (
        message.get(ours) if message.get(ours) is not None else message.get(theirs)
        for ours, theirs in (('role', 'from'), ('content', 'value'))
    )
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise _Malformed('unknown_role', f'message {number} has the role {role!r}, not system, user or assistant')
    if not isinstance(content, str):
        raise _Malformed('not_text', f'message {number} has a content that is no text')
    return Message(role=_ROLES[role.lower()], content=content)


def _text(have: Mapping[str, Any], key: str) -> str:
    if not isinstance(have[key], str):
        raise _Malformed('not_text', f'{key} is no text')
    return have[key]


def _number(have: Mapping[str, Any], key: str) -> float:
    try:
        number = float(have[key])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _Malformed('not_number', f'{key} is {have[key]!r}, no number')
    return number


def _size(messages: Sequence[Message]) -> int:
    """Bytes of the contents in UTF-8. JSON can write lone surrogates, which UTF-8 cannot."""
    try:
        return sum(len(m['content'].encode()) for m in messages)
    except UnicodeEncodeError:
        raise _Malformed('not_utf8', 'a content is not UTF-8') from None


def _meta(have: Mapping[str, Any], column: str | None = None) -> dict[str, Any]:
    rest = ((key, value) for key, value in have.items() if key not in _FIELDS and key != column)
    return {key: value for key, value in rest if isinstance(value, str | int | float | bool)}
