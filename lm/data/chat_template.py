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
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from etils import epath

from lm import files
from lm.data.chat_layout import lay_out, unveiled
from lm.data.chat_shape import SIGN, Message, Shape, Source, Tools, filled, said, shape, sign
from lm.data.tokenizer import CHAT_MARKERS, Tokenizer
from lm.data.tokenizer_json import CONFIG_FILE
from lm.errors import UsageError

TEMPLATE_FILE = 'chat_template.jinja'
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
        plan, pieces = _fitting(self, tokenizer, messages, tools, given=given)
        ids: list[int] = []
        trained: list[bool] = []
        learned = {i for i, m in enumerate(messages) if i >= given and i not in plan.changed and m.get('train', True)}
        for (_, owner), found in zip(plan.parts, tokenizer.encode_pieces(pieces), strict=True):
            ids += found
            trained += [owner in learned] * len(found)
        return ids, trained

    def check(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, given: int = 0, tools: Tools = None
    ) -> frozenset[str]:
        """The names of all that `encode` makes nothing of: keys of messages, and earlier answers; raises what it
        raises."""
        plan, _ = _fitting(self, tokenizer, messages, tools, given=given)
        return plan.unused | {_CHANGED for i in plan.changed if i >= given}

    def prompt(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant is to speak.

        Raises UsageError if the template refuses the conversation or changes what is said in it.
        """
        return [i for found in tokenizer.encode_pieces(self.prompt_pieces(tokenizer, messages)) for i in found]

    def prompt_pieces(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int | str]:
        """The pieces that `prompt` encodes: the ids of control symbols, and texts that are encoded each as one."""
        return _planned(self, tokenizer, messages, None, speak=True)[1]

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


class _Plan(NamedTuple):
    """The parts of which the ids of a conversation are put together.

    Attributes:
      parts: each a control symbol, or text that is encoded as one, and the answer with which it is learned.
      begun: the answers that begin where the prompts for them end.
      changed: answers that are not shown as they are.
      unused: keys of messages of which nothing is shown.
    """

    parts: tuple[tuple[int | str, int | None], ...]
    begun: Container[int]
    changed: frozenset[int] = frozenset()
    unused: frozenset[str] = frozenset()


def _fitting(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, *, given: int
) -> tuple[_Plan, list[int | str]]:
    """`_planned` for training. Raises UsageError if the last answer is to be learned and cannot be."""
    template.stop_ids(tokenizer)
    last = len(messages) - 1
    learns = last >= given and messages[last]['role'] == 'assistant' and messages[last].get('train', True)
    plan, pieces = _planned(template, tokenizer, messages, tools, speak=False, whole=last if learns else None)
    if learns and last not in plan.begun:
        raise UsageError(_MISMATCH)
    return plan, pieces


def _planned(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, *, speak: bool,
    whole: int | None = None,
) -> tuple[_Plan, list[int | str]]:  # fmt: skip
    """(how a conversation becomes ids, its parts with the contents in them).

    Args:
      whole: the answer that must be shown as it is.
    """
    roles = _roles(messages)
    source = Source(template.text, *_symbols(tokenizer), speak)
    if not tools and 'tool' not in roles and all(m.keys() <= {'role', 'content', 'train'} for m in messages):
        plan, form = _plan(source, tokenizer, roles)
        if (texts := said(form, messages)) is not None:
            return plan, [filled(part, texts) if isinstance(part, str) else part for part, _ in plan.parts]
    laid = lay_out(source, messages, tools, tokenizer.controls, whole=whole)
    # Within tool calls there may be symbols that end no answer.
    calls = [i for i, m in enumerate(messages) if m.get('tool_calls')]
    stops = dict.fromkeys(calls, template.stop_ids(tokenizer))
    plan = _assembled(tokenizer, laid.text, laid.starts, laid.ends, laid.generated, stops)
    pieces = [unveiled(part) if laid.veiled and isinstance(part, str) else part for part, _ in plan.parts]
    return plan._replace(changed=laid.changed, unused=laid.unused), pieces


@lru_cache(maxsize=8192)
def _plan(source: Source, tokenizer: Tokenizer, roles: tuple[str, ...]) -> tuple[_Plan, Shape]:
    """The plan of all conversations of a shape, and the shape."""
    whole = shape(source, roles)
    starts = {i: _start(whole, roles[:i]) for i, role in enumerate(roles) if role == 'assistant'}
    ends = [whole.text.index(sign(i)) + 1 for i in range(len(roles))]
    return _assembled(tokenizer, whole.text, starts, ends, whole.generated, {}), whole


def _start(whole: Shape, before: tuple[str, ...]) -> int | None:
    """The place in a shape where the answer after some messages begins: where its prompt ends. None if the shape does
    not begin with its prompt."""
    try:
        prompt = shape(whole.source._replace(speak=True), before)
    except UsageError:  # nothing to ask: the assistant has the first word
        return None
    same = whole.text.startswith(prompt.text) and whole.strips[: len(before)] == prompt.strips
    return len(prompt.text) if same and len(prompt.text) <= whole.text.index(sign(len(before))) else None


def _assembled(
    tokenizer: Tokenizer, text: str, starts: Mapping[int, int | None], ends: Sequence[int],
    generated: Sequence[tuple[int, int]], stops: Mapping[int, Container[int]],
) -> _Plan:  # fmt: skip
    """The plan of a text.

    Args:
      starts: where each answer begins, None where its prompt is not there.
      ends: where the content of each message ends.
      generated: where the {% generation %} blocks begin and end; each is of the last answer before its end.
      stops: the ids that may end an answer, if not all may.
    """
    begun = {i: at for i, at in starts.items() if at is not None}
    if generated:
        ended = sorted((ends[i], i) for i in starts)
        spans = {span: next((i for end, i in reversed(ended) if end <= span[1]), None) for span in generated}
    else:
        spans = {(at, _end(tokenizer, text, ends[i], stops.get(i, ()))[0]): i for i, at in begun.items()}
    cuts = {at for span in spans for at in span} | set(begun.values())
    parts = tuple(_parts(tokenizer, text, cuts, spans))
    if tokenizer.adds_bos and (not parts or parts[0][0] != tokenizer.bos_id):
        parts = ((tokenizer.bos_id, None), *parts)
    return _Plan(parts, begun)


def _end(tokenizer: Tokenizer, text: str, at: int, among: Container[int] = ()) -> tuple[int, int | None]:
    """(where in a text an answer ends whose content ends at `at`, the id that ends it): after the first control symbol
    that follows, one of `among` if there is such; or at `at` if none follows."""
    first: tuple[int, int | None] = at, None
    content = SIGN.search(text, at)
    for found in _controls(tokenizer).finditer(text, at, content.start() if content else len(text)):
        symbol = tokenizer.controls[found[0]]
        first = (found.end(), symbol) if first[1] is None else first
        if not among or symbol in among:
            return found.end(), symbol
    return first


def _parts(
    tokenizer: Tokenizer, text: str, cuts: set[int], spans: Mapping[tuple[int, int], int | None]
) -> Iterator[tuple[int | str, int | None]]:
    """A text as control symbols and texts, which are cut at `cuts`, each with the answer in whose span it is."""
    owner = lambda at: next((i for (start, end), i in spans.items() if start <= at < end), None)
    at = 0
    for piece in _controls(tokenizer).split(text):
        if piece in tokenizer.controls:
            yield tokenizer.controls[piece], owner(at)
        else:
            inner = sorted({at, at + len(piece)} | {cut for cut in cuts if at < cut < at + len(piece)})
            yield from ((text[a:b], owner(a)) for a, b in pairwise(inner))
        at += len(piece)


@lru_cache(maxsize=16)
def _controls(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds the control symbols, longest first."""
    return re.compile(f'({"|".join(map(re.escape, sorted(filter(None, tokenizer.controls), key=len, reverse=True)))})')


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


@lru_cache(maxsize=16)
def _symbols(tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of <bos> and <eos>; '' for a <bos> that the tokenizer has none of, and for which <eos> stands in."""
    names = {i: name for name, i in tokenizer.controls.items()}
    bos, eos = names.get(tokenizer.bos_id, ''), names.get(tokenizer.eos_id, '')
    config = json.loads(tokenizer.saved.get(CONFIG_FILE, b'{}'))
    return ('' if bos == eos and not config.get('bos_token') else bos), eos
