"""The fixed prompts that every stage answers at every evaluation, so that samples compare across runs and stages."""

import json
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm.errors import UsageError

# operation: a real one; invented: none of that name exists; chat: small talk; raw: the start of a document.
KINDS = ('operation', 'invented', 'chat', 'raw')


@dataclass(frozen=True)
class Prompt:
    """A prompt. `raw` ones are continued as plain text; the others are a user's turn."""

    id: str
    kind: str
    text: str


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
        prompt = Prompt(**json.loads(line.decode('utf-8')))
    except UnicodeDecodeError:
        raise UsageError(f'{place} is not UTF-8: save the file as UTF-8') from None
    except (TypeError, ValueError, RecursionError):
        raise UsageError(f'{place} is not an object with exactly id, kind and text') from None
    if wrong := [name for name, value in vars(prompt).items() if not _is_text(value)]:
        raise UsageError(f'{place}: {wrong[0]} must be a text, and not an empty one')
    if prompt.kind not in KINDS:
        raise UsageError(f'{place} has the kind {prompt.kind!r}: it must be one of {", ".join(KINDS)}')
    return prompt


def _is_text(value: Any) -> bool:
    """Whether it is more than spaces, and without lone surrogates (JSON can write them, UTF-8 cannot)."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors='replace').decode()
