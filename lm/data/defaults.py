"""The default sources of conversations and pairs, built from the installed packages as TFDS data of JSON texts."""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lm.data import corpora, decline, operations, smalltalk, tfds
from lm.data.records import Chat, Counts, Kind, Pair, Source

# Part of the cache's key: raise it when the records that come out change.
RECIPE = 7


class _Default(NamedTuple):
    """`corpus` names the packages; `records` gives the fields of a record and counts what it leaves out."""

    kind: Kind
    corpus: str
    records: Callable[[Counts], Iterator[dict[str, Any]]]
    split: Callable[[Any, float], bool]


def _heldout(record: Chat | Pair, share: float) -> bool:
    """Held out by name or by prompt, once and for all: `share` is that of other sources."""
    return record['meta']['heldout']


DEFAULTS = {
    'operations': _Default('chat', 'botocore', lambda c: operations.chats(corpora.operations(), c), _heldout),
    'smalltalk': _Default('chat', 'chitchat', smalltalk.chats, smalltalk.heldout_chat),
    'programmatic': _Default('pairs', 'botocore', lambda c: operations.programmatic(corpora.operations(), c), _heldout),
    'ratings': _Default('pairs', 'chitchat', smalltalk.ratings, _heldout),
    'decline': _Default('pairs', 'botocore chitchat', lambda c: decline.decline(corpora.operations(), c), _heldout),
}


class _Records(corpora.Builder, skip_registration=True):
    """A default source: a record is the JSON text of its fields."""

    name = 'records'
    FIELDS = ('id', 'record')

    def __init__(self, tally: Counts, *, source: str, **kwargs: Any):
        self._source = source
        super().__init__(tally, **kwargs)

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for number, fields in enumerate(DEFAULTS[self._source].records(self._tally)):
            yield number, {'id': fields.pop('id'), 'record': json.dumps(fields)}


def open_default(name: str) -> Source:
    """The default source of this name. Raises UsageError if the package it is read from is not installed."""
    default = DEFAULTS[name]
    versions = [corpora.package_version(c) for c in default.corpus.split()]
    state = {'version': versions, 'recipe': [RECIPE, corpora.RECIPE]}

    def read(counts: Counts) -> Iterator[Chat | Pair]:
        directory, tally = corpora.prepare_with(name, state, functools.partial(_Records, source=name))
        # What the builder left out was never written, so it is counted from the builder's tally.
        counts.read += sum(tally.dropped.values())
        for reason, number in tally.dropped.items():
            counts.drop(reason, number=number)
        for example in tfds.examples(name, directory, 'train'):
            counts.read += 1
            yield _record(name, example['id'].decode(), json.loads(example['record']))

    return Source(name, state, read, kind=default.kind, split=default.split)


def _record(name: str, key: str, fields: dict[str, Any]) -> Chat | Pair:
    place = f'{name}:{key}'
    if 'messages' in fields:
        return Chat(id=key, source=name, bytes=_size(fields['messages']), place=place, **fields)
    size = _size(fields['prompt'] + fields['chosen'] + fields['rejected'])
    margin = fields.pop('margin', 0.0)
    return Pair(id=key, source=name, bytes=size, margin=margin, label=1.0, place=place, **fields)


def _size(messages: list[dict[str, str]]) -> int:
    return sum(len(m['content'].encode()) for m in messages)
