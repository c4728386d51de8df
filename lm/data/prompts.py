"""The fixed prompts that every stage answers at every evaluation, so that samples compare across runs and stages."""

import json
from dataclasses import dataclass

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
    if not path.exists():
        raise UsageError(f'no prompts at {path}: name a .jsonl file with id, kind and text in each line')
    lines = path.read_text().splitlines()
    prompts = [_parse(f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line.strip()]
    ids = [prompt.id for prompt in prompts]
    if len(ids) > len(set(ids)):
        raise UsageError(f'{path} has two prompts with the same id: samples are found by it, so make them differ')
    return prompts


def _parse(place: str, line: str) -> Prompt:
    try:
        prompt = Prompt(**json.loads(line))
    except (TypeError, ValueError):
        raise UsageError(f'{place} is not an object with exactly id, kind and text') from None
    if prompt.kind not in KINDS:
        raise UsageError(f'{place} has the kind {prompt.kind!r}: it must be one of {", ".join(KINDS)}')
    return prompt
