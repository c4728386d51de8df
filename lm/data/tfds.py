"""TFDS data prepared here in array_record, as sources: read without TensorFlow, and never downloaded."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lm.data import cache, conversations
from lm.data.conversations import Reading, Row
from lm.data.records import Counts, Record, Source, record
from lm.errors import UsageError

_READ_AT_ONCE = 4096


def open_prepared(name: str, address: str, reading: Reading | None, copy: str | None) -> Source:
    """The source 'tfds:NAME[@SPLIT][#COLUMN]', out of the local `copy`, if any: text, or what `reading` says."""
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
    wanted = column or None
    if reading is None:
        return Source(name, state, lambda counts: read_text(name, directory, counts, split, wanted))

    def read(counts: Counts) -> Iterator[Any]:
        rows = _rows(name, directory, split, reading, wanted)
        return conversations.read_rows(name, reading, rows, counts, column=wanted)

    return Source(name, [*state, reading.state], read, kind=reading.kind)


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
        found = [p.parent for depth in ('', '*/', '*/*/') for p in base.glob(f'{depth}dataset_info.json')]
        if found:
            return max(found, key=lambda p: [int(part) for part in re.findall(r'\d+', p.name)])
    if copy:
        raise UsageError(f'{copy} holds no prepared TFDS dataset: put the folder that TFDS writes for {name} there')
    raise UsageError(
        f'tfds:{name} is not prepared in {" or ".join(roots)}: run tfds.builder({name!r}, file_format="array_record")'
        '.download_and_prepare(), or set TFDS_DATA_DIR to where it is'
    )


def examples(name: str, directory: epath.Path, split: str) -> Iterator[dict[str, Any]]:
    """Every example of a prepared split. Raises UsageError if it has none."""
    import tensorflow_datasets as tfds  # takes a while, and a start that finds its data prepared needs none of it

    # TFDS's own decorator hides the signature from type checkers.
    builder: Any = tfds.builder_from_directory(directory)
    data = builder.as_data_source(split=split)
    if not len(data):
        raise UsageError(f'data source {name!r} has no documents: name other data')
    for start in range(0, len(data), _READ_AT_ONCE):
        # Many at once: TFDS reads them in parallel, four times as fast as one by one.
        yield from data.__getitems__(range(start, min(start + _READ_AT_ONCE, len(data))))


def read_text(
    name: str, directory: epath.Path, counts: Counts, split: str, wanted: str | None = None
) -> Iterator[Record]:
    """The documents of a split, out of the feature `wanted`, or the one that holds text."""
    column = None
    for number, example in enumerate(examples(name, directory, split)):
        if column is None:
            texts = [key for key, value in example.items() if isinstance(value, bytes)]
            column = conversations.choose_column(name, wanted, texts, list(example))
        counts.read += 1
        yield from record(name, f'{directory.name}:{number}', example[column], counts, column=column)


def _rows(name: str, directory: epath.Path, split: str, reading: Reading, column: str | None) -> Iterator[Row]:
    for number, example in enumerate(examples(name, directory, split)):
        if not number:
            conversations.check_columns(f'data source {name!r}', reading.kind, list(example), column)
        place, key = f'{name}:{number}', f'{directory.name}:{number}'
        try:
            yield Row(place, key, _plain(example))
        except UnicodeDecodeError:
            yield Row(place, key, {}, 'not_utf8')


def _plain(value: Any) -> Any:
    """A feature's value in Python's own types: TFDS has texts as bytes, numbers and sequences as arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
