"""The chat template: how a conversation becomes ids, the same in training and when the model is talked to.

A template is a Jinja text, as Hugging Face's are, run in a sandbox (lm/data/jinja_sandbox.py). Which ids an assistant
wrote is known by *spans*, never by looking for a string: the template is rendered once for the roles of a conversation,
with a private character in place of each content (lm/data/chat_shape.py). What stands between those is the template's
own text, in which control symbols become their ids; contents are encoded by `Tokenizer.encode`, which never gives a
control symbol, so that what a person types stays text.

What the assistant writes begins where the template's prompt for it ends (`add_generation_prompt`), and ends with the
first control symbol after its content, the end of the turn; {% generation %} blocks, where a template has them, say it
instead. Text is cut there before it is encoded, since there the model begins; all other text that adjoins is encoded as
one, as Hugging Face's libraries do, so that the ids are theirs.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from etils import epath

from lm import files
from lm.data.chat_shape import SIGN, Message, Shape, Source, number, said, shape, sign
from lm.data.tokenizer import CHAT_MARKERS, Tokenizer
from lm.errors import UsageError

TEMPLATE_FILE, CONFIG_FILE = 'chat_template.jinja', 'tokenizer_config.json'
ROLES = ('system', 'user', 'assistant')
DEFAULT = (
    '{{ bos_token }}{% for message in messages %}'
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_MISMATCH = (
    'the chat template asks for an answer otherwise than it shows one, so that a model would learn what it is never '
    'asked for: bring another template'
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, by its Jinja text; the default one is for our own tokenizers."""

    text: str = DEFAULT

    @staticmethod
    def load(folder: epath.PathLike, tokenizer: Tokenizer) -> 'ChatTemplate':
        """That of a tokenizer's folder, which may name it in either of two files; without one ours, if it fits.

        Raises UsageError if there is none, or it ends an answer with no control symbol of the tokenizer.
        """
        template = find(folder, tokenizer)
        if template is None:
            raise UsageError(
                f'{folder} has no chat template, and its tokenizer lacks the control symbols of ours '
                f'({" ".join(CHAT_MARKERS)}): put a {TEMPLATE_FILE} there'
            )
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
        texts, changed = said(plan.shape, messages)
        ids: list[int] = []
        trained: list[bool] = []
        for part, found in zip(plan.parts, _encoded(plan, tokenizer, texts), strict=True):
            ids += found
            trained += [part.owner is not None and part.owner >= given and part.owner not in changed] * len(found)
        return ids, trained

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant is to speak.

        Raises UsageError if the template refuses the conversation or changes what is said in it.
        """
        plan = _plan(self, tokenizer, _roles(messages), True)
        return [i for found in _encoded(plan, tokenizer, said(plan.shape, messages)[0]) for i in found]

    def prompt_pieces(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int | str]:
        """What `prompt` encodes: the ids of control symbols, and texts that are encoded each as one."""
        plan = _plan(self, tokenizer, _roles(messages), True)
        return _filled(plan, said(plan.shape, messages)[0])

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: what the template ends it with, then what the tokenizer knows.

        Raises UsageError if the template ends it with no control symbol: a model would never learn to stop.
        """
        return _stop_ids(self, tokenizer)


def find(folder: epath.PathLike | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a tokenizer's folder (None: of a tokenizer of ours), fit or not; None if there is none.

    Raises UsageError if it cannot be read.
    """
    text = None if folder is None else _read(epath.Path(folder))
    if text is not None:
        return ChatTemplate(text)
    return ChatTemplate() if all(marker in tokenizer.controls for marker in CHAT_MARKERS) else None


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
    return chosen(found, config)


def chosen(found: Any, where: object) -> str | None:
    """The template of what a configuration has under chat_template: a text, or several by name.

    Raises UsageError if it is neither.
    """
    if isinstance(found, list):
        named = {t.get('name'): t.get('template') for t in found if isinstance(t, dict)}
        found = named.get('default', next(iter(named.values()), None) if len(named) == 1 else None)
    if not isinstance(found, str | None):
        raise UsageError(f'the chat template in {where} is neither a text nor a list of named ones: mend it')
    return found


# ---- what becomes of a shape with a tokenizer ----


def _roles(messages: Sequence[Message]) -> tuple[str, ...]:
    roles = tuple(message['role'] for message in messages)
    if unknown := set(roles) - set(ROLES):
        raise UsageError(f'a message has the role {min(map(str, unknown))!r}: it must be one of {", ".join(ROLES)}')
    return roles


class _Part(NamedTuple):
    """A control symbol, or text that is encoded as one: literal, or the number of the message whose content it is."""

    control: int | None
    text: tuple[str | int, ...]
    owner: int | None  # the message of the assistant's by which it is learned


class _Plan(NamedTuple):
    """How the ids of a shape are put together."""

    shape: Shape
    parts: tuple[_Part, ...]
    mismatch: str | None  # why the last answer cannot be learned


def _encoded(plan: _Plan, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each part of the plan."""
    return tokenizer.encode_pieces(_filled(plan, texts))


def _filled(plan: _Plan, texts: Sequence[str]) -> list[int | str]:
    """Each part of the plan: a control symbol, or a text with its contents in it."""

    def text(part: _Part) -> str:
        return ''.join(piece if isinstance(piece, str) else texts[piece] for piece in part.text)

    return [text(part) if part.control is None else part.control for part in plan.parts]


@lru_cache(maxsize=8192)
def _plan(template: ChatTemplate, tokenizer: Tokenizer, roles: tuple[str, ...], speak: bool) -> _Plan:
    whole = shape(Source(template.text, *_symbols(tokenizer), speak), roles)
    starts = {i: _start(whole, roles[:i]) for i, role in enumerate(roles) if role == 'assistant'}
    begun = {i: at for i, at in starts.items() if at is not None}
    if whole.generated:
        spans = {span: _last_answer(whole.text[: span[1]], starts) for span in whole.generated}
    else:
        spans = {(at, _end(tokenizer, whole.text, i)[0]): i for i, at in begun.items()}
    cuts = {at for span in spans for at in span} | set(begun.values())
    parts = list(_parts(tokenizer, whole.text, cuts, spans))
    if tokenizer.adds_bos and (not parts or parts[0].control != tokenizer.bos_id):
        parts.insert(0, _Part(tokenizer.bos_id, (), None))
    lost = not speak and roles[-1:] == ('assistant',) and len(roles) - 1 not in begun
    return _Plan(whole, tuple(parts), _MISMATCH if lost else None)


def _start(whole: Shape, before: tuple[str, ...]) -> int | None:
    """Where in a shape the answer after some messages begins: where its prompt ends. None if the shape does not begin
    with its prompt."""
    try:
        prompt = shape(whole.source._replace(speak=True), before)
    except UsageError:  # nothing to ask: the assistant has the first word
        return None
    same = whole.text.startswith(prompt.text) and whole.strips[: len(before)] == prompt.strips
    return len(prompt.text) if same and len(prompt.text) <= whole.text.index(sign(len(before))) else None


def _last_answer(text: str, answers: Mapping[int, Any]) -> int | None:
    """The last message of the assistant's in a shape's text."""
    found = [number(character) for character in SIGN.findall(text)]
    return next((i for i in reversed(found) if i in answers), None)


def _end(tokenizer: Tokenizer, text: str, answer: int) -> tuple[int, int | None]:
    """(where in a shape's text an answer ends, the id that ends it): after the first control symbol that follows its
    content, or after that if none does."""
    at = text.index(sign(answer)) + 1
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
        waiting.append(number(piece) if SIGN.fullmatch(piece) else piece)
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
    return re.compile('|'.join([*map(re.escape, names), SIGN.pattern]))


@lru_cache(maxsize=64)
def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    source = Source(template.text, *_symbols(tokenizer), speak=False)
    try:
        roles = ('user', 'assistant') * 2  # some end the last answer alone with a symbol
        text = shape(source, roles).text
    except UsageError:  # for one question only
        roles = ('user', 'assistant')
        text = shape(source, roles).text
    ends = [_end(tokenizer, text, i)[1] for i in range(1, len(roles), 2)]
    if not any(end is not None for end in ends):
        raise UsageError(
            'the chat template ends an answer with no control symbol of the tokenizer, so that a model would never '
            'learn to stop: bring a template that fits the tokenizer'
        )
    return tuple(dict.fromkeys([*(end for end in ends if end is not None), *tokenizer.stop_ids]))


@lru_cache(maxsize=16)
def _symbols(tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of <bos> and <eos>; '' for a <bos> that the tokenizer has none of, and for which <eos> stands in."""
    names = {i: name for name, i in tokenizer.controls.items()}
    bos, eos = names.get(tokenizer.bos_id, ''), names.get(tokenizer.eos_id, '')
    config = json.loads(tokenizer.saved.get(CONFIG_FILE, b'{}'))
    return ('' if bos == eos and not config.get('bos_token') else bos), eos
