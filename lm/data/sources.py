"""Where text comes from: the default corpora, jsonl and text files, and TFDS data prepared on this machine.

A mixture is one string: 'botocore:0.7,chitchat:0.3', 'notes/*.txt', 'mine.jsonl:2,tfds:wiki40b/en:1'. Each of its names
opens a `Source`, which gives records and counts what it read and what it dropped, by reason.
"""

import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm.data import cache
from lm.data.records import Counts, Record
from lm.errors import UsageError

CORPORA = ('botocore', 'chitchat')
_NUMBER = re.compile(r'[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf(?:inity)?|nan)', re.IGNORECASE)
_READ_AT_ONCE = 4096
# Beyond these, shares of a sum overflow or vanish; the mixture rounds far more coarsely.
_LIGHTEST, _HEAVIEST = 1e-9, 1e9


@dataclass(frozen=True)
class Source:
    """A named source. `state` is JSON-able and differs when what would be read differs; `read` counts as it goes."""

    name: str
    state: Any
    read: Callable[[Counts], Iterator[Record]]


def parse_mixture(text: str) -> tuple[tuple[str, float | None], ...]:
    """('name', weight or None) of each source of 'a:0.7,b:0.3'. Raises UsageError unless all or none are weighted."""
    parts = tuple(_parse_part(part.strip()) for part in text.split(',') if part.strip())
    names = [name for name, _ in parts]
    if not parts:
        raise UsageError("the data mixture is empty: name a source, as in data.mixture='botocore:0.7,chitchat:0.3'")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f'the data mixture names {twice!r} twice: give it once, with the sum of the weights')
    unweighted = [name for name, weight in parts if weight is None]
    if unweighted and len(unweighted) < len(parts):
        raise UsageError(f'give every source of the mixture a weight, or none: {unweighted[0]!r} has none')
    return parts


def _parse_part(part: str) -> tuple[str, float | None]:
    name, colon, number = part.rpartition(':')
    if not colon or not _NUMBER.fullmatch(number):
        return part, None
    weight = float(number)
    if not name or not _LIGHTEST <= weight <= _HEAVIEST:
        raise UsageError(f'the weight in {part!r} must be a number from {_LIGHTEST:g} to {_HEAVIEST:g} after a name')
    return name, weight


def open_source(name: str) -> Source:
    """The source that a mixture calls `name`. Raises UsageError, in one line, if there is no such thing."""
    if name in CORPORA:
        return _corpus(name)
    if name.startswith('tfds:'):
        return _prepared_tfds(name)
    return _files(name, _find_files(name))


# --- files ---------------------------------------------------------------------------------------------------------


def _find_files(name: str) -> tuple[str, ...]:
    """The files of a path, a pattern or a directory (its .jsonl and .txt files, at any depth), sorted."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        found = [p for end in ('jsonl', 'txt') for p in glob.glob(f'{glob.escape(path)}/**/*.{end}', recursive=True)]
        problem = 'holds no .jsonl and no .txt file'
    elif os.path.exists(path):
        found, problem = [path], ''
    elif any(c in path for c in '*?['):
        found, problem = glob.glob(path, recursive=True), 'matches no file'
    else:
        found, problem = [], _unknown(name)
    found = sorted(p for p in found if os.path.isfile(p))
    if not found:
        raise UsageError(f'data source {name!r} {problem or "is not a file"}')
    return tuple(found)


def _unknown(name: str) -> str:
    if '/' in name or '.' in name:
        return 'does not exist: give a .jsonl or text file, a directory or a pattern'
    nearest = difflib.get_close_matches(name, CORPORA, n=1, cutoff=0.5)
    hint = f'did you mean {nearest[0]!r}?' if nearest else 'give a path, or tfds:NAME'
    return f'is unknown ({hint} known: {", ".join(CORPORA)})'


def _files(name: str, paths: tuple[str, ...]) -> Source:
    if closed := [p for p in paths if not os.access(p, os.R_OK)]:
        raise UsageError(f'data source {name!r}: {closed[0]} cannot be read: change its permissions')
    # Size and time of change stand for the content, as for make: hashing terabytes at each start would not do.
    state = [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths]

    def read(counts: Counts) -> Iterator[Record]:
        for path in paths:
            yield from (_read_jsonl if path.endswith('.jsonl') else _read_text)(name, path, counts)

    return Source(name, state, read)


def _read_jsonl(name: str, path: str, counts: Counts) -> Iterator[Record]:
    with open(path, 'rb') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            counts.read += 1
            value, reason = _parse_line(line)
            if reason:
                counts.drop(reason)
                continue
            text = value.pop('text')
            key = value.pop('id', f'{os.path.basename(path)}:{number}')
            yield from _record(name, str(key), text, value, counts)


def _parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(the object of a jsonl line, why it is dropped or None)."""
    try:
        value = json.loads(line.decode('utf-8'))
    except UnicodeDecodeError:
        return {}, 'not_utf8'
    except (ValueError, RecursionError):
        return {}, 'malformed'
    if not isinstance(value, dict):
        return {}, 'malformed'
    return value, None if isinstance(value.get('text'), str) else 'no_text'


def _read_text(name: str, path: str, counts: Counts) -> Iterator[Record]:
    counts.read += 1
    with open(path, 'rb') as file:
        content = file.read()
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError:
        counts.drop('not_utf8')
        return
    yield from _record(name, path, text, {}, counts)


def _record(name: str, key: str, text: str, meta: dict[str, Any], counts: Counts) -> Iterator[Record]:
    """The record, or none of an empty text or one with lone surrogates (JSON can write them, UTF-8 cannot)."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        counts.drop('not_utf8')
        return
    if not text.strip():
        counts.drop('empty')
        return
    yield Record(id=key, source=name, text=text, bytes=size, meta=meta)


# --- TFDS ----------------------------------------------------------------------------------------------------------
# TensorFlow Datasets takes a while to import and the second start needs none of it, so it is imported where it is used.


def _corpus(name: str) -> Source:
    from lm.data import corpora

    state = {'version': corpora.package_version(name), 'recipe': corpora.RECIPE}

    def read(counts: Counts) -> Iterator[Record]:
        directory, tally = corpora.prepare_corpus(name)
        # What the builder left out was never written, so it is counted from the builder's tally.
        counts.read += sum(tally.dropped.values())
        for reason, number in tally.dropped.items():
            counts.drop(reason, number)
        yield from _read_tfds(name, directory, counts)

    return Source(name, state, read)


def _prepared_tfds(name: str) -> Source:
    directory = _find_tfds(name.removeprefix('tfds:'))
    info = json.loads((directory / 'dataset_info.json').read_text())
    if info.get('fileFormat') != 'array_record':
        raise UsageError(
            f'{directory} holds {info.get("fileFormat", "tfrecord")}, which needs TensorFlow: prepare it again with '
            f'download_and_prepare(file_format="array_record")'
        )
    state = [str(directory), os.stat(directory / 'dataset_info.json').st_mtime_ns]
    return Source(name, state, lambda counts: _read_tfds(name, directory, counts))


def _find_tfds(name: str) -> epath.Path:
    """The newest prepared version of NAME[/CONFIG]; looked for by hand, since TFDS retries for minutes offline."""
    roots = [os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'), str(cache.cache_dir() / 'tfds')]
    for root in roots:
        base = epath.Path(root).expanduser() / name
        found = [p.parent for depth in ('*', '*/*') for p in base.glob(f'{depth}/dataset_info.json')]
        if (base / 'dataset_info.json').exists():
            found.append(base)
        if found:
            return max(found, key=lambda p: _version_key(p.name))
    raise UsageError(
        f'tfds:{name} is not prepared in {" or ".join(roots)}: run tfds.builder({name!r}, file_format="array_record")'
        '.download_and_prepare(), or set TFDS_DATA_DIR to where it is'
    )


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', version))


def _read_tfds(name: str, directory: epath.Path, counts: Counts) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    # TFDS's own decorator hides the signature from type checkers.
    builder: Any = tfds.builder_from_directory(directory)
    data = builder.as_data_source(split='train')
    key = _text_feature(name, data)
    for start in range(0, len(data), _READ_AT_ONCE):
        # Many at once: TFDS reads them in parallel, four times as fast as one by one.
        for number, example in enumerate(data.__getitems__(range(start, min(start + _READ_AT_ONCE, len(data)))), start):
            counts.read += 1
            try:
                text = example[key].decode('utf-8')
            except UnicodeDecodeError:
                counts.drop('not_utf8')
                continue
            yield from _record(name, f'{directory.name}:{number}', text, {}, counts)


def _text_feature(name: str, data: Any) -> str:
    """The feature that holds a document: `text`, or the only string one."""
    features = {key: example for key, example in data[0].items() if isinstance(example, bytes)}
    if 'text' in features:
        return 'text'
    if len(features) != 1:
        raise UsageError(f'{name} has no feature `text` and not exactly one string feature: {", ".join(data[0])}')
    return next(iter(features))
