"""From a mixture to stores: read, deduplicate, split, train the tokenizer, encode. Done once, then cached.

A `Form` says what becomes of the records of a kind: documents of text here, conversations and pairs in modules of their
own.

A document is a duplicate by its exact text, in any source; the first source of the mixture keeps it. What was seen is
held in memory, about 100 bytes a document; the text itself goes through disk. Whether a document is held out depends
on its text alone, so it never moves when others come or go, except where so few come that a part would be empty. Of a
text among so few, one file for example, the end is held out.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from etils import epath

from lm import files
from lm import progress as shown
from lm.data import cache
from lm.data.chat_layout import refusal
from lm.data.heldout import cut_tail, is_heldout
from lm.data.records import Counts, Kind, Source, content, split_content
from lm.data.sources import open_source, parse_mixture
from lm.data.store import Spool, TokenStore, checksums_of, digest, write_store
from lm.data.tokenizer import Tokenizer, train_tokenizer
from lm.errors import UsageError

# Part of the cache's key: raise it when the stores that come out change.
RECIPE = 3
FAR_FROM_SHARE = 5  # times more or less of the bytes than was asked for: whole texts are then too coarse to hold out
LEAST_HELDOUT = 1000  # bytes that are worth measuring, or a tenth of what there is if that is less
_UNPAIRED = 'single answers with a label are learned by stage=dpo with loss=kto; other losses want pairs'
TOKENIZER_SAMPLE_BYTES = 16_000_000
TAIL = 'tail_held_out'  # in the counts of a source: the end of a text is held out


class Form(NamedTuple):
    """The form in which the records of a kind are kept.

    Attributes:
      key: JSON-able, what a store depends on besides its records and the tokenizer.
      write: (directory, contents of records as `records.content` has them, tokenizer, counts) -> tokens written.
      open: (directory, vocab_size=, pad_id=, checksums=) -> the store; raises OSError or ValueError if it is damaged.
      files: the names of a store's files.
      check: (record, tokenizer) -> the keys of messages that nothing is made of; raises UsageError if the record cannot
        be written.
    """

    kind: Kind
    key: Any
    write: Callable[[epath.Path, Iterator[bytes], Tokenizer, Counts], int]
    open: Callable[..., Any]
    files: tuple[str, ...]
    check: Callable[[Any, Tokenizer], Iterable[str]] = lambda record, tokenizer: ()


def _write_text(directory: epath.Path, contents: Iterator[bytes], tokenizer: Tokenizer, counts: Counts) -> int:
    del counts
    return write_store(directory, (c.decode() for c in contents), tokenizer)


TEXT = Form('text', None, _write_text, TokenStore.open, ('tokens.bin', 'offsets.npy'))


@dataclass(frozen=True)
class PreparedSource:
    """A source ready to train on. `weight` is its share of the rows; `counts` what became of its records; `content` a
    digest of them. `train` and `heldout` are stores of the form that was asked for."""

    name: str
    weight: float
    train: Any = field(repr=False)
    heldout: Any = field(repr=False)
    counts: dict[str, Any]
    content: str = ''


@dataclass(frozen=True)
class Prepared:
    """All that a run needs of its data. Weights sum to 1; `fingerprint` changes with any document, id or weight."""

    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]
    fingerprint: str


@dataclass
class _Split:
    """One source's documents between reading and encoding."""

    name: str
    counts: Counts
    train: Spool
    heldout: Spool


def prepare(
    *,
    mixture: str,
    vocab_size: int,
    tokenizer: str | None,
    heldout: float,
    progress: Callable[[str], None],
    form: Form = TEXT,
    strict: bool = False,
    unpaired: bool = False,
) -> Prepared:
    """Prepares a mixture, or finds it in the cache.

    Args:
      vocab_size: rows of the model's tables; a tokenizer may have fewer ids.
      tokenizer: a directory with one, or None to train one of `vocab_size` on a mixture of text.
      heldout: the share of records held out, where a source has no split of its own.
      progress: is told each step, and the first malformed records.
      strict: a malformed record is an error and not only counted.
      unpaired: of pairs, single answers are let through.

    Raises UsageError for missing, empty or too little data.
    """
    parts = parse_mixture(mixture)
    if not 0 < heldout < 1:
        raise UsageError(f'data.heldout={heldout} is no share of the documents: give a number between 0 and 1')
    sources = [open_source(name, form.kind, strict=strict, unpaired=unpaired) for name, _ in parts]
    weights = [weight for _, weight in parts]
    existing = _load_tokenizer(tokenizer, vocab_size)
    key = {
        'recipe': RECIPE,
        'sources': [[source.name, source.state] for source in sources],
        # Weights choose what the tokenizer is trained on, and nothing else of what is written.
        'tokenizer': existing.fingerprint if existing else [vocab_size, weights],
        'heldout': heldout,
    }
    key |= {} if form.key is None else {'form': form.key}
    # Those who trained this very tokenizer on this mixture have encoded it too.
    trained = cache.find('prepared', key | {'tokenizer': [existing.vocab_size, weights]}) if existing else None
    if trained and Tokenizer.load(trained / 'tokenizer').fingerprint == key['tokenizer']:
        directory = trained
    else:
        new = _Preparation(sources, weights, vocab_size, existing, heldout, progress, form, strict)
        directory = cache.build('prepared', key, new.write)
    try:
        prepared = _open(directory, weights, form)
        malformed = [problem for s in prepared.sources for problem in s.counts['named']] if strict else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UsageError) as e:
        raise UsageError(f'the prepared data in {directory} is damaged ({e}): delete that folder') from e
    if malformed:  # left out when it was prepared, before anybody was strict
        raise UsageError(f'{malformed[0]}: repair it, or set data.strict=false to leave it out')
    return prepared


def _load_tokenizer(directory: str | None, vocab_size: int) -> Tokenizer | None:
    if directory is None:
        return None
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > vocab_size:  # fewer are usual: the rows of many models are padded
        raise UsageError(
            f'the tokenizer in {directory} has {tokenizer.vocab_size} ids and the model {vocab_size} rows: set '
            f'--config.model.vocab_size={tokenizer.vocab_size}, or name a tokenizer that fits'
        )
    return tokenizer


def _open(directory: epath.Path, weights: Sequence[float | None], form: Form) -> Prepared:
    """Raises one of several errors if a file in it is damaged: all are a cache's, which can be made again."""
    index = json.loads((directory / 'prepared.json').read_bytes())
    if index.pop('fingerprint') != cache.fingerprint(index):
        raise ValueError('prepared.json has changed')
    tokenizer = Tokenizer.load(directory / 'tokenizer')
    if tokenizer.fingerprint != index['content'][0]:
        raise ValueError('the tokenizer has changed')
    shares = _shares(weights, [source['counts']['train_tokens'] for source in index['sources']])

    def store(number: int, split: str) -> Any:
        options = {'vocab_size': tokenizer.vocab_size, 'pad_id': tokenizer.pad_id}
        checksums = index['sources'][number]['checksums'][split]
        return form.open(directory / f'{number}' / split, checksums=checksums, **options)

    sources = tuple(
        PreparedSource(s['name'], share, store(n, 'train'), store(n, 'heldout'), s['counts'], s['content'])
        for n, (s, share) in enumerate(zip(index['sources'], shares, strict=True))
    )
    # How the records are kept (the chat template, the sides of a pair) is in no digest of what they are.
    made_of = [index['content'], shares, *([] if form.key is None else [form.key])]
    return Prepared(tokenizer, sources, cache.fingerprint(made_of))


def _shares(weights: Sequence[float | None], sizes: Sequence[int]) -> list[float]:
    """The weights normalised; the sizes normalised where there are none."""
    numbers = [size if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]
    return [number / sum(numbers) for number in numbers]


@dataclass(frozen=True)
class _Preparation:
    """The work on a mixture that is not in the cache; its attributes are as `prepare` has them."""

    sources: Sequence[Source]
    weights: Sequence[float | None]
    vocab_size: int
    existing: Tokenizer | None
    heldout: float
    progress: Callable[[str], None]
    form: Form
    strict: bool

    def write(self, directory: epath.Path) -> None:
        for source in self.sources:
            source.check()
        seen: set[bytes] = set()
        spool = directory / 'spool'
        splits = [self._read(spool / f'{n}', source, seen) for n, source in enumerate(self.sources)]
        tokenizer = self.existing or self._train(splits)
        tokenizer.save(directory / 'tokenizer')
        described = [self._encode(directory / f'{n}', split, tokenizer) for n, split in enumerate(splits)]
        shutil.rmtree(spool)
        content = [tokenizer.fingerprint, [[s['name'], s['content']] for s in described]]
        index = {'content': content, 'sources': described}
        files.write_json(directory / 'prepared.json', index | {'fingerprint': cache.fingerprint(index)})

    def _read(self, spool: epath.Path, source: Source, seen: set[bytes]) -> _Split:
        """Reads a source into two spools, without what `seen` holds or what is not accepted.

        Raises UsageError for fewer than two documents.
        """
        self.progress(f'reading {source.name}')
        split = _Split(source.name, Counts(), Spool(spool / 'train'), Spool(spool / 'heldout'))
        decide = source.split or (lambda record, share: is_heldout(digest(split_content(record)), share))
        for record in shown.over(source.read(split.counts), f'reading {source.name}'):
            data = content(record)
            content_digest = digest(data)
            if content_digest in seen:
                split.counts.drop('duplicate')
                continue
            seen.add(content_digest)
            if self._accepts(record, split.counts):
                (split.heldout if decide(record, self.heldout) else split.train).add(data, content_digest)
        for problem in split.counts.named:
            self.progress(f'left out: {problem}')
        for key, (number, first) in sorted(split.counts.unused.items()):
            self.progress(f'not used: {key} of {number:,} records, the first of them {first}')
        total = split.train.documents + split.heldout.documents
        if not total:
            raise UsageError(_no_documents(split))
        _fill_empty_part(split)
        if source.kind == 'text' and not source.split:
            _check_share(split, self.heldout, spool / 'tail')
        elif total == 1:
            one = 'document' if source.kind == 'text' else 'record'
            raise UsageError(
                f'data source {split.name!r} has one {one}{_told_of_duplicates(split)}, and training and held-out data '
                'need one each: add more'
            )
        return split

    def _accepts(self, record: Any, counts: Counts) -> bool:
        """Tells whether a record can be written; counts it, and names it, if it cannot.

        Raises UsageError for one that cannot if `strict`.
        """
        try:
            unused = self.form.check(record, self.existing) if self.existing else ()
        except UsageError as error:
            problem = f'{record["place"]}: {error}'
            if self.strict:
                raise UsageError(f'{problem}: leave it out, or set data.strict=false') from None
            counts.drop(refusal(error), problem)
            return False
        for key in unused:
            counts.leave_unused(key, record['place'])
        return True

    def _train(self, splits: Sequence[_Split]) -> Tokenizer:
        self.progress(f'training a tokenizer of {self.vocab_size}')
        shares = _shares(self.weights, [split.train.bytes for split in splits])
        # The largest sample in the mixture's proportions that no source runs out of, within the budget.
        total = min(TOKENIZER_SAMPLE_BYTES, *(s.train.bytes / share for s, share in zip(splits, shares, strict=True)))
        texts = (text for s, share in zip(splits, shares, strict=True) for text in _sample(s.train, share * total))
        with shown.task(f'training a tokenizer of {self.vocab_size}'):
            return train_tokenizer(texts, vocab_size=self.vocab_size)

    def _encode(self, directory: epath.Path, split: _Split, tokenizer: Tokenizer) -> dict[str, Any]:
        """Writes the two stores of a source; returns its entry of prepared.json."""
        self.progress(f'encoding {split.name}')
        counts: dict[str, Any] = {}
        checksums = {}
        hashed = hashlib.blake2b(digest_size=16)
        for name, spool in (('train', split.train), ('heldout', split.heldout)):
            before = sum(split.counts.dropped.values())
            with shown.task(f'encoding {split.name}', spool.documents) as task:
                contents = _hashing(spool, hashed.update, task)
                counts[f'{name}_tokens'] = self.form.write(directory / name, contents, tokenizer, split.counts)
            refused = sum(split.counts.dropped.values()) - before  # by the form
            counts[f'{name}_documents'] = spool.documents - refused
            counts[f'{name}_bytes'] = spool.bytes
            hashed.update(name.encode())
            checksums[name] = checksums_of(directory / name, self.form.files)
        kept = counts['train_documents'] + counts['heldout_documents'] - split.counts.changed.get(TAIL, 0)
        counts |= asdict(split.counts) | {'kept': kept}
        return {'name': split.name, 'counts': counts, 'content': hashed.hexdigest(), 'checksums': checksums}


def _no_documents(split: _Split) -> str:
    """A sentence on a source without documents, with the first record that was left out, if it is known."""
    dropped = ', '.join(f'{reason} {n}' for reason, n in sorted(split.counts.dropped.items()))
    todo = _UNPAIRED if set(split.counts.dropped) == {'unpaired'} else 'name other data'
    why = f'read {split.counts.read}; dropped: {dropped or "none"}'
    return f'data source {split.name!r} has no documents ({why}): {next(iter(split.counts.named), todo)}'


def _told_of_duplicates(split: _Split) -> str:
    """The middle of a sentence on a source with too little: how much of it was there twice."""
    twice = split.counts.dropped.get('duplicate', 0)
    return f' ({twice} of {split.counts.read} read were duplicates)' if twice else ''


def _fill_empty_part(split: _Split) -> None:
    """Gives a part without documents the one nearest to it, the first that another share would have put there."""
    for empty, full, nearest in ((split.heldout, split.train, min), (split.train, split.heldout, max)):
        if not empty.documents and full.documents > 1:
            content_digest, content = full.pop(nearest)
            empty.add(content, content_digest)


def _check_share(split: _Split, share: float, spool: epath.Path) -> None:
    """Holds out the end of the longest text where whole ones would be far more or less than a share of the bytes.

    Raises UsageError for one text that is too short for it.
    """
    whole = split.train.bytes + split.heldout.bytes
    wanted = max(share * whole, min(LEAST_HELDOUT, whole / 10))
    near = wanted / FAR_FROM_SHARE <= split.heldout.bytes <= wanted * FAR_FROM_SHARE
    if split.train.documents and split.heldout.documents and near:
        return
    for content_digest, data in split.heldout.read():
        split.train.add(data, content_digest)
    split.heldout = Spool(spool)
    _, data = split.train.pop(lambda found: max(found, key=lambda document: len(document[1])))
    parts = cut_tail(data, wanted)
    if parts is None:
        raise UsageError(
            f'data source {split.name!r}: the longest text has {len(data)} bytes, too short to hold out its end'
            f'{_told_of_duplicates(split)}: add more'
        )
    for part_spool, part in zip((split.train, split.heldout), parts, strict=True):
        part_spool.add(part, digest(part))
    split.counts.change(TAIL)


def _sample(spool: Spool, size: float) -> Iterator[str]:
    """The first texts of a shuffled spool, up to `size` bytes: a random sample, and always the same."""
    taken = 0
    for _, data in spool.read():
        if taken >= size:
            return
        taken += len(data)
        yield data[:TOKENIZER_SAMPLE_BYTES].decode(errors='ignore')  # a book may be more than the whole sample


def _hashing(spool: Spool, update: Callable[[bytes], None], task: shown.Task) -> Iterator[bytes]:
    for content_digest, data in spool.read():
        update(content_digest)
        yield data
        task.advance()
