"""Conversations and pairs out of the formats of the field, told apart by their fields; every record is checked.

    chat    messages | conversations                   [{role, content}] or [{from, value}], or JSON text of such a list
            prompt, completion                         a text, or such a list
            instruction, output [, input]              and Dolly's instruction, response [, context]
    pairs   chosen, rejected [, prompt]                answers to the prompt (or question, or instruction [, input]), or
                                                       whole conversations that share one: lists, or
                                                       '\\n\\nHuman: … \\n\\nAssistant: …'
            context, response1, response2, overall_preference
            prompt, completion, label                  one answer, good or bad
            messages, label                            the same, the answer being the last message

A pair may have `margin`, or `score_chosen` and `score_rejected`, whose difference is the margin, and `label`, the
probability that the chosen one is the better one. A text `system` (or `system_prompt`) is the first message where there
is no other; `history`, [[question, answer], …], stands before a prompt or an instruction; `tools` are functions that
the assistant may call; `kto_tag` is a label. Of what else a record has, numbers and texts go into its meta, and other
things are counted by their keys.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm.data.messages import Malformed, Unused, is_empty, number_of, read_messages, read_tools, side_of, text_of
from lm.data.records import Chat, Counts, Kind, Message, Pair, Role
from lm.errors import UsageError
from lm.settings import FLOAT32_END

# Part of what a source is: raise it when other records come out of the same rows.
RECIPE = 3
_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    'chat': (
        ('messages',), ('conversations',), ('prompt', 'completion'), ('instruction', 'output'),
        ('instruction', 'response'),
    ),
    'pairs': (
        ('chosen', 'rejected'), ('context', 'response1', 'response2', 'overall_preference'),
        ('prompt', 'completion', 'label'), ('messages', 'label'), ('conversations', 'label'),
        ('instruction', 'output', 'label'),
    ),
}  # fmt: skip
_CALLED = {'text': 'text is', 'chat': 'conversations are', 'pairs': 'pairs of answers are'}
_STAGES = {'text': 'configs/pretrain.py', 'chat': 'configs/sft.py', 'pairs': 'configs/reward.py or configs/dpo.py'}
_SYSTEM, _TOOLS, _QUESTIONS = (
    ('system', 'system_prompt'),
    ('tools', 'functions'),
    ('prompt', 'conversations', 'question'),
)
_OPTIONAL = {'id', 'input', 'margin', 'score_chosen', 'score_rejected', 'history', 'kto_tag'}
_FIELDS = _OPTIONAL.union(_SYSTEM, _TOOLS, _QUESTIONS, *_FORMS['chat'], *_FORMS['pairs'])
# They change what should be learned, and nothing here does as they say.
_IGNORED = ('loss_mask', 'train', 'chat_template_kwargs', 'enable_thinking')
_WEIGHTS = ('weight', 'sample_weight')
_MEDIA = ('images', 'image', 'videos', 'video', 'audios', 'audio')
_SHOWN = 12  # of the fields of a record that has none of ours


class Row(NamedTuple):
    """The content of one place of a source ('FILE:LINE'): fields, or the reason why there are none."""

    place: str
    key: str
    value: Mapping[str, Any]
    problem: str | None = None


class Reading(NamedTuple):
    """The way rows are read. `strict`: the first malformed one is a UsageError. `unpaired`: single answers, good or
    bad, are let through as pairs with an empty side.
    """

    kind: Kind
    strict: bool = False
    unpaired: bool = False

    @property
    def state(self) -> list[Any]:
        """All that the records depend on besides the rows."""
        return [RECIPE, self.kind, self.unpaired]


class _LeftOut(Exception):
    """A sound record that is not for this use; counted, and no mistake of anybody's."""


@dataclass
class _Notes:
    """Changes to a record, and the keys of which nothing is made."""

    changed: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)


PROBLEMS = {'malformed': 'is no JSON object', 'not_utf8': 'is not UTF-8'}


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
                raise Malformed(row.problem, PROBLEMS[row.problem])
            notes = _Notes()
            chat = reading.kind == 'chat'
            yield _chat(name, row, notes, column) if chat else _pair(name, row, notes, reading.unpaired)
            for what in notes.changed:
                counts.change(what)
            for key in sorted(notes.unused):
                counts.leave_unused(key, row.place)
        except _LeftOut as left:
            counts.drop(str(left))
        except Malformed as wrong:
            problem = f'{row.place}: {wrong}'
            if reading.strict:
                raise UsageError(f'{problem}: repair it, or set data.strict=false to leave it out') from None
            counts.drop(wrong.reason, problem)


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
    """The kind of record that these fields make: a pair, a conversation, or nothing that is known."""
    have = set(fields)
    if have.issuperset(_FORMS['pairs'][0]):
        return 'pairs'
    return next((kind for kind in ('chat', 'pairs') if _form(kind, have)), None)


def belongs(kind: Kind) -> str:
    """The end of a sentence on data of a kind that was given to a stage of another: which stage takes it."""
    return f'; {_CALLED[kind]} for --config={_STAGES[kind]}'


def without_text(fields: Mapping[str, Any], column: str) -> str:
    """A sentence on a record that has no text in a column."""
    if column in fields:
        return f'{column} is null'
    kind = kind_of(key for key, value in fields.items() if value is not None)
    return f'has no {column}, but {_names(fields)}{belongs(kind) if kind else "; name one as in FILE#FIELD"}'


def _form(kind: Kind, fields: Iterable[str]) -> tuple[str, ...] | None:
    """The first format of this kind whose fields are all there."""
    have = set(fields)
    return next((form for form in _FORMS[kind] if have.issuperset(form)), None)


def _fitting_form(kind: Kind, row: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the fields that are not null, the format that they have). Raises Malformed if they have none."""
    have = {key: value for key, value in row.items() if value is not None}
    if 'kto_tag' in have:
        have.setdefault('label', have['kto_tag'])
    if form := _form(kind, have):
        return have, form
    if nulls := [key for key in _form(kind, row) or () if key not in have]:
        raise Malformed('null', f'{" and ".join(nulls)} {"is" if len(nulls) == 1 else "are"} null')
    raise Malformed('no_fields', _no_form(kind, row))


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


def _chat(name: str, row: Row, notes: _Notes, column: str | None) -> Chat:
    if column:
        if row.value.get(column) is None:
            raise Malformed('null', f'{column} is null or missing')
        row = row._replace(value={**row.value, 'messages': row.value[column]})
    have, form = _fitting_form('chat', row.value)
    if have.get('label') is False or (form[0] == 'prompt' and _is_false(have.get('label'))):
        raise _LeftOut('bad_answer')
    messages = _until_learned(_with_system(_conversation(have, form, notes.unused.add), have, notes), notes)
    _check_turns(messages)
    if not any(m['role'] == 'assistant' for m in messages):
        raise Malformed('no_response', "no message is the assistant's")
    return _record(name, row, have, notes, messages, column=column, messages=messages)


def _conversation(have: Mapping[str, Any], form: tuple[str, ...], unused: Unused) -> list[Message]:
    if len(form) == 1:
        return read_messages(have[form[0]], form[0], unused)
    if form[0] == 'prompt':
        said = side_of(have, 'prompt', 'user', unused) + side_of(have, 'completion', 'assistant', unused)
    else:
        said = [_instruction(have), Message(role='assistant', content=text_of(have, form[1]))]
    return _history(have) + said


def _instruction(have: Mapping[str, Any]) -> Message:
    """Alpaca's and Dolly's: what the instruction is about stands below it."""
    parts = [text_of(have, key) for key in ('instruction', 'input', 'context') if key in have]
    return Message(role='user', content='\n\n'.join(part for part in parts if part.strip()))


def _history(have: Mapping[str, Any]) -> list[Message]:
    """LLaMA-Factory's: what was said before, as [question, answer]."""
    turns = have.get('history') or []
    if not isinstance(turns, Sequence) or not all(_is_turn(turn) for turn in turns):
        raise Malformed('history', 'history is no list of [question, answer]')
    roles: tuple[Role, Role] = ('user', 'assistant')
    return [Message(role=role, content=text) for turn in turns for role, text in zip(roles, turn, strict=True)]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _with_system(messages: list[Message], have: Mapping[str, Any], notes: _Notes) -> list[Message]:
    """With the record's own system message first, and without an empty one."""
    system = next((have[key] for key in _SYSTEM if isinstance(have.get(key), str) and have[key].strip()), None)
    if system is not None and not any(m['role'] == 'system' for m in messages):
        messages = [Message(role='system', content=system), *messages]
    if messages and messages[0]['role'] == 'system' and not messages[0]['content'].strip():
        notes.changed.add('empty_system')
        messages = messages[1:]
    return messages


def _until_learned(messages: list[Message], notes: _Notes) -> list[Message]:
    """Up to the last answer that is to be learned: nothing is learned after it.

    Raises _LeftOut if there are answers and none of them is.
    """
    end = len(messages)
    while end and (messages[end - 1]['role'] in ('user', 'tool') or not messages[end - 1].get('train', True)):
        end -= 1
        role = messages[end]['role']
        notes.changed.add('trailing_answer' if role == 'assistant' else f'trailing_{role}')
    if not any(m['role'] == 'assistant' for m in messages[:end]) and any(m['role'] == 'assistant' for m in messages):
        raise _LeftOut('no_learned_answer')
    return messages[:end]


def _record(
    name: str, row: Row, have: Mapping[str, Any], notes: _Notes, said: Sequence[Message], *, column: str | None = None,
    **own: Any,
) -> Any:  # fmt: skip
    """A chat or a pair: its own fields, and those that both have. Notes what else there is and nothing is made of."""
    key = str(have.get('id', row.key))
    record = own | {'id': key, 'source': name, 'bytes': _size(said), 'meta': _meta(have, column), 'place': row.place}
    if media := next((key for key in _MEDIA if not is_empty(have.get(key))), None):
        raise Malformed(media, f'it has {media}, which are not read')
    for key in _TOOLS:
        if not is_empty(have.get(key)):
            record['tools'] = read_tools(have[key], key)
    for key in have.keys() & _WEIGHTS:
        if have[key] in (False, 0):
            raise _LeftOut('weight_0')
        notes.unused |= set() if have[key] in (True, 1) else {key}
    for key in have.keys() - _FIELDS - {column}:
        if not is_empty(have[key]) and (key in _IGNORED or not isinstance(have[key], str | int | float | bool)):
            notes.unused.add(key)
    return record


_BEFORE: dict[str, tuple[str, ...]] = {
    'system': ('nothing',), 'user': ('nothing', 'system', 'assistant'), 'assistant': ('user', 'tool'),
    'tool': ('assistant', 'tool'),
}  # fmt: skip


def _check_turns(messages: Sequence[Message]) -> None:
    """Raises Malformed unless user and assistant alternate, user first, after at most one system message; a tool has
    its turns between two of an assistant's."""
    before = 'nothing'
    for i, message in enumerate(messages):
        role = message['role']
        if before not in _BEFORE[role] or (role == 'user' and i and messages[i - 1].get('tool_calls')):
            raise Malformed('role_order', f'message {i + 1} is of role {role} after {before}')
        if not message['content'].strip() and role != 'tool' and not message.get('tool_calls'):
            reason = 'empty_response' if role == 'assistant' else 'empty_prompt'
            raise Malformed(reason, f'message {i + 1}, of role {role}, is empty')
        before = role


# ---- pairs ----


class _Sides(NamedTuple):
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    label: float = 1.0
    margin: float = 0.0


def _pair(name: str, row: Row, notes: _Notes, unpaired: bool) -> Pair:
    have, form = _fitting_form('pairs', row.value)
    single = form[-1] == 'label'
    if single and not unpaired:
        raise _LeftOut('unpaired')
    read = _single(have, form, notes.unused.add) if single else None
    sides = read or (_paired if form[0] == 'chosen' else _compared)(have, notes.unused.add)
    if sides.margin >= FLOAT32_END:
        raise Malformed('margin', f'margin is {sides.margin:g}, which float32 has no room for')
    prompt = _with_system(sides.prompt, have, notes)
    if not any(m['role'] == 'user' for m in prompt):
        raise Malformed('empty_prompt', 'there is no prompt')
    chosen, rejected = (_until_learned(side, notes) for side in (sides.chosen, sides.rejected))
    for side in filter(None, (chosen, rejected)):
        _check_turns([*prompt, *side])
    if not (chosen or rejected) or (not single and not (chosen and rejected)):
        raise Malformed('empty_response', f'{"rejected" if chosen else "chosen"} has no messages')
    if chosen == rejected:
        raise Malformed('equal_sides', 'chosen and rejected are equal')
    label = sides.label
    if label < 0.5:  # the better side is `chosen`
        chosen, rejected, label = rejected, chosen, 1 - label
        notes.changed.add('sides_swapped')
    own = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, 'margin': sides.margin, 'label': label}
    return _record(name, row, have, notes, [*prompt, *chosen, *rejected], **own)


def _paired(have: Mapping[str, Any], unused: Unused) -> _Sides:
    """`chosen` and `rejected`: answers to a prompt, or whole conversations."""
    label, margin = _judgement(have)
    chosen, rejected = (side_of(have, key, 'assistant', unused, dialogue=True) for key in ('chosen', 'rejected'))
    if all(side and side[0]['role'] != 'assistant' for side in (chosen, rejected)):  # from the start
        length = _shared(chosen, rejected)
        return _Sides(chosen[:length], chosen[length:], rejected[length:], label, margin)
    place = next((key for key in _QUESTIONS if key in have), None)
    if place is None and 'instruction' not in have:
        raise Malformed('empty_prompt', 'chosen and rejected are answers alone, and there is no prompt, or it is null')
    prompt = [_instruction(have)] if place is None else side_of(have, place, 'user', unused, dialogue=True)
    return _Sides(_history(have) + prompt, chosen, rejected, label, margin)


def _compared(have: Mapping[str, Any], unused: Unused) -> _Sides:
    """HelpSteer: `overall_preference` is below 0 where the first response is better; its size says by how much."""
    preference = number_of(have, 'overall_preference')
    if not preference:
        raise _LeftOut('tie')
    first, second = (side_of(have, key, 'assistant', unused) for key in ('response1', 'response2'))
    sides = (first, second) if preference < 0 else (second, first)
    return _Sides(side_of(have, 'context', 'user', unused), *sides, margin=abs(preference))


def _single(have: Mapping[str, Any], form: tuple[str, ...], unused: Unused) -> _Sides:
    """KTO: one answer, good or bad."""
    good = _is_true(have['label'])
    if not good and not _is_false(have['label']):
        raise Malformed('label', f'label is {have["label"]!r}, neither true nor false')
    if form[0] == 'prompt':
        prompt = _history(have) + side_of(have, 'prompt', 'user', unused, dialogue=True)
        answer = side_of(have, 'completion', 'assistant', unused)
    else:
        said = _conversation(have, form[:-1], unused)
        begin = max((i + 1 for i, m in enumerate(said) if m['role'] == 'user'), default=0)
        prompt, answer = said[:begin], said[begin:]
    return _Sides(prompt, answer, []) if good else _Sides(prompt, [], answer)


def _is_true(label: Any) -> bool:
    """Tells whether a label, which is a text in a table of texts, says so."""
    return label in (True, 1) or (isinstance(label, str) and label.lower() in ('true', '1', '1.0'))


def _is_false(label: Any) -> bool:
    return label in (False, 0) or (isinstance(label, str) and label.lower() in ('false', '0', '0.0'))


def _judgement(have: Mapping[str, Any]) -> tuple[float, float]:
    """(label, margin) of a record with two sides."""
    label, margin = number_of(have, 'label') if 'label' in have else 1.0, 0.0
    if not 0 <= label <= 1:
        raise Malformed('label', f'label is {label:g}, no probability')
    if 'score_chosen' in have and 'score_rejected' in have:
        margin = number_of(have, 'score_chosen') - number_of(have, 'score_rejected')
        if not margin:
            raise _LeftOut('tie')
        if margin < 0:
            raise Malformed('scores', 'score_chosen is below score_rejected')
    if label == 0.5:
        raise _LeftOut('tie')
    margin = number_of(have, 'margin') if 'margin' in have else margin
    if margin < 0:
        raise Malformed('margin', f'margin is {margin:g}, below 0')
    return label, margin


def _shared(a: Sequence[Message], b: Sequence[Message]) -> int:
    """The number of first messages that two conversations share, up to a user's last one; raises Malformed if none."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while length and a[length - 1]['role'] != 'user':
        length -= 1
    if not length:
        raise Malformed('no_shared_prompt', 'chosen and rejected do not begin with the same message')
    return length


# ---- fields ----


def _size(messages: Sequence[Message]) -> int:
    """Bytes of what is said in UTF-8. JSON can write lone surrogates, which UTF-8 cannot."""
    try:
        return sum(len(text.encode()) for m in messages for text in (m['content'], m.get('reasoning_content', '')))
    except UnicodeEncodeError:
        raise Malformed('not_utf8', 'a content is not UTF-8') from None


def _meta(have: Mapping[str, Any], column: str | None) -> dict[str, Any]:
    own = {key: have[key] for key in have if key not in _FIELDS and key != column}
    return {key: value for key, value in own.items() if isinstance(value, str | int | float | bool)}
