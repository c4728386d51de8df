"""The default corpora: text that installs with pip, read from the installed packages at run time.

`botocore`: the documentation strings of the AWS service models, one document a string. `chitchat`: human conversations,
one document a conversation.
"""

import gzip
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.data.heldout import heldout_operation, leaks, normalized
from lm.data.markup import strip_html
from lm.data.records import Counts
from lm.errors import UsageError, install

# Part of the cache's key: raise it when the text that comes out changes.
RECIPE = 1
PACKAGES = {'botocore': 'botocore', 'chitchat': 'chitchat-dataset'}
MIN_CHARACTERS = 200
MAX_CODE_SHARE = 0.25
_CODE_WORD = re.compile(r'arn:|://|[{}<>\\=_|^$*/]|\d.*\d|\w{24}')
_ABBREVIATION = re.compile(r'(?:\be\.g|\bi\.e|\betc|\bvs|\bno|\bDr|\bInc|\b[A-Z])\.$')


@dataclass(frozen=True)
class Operation:
    """One operation of a service: its name ('PutImage'), the service's ('ECR'), and its documentation as plain text."""

    service: str
    name: str
    text: str

    @property
    def first_sentence(self) -> str:
        return first_sentence(self.text)


def package_version(name: str) -> str:
    """The version of the package that a corpus is read from. Raises UsageError if it is not installed."""
    try:
        return importlib.metadata.version(PACKAGES[name])
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f'the corpus {name!r} is read from the package {PACKAGES[name]}: {install("corpus")}'
        ) from None


def botocore_documents(tally: Counts) -> Iterator[dict[str, Any]]:
    """Documentation strings of ≥ 200 characters of English, without near-copies and without held-out answers."""
    models = list(_service_models())
    answers = [normalized(o.first_sentence) for o in _operations(models) if heldout_operation(o.name)]
    kept = list(_keep_prose(models, tally))
    for document, leaked in zip(kept, leaks([d['text'] for d in kept], answers), strict=True):
        if leaked:
            tally.drop('heldout_answer')
        else:
            yield document


def chitchat_documents(tally: Counts) -> Iterator[dict[str, Any]]:
    """Conversations of two turns or more.

    A turn is a line, without a speaker's name: the turns of the two people strictly alternate, so a name would say
    nothing that the line break does not, its bytes would flatter bits per byte, and fine-tuning marks speakers with
    control tokens of its own.
    """
    for key, conversation in conversations():
        tally.read += 1
        text = conversation_text(conversation)
        if '\n' not in text:
            tally.drop('one_turn')
            continue
        # Some conversations have no prompt, some no ratings.
        meta = {k: conversation[k] for k in ('prompt', 'ratings') if k in conversation}
        yield {'id': key, 'text': text, 'meta': meta}


def conversations() -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, conversation) of all that the package holds: its `messages`, a list a turn, and its prompt and ratings."""
    yield from json.loads((package_dir('chitchat_dataset') / 'dataset.json').read_bytes()).items()


def conversation_text(conversation: dict[str, Any]) -> str:
    """The document that pretraining reads of a conversation: a line a turn."""
    turns = (' '.join(' '.join(m['text'] for m in turn).split()) for turn in conversation['messages'])
    return '\n'.join(turn for turn in turns if turn)


def operations() -> Iterator[Operation]:
    """Every documented operation of every service, latest API version: the ground of operation Q&A."""
    return _operations(_service_models())


def first_sentence(text: str) -> str:
    """The first sentence of a documentation text that is no note: up to a full stop before a new sentence."""
    lines = [line for line in text.split('\n') if line]
    line = next((line for line in lines if not line.startswith(('Note:', 'Important:', '- '))), lines[0])
    for match in re.finditer(r'[.!?](?=\s+["\'(`]?[A-Z0-9])', line):
        if not _ABBREVIATION.search(line[: match.end()]):
            return line[: match.end()]
    return line


def package_dir(package: str) -> Path:
    """The directory of an installed package, found without importing it (importing botocore takes half a second)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f'the package {package} is not installed: {install("corpus")}')
    return Path(spec.submodule_search_locations[0])


def _service_models() -> Iterator[dict[str, Any]]:
    """The parsed service-2.json of each service, latest API version."""
    services = sorted(p for p in (package_dir('botocore') / 'data').iterdir() if p.is_dir())
    latest = (max(service.glob('*/service-2.json.gz'), default=None) for service in services)
    # gzip and file reading let go of the interpreter lock, so decompression overlaps with parsing.
    with ThreadPoolExecutor(2) as pool:
        yield from map(json.loads, pool.map(_decompress, [path for path in latest if path]))


def _decompress(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def _operations(models: Iterable[dict[str, Any]]) -> Iterator[Operation]:
    for model in models:
        for name, operation in model['operations'].items():
            text = strip_html(operation.get('documentation', ''))
            if text:
                yield Operation(service=model['metadata']['serviceId'], name=name, text=text)


def _keep_prose(models: Iterable[dict[str, Any]], tally: Counts) -> Iterator[dict[str, Any]]:
    """The documentation strings worth learning from; counts why the others are not."""
    seen: set[str] = set()
    for model in models:
        service = model['metadata']['serviceId']
        for path, documentation in _documentation(model, ''):
            tally.read += 1
            reason, text = _judge(documentation, seen)
            if reason:
                tally.drop(reason)
            else:
                yield {'id': f'{service}{path}', 'text': text, 'meta': {'service': service}}


def _judge(documentation: str, seen: set[str]) -> tuple[str | None, str]:
    """(why it is dropped or None, its plain text); remembers in `seen` what was met."""
    if len(documentation) < MIN_CHARACTERS:
        return 'short', ''
    if documentation in seen:
        return 'duplicate', ''
    seen.add(documentation)
    text = strip_html(documentation)
    if len(text) < MIN_CHARACTERS:
        return 'short', text
    if code_share(text) > MAX_CODE_SHARE:
        return 'symbols', text
    words = normalized(text)
    if words in seen:
        return 'duplicate', text
    seen.add(words)
    return None, text


def code_share(text: str) -> float:
    """The share of a text's characters in words that are not prose: ARNs, placeholders, paths, patterns, numbers."""
    words = text.split()
    return sum(len(w) for w in words if _CODE_WORD.search(w)) / max(1, sum(map(len, words)))


def _documentation(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, text) of every documentation string below a node of a service model."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        if key == 'documentation' and isinstance(value, str):
            yield path, value
        else:
            yield from _documentation(value, f'{path}/{key}')
