"""Where text comes from: the default corpora, named datasets, files, TFDS data prepared here, Hugging Face datasets.

A mixture is one string: 'botocore:0.7,chitchat:0.3', 'notes/*.txt', 'mine.jsonl#body:2,tfds:wiki40b/en:1'. Each of its
names opens a `Source`, which gives records and counts what it read and what it dropped, by reason:

    NAME                            botocore, chitchat, or a line of the table in lm/data/mixtures.py
    PATH[#COLUMN]                   files, patterns and folders of .jsonl, .parquet and .txt
    tfds:NAME[@SPLIT][#COLUMN]      prepared in array_record
    hf:NAME[@SPLIT][#COLUMN]        see lm/data/hub.py
"""

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from lm.data import cache, hub, mixtures, parquet
from lm.data.records import Counts, Record, Source, choose_column, record
from lm.errors import UsageError

# Weights are rounded to multiples of 1/PERIOD, and the mixture is exact over every PERIOD rows.
PERIOD = 1 << 14
CORPORA = ('botocore', 'chitchat')
KINDS = ('jsonl', 'parquet', 'txt')
_NUMBER = re.compile(r'[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf(?:inity)?|nan)', re.IGNORECASE)
_READ_AT_ONCE = 4096
# Beyond these, shares of a sum overflow or vanish.
_LIGHTEST, _HEAVIEST = 1e-9, 1e9


def parse_mixture(text: str) -> tuple[tuple[str, float | None], ...]:
    """('name', weight or None) of each source of 'a:0.7,b:0.3'.

    Raises UsageError unless all or none are weighted, and each weight is worth a row in PERIOD.
    """
    parts = tuple(_parse_part(part.strip()) for part in text.split(',') if part.strip())
    names = [name for name, _ in parts]
    if not parts:
        raise UsageError("the data mixture is empty: name a source, as in data.mixture='botocore:0.7,chitchat:0.3'")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f'the data mixture names {twice!r} twice: give it once, with the sum of the weights')
    unweighted = [name for name, weight in parts if weight is None]
    if unweighted and len(unweighted) < len(parts):
        raise UsageError(f'give every source of the mixture a weight, or none: {unweighted[0]!r} has none')
    least = sum(weight or 0 for _, weight in parts) / PERIOD / 2
    if light := next((part for part in parts if part[1] is not None and part[1] < least), None):
        raise UsageError(
            f'the weight {light[1]:g} of {light[0]!r} is so small beside the others that none of {PERIOD:,} rows would '
            f'be its own: give it at least {2 * least:.1g} or leave it out'
        )
    return parts


def _parse_part(part: str) -> tuple[str, float | None]:
    name, colon, number = part.rpartition(':')
    if _NUMBER.fullmatch(part):
        raise UsageError(f'{part!r} in the data mixture is a weight without a source: write NAME:{part}')
    if part in ('hf:', 'tfds:'):
        raise UsageError(f'{part!r} in the data mixture names no dataset: write {part}NAME')
    if not number and colon:
        raise UsageError(f'{part!r} in the data mixture has no weight after its colon: write {name or "NAME"}:0.5')
    if not colon or not _NUMBER.fullmatch(number):
        return part, None
    weight = float(number)
    if not name or not _LIGHTEST <= weight <= _HEAVIEST:
        raise UsageError(f'the weight in {part!r} must be a number from {_LIGHTEST:g} to {_HEAVIEST:g} after a name')
    if _NUMBER.fullmatch(name.rpartition(':')[2]) and ':' in name:
        raise UsageError(f'{part!r} in the data mixture has two weights: give one, and a comma between two sources')
    return name, weight


def open_source(name: str) -> Source:
    """The source that a mixture calls `name`. Raises UsageError, in one line, if there is no such thing."""
    if name in CORPORA:
        return _corpus(name)
    if name in mixtures.NAMED:
        return _named(name)
    if name.startswith('tfds:'):
        return _prepared_tfds(name, name)
    if name.startswith('hf:'):
        return hub.open_dataset(name, hub.parse(name))
    path, column = _split_column(name)
    return _files(name, _find_files(name, path), column)


def _named(name: str) -> Source:
    """A line of the table: its local copy if there is one, else where the table says."""
    address, copy = mixtures.NAMED[name].source, mixtures.local_copy(name)
    if address.startswith('tfds:'):
        return _prepared_tfds(name, address, copy)
    return hub.open_dataset(name, hub.parse(address, copy))


def _split_column(name: str) -> tuple[str, str | None]:
    """'PATH#COLUMN' -> (PATH, COLUMN), 'PATH' -> (PATH, None). A file's own name may have a # in it."""
    path, mark, column = name.rpartition('#')
    if not mark or '/' in column or os.path.exists(os.path.expanduser(name)):
        return name, None
    if not path or not column:
        raise UsageError(f'data source {name!r}: write PATH#COLUMN')
    return path, column


# --- files ---------------------------------------------------------------------------------------------------------


def _find_files(name: str, path: str) -> tuple[str, ...]:
    """The files of a path, a pattern or a directory (its files of our kinds, at any depth), sorted."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = [p for end in KINDS for p in glob.glob(f'{glob.escape(path)}/**/*.{end}', recursive=True)]
        problem = f'holds no file that ends with .{" .".join(KINDS)}'
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
        return 'does not exist: give a .jsonl, .parquet or text file, a directory or a pattern'
    known = (*CORPORA, *mixtures.NAMED)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean {nearest[0]!r}?' if nearest else 'give a path, tfds:NAME or hf:NAME;'
    colon = ' and a weight is a number after a colon;' if ':' in name else ''
    return f'is unknown ({hint}{colon} known: {", ".join(known)})'


def _files(name: str, paths: tuple[str, ...], column: str | None) -> Source:
    if closed := [p for p in paths if not os.access(p, os.R_OK)]:
        raise UsageError(f'data source {name!r}: {closed[0]} cannot be read: change its permissions')
    tables = [p for p in paths if p.endswith('.parquet')]
    if column and (plain := [p for p in paths if not p.endswith(('.jsonl', '.parquet'))]):
        raise UsageError(f'data source {name!r}: {plain[0]} is plain text and has no column {column!r}')
    # Size and time of change stand for the content, as for make: hashing terabytes at each start would not do.
    state = [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths]

    def read(counts: Counts) -> Iterator[Record]:
        for path in paths:
            if path.endswith('.parquet'):
                yield from _read_parquet(name, path, counts, column)
            elif path.endswith('.jsonl'):
                yield from _read_jsonl(name, path, counts, column or 'text')
            else:
                yield from _read_text(name, path, counts)

    def check() -> None:
        for path in tables:
            parquet.text_column(path, column)

    return Source(name, state, read, check)


def _read_parquet(name: str, path: str, counts: Counts, wanted: str | None) -> Iterator[Record]:
    column = parquet.text_column(path, wanted)
    for number, text in enumerate(parquet.read_column(path, column)):
        counts.read += 1
        yield from record(name, f'{os.path.basename(path)}:{number}', text, counts, column=column)


def _read_jsonl(name: str, path: str, counts: Counts, column: str) -> Iterator[Record]:
    with open(path, 'rb') as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            counts.read += 1
            value, reason = _parse_line(line)
            if reason:
                counts.drop(reason)
                continue
            text = value.pop(column, None)
            key = value.pop('id', f'{os.path.basename(path)}:{number}')
            yield from record(name, str(key), text, counts, column=column, meta=value)


def _parse_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    """(the object of a jsonl line, why it is dropped or None)."""
    try:
        value = json.loads(line.decode('utf-8'))
    except UnicodeDecodeError:
        return {}, 'not_utf8'
    except (ValueError, RecursionError):
        return {}, 'malformed'
    return (value, None) if isinstance(value, dict) else ({}, 'malformed')


def _read_text(name: str, path: str, counts: Counts) -> Iterator[Record]:
    counts.read += 1
    with open(path, 'rb') as file:
        content = file.read()
    yield from record(name, path, content, counts)


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
        yield from _read_tfds(name, directory, counts, 'train', None)

    return Source(name, state, read)


def _prepared_tfds(name: str, address: str, copy: str | None = None) -> Source:
    """What 'tfds:NAME[@SPLIT][#COLUMN]' says, out of the local `copy` if there is one."""
    rest, _, column = address.removeprefix('tfds:').partition('#')
    dataset, _, split = rest.partition('@')
    directory = _find_tfds(dataset, copy)
    info = json.loads((directory / 'dataset_info.json').read_text())
    if info.get('fileFormat') != 'array_record':
        raise UsageError(
            f'{directory} holds {info.get("fileFormat", "tfrecord")}, which needs TensorFlow: prepare it again with '
            f'download_and_prepare(file_format="array_record")'
        )
    split, splits = split or 'train', [s['name'] for s in info.get('splits', [])]
    if split not in splits:
        raise UsageError(f'data source {name!r}: {directory} has no split {split!r}, it has {", ".join(splits)}')
    state = [str(directory), os.stat(directory / 'dataset_info.json').st_mtime_ns, split, column]
    return Source(name, state, lambda counts: _read_tfds(name, directory, counts, split, column or None))


def _find_tfds(name: str, copy: str | None) -> epath.Path:
    """The newest prepared version of NAME[/CONFIG]; looked for by hand, since TFDS retries for minutes offline.

    A local `copy` is such a folder as TFDS writes for NAME, or the part of it that is CONFIG or a version.
    """
    roots = [os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'), str(cache.cache_dir() / 'tfds')]
    folders = [epath.Path(root).expanduser() / name for root in roots]
    if copy:
        config = name.partition('/')[2]
        folders = [epath.Path(copy) / config, epath.Path(copy)]
    for base in folders:
        found = [p.parent for depth in ('*', '*/*') for p in base.glob(f'{depth}/dataset_info.json')]
        if (base / 'dataset_info.json').exists():
            found.append(base)
        if found:
            return max(found, key=lambda p: _version_key(p.name))
    if copy:
        raise UsageError(f'{copy} holds no prepared TFDS dataset: put the folder that TFDS writes for {name} there')
    raise UsageError(
        f'tfds:{name} is not prepared in {" or ".join(roots)}: run tfds.builder({name!r}, file_format="array_record")'
        '.download_and_prepare(), or set TFDS_DATA_DIR to where it is'
    )


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r'\d+', version))


def _read_tfds(name: str, directory: epath.Path, counts: Counts, split: str, wanted: str | None) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    # TFDS's own decorator hides the signature from type checkers.
    builder: Any = tfds.builder_from_directory(directory)
    data = builder.as_data_source(split=split)
    column = _text_feature(name, data, wanted)
    for start in range(0, len(data), _READ_AT_ONCE):
        # Many at once: TFDS reads them in parallel, four times as fast as one by one.
        for number, example in enumerate(data.__getitems__(range(start, min(start + _READ_AT_ONCE, len(data)))), start):
            counts.read += 1
            yield from record(name, f'{directory.name}:{number}', example[column], counts, column=column)


def _text_feature(name: str, data: Sequence[dict[str, Any]], wanted: str | None) -> str:
    """The feature that holds a document."""
    if not len(data):
        raise UsageError(f'data source {name!r} has no documents: name other data')
    first = data[0]
    return choose_column(name, wanted, [key for key, value in first.items() if isinstance(value, bytes)], list(first))
