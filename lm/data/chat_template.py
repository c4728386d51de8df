"""The chat template: how a conversation becomes ids, the same in training and when the model is talked to.

A template is a Jinja text, as Hugging Face's are, run in a sandbox (lm/data/jinja_sandbox.py). Which ids an assistant
wrote is known by *spans*, never by looking for a string: the template is rendered once for the roles of a conversation,
with a private character in place of each content. What stands between those is the template's own text, in which
control symbols become their ids; contents are encoded by `Tokenizer.encode`, which never gives a control symbol, so
that what a person types stays text.

What the assistant writes begins where the template's prompt for it ends (`add_generation_prompt`), and ends with the
first control symbol after its content, the end of the turn; {% generation %} blocks, where a template has them, say it
instead. Text is cut there before it is encoded, since there the model begins; all other text that adjoins is encoded as
one, as Hugging Face's libraries do, so that the ids are theirs.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from etils import epath

from lm import files
from lm.data.tokenizer import CHAT_MARKERS, JSON_FILE, Tokenizer
from lm.errors import UsageError

TEMPLATE_FILE, CONFIG_FILE = 'chat_template.jinja', 'tokenizer_config.json'
ROLES = ('system', 'user', 'assistant')
DEFAULT = (
    '{{ bos_token }}{% for message in messages %}'
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Message: TypeAlias = Mapping[str, Any]  # role: one of ROLES; content: str

# Characters for private use, which stand for contents and for the ends of {% generation %} blocks.
_FIRST, _LAST = 0xF0000, 0xFFFFD
_PRIVATE = re.compile(f'[{chr(_FIRST)}-{chr(_LAST)}]')
# Put around contents, to see with what a template strips them: with nothing, newlines, or all that is white.
_LEFT, _RIGHT = '\n\u2003', '\u2002\n'
_STRIPS = {2: '', 1: '\n', 0: None}  # by how much of it is left


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, by its Jinja text; the default one is for our own tokenizers."""

    text: str = DEFAULT

    @staticmethod
    def load(folder: epath.PathLike, tokenizer: Tokenizer) -> 'ChatTemplate':
        """That of a tokenizer's folder, which may name it in either of two files; without one ours, if it fits.

        Raises UsageError if there is none, or it ends an answer with no control symbol of the tokenizer.
        """
        text = _read(epath.Path(folder))
        if text is None and any(marker not in tokenizer.controls for marker in CHAT_MARKERS):
            raise UsageError(
                f'{folder} has no chat template, and its tokenizer lacks the control symbols of ours '
                f'({" ".join(CHAT_MARKERS)}): put a {TEMPLATE_FILE} there'
            )
        template = ChatTemplate(DEFAULT if text is None else text)
        template.stop_ids(tokenizer)
        return template

    def save(self, folder: epath.PathLike) -> None:
        files.write_text(epath.Path(folder) / TEMPLATE_FILE, self.text)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, given: int = 0
    ) -> tuple[list[int], list[bool]]:
        """(the ids of a conversation, whether each is to be learned: what the assistant writes in messages[given:]).

        Where the assistant has the last word, the ids begin with `prompt(messages[:-1])`. An earlier answer that the
        template shows otherwise than when it was the last (some leave out what was thought) is not learned.

        Raises:
          UsageError: the template refuses the conversation or changes what is said in it, its last answer does not
            begin where its prompt ends, or an answer ends with no control symbol.
        """
        self.stop_ids(tokenizer)
        plan = _plan(self, tokenizer, _roles(messages), False)
        if plan.mismatch and given < len(messages):
            raise UsageError(plan.mismatch)
        said, changed = _said(self, plan, messages)
        ids: list[int] = []
        trained: list[bool] = []
        for part, found in zip(plan.parts, _encoded(plan, tokenizer, said), strict=True):
            ids += found
            trained += [part.owner is not None and part.owner >= given and part.owner not in changed] * len(found)
        return ids, trained

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant is to speak.

        Raises UsageError if the template refuses the conversation or changes what is said in it.
        """
        plan = _plan(self, tokenizer, _roles(messages), True)
        return [i for found in _encoded(plan, tokenizer, _said(self, plan, messages)[0]) for i in found]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: what the template ends it with, then what the tokenizer knows.

        Raises UsageError if the template ends it with no control symbol: a model would never learn to stop.
        """
        return _stop_ids(self, tokenizer)


def _read(folder: epath.Path) -> str | None:
    """The template in a folder (or beside a tokenizer.json): its own file, else what the configuration has."""
    folder = folder if folder.is_dir() else folder.parent
    file, config = folder / TEMPLATE_FILE, folder / CONFIG_FILE
    try:
        if file.exists():
            return file.read_text()
        found = json.loads(config.read_text()).get('chat_template') if config.exists() else None
    except (ValueError, AttributeError, RecursionError) as e:
        raise UsageError(f'the chat template of {folder} cannot be read ({" ".join(str(e).split())[:200]})') from e
    if isinstance(found, list):  # several, by name
        named = {t.get('name'): t.get('template') for t in found if isinstance(t, dict)}
        found = named.get('default', next(iter(named.values()), None) if len(named) == 1 else None)
    if not isinstance(found, str | None):
        raise UsageError(f'the chat template in {config} is neither a text nor a list of named ones')
    return found


# ---- what a template makes of roles, whatever is said ----


class _Shape(NamedTuple):
    """A rendering with private characters for contents.

    Attributes:
      text: chr(_FIRST + i) in it stands for the content of message i.
      strips: what each content is stripped of first, as `str.strip` takes it: '' for nothing, None for white space.
      generated: where the {% generation %} blocks begin and end in `text`.
    """

    text: str
    strips: tuple[tuple[str | None, str | None], ...]
    generated: tuple[tuple[int, int], ...]


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    roles = tuple(message['role'] for message in messages)
    if unknown := set(roles) - set(ROLES):
        raise UsageError(f'a message has the role {min(map(str, unknown))!r}: it must be one of {", ".join(ROLES)}')
    return roles


def _stripped(text: str, strip: tuple[str | None, str | None]) -> str:
    left, right = strip
    return text.lstrip(left).rstrip(right)


def _rendered(
    template: ChatTemplate, symbols: tuple[str, str], messages: Sequence[Message], speak: bool, marks: str = ''
) -> str:
    from lm.data import jinja_sandbox  # not every command needs Jinja

    return jinja_sandbox.render(
        template.text,
        {
            'messages': messages,
            'bos_token': symbols[0],
            'eos_token': symbols[1],
            'add_generation_prompt': speak,
            'tools': None,
            'documents': None,
            'generation_begin': marks[:1],
            'generation_end': marks[1:],
        },
    )


@lru_cache(maxsize=8192)
def _shape(template: ChatTemplate, symbols: tuple[str, str], roles: tuple[str, ...], speak: bool) -> _Shape:
    """Raises UsageError if the template refuses these roles, or leaves a content out or repeats it."""
    if len(roles) > _LAST - _FIRST - 2 or _PRIVATE.search(template.text):
        raise UsageError(f'a chat template has no place for {len(roles):,} messages')
    marks = chr(_LAST - 1) + chr(_LAST)
    signs = [chr(_FIRST + i) for i in range(len(roles))]
    messages = [{'role': role, 'content': sign} for role, sign in zip(roles, signs, strict=True)]
    text, generated = _without_marks(_rendered(template, symbols, messages, speak, marks), marks)
    found = _PRIVATE.findall(text)
    for i, role in enumerate(roles):
        if (times := found.count(signs[i])) != 1:
            does = 'leaves out' if not times else f'shows {times} times'
            raise UsageError(f'the chat template {does} what the {role} says in message {i + 1}')
    padded = [m | {'content': _LEFT + m['content'] + _RIGHT} for m in messages]
    strips = _strips(text, _rendered(template, symbols, padded, speak))
    return _Shape(text, tuple(strips[sign] for sign in signs), generated)


def _without_marks(text: str, marks: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """(the text, where what is between each two marks lies in it)."""
    kept, begins, spans, at = [], [], [], 0
    for piece in re.split(f'([{marks}])', text):
        if piece and piece in marks:
            spans.append((begins.pop(), at)) if piece == marks[1] else begins.append(at)
        else:
            kept.append(piece)
            at += len(piece)
    return ''.join(kept), tuple(sorted(spans))


def _strips(text: str, padded: str) -> dict[str, tuple[str | None, str | None]]:
    """What each content is stripped of on the left and on the right, by its private character; nothing where the two
    renderings differ in another way."""
    signs = _PRIVATE.findall(text)
    lefts, rights = {}, {}
    if _PRIVATE.findall(padded) == signs:
        pieces = zip(_PRIVATE.split(text), _PRIVATE.split(padded), [None, *signs], [*signs, None], strict=True)
        for plain, wide, before, after in pieces:
            ends = ((right, left) for right in (2, 1, 0) for left in (2, 1, 0))
            fits = (e for e in ends if wide == _RIGHT[: e[0]] + plain + _LEFT[len(_LEFT) - e[1] :])
            rights[before], lefts[after] = next(fits, (2, 2))
    return {sign: (_STRIPS[lefts.get(sign, 2)], _STRIPS[rights.get(sign, 2)]) for sign in signs}


def _filled(text: str, said: Sequence[str]) -> str:
    return _PRIVATE.sub(lambda sign: said[ord(sign[0]) - _FIRST], text)


def _said(template: ChatTemplate, plan: '_Plan', messages: Sequence[Message]) -> tuple[list[str], set[int]]:
    """(what of each message the template shows, which earlier answers it shows otherwise than they are).

    Raises UsageError unless the template makes of the messages its shape with that in it.
    """
    plain = [{'role': m['role'], 'content': m['content']} for m in messages]
    said = [_stripped(m['content'], strip) for m, strip in zip(plain, plan.shape.strips, strict=True)]
    rendered = _rendered(template, plan.symbols, plain, plan.speak)
    changed = set()
    if rendered != _filled(plan.shape.text, said):
        for i, role in enumerate(m['role'] for m in plain[: None if plan.speak else -1]):
            shown = _shown(template, plan, plain, i) if role == 'assistant' else None
            if shown is not None and shown != said[i]:
                said[i] = shown
                changed.add(i)
        _check_unchanged(plan, said, plain, rendered)
    return said, changed


def _shown(template: ChatTemplate, plan: '_Plan', messages: Sequence[Message], at: int) -> str | None:
    """What the template shows of one message; None if what stands around it changes too."""
    others = [m | {'content': m['content'] if i == at else chr(_FIRST + i)} for i, m in enumerate(messages)]
    rendered = _rendered(template, plan.symbols, others, plan.speak)
    before, after = plan.shape.text.split(chr(_FIRST + at))
    fits = rendered.startswith(before) and rendered.endswith(after) and len(rendered) >= len(before) + len(after)
    return rendered[len(before) : len(rendered) - len(after)] if fits else None


def _check_unchanged(plan: '_Plan', said: Sequence[str], messages: Sequence[Message], rendered: str) -> None:
    """Raises UsageError, with the place, unless the rendering is the shape with this in it."""
    wanted = _filled(plan.shape.text, said)
    if rendered == wanted:
        return
    at, length, number = len(os.path.commonprefix([wanted, rendered])), 0, 0
    for piece in re.split(f'({_PRIVATE.pattern})', plan.shape.text):
        if _PRIVATE.fullmatch(piece):
            number = ord(piece) - _FIRST
            piece = said[number]
        length += len(piece)
        if length > at:
            break
    raise UsageError(
        f'the chat template changes what the {messages[number]["role"]} says in message {number + 1}, at '
        f'{wanted[max(0, at - 20) : at + 20]!r}: leave such conversations out, or bring another template'
    )


# ---- what becomes of the shape with a tokenizer ----


class _Part(NamedTuple):
    """A control symbol, or text that is encoded as one: literal, or the number of the message whose content it is."""

    control: int | None
    text: tuple[str | int, ...]
    owner: int | None  # the message of the assistant's by which it is learned


class _Plan(NamedTuple):
    shape: _Shape
    symbols: tuple[str, str]
    speak: bool
    parts: tuple[_Part, ...]
    mismatch: str | None  # why the last answer cannot be learned


def _encoded(plan: _Plan, tokenizer: Tokenizer, said: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each part of the plan."""
    fill = lambda parts: ''.join(part if isinstance(part, str) else said[part] for part in parts)
    texts = iter(tokenizer.encode_batch([fill(p.text) for p in plan.parts if p.control is None]))
    for part in plan.parts:
        yield next(texts) if part.control is None else [part.control]


@lru_cache(maxsize=8192)
def _plan(template: ChatTemplate, tokenizer: Tokenizer, roles: tuple[str, ...], speak: bool) -> _Plan:
    symbols = _symbols(tokenizer)
    shape = _shape(template, symbols, roles, speak)
    answers = [i for i, role in enumerate(roles) if role == 'assistant']
    starts = {i: _start(template, symbols, roles, shape, i) for i in answers}
    spans = {}  # (start, end): the message
    for i in answers:
        if starts[i] is not None and not shape.generated:
            spans[starts[i], _end(tokenizer, shape.text, i)[0]] = i
    for span in shape.generated:
        before = [ord(sign) - _FIRST for sign in _PRIVATE.findall(shape.text[: span[1]])]
        spans[span] = next((i for i in reversed(before) if i in answers), None)
    cuts = {at for span in spans for at in span} | {at for at in starts.values() if at is not None}
    parts = list(_parts(tokenizer, shape.text, cuts, spans))
    first = parts[0].control if parts else None
    if first != tokenizer.bos_id and _begins_with_bos(tokenizer):
        parts.insert(0, _Part(tokenizer.bos_id, (), None))
    mismatch = None
    if not speak and roles and roles[-1] == 'assistant' and starts[len(roles) - 1] is None:
        mismatch = (
            'the chat template asks for an answer otherwise than it shows one, so that a model would learn what it is '
            'never asked for: bring another template'
        )
    return _Plan(shape, symbols, speak, tuple(parts), mismatch)


def _start(
    template: ChatTemplate, symbols: tuple[str, str], roles: tuple[str, ...], shape: _Shape, answer: int
) -> int | None:
    """Where in the shape an answer begins: where its prompt ends. None if the shape does not begin with its prompt."""
    try:
        prompt = _shape(template, symbols, roles[:answer], True)
    except UsageError:  # nothing to ask: the assistant has the first word
        return None
    same = shape.text.startswith(prompt.text) and shape.strips[:answer] == prompt.strips
    return len(prompt.text) if same and len(prompt.text) <= shape.text.index(chr(_FIRST + answer)) else None


def _end(tokenizer: Tokenizer, text: str, answer: int) -> tuple[int, int | None]:
    """(where in a shape's text an answer ends, the id that ends it): after the first control symbol that follows its
    content, or after that if none does."""
    at = text.index(chr(_FIRST + answer)) + 1
    found = _tokens(tokenizer).search(text, at)
    symbol = found and tokenizer.controls.get(found[0])
    return (found.end(), symbol) if found and symbol is not None else (at, None)


def _parts(
    tokenizer: Tokenizer, text: str, cuts: set[int], spans: Mapping[tuple[int, int], int | None]
) -> Iterator[_Part]:
    """The shape's text as control symbols and texts, which are cut at `cuts`."""
    owner = lambda at: next((i for (start, end), i in spans.items() if start <= at < end), None)
    waiting: list[str | int] = []
    begun = 0
    for at, piece in _pieces(tokenizer, text, cuts):
        control = tokenizer.controls.get(piece)
        if waiting and (at in cuts or control is not None):
            yield _Part(None, tuple(waiting), owner(begun))
            waiting = []
        if control is not None:
            yield _Part(control, (), owner(at))
            continue
        begun = begun if waiting else at
        waiting.append(ord(piece) - _FIRST if _PRIVATE.fullmatch(piece) else piece)
    if waiting:
        yield _Part(None, tuple(waiting), owner(begun))


def _pieces(tokenizer: Tokenizer, text: str, cuts: set[int]) -> Iterator[tuple[int, str]]:
    """(place, piece): control symbols, private characters, and what is between them and the cuts."""
    at = 0
    for piece in re.split(f'({_tokens(tokenizer).pattern})', text):
        if piece in tokenizer.controls:
            yield at, piece
        else:
            inner = sorted({at, at + len(piece)} | {cut for cut in cuts if at < cut < at + len(piece)})
            yield from ((a, text[a:b]) for a, b in zip(inner, inner[1:], strict=False))
        at += len(piece)


@lru_cache(maxsize=16)
def _tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the control symbols, longest first, and the private characters."""
    names = sorted(filter(None, tokenizer.controls), key=len, reverse=True)
    return re.compile('|'.join([*map(re.escape, names), _PRIVATE.pattern]))


@lru_cache(maxsize=64)
def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    symbols = _symbols(tokenizer)
    try:
        roles = ('user', 'assistant') * 2  # some end the last answer alone with a symbol
        text = _shape(template, symbols, roles, False).text
    except UsageError:  # for one question only
        roles = ('user', 'assistant')
        text = _shape(template, symbols, roles, False).text
    ends = [_end(tokenizer, text, i)[1] for i in range(1, len(roles), 2)]
    if not any(end is not None for end in ends):
        raise UsageError(
            'the chat template ends an answer with no control symbol of the tokenizer, so that a model would never '
            'learn to stop: bring a template that fits the tokenizer'
        )
    return tuple(dict.fromkeys([*(end for end in ends if end is not None), *tokenizer.stop_ids]))


# ---- a tokenizer's convention for <bos> ----


@lru_cache(maxsize=16)
def _symbols(tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of <bos> and <eos>; '' for a <bos> that the tokenizer has none of, and for which <eos> stands in."""
    names = {i: name for name, i in tokenizer.controls.items()}
    bos, eos = names.get(tokenizer.bos_id, ''), names.get(tokenizer.eos_id, '')
    return ('' if bos == eos and not _config(tokenizer).get('bos_token') else bos), eos


@lru_cache(maxsize=16)
def _begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether a text begins with <bos>: ours do, and of a tokenizer.json it is told in its files."""
    if JSON_FILE not in tokenizer.saved:
        return True
    told = _config(tokenizer).get('add_bos_token')
    if isinstance(told, bool):
        return told
    processor = json.loads(tokenizer.saved[JSON_FILE]).get('post_processor') or {}
    templates = [p.get('single') or [] for p in (processor, *processor.get('processors', ()))]
    firsts = [single[0].get('SpecialToken', {}).get('id') for single in templates if single]
    return any(tokenizer.controls.get(name) == tokenizer.bos_id for name in firsts)


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.saved.get(CONFIG_FILE, b'{}'))
