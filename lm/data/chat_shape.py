"""The shape of a conversation: the text that a chat template makes of its roles, whatever is said.

It is what the template renders with a private character in place of each content. Shapes are few (by the roles), so
that of each conversation it is only checked that the template makes of it its shape with its contents in it. Where it
does not, or messages have more than a role and a content, lm/data/chat_layout.py looks at the one conversation.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from lm.data import jinja_sandbox
from lm.errors import UsageError

Message: TypeAlias = Mapping[str, Any]  # as lm.data.records.Message

Tools: TypeAlias = Sequence[Mapping[str, Any]] | None  # functions that the assistant may call, as their JSON schemas
# Characters for private use, which stand for contents and for the ends of {% generation %} blocks.
_FIRST, _LAST = 0xF0000, 0xFFFFD
SIGN = re.compile(f'[{chr(_FIRST)}-{chr(_LAST)}]')
# Put around contents, to see with what a template strips them: with nothing, newlines, or all that is white.
_LEFT, _RIGHT = '\n\u2003', '\u2002\n'
_STRIPS = {2: '', 1: '\n', 0: None}  # by how much of it is left


def sign(i: int) -> str:
    """The character that stands for the content of message i."""
    return chr(_FIRST + i)


class Source(NamedTuple):
    """A template, the names of <bos> and <eos>, and whether the assistant is to speak after the messages."""

    text: str
    bos: str
    eos: str
    speak: bool


class Shape(NamedTuple):
    """The shape of a conversation.

    Attributes:
      text: `sign(i)` in it stands for the content of message i.
      strips: what each content is stripped of first, as `str.strip` takes it: '' for nothing, None for white space.
      generated: where the {% generation %} blocks begin and end in `text`.
    """

    source: Source
    text: str
    strips: tuple[tuple[str | None, str | None], ...]
    generated: tuple[tuple[int, int], ...]


@lru_cache(maxsize=8192)
def shape(source: Source, roles: tuple[str, ...]) -> Shape:
    """Raises UsageError if the template refuses these roles, or leaves a content out or repeats it."""
    if len(roles) > _LAST - _FIRST - 2 or SIGN.search(source.text):
        raise UsageError(f'a chat template has no place for {len(roles):,} messages')
    messages = [{'role': role, 'content': sign(i)} for i, role in enumerate(roles)]
    text, generated = rendered_with_spans(source, messages)
    found = SIGN.findall(text)
    for i, role in enumerate(roles):
        if (times := found.count(sign(i))) != 1:
            does = 'leaves out' if not times else f'shows {times} times'
            raise UsageError(f'the chat template {does} what the {role} says in message {i + 1}')
    padded = [m | {'content': _LEFT + m['content'] + _RIGHT} for m in messages]
    strips = _strips(text, rendered(source, padded))
    return Shape(source, text, tuple(strips[sign(i)] for i in range(len(roles))), generated)


def rendered(source: Source, messages: Sequence[Message], *, tools: Tools = None, marks: str = '') -> str:
    """The text that the template makes of messages. Raises UsageError if it refuses them."""
    variables = {
        'messages': messages, 'bos_token': source.bos, 'eos_token': source.eos, 'add_generation_prompt': source.speak,
        'tools': tools, 'documents': None, 'generation_begin': marks[:1], 'generation_end': marks[1:],
    }  # fmt: skip
    return jinja_sandbox.render(source.text, variables)


def rendered_with_spans(
    source: Source, messages: Sequence[Message], *, tools: Tools = None
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """(what the template makes of messages, where its {% generation %} blocks begin and end in that)."""
    marks = chr(_LAST - 1) + chr(_LAST)
    kept, begins, spans, at = [], [], [], 0
    for piece in re.split(f'([{marks}])', rendered(source, messages, tools=tools, marks=marks)):
        if piece and piece in marks:
            spans.append((begins.pop(), at)) if piece == marks[1] else begins.append(at)
        else:
            kept.append(piece)
            at += len(piece)
    return ''.join(kept), tuple(sorted(spans))


def _strips(text: str, padded: str) -> dict[str, tuple[str | None, str | None]]:
    """The white space that each content is stripped of on the left and on the right, by its private character; nothing
    where the two renderings differ in another way."""
    signs = SIGN.findall(text)
    lefts, rights = {}, {}
    if SIGN.findall(padded) == signs:
        pieces = zip(SIGN.split(text), SIGN.split(padded), [None, *signs], [*signs, None], strict=True)
        for plain, wide, before, after in pieces:
            ends = ((right, left) for right in (2, 1, 0) for left in (2, 1, 0))
            fits = (e for e in ends if wide == _RIGHT[: e[0]] + plain + _LEFT[len(_LEFT) - e[1] :])
            rights[before], lefts[after] = next(fits, (2, 2))
    return {s: (_STRIPS[lefts.get(s, 2)], _STRIPS[rights.get(s, 2)]) for s in signs}


# ---- what is said in it ----


def said(shape: Shape, messages: Sequence[Message]) -> list[str] | None:
    """The texts that the template shows of the messages; None where it does not make of them its shape with that in
    it."""
    plain = [{'role': m['role'], 'content': m['content']} for m in messages]
    texts = [m['content'].lstrip(left).rstrip(right) for m, (left, right) in zip(plain, shape.strips, strict=True)]
    return texts if rendered(shape.source, plain) == filled(shape.text, texts) else None


def filled(text: str, contents: Sequence[str]) -> str:
    """A text of a shape's with the contents in the places of their private characters."""
    return SIGN.sub(lambda found: contents[ord(found[0]) - _FIRST], text)
