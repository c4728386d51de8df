"""The layout of one conversation by a chat template: where in its text each message stands, and what of it is shown.

Where the roles alone say that, it is a shape (lm/data/chat_shape.py). This is for the other conversations: those of
which a template shows something by what is in it (thoughts, in the last answer only), and those whose messages have
more than a role and a content: thoughts of their own, tool calls, names. Nothing of what a template does with these is
known beforehand. The conversation is rendered again with a private character in place of each of them: what then
differs is where it stands.

Control symbols that were typed are told from the template's own by a veil: their first character is a private one
while the template is run.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lm.data.chat_shape import Message, Source, Tools, rendered, rendered_with_spans, sign
from lm.errors import UsageError

# Names under which templates look for thoughts, and how templates write those that they take out of a content.
_THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')
_INLINE, _INLINE_END = '<think>\n{}\n</think>\n\n{}', '</think>'
_MARK = sign(0)
_VEIL = 0x100000
_VEILED = re.compile(f'[{chr(_VEIL)}-{chr(_VEIL + 0xFFFD)}]')


class NoPlace(UsageError):
    """The template shows nothing of something that a conversation has, by the key of which it is counted."""

    def __init__(self, key: str, what: str):
        super().__init__(f'the chat template has no place for {what}')
        self.key = key


def refusal(error: UsageError) -> str:
    """The reason under which a conversation that a template does not take is counted."""
    return f'no_place_for_{error.key}' if isinstance(error, NoPlace) else 'template'


class Layout(NamedTuple):
    """A conversation as a template writes it.

    Attributes:
      text: typed control symbols are veiled in it, if `veiled`; see `unveiled`.
      generated: where the {% generation %} blocks begin and end in `text`.
      starts: where each answer begins, after the prompt for it; None where the text does not begin with that prompt.
      ends: where what each message says ends.
      changed: the answers that are shown otherwise than they are.
      unused: keys of which nothing is shown and without which a conversation is still whole.
    """

    text: str
    veiled: bool
    generated: tuple[tuple[int, int], ...]
    starts: Mapping[int, int | None]
    ends: tuple[int, ...]
    changed: frozenset[int]
    unused: frozenset[str]


def lay_out(
    source: Source, messages: Sequence[Message], tools: Tools, symbols: Iterable[str], *, whole: int | None
) -> Layout:
    """Lays out a conversation.

    Args:
      symbols: the names of the control symbols.
      whole: the answer that must be shown as it is, because it is to be learned; None for none.

    Raises:
      NoPlace: nothing is shown of tools, of a tool's turn, or of what the answer `whole` thinks.
      UsageError: the template refuses the conversation, or changes what is said in it.
    """
    given = _Talk(source, [_as_read(source, m) for m in messages], tools)
    talk = _veil(given, symbols)
    text, generated = rendered_with_spans(source, talk.messages, tools=tools)
    _check_tools(talk)
    found = [_places(talk, text, i) for i in range(len(messages))]
    changed, unused = _verdicts(talk, text, found, whole)
    begins, ends = _extents(found)
    # What stands for a message may have changed how those after it are shown: then nobody knows where it ends.
    changed |= {i for i, end in enumerate(ends) if i != whole and any(begin < end for begin in begins[i + 1 :])}
    starts = {i: _start(talk, text, i, begins[i]) for i, m in enumerate(messages) if _is_answer(m)}
    return Layout(text, talk != given, generated, starts, ends, frozenset(changed), frozenset(unused))


def unveiled(text: str) -> str:
    """With typed control symbols as they were typed."""
    return _VEILED.sub(lambda found: chr(ord(found[0]) - _VEIL), text)


class _Talk(NamedTuple):
    """A conversation, and what the template makes of it."""

    source: Source
    messages: list[dict[str, Any]]
    tools: Tools

    def rendered(self) -> str:
        return rendered(self.source, self.messages, tools=self.tools)


def _is_answer(message: Message) -> bool:
    return message['role'] == 'assistant'


def _as_read(source: Source, message: Message) -> dict[str, Any]:
    """A message as a template looks at it: thoughts under its name for them, or before the answer where it takes them
    from there."""
    read = {key: value for key, value in message.items() if key not in ('train', _THOUGHTS[0])}
    if thoughts := message.get(_THOUGHTS[0]):
        names = [name for name in _THOUGHTS if re.search(rf'[.\'"]{name}\b', source.text)]
        if not names and _INLINE_END in source.text:
            return read | {'content': _INLINE.format(thoughts, message['content'])}
        read[(names or _THOUGHTS)[0]] = thoughts
    return read


# ---- what was typed ----


def _veil(talk: _Talk, symbols: Iterable[str]) -> _Talk:
    """The conversation with typed control symbols veiled. Those that a template looks for in an answer (the end of the
    thoughts, where that is one) are its own.

    Raises UsageError if it looks for one that another typed.
    """
    said = _texts(talk.messages)
    typed = [name for name in symbols if name and any(name in text for text in said)]
    if not typed:
        return talk
    plain, veiled = talk.rendered(), lambda names: talk._replace(messages=_veiled(talk.messages, names))
    same = lambda names: unveiled(veiled(names).rendered()) == plain
    if same(typed):
        return veiled(typed)
    own = {name for name in typed if not same([name])}
    others = _texts([m for m in talk.messages if not _is_answer(m)])
    if name := next((name for name in own if any(name in text for text in others)), None):
        raise UsageError(f'the chat template takes {name} in what is said for a symbol of its own')
    return veiled([name for name in typed if name not in own])


def _texts(value: Any) -> list[str]:
    """All texts in messages."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _texts(part)]


def _veiled(value: Any, names: Sequence[str]) -> Any:
    if not names:
        return value
    if isinstance(value, str):
        longest_first = '|'.join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.sub(longest_first, lambda found: chr(_VEIL + ord(found[0][0]) % 0x10000) + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _veiled(part, names) for key, part in value.items()}
    return [_veiled(part, names) for part in value] if isinstance(value, list) else value


# ---- where everything stands ----


def _places(talk: _Talk, text: str, i: int) -> dict[str, tuple[int, int] | None]:
    """The place of each thing that a message has, from where to where, by its key; None where it is not shown."""
    message, places = talk.messages[i], {}
    for key in sorted(message.keys() & {'content', 'tool_calls', 'name', *_THOUGHTS}):
        if not message[key] or (key == 'content' and not message[key].strip()):
            continue
        marked = message | {key: _marked(message[key]) if key == 'tool_calls' else _MARK}
        other = talk._replace(messages=[*talk.messages[:i], marked, *talk.messages[i + 1 :]]).rendered()
        if key == 'content' and (times := other.count(_MARK)) > 1:
            raise UsageError(f'the chat template shows {times} times what {_who(talk, i)}')
        places[key] = _difference(text, other)
    return places


def _marked(calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Tool calls, or tools, the last one under another name."""
    return [*calls[:-1], {**calls[-1], 'function': {**calls[-1]['function'], 'name': _MARK}}]


def _difference(text: str, other: str) -> tuple[int, int] | None:
    """The place at which `text` differs from the rendering with the mark in it, from the first character to the last;
    None if the mark is not in it."""
    if _MARK not in other:
        return None
    before, after = other[: other.index(_MARK)], other[other.rindex(_MARK) + 1 :]
    begin = len(before) if text.startswith(before) else len(os.path.commonprefix([text, before]))
    tail = len(after) if text.endswith(after) else len(os.path.commonprefix([text[::-1], after[::-1]]))
    return begin, max(begin, len(text) - tail)


def _extents(found: Sequence[Mapping[str, tuple[int, int] | None]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(where each message begins, where it ends); one of which nothing is shown is where the one before ends."""
    begins, ends = [], []
    for places in found:
        here = [place for key, place in places.items() if place and key != 'name']
        begins.append(min(begin for begin, _ in here) if here else max(ends, default=0))
        ends.append(max(end for _, end in here) if here else begins[-1])
    return tuple(begins), tuple(ends)


def _start(talk: _Talk, text: str, i: int, begin: int) -> int | None:
    """The place where answer i begins, of which something stands at `begin`: where its prompt ends."""
    asked = talk._replace(source=talk.source._replace(speak=True), messages=talk.messages[:i])
    try:
        prompt = asked.rendered()
    except UsageError:  # nothing to ask: the assistant has the first word
        return None
    return len(prompt) if text.startswith(prompt) and len(prompt) <= begin else None


# ---- what is shown ----


def _check_tools(talk: _Talk) -> None:
    """Raises NoPlace if there are tools of which nothing is shown, or turns of theirs that the template knows not."""
    if talk.tools and _MARK not in talk._replace(tools=_marked(talk.tools)).rendered():
        raise NoPlace('tools', 'tools')
    if any(m['role'] == 'tool' for m in talk.messages) and 'tool' not in talk.source.text:
        raise NoPlace('tool', "messages of the role 'tool'")


def _verdicts(
    talk: _Talk, text: str, found: Sequence[Mapping[str, tuple[int, int] | None]], whole: int | None
) -> tuple[set[int], set[str]]:
    """(the answers that are shown otherwise than they are, keys that are not used).

    Raises UsageError for what must be shown and is not.
    """
    changed, unused = set(), set()
    for i, places in enumerate(found):
        for key, place in places.items():
            if key == 'name':
                unused |= set() if place or talk.messages[i]['role'] == 'tool' else {key}
            elif key == 'tool_calls':
                if not place:
                    raise NoPlace(key, f'the tool calls of message {i + 1}')
            elif not place or not _holds(text, place, talk.messages[i][key]):
                if _is_answer(talk.messages[i]) and i != whole:
                    changed.add(i)
                else:
                    _check_shown(talk, text, i, key, place)
    return changed, unused


def _check_shown(talk: _Talk, text: str, i: int, key: str, place: tuple[int, int] | None) -> None:
    """Raises UsageError, with the place, for what is left out of a message or changed; a tool's words may be changed,
    as for JSON."""
    if key != 'content' and not place:
        raise NoPlace(_THOUGHTS[0], f'the thoughts ({_THOUGHTS[0]}) of message {i + 1}')
    if not place and talk.messages[i]['role'] == 'tool':
        raise NoPlace('tool', f'what {_who(talk, i)}')
    if not place:
        raise UsageError(f'the chat template leaves out what {_who(talk, i)}')
    if talk.messages[i]['role'] != 'tool':
        said, shown = (_short(unveiled(t)) for t in (talk.messages[i][key], text[slice(*place)]))
        raise UsageError(f'the chat template changes what {_who(talk, i)}: {said} becomes {shown}')


def _who(talk: _Talk, i: int) -> str:
    return f'the {talk.messages[i]["role"]} says in message {i + 1}'


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + '…')


def _holds(text: str, place: tuple[int, int], said: str) -> bool:
    """Tells whether the text at a place, with as much as belongs to it of what stands around, is what was said, white
    space aside: what is equal to the template's own text beside it does not differ."""
    squash = lambda part: ''.join(part.split())
    begin, end = place
    room = 2 * len(said) + 64
    before, here, after = map(squash, (text[max(0, begin - room) : begin], text[begin:end], text[end : end + room]))
    whole, least = squash(said), len(before) + len(here)
    return (before + here + after).find(whole, max(0, least - len(whole)), len(before) + len(whole)) >= 0
