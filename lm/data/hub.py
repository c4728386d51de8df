"""Hugging Face datasets as sources, through the library `datasets` (of the extra [hub]).

    hf:NAMESPACE/NAME[/CONFIG][@SPLIT][#COLUMN]     on the hub, or in the library's own cache
    hf:./FOLDER[@SPLIT][#COLUMN]                    written by save_to_disk, or with parquet or jsonl files in it

SPLIT is train by default; of the hub and of files it may be a slice, as train[:1%]. COLUMN is `text` by default, or
the only text column. A dataset is random access, so Grain reads it as it is. None of its code runs: from version 4 on
the library knows no loading scripts.
"""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain

from lm.data import cache, conversations
from lm.data.conversations import Reading, Row
from lm.data.records import Counts, Source, record
from lm.errors import UsageError, install

_HUB = 'https://huggingface.co'
_PATIENCE_SECONDS = 3.0


class Address(NamedTuple):
    """The place of a dataset: on the hub, or in a local folder, whose config may be its only one, without a name."""

    name: str
    config: str | None
    split: str | None
    column: str | None
    folder: str | None


def parse(text: str, copy: str | None = None) -> Address:
    """Reads 'hf:…'; `copy` is a folder to read in its place. Raises UsageError if it names nothing."""
    rest, mark, column = text.removeprefix('hf:').partition('#')
    name, at, split = rest.rpartition('@')
    if not at or os.path.isdir(os.path.expanduser(rest)):
        name, at, split = rest, '', ''
    if not name.strip('/') or (mark and not column) or (at and not split):
        raise UsageError(f'data source {text!r}: write hf:NAMESPACE/NAME[/CONFIG][@SPLIT][#COLUMN], or hf:./FOLDER')
    config = None
    if name.startswith(('.', '/', '~')):
        copy = os.path.expanduser(name)
    elif name.count('/') > 1:
        namespace, name, config = name.split('/', 2)
        name = f'{namespace}/{name}'
    return Address(name, config, split or None, column or None, copy)


def open_dataset(name: str, address: Address, reading: Reading | None = None) -> Source:
    """The source at an address, of text or of what `reading` says.

    A dataset of the hub is fetched into the library's cache unless it is there.

    Raises UsageError if it is not to be had, or has no such config, split or column.
    """
    if address.folder and not os.path.isdir(address.folder):
        raise UsageError(f'data source {name!r}: there is no folder {address.folder}')
    datasets = _library(name, offline=not address.folder and not _reachable())
    try:
        data = _open(datasets, address)
    except ConnectionError as e:
        place = 'a folder and name hf:./FOLDER' if name.startswith('hf:') else f'$LM_DATA/{name}'
        raise UsageError(
            f'data source {name!r} is in no cache and the hub cannot be reached: connect, or put a copy into {place}'
        ) from e
    except Exception as e:  # whatever the library, the hub or a damaged file raises: its reason fits one line
        reason = ' '.join(str(e).split())[:300] or type(e).__name__
        raise UsageError(f'data source {name!r} cannot be opened: {reason}') from e
    plain = {k: v for k, v in data.features.items() if isinstance(v, datasets.Value)}
    texts = [k for k, v in plain.items() if v.dtype in ('string', 'large_string')]
    return _source(name, address.column, data, texts, reading)


def _source(name: str, column: str | None, data: Any, texts: list[str], reading: Reading | None) -> Source:
    place = f'data source {name!r}'
    if reading:
        conversations.check_columns(place, reading.kind, data.column_names, column)
    else:
        column = conversations.choose_column(place, column, texts, data.column_names)

    def rows() -> Iterator[Row]:
        found: Any = grain.MapDataset.source(data if reading else data.select_columns([column]))
        for number in range(len(found)):
            try:
                yield Row(f'{name}:{number}', str(number), found[number])
            except UnicodeDecodeError:
                yield Row(f'{name}:{number}', str(number), {}, 'not_utf8')

    def read(counts: Counts) -> Iterator[Any]:
        if reading:
            yield from conversations.read_rows(name, reading, rows(), counts, column=column)
            return
        for row in rows():
            counts.read += 1
            text = next(iter(row.value.values()), b'\xff')  # no UTF-8, which is counted where all are
            yield from record(name, row.key, text, counts, column=column or 'text')

    files = [Path(file['filename']) for file in data.cache_files]
    state: list[Any] = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    state += [len(data), column, *([reading.state] if reading else [])]
    return Source(name, state, read, kind=reading.kind if reading else 'text')


def _open(datasets: Any, address: Address) -> Any:
    """A dataset of the hub; the split of what save_to_disk wrote, where a single dataset is its own split, or train; or
    the files in a folder, which become Arrow files in our cache."""
    folder, config, split = address.folder, address.config, address.split or 'train'
    if not folder:
        return datasets.load_dataset(address.name, config, split=split)
    if not any((Path(folder) / name).exists() for name in ('state.json', 'dataset_dict.json')):
        if config and datasets.get_dataset_config_names(folder) == ['default']:
            config = None  # a copy of this config alone
        return datasets.load_dataset(folder, config, split=split, cache_dir=str(cache.cache_dir() / 'hf'))
    data = datasets.load_from_disk(folder)
    parts = data if isinstance(data, datasets.DatasetDict) else {str(data.split or 'train'): data}
    if split not in parts:
        raise ValueError(f'{folder} has no split {split!r}, it has {", ".join(parts)}')
    return parts[split]


def _library(name: str, *, offline: bool) -> Any:
    """The module `datasets`. Raises UsageError if it is not installed."""
    try:
        import datasets
        from datasets import config
        from huggingface_hub import constants
    except ImportError:
        raise UsageError(f'data source {name!r} is read by the package datasets: {install("hub")}') from None
    # Otherwise it retries for half a minute. The environment's HF_HUB_OFFLINE is read at its import alone.
    config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE or offline
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or offline
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _reachable() -> bool:
    """Tells whether the hub answers at all."""
    request = urllib.request.Request(os.environ.get('HF_ENDPOINT', _HUB), method='HEAD')
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS).close()
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)
    return True
