"""The fixed prompts that every stage answers at every evaluation, so that samples compare across runs and stages.

Those of configs/prompts.jsonl ask about the default data. A run on other data answers held-out beginnings of that.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from lm.data.chats import Question
from lm.data.store import TokenStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

# operation: a real one; invented: none of that name exists; chat: small talk; raw: the start of a document.
KINDS = ('operation', 'invented', 'chat', 'raw')
DEFAULT_FILE = Path(__file__).parents[2] / 'configs' / 'prompts.jsonl'  # in a checkout
HELDOUT = 8  # prompts of own data, over all sources
BEGINNING = 12  # tokens of a text
LINE = 64  # tokens within which a line is looked for to begin with


@dataclass(frozen=True)
class Prompt:
    """A prompt. `raw` ones are continued as plain text; the others are a user's turn, or the conversation up to an
    answer, as `ids`."""

    id: str
    kind: str
    text: str
    ids: tuple[int, ...] | None = None


def load_prompts(path: epath.PathLike) -> list[Prompt]:
    """The prompts of a jsonl file with `id`, `kind` and `text` a line. Raises UsageError for anything else."""
    path = epath.Path(path)
    try:
        # Not splitlines: JSON may hold U+2028 and others that it takes for ends of lines.
        lines = path.read_bytes().split(b'\n')
    except OSError as e:
        raise UsageError(
            f'no prompts at {path} ({e.strerror or e}): name a .jsonl file with id, kind and text in each line'
        ) from None
    prompts = [_parse(f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line.strip()]
    ids = [prompt.id for prompt in prompts]
    if len(ids) > len(set(ids)):
        raise UsageError(f'{path} has two prompts with the same id: samples are found by it, so make them differ')
    return prompts


def _parse(place: str, line: bytes) -> Prompt:
    try:
        fields = json.loads(line.decode('utf-8-sig'))
        if set(fields) != {'id', 'kind', 'text'}:
            raise ValueError
        prompt = Prompt(**fields)
    except UnicodeDecodeError:
        raise UsageError(f'{place} is not UTF-8: save the file as UTF-8') from None
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f'{place} is not an object with exactly id, kind and text') from None
    if wrong := [name for name, value in fields.items() if not _is_text(value)]:
        raise UsageError(f'{place}: {wrong[0]} must be a text, and not an empty one')
    if prompt.kind not in KINDS:
        raise UsageError(f'{place} has the kind {prompt.kind!r}: it must be one of {", ".join(KINDS)}')
    return prompt


def _is_text(value: Any) -> bool:
    """Tells whether it is more than spaces, and without lone surrogates (JSON can write them, UTF-8 cannot)."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors='replace').decode()


# ---- of own data ----


def of_text(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> list[Prompt]:
    """Beginnings of held-out texts, those of each store's first documents; of a few long ones, at several places."""
    count = max(1, HELDOUT // len(stores))
    found = (text for store in stores for text in _beginnings(store, tokenizer, count))
    return _unlike(Prompt(_hash(text), 'raw', text) for text in found if _is_text(text))


def of_questions(
    stores: Sequence[Any], questions: Callable[[Any, int], list[Question]], tokenizer: Tokenizer
) -> list[Prompt]:
    """The questions of held-out conversations, up to where the assistant is to speak.

    Args:
      questions: (store, how many) -> the first of a store.
    """
    count = max(1, HELDOUT // len(stores))
    asked = (question.prompt for store in stores for question in questions(store, count))
    found = ((ids, tokenizer.decode(ids).strip()) for ids in asked)
    return _unlike(Prompt(_hash(text), 'chat', text, tuple(ids)) for ids, text in found if _is_text(text))


def _beginnings(store: TokenStore, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The first words of the first documents, or of `count` places in all if there are fewer documents."""
    places = -(-count // store.documents)
    for i in range(min(count, store.documents)):
        ids = store.document(i)[1:-1].tolist()
        for at in range(0, len(ids), max(len(ids) // places, 2 * BEGINNING, 1)):
            start = at and _line_start(ids, at, tokenizer)
            words = ids[start : start + min(BEGINNING, max(1, (len(ids) - start) // 2))]
            yield tokenizer.decode(words).strip('\ufffd')  # half of a character


def _line_start(ids: Sequence[int], at: int, tokenizer: Tokenizer) -> int:
    """The place where the next line begins after place `at`; `at` if none does soon."""
    ends = (i for i in range(at, min(at + LINE, len(ids) - 1)) if tokenizer.pieces[ids[i]].endswith(b'\n'))
    return next(ends, at - 1) + 1


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _unlike(prompts: Iterator[Prompt]) -> list[Prompt]:
    """Those with different texts, HELDOUT at most."""
    return list({prompt.id: prompt for prompt in prompts}.values())[:HELDOUT]
