"""The chat template: how a conversation becomes ids, the same in training and when the model is talked to.

A template is a Jinja text, as Hugging Face's are, run in a sandbox (lm/data/jinja_sandbox.py). Which ids an assistant
wrote is known by *spans*, never by looking for a string: the template is rendered once for the roles of a conversation,
with a private character in place of each content (lm/data/chat_shape.py), or several times where what is in the
messages changes more than that (lm/data/chat_layout.py). Control symbols in the template's own text become their ids;
what was said is encoded by `Tokenizer.encode`, which never gives one, so that what a person types stays text.

What the assistant writes begins where the template's prompt for it ends (`add_generation_prompt`), and ends with the
first control symbol after its content, the end of the turn; {% generation %} blocks, where a template has them, say it
instead. Text is cut there before it is encoded, since there the model begins; all other text that adjoins is encoded as
one, as Hugging Face's libraries do, so that the ids are theirs.
"""

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from etils import epath

from lm import files
from lm.data.chat_layout import Layout, lay_out, unveiled
from lm.data.chat_shape import SIGN, Message, Shape, Source, Tools, number, said, shape, sign
from lm.data.tokenizer import CHAT_MARKERS, JSON_FILE, Tokenizer
from lm.errors import UsageError

TEMPLATE_FILE, CONFIG_FILE = 'chat_template.jinja', 'tokenizer_config.json'
ROLES = ('system', 'user', 'assistant', 'tool')
DEFAULT = (
    '{{ bos_token }}{% for message in messages %}'
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_MISMATCH = (
    'the chat template asks for an answer otherwise than it shows one, so that a model would learn what it is never '
    'asked for: bring another template'
)


_CHANGED = 'an earlier answer, which the template shows otherwise,'


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
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, given: int = 0, tools: Tools = None
    ) -> tuple[list[int], list[bool]]:
        """(the ids of a conversation, whether each is to be learned: what the assistant writes in messages[given:],
        but for messages with `train` False).

        Where the assistant has the last word, the ids begin with `prompt(messages[:-1])`. An earlier answer that the
        template shows otherwise than when it was the last (some leave out what was thought) is not learned.

        Raises:
          NoPlace: the template has no place for tools, calls of them or thoughts that the messages have.
          UsageError: it refuses the conversation or changes what is said in it, its last answer does not begin where
            its prompt ends, or an answer ends with no control symbol.
        """
        plan, texts = _fitting(self, tokenizer, messages, tools, given=given)
        ids: list[int] = []
        trained: list[bool] = []
        for part, found in zip(plan.parts, _encoded(plan, tokenizer, texts), strict=True):
            ids += found
            trained += [_is_learned(plan, messages, part.owner, given)] * len(found)
        return ids, trained

    def check(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, given: int = 0, tools: Tools = None
    ) -> frozenset[str]:
        """What `encode` makes nothing of: keys of messages, and earlier answers; raises what it raises."""
        plan, _ = _fitting(self, tokenizer, messages, tools, given=given)
        return plan.unused | {_CHANGED for i in plan.changed if i >= given}

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant is to speak.

        Raises UsageError if the template refuses the conversation or changes what is said in it.
        """
        plan, texts = _planned(self, tokenizer, messages, None, speak=True)
        return [i for found in _encoded(plan, tokenizer, texts) for i in found]

    def prompt_pieces(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int | str]:
        """What `prompt` encodes: the ids of control symbols, and texts that are encoded each as one."""
        return _filled(*_planned(self, tokenizer, messages, None, speak=True))

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
    """How the ids of a conversation are put together."""

    parts: tuple[_Part, ...]
    shape: Shape | None = None  # None: of one conversation, whose text is in the parts
    mismatch: str | None = None  # why the last answer cannot be learned
    changed: frozenset[int] = frozenset()  # answers that are not shown as they are
    unused: frozenset[str] = frozenset()  # keys of messages of which nothing is shown


def _fitting(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, *, given: int
) -> tuple[_Plan, Sequence[str]]:
    """`_planned` for training. Raises UsageError if the last answer is to be learned and cannot be."""
    template.stop_ids(tokenizer)
    last = len(messages) - 1
    learns = last >= given and messages[last]['role'] == 'assistant' and messages[last].get('train', True)
    plan, texts = _planned(template, tokenizer, messages, tools, speak=False, whole=last if learns else None)
    if plan.mismatch and learns:
        raise UsageError(plan.mismatch)
    return plan, texts


def _is_learned(plan: _Plan, messages: Sequence[Message], owner: int | None, given: int) -> bool:
    return owner is not None and owner >= given and owner not in plan.changed and messages[owner].get('train', True)


def _planned(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, *, speak: bool,
    whole: int | None = None,
) -> tuple[_Plan, Sequence[str]]:  # fmt: skip
    """(how a conversation becomes ids, the contents in it).

    Args:
      whole: the answer that must be shown as it is.
    """
    roles = _roles(messages)
    if not tools and 'tool' not in roles and all(m.keys() <= {'role', 'content', 'train'} for m in messages):
        plan = _plan(template, tokenizer, roles, speak)
        if plan.shape is not None and (texts := said(plan.shape, messages)) is not None:
            return plan, texts
    source = Source(template.text, *_symbols(tokenizer), speak)
    laid = lay_out(source, messages, tools, tokenizer.controls, whole=whole)
    stops = template.stop_ids(tokenizer)
    # Within tool calls there may be symbols that end no answer.
    calls = {i for i, m in enumerate(messages) if m.get('tool_calls')}
    ends = {i: _end(tokenizer, laid.text, laid.ends[i], stops if i in calls else ())[0] for i in laid.starts}
    return _laid_plan(tokenizer, laid, ends, last_is_answer=not speak and roles[-1:] == ('assistant',)), ()


def _laid_plan(tokenizer: Tokenizer, laid: Layout, ends: Mapping[int, int], *, last_is_answer: bool) -> _Plan:
    """The plan of one conversation."""
    begun = {i: at for i, at in laid.starts.items() if at is not None}
    if laid.generated:
        before = lambda end: max((i for i in laid.starts if laid.ends[i] <= end), default=None)
        spans = {span: before(span[1]) for span in laid.generated}
    else:
        spans = {(at, ends[i]): i for i, at in begun.items()}
    parts = _all_parts(tokenizer, laid.text, begun.values(), spans, _controls(tokenizer))
    if laid.veiled:
        parts = tuple(part._replace(text=tuple(unveiled(str(piece)) for piece in part.text)) for part in parts)
    lost = last_is_answer and len(laid.ends) - 1 not in begun
    return _Plan(parts, None, _MISMATCH if lost else None, laid.changed, laid.unused)


def _encoded(plan: _Plan, tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each part of the plan."""
    pieces = _filled(plan, texts)
    found = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
    for piece in pieces:
        yield next(found) if isinstance(piece, str) else [piece]


def _filled(plan: _Plan, texts: Sequence[str]) -> list[int | str]:
    """Each part of the plan: a control symbol, or a text with its contents in it."""

    def text(part: _Part) -> str:
        return ''.join(piece if isinstance(piece, str) else texts[piece] for piece in part.text)

    return [text(part) if part.control is None else part.control for part in plan.parts]


@lru_cache(maxsize=8192)
def _plan(template: ChatTemplate, tokenizer: Tokenizer, roles: tuple[str, ...], speak: bool) -> _Plan:
    """The plan of all conversations of a shape."""
    whole = shape(Source(template.text, *_symbols(tokenizer), speak), roles)
    starts = {i: _start(whole, roles[:i]) for i, role in enumerate(roles) if role == 'assistant'}
    begun = {i: at for i, at in starts.items() if at is not None}
    if whole.generated:
        spans = {span: _last_answer(whole.text[: span[1]], starts) for span in whole.generated}
    else:
        ends = {i: whole.text.index(sign(i)) + 1 for i in begun}
        spans = {(at, _end(tokenizer, whole.text, ends[i])[0]): i for i, at in begun.items()}
    parts = _all_parts(tokenizer, whole.text, begun.values(), spans, _tokens(tokenizer))
    lost = not speak and roles[-1:] == ('assistant',) and len(roles) - 1 not in begun
    return _Plan(parts, whole, _MISMATCH if lost else None)


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


def _end(tokenizer: Tokenizer, text: str, at: int, among: Container[int] = ()) -> tuple[int, int | None]:
    """(where in a text an answer ends whose content ends at `at`, the id that ends it): after the first control symbol
    that follows, one of `among` if there is such; or at `at` if none follows."""
    first: tuple[int, int | None] = at, None
    for found in _tokens(tokenizer).finditer(text, at):
        if (symbol := tokenizer.controls.get(found[0])) is None:
            break
        first = (found.end(), symbol) if first[1] is None else first
        if not among or symbol in among:
            return found.end(), symbol
    return first


def _all_parts(
    tokenizer: Tokenizer, text: str, starts: Iterable[int], spans: Mapping[tuple[int, int], int | None],
    tokens: re.Pattern[str],
) -> tuple[_Part, ...]:  # fmt: skip
    """`_parts`, cut where answers and spans begin and end, with the tokenizer's own <bos> first."""
    cuts = {at for span in spans for at in span} | set(starts)
    parts = tuple(_parts(tokenizer, text, cuts, spans, tokens))
    if begins_with_bos(tokenizer) and (not parts or parts[0].control != tokenizer.bos_id):
        return (_Part(tokenizer.bos_id, (), None), *parts)
    return parts


def _parts(
    tokenizer: Tokenizer, text: str, cuts: set[int], spans: Mapping[tuple[int, int], int | None],
    tokens: re.Pattern[str],
) -> Iterator[_Part]:  # fmt: skip
    """A text as control symbols and texts, which are cut at `cuts`; private characters that `tokens` finds are
    contents."""
    owner = lambda at: next((i for (start, end), i in spans.items() if start <= at < end), None)
    waiting: list[str | int] = []
    begun = 0
    for at, piece in _pieces(tokenizer, text, cuts, tokens):
        control = tokenizer.controls.get(piece)
        if waiting and (at in cuts or control is not None):
            yield _Part(None, tuple(waiting), owner(begun))
            waiting = []
        if control is not None:
            yield _Part(control, (), owner(at))
            continue
        begun = begun if waiting else at
        is_content = SIGN.fullmatch(piece) and tokens.fullmatch(piece)
        waiting.append(number(piece) if is_content else piece)
    if waiting:
        yield _Part(None, tuple(waiting), owner(begun))


def _pieces(tokenizer: Tokenizer, text: str, cuts: set[int], tokens: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """(place, piece): what `tokens` finds, and what is between that and the cuts."""
    at = 0
    for piece in re.split(f'({tokens.pattern})', text):
        if piece in tokenizer.controls:
            yield at, piece
        else:
            inner = sorted({at, at + len(piece)} | {cut for cut in cuts if at < cut < at + len(piece)})
            yield from ((a, text[a:b]) for a, b in zip(inner, inner[1:], strict=False))
        at += len(piece)


@lru_cache(maxsize=16)
def _tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the control symbols, longest first, and the private characters."""
    return re.compile(f'{_controls(tokenizer).pattern}|{SIGN.pattern}')


@lru_cache(maxsize=16)
def _controls(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the control symbols, longest first."""
    return re.compile('|'.join(map(re.escape, sorted(filter(None, tokenizer.controls), key=len, reverse=True))))


@lru_cache(maxsize=64)
def _stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    source = Source(template.text, *_symbols(tokenizer), speak=False)
    try:
        roles = ('user', 'assistant') * 2  # some end the last answer alone with a symbol
        text = shape(source, roles).text
    except UsageError:  # for one question only
        roles = ('user', 'assistant')
        text = shape(source, roles).text
    ends = [_end(tokenizer, text, text.index(sign(i)) + 1)[1] for i in range(1, len(roles), 2)]
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
def begins_with_bos(tokenizer: Tokenizer) -> bool:
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
