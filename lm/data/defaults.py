"""The default sources, built from the installed packages as TFDS data in array_record, which needs no TensorFlow."""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from lm import files
from lm.data import cache, corpora, decline, operations, smalltalk
from lm.data.records import Chat, Counts, Kind, Pair, Record, Source
from lm.data.tfds import examples, read_text

# Part of the cache's key: raise it when the conversations or pairs that come out change.
RECIPE = 7


class _Default(NamedTuple):
    """`corpus` names the packages; `records` gives the fields of a record and counts what it leaves out."""

    kind: Kind
    corpus: str
    records: Callable[[Counts], Iterator[dict[str, Any]]]
    split: Callable[[Any, float], bool] | None


def _heldout(record: Chat | Pair, share: float) -> bool:
    """Held out by name or by prompt, once and for all: `share` is that of other sources."""
    return record['meta']['heldout']


DEFAULTS = {
    'botocore': _Default('text', 'botocore', corpora.botocore_documents, None),
    'chitchat': _Default('text', 'chitchat', corpora.chitchat_documents, None),
    'operations': _Default('chat', 'botocore', lambda c: operations.chats(corpora.operations(), c), _heldout),
    'smalltalk': _Default('chat', 'chitchat', smalltalk.chats, smalltalk.heldout_chat),
    'programmatic': _Default('pairs', 'botocore', lambda c: operations.programmatic(corpora.operations(), c), _heldout),
    'ratings': _Default('pairs', 'chitchat', smalltalk.ratings, _heldout),
    'decline': _Default('pairs', 'botocore chitchat', lambda c: decline.decline(corpora.operations(), c), _heldout),
}


def open_default(name: str) -> Source:
    """The default source of this name. Raises UsageError if the package it is read from is not installed."""
    default = DEFAULTS[name]
    versions = [corpora.package_version(c) for c in default.corpus.split()]
    state: dict[str, Any] = {'version': versions, 'recipe': [RECIPE, corpora.RECIPE]}
    if default.kind == 'text':
        state = {'version': versions[0], 'recipe': corpora.RECIPE}

    def read(counts: Counts) -> Iterator[Record | Chat | Pair]:
        folder = cache.build('tfds', {'corpus': name} | state, functools.partial(_build, name))
        # What the builder left out was never written, so it is counted from the builder's tally.
        for reason, number in json.loads((folder / 'tally.json').read_text())['dropped'].items():
            counts.read += number
            counts.drop(reason, number=number)
        data = next(folder.glob('*/1.0.0'))
        if default.kind == 'text':
            yield from read_text(name, data, counts, 'train')
            return
        for example in examples(name, data, 'train'):
            counts.read += 1
            yield _record(name, example['id'].decode(), json.loads(example['record']))

    return Source(name, state, read, kind=default.kind, split=default.split)


def _build(name: str, directory: epath.Path) -> None:
    """Writes the data of a default source, and the tally of what it leaves out."""
    tally, default = Counts(), DEFAULTS[name]
    if default.kind == 'text':
        fields = ('id', 'source', 'text', 'meta')
        texts = ({**r, 'source': name, 'meta': json.dumps(r['meta'])} for r in default.records(tally))
    else:
        name, fields = 'records', ('id', 'record')
        texts = ({'id': r.pop('id'), 'record': json.dumps(r)} for r in default.records(tally))
    builder = Builder(name, fields, texts, data_dir=directory, file_format='array_record')
    tfds.disable_progress_bar()
    # TFDS prints that it downloads, which it does not: it is told not to ask its bucket for prepared data either.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    files.write_json(directory / 'tally.json', {'read': tally.read, 'dropped': tally.dropped})


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Data of texts, each under one of `fields`, with one split, `train`."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, name: str, fields: tuple[str, ...], examples: Iterable[dict[str, str]], **kwargs: Any):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue] (TFDS's own AdhocBuilder does so)
        self._fields, self._examples = fields, examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in self._fields})
        # Kept in the order of generation: preparation shuffles by content, so a second shuffle here buys nothing.
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        return {'train': self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(self._examples)


def _record(name: str, key: str, fields: dict[str, Any]) -> Chat | Pair:
    place = f'{name}:{key}'
    if 'messages' in fields:
        return Chat(id=key, source=name, bytes=_size(fields['messages']), place=place, **fields)
    size = _size(fields['prompt'] + fields['chosen'] + fields['rejected'])
    margin = fields.pop('margin', 0.0)
    return Pair(id=key, source=name, bytes=size, margin=margin, label=1.0, place=place, **fields)


def _size(messages: list[dict[str, str]]) -> int:
    return sum(len(m['content'].encode()) for m in messages)
