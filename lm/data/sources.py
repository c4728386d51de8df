"""Sources of data: the default sources, named datasets, files, TFDS data prepared here, Hugging Face datasets.

A mixture is one string: 'botocore:0.7,chitchat:0.3', 'notes/*.txt', 'mine.jsonl#body:2,tfds:wiki40b/en:1'. Each of its
names opens a `Source`, which gives records and counts what it read and what it dropped, by reason:

    NAME                            a default source, or a line of the table in lm/data/mixtures.py
    PATH[#COLUMN]                   files, patterns and folders of text, JSON, .csv, .parquet: lm/data/record_files.py
    tfds:NAME[@SPLIT][#COLUMN]      prepared in array_record
    hf:NAME[@SPLIT][#COLUMN]        see lm/data/hub.py
    gym:NAME[(KEY=VALUE,…)]         a set of reasoning-gym, see lm/data/gym.py

The same addresses hold text, conversations ('chat') and pairs of answers ('pairs'); the fields of the latter two are in
lm/data/conversations.py.
"""

import codecs
import difflib
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.data import conversations, gym, hub, mixtures, parquet, record_files, tfds
from lm.data.conversations import Reading, Row
from lm.data.records import Counts, Kind, Record, Source, record
from lm.errors import UsageError

# Weights are rounded to multiples of 1/PERIOD, and the mixture is exact over every PERIOD rows.
PERIOD = 1 << 14
DEFAULTS: dict[Kind, tuple[str, ...]] = {
    'text': ('botocore', 'chitchat'),
    'chat': ('operations', 'smalltalk'),
    'pairs': ('programmatic', 'ratings', 'decline'),
}
_KIND_OF: dict[str, Kind] = {name: kind for kind, names in DEFAULTS.items() for name in names}
_KIND_OF |= {name: named.kind for name, named in mixtures.NAMED.items()}
TABLES = ('.parquet', '.json', *record_files.LINES, *record_files.TABLES)
_NUMBER = re.compile(r'[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:inf(?:inity)?|nan)', re.IGNORECASE)
_HUB_NAME = re.compile(
    r'(?:https?://huggingface\.co/)?(?:datasets/)?(?P<name>[\w-][\w.-]*/[\w.-]*\w(?:/[\w.-]+)?(?:@[\w\[:%\]]+)?)/?'
)
# The parts of a mixture; commas within the brackets of gym: are no ends of one.
_PART = re.compile(r'\s*gym:\w+\([^()]*\)[^,]*|[^,]+')
# Beyond these, shares of a sum overflow or vanish.
_LIGHTEST, _HEAVIEST = 1e-9, 1e9


def parse_mixture(text: str) -> tuple[tuple[str, float | None], ...]:
    """('name', weight or None) of each source of 'a:0.7,b:0.3'.

    Raises UsageError unless all or none are weighted, and each weight is worth a row in PERIOD.
    """
    parts = tuple(_parse_part(part.strip()) for part in _PART.findall(text) if part.strip())
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
    if part in ('hf:', 'tfds:', 'gym:'):
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


def has_default(mixture: str) -> bool:
    """Tells whether a default source is in a mixture."""
    return any(name in names for name, _ in parse_mixture(mixture) for names in DEFAULTS.values())


def open_source(name: str, kind: Kind = 'text', *, strict: bool = False, unpaired: bool = False) -> Source:
    """The source that a mixture calls `name`, of text, of conversations ('chat') or of pairs of answers ('pairs').

    `strict`: the first malformed conversation or pair is a UsageError, where it is read. `unpaired`: single answers,
    good or bad, are let through as pairs with an empty side. Raises UsageError, in one line, if there is no such thing,
    or it is of another kind.
    """
    reading = None if kind == 'text' else Reading(kind, strict, unpaired)
    if (found := _KIND_OF.get(name)) and found != kind:
        what = {'text': 'text', 'chat': 'conversations', 'pairs': 'pairs of answers'}
        raise UsageError(
            f'data source {name!r} holds {what[found]}, not {what[kind]}: name one of '
            f'{", ".join(_known(kind))}, or your own files{conversations.belongs(found)}'
        )
    if name in DEFAULTS[kind]:
        # TensorFlow Datasets takes a while to import, and other sources need none of it.
        from lm.data import defaults

        return defaults.open_default(name)
    address, copy = name, None
    if name in mixtures.NAMED:
        address, copy = mixtures.NAMED[name].source, mixtures.local_copy(name)
    if gym.is_gym(address):
        return gym.open_set(name, kind)
    if address.startswith('tfds:'):
        return tfds.open_prepared(name, address, reading, copy)
    if address.startswith('hf:'):
        return hub.open_dataset(name, hub.parse(address, copy), reading)
    return _open_files(name, kind, reading)


def _known(kind: Kind) -> list[str]:
    return [name for name, its_kind in _KIND_OF.items() if its_kind == kind]


def _split_column(name: str) -> tuple[str, str | None]:
    """'PATH#COLUMN' -> (PATH, COLUMN), 'PATH' -> (PATH, None). A file's own name may have a # in it."""
    path, mark, column = name.rpartition('#')
    if not mark or '/' in column or os.path.exists(os.path.expanduser(name)):
        return name, None
    if not path or not column:
        raise UsageError(f'data source {name!r}: write PATH#COLUMN')
    return path, column


# --- files ---------------------------------------------------------------------------------------------------------


def _find_files(name: str, path: str, column: str | None, kind: Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the files of a path, a pattern or a folder, sorted; those of a folder that cannot be read as this kind)."""
    path, left_out = os.path.expanduser(path), []
    if os.path.isdir(path):
        below, only_tables = list(_walk(path)), kind != 'text' or column
        is_table = lambda p: record_files.plain_name(p).endswith(TABLES)
        found = [p for p in below if _is_file(p) and (is_table(p) or not only_tables)]
        left_out = sorted(set(below) - set(found))
        problem = 'holds no file' + (f' that ends with {" ".join(TABLES)}' if only_tables else '')
    elif os.path.exists(path):
        found, problem = [path], ''
    elif any(c in path for c in '*?['):
        found, problem = glob.glob(path, recursive=True), 'matches no file'
    else:
        found, problem = [], _unknown(name, kind)
    found = sorted(p for p in found if os.path.isfile(p))
    if not found:
        raise UsageError(f'data source {name!r} {problem or "is not a file"}')
    return tuple(found), tuple(left_out)


def _unknown(name: str, kind: Kind) -> str:
    if '/' in name or '.' in name:
        files = '.jsonl, .csv, .parquet or text file' if kind == 'text' else '.jsonl, .csv or .parquet file'
        of_hub = _HUB_NAME.fullmatch(name)
        hint = f'; hf:{of_hub["name"]} names a dataset of the Hugging Face hub' if of_hub else ''
        return f'does not exist: give a {files}, a directory or a pattern{hint}'
    known = _known(kind)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean {nearest[0]!r}?' if nearest else 'give a path, tfds:NAME or hf:NAME;'
    colon = ' and a weight is a number after a colon;' if ':' in name else ''
    return f'is unknown ({hint}{colon} known: {", ".join(known)})'


def _state_of(name: str, paths: tuple[str, ...]) -> list[list[Any]]:
    """Stands for the files' content, as for make, by size and time of change: hashing terabytes at each start would not
    do. Raises UsageError if one cannot be read."""
    if closed := [p for p in paths if not os.access(p, os.R_OK)]:
        raise UsageError(f'data source {name!r}: {closed[0]} cannot be read: change its permissions')
    return [[os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in paths]


def _open_files(name: str, kind: Kind, reading: Reading | None) -> Source:
    """Files of text or of records; in a folder what is neither is counted and left out."""
    place, column = _split_column(name)
    paths, left_out = _find_files(name, place, column, kind)
    state = _state_of(name, paths)
    if plain := [p for p in paths if (reading or column) and record_files.is_named_text(p)]:
        raise _no_records(name, plain[0], column, reading)
    if column and kind == 'pairs':
        conversations.check_columns(f'data source {name!r}', kind, [], column)
    inside = not reading and os.path.isdir(os.path.expanduser(place))

    def read(counts: Counts) -> Iterator[Any]:
        for path in left_out:
            _leave_out(path, counts)
        if reading:
            rows = (row for path in paths for row in _rows(path))
            yield from conversations.read_rows(name, reading, rows, counts, column=column)
            return
        for path in paths:
            form = _format(path, inside)
            if form is None:
                _leave_out(path, counts)
            elif form == 'text':
                counts.read += 1
                yield from record(name, path, record_files.read_whole(path), counts)
            else:
                yield from _read_texts(name, path, form, counts, column)

    def check() -> None:
        for path in paths:
            form = record_files.format_of(path) if reading else _format(path, inside)
            if form == 'text' and (reading or column):
                raise _no_records(name, path, column, reading)
            if not reading:
                _text_column(path, form, column)
            elif form in _COLUMNS:
                conversations.check_columns(path, kind, _COLUMNS[form](path), column)

    return Source(name, [*state, reading.state] if reading else state, read, check, kind)


_COLUMNS = {'parquet': parquet.columns_of, 'csv': record_files.csv_columns}


def _no_records(name: str, path: str, column: str | None, reading: Reading | None) -> UsageError:
    why = f'no table or JSON of records{conversations.belongs("text")}' if reading else f'has no column {column!r}'
    return UsageError(f'data source {name!r}: {path} is plain text{"," if reading else ""} and {why}')


def _leave_out(path: str, counts: Counts) -> None:
    counts.read += 1
    counts.drop(_kind_of_path(path))


def _format(path: str, inside: bool) -> record_files.Format | None:
    """The format of a file, None for neither text nor records. Raises UsageError for a file of another kind that was
    named, and not found in a folder."""
    try:
        form = record_files.format_of(path)
    except UsageError:
        if inside:
            return None
        raise
    return None if form == 'text' and _is_binary(path) else form


def _text_column(path: str, form: record_files.Format | None, wanted: str | None) -> str:
    """The column of a file that holds its documents. Raises UsageError if a table has none."""
    if form == 'parquet':
        return parquet.text_column(path, wanted)
    columns = record_files.csv_columns(path) if form == 'csv' else [wanted or 'text']
    return conversations.choose_column(path, wanted, columns, columns)


def _read_texts(
    name: str, path: str, form: record_files.Format, counts: Counts, wanted: str | None
) -> Iterator[Record]:
    column = _text_column(path, form, wanted)
    for number, value, reason in record_files.read_rows(path, form, [column]):
        counts.read += 1
        text = value.get(column)
        if reason or text is None:
            problem = f'{path}:{number}: {_no_text(form, value, column, reason)}'
            counts.drop(reason or f'no_{column}', None if form == 'parquet' else problem)
            continue
        del value[column]
        key = value.pop('id', f'{os.path.basename(path)}:{number}')
        yield from record(name, str(key), text, counts, column=column, meta=None if form == 'parquet' else value)


def _no_text(form: record_files.Format, value: dict[str, Any], column: str, reason: str | None) -> str:
    if reason is None:
        return conversations.without_text(value, column)
    return 'is no row of the table' if form == 'csv' else conversations.PROBLEMS[reason]


def _rows(path: str) -> Iterator[Row]:
    for number, value, problem in record_files.read_rows(path, record_files.format_of(path)):
        yield Row(f'{path}:{number}', f'{os.path.basename(path)}:{number}', value, problem)


# --- folders ------------------------------------------------------------------------------------------------------


def _walk(folder: str) -> Iterator[str]:
    """Yields the files below a folder, sorted, and, as one path each, folders that are not entered: those that are
    hidden (.git), links, or closed to us."""
    closed: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=closed.append):
        apart = {name for name in folders if name.startswith('.') or os.path.islink(os.path.join(root, name))}
        folders[:] = sorted(set(folders) - apart)
        yield from (os.path.join(root, name) for name in sorted([*names, *apart]))
    yield from (error.filename for error in closed)


def _is_file(path: str) -> bool:
    """Tells whether a path of a folder is a file to be read: it exists, and is not hidden."""
    return not os.path.basename(path).startswith('.') and os.path.isfile(path)


def _is_binary(path: str) -> bool:
    """Tells whether a file, unpacked, is no text: NULs that are not UTF-16's, or no UTF-8 in a file that is not called
    text."""
    begins = record_files.begin_of(path)
    if record_files.encoding_of(begins)[0] != 'utf-8':
        return False
    try:
        codecs.getincrementaldecoder('utf-8')().decode(begins)  # its last character may be cut
    except UnicodeDecodeError:
        return not record_files.is_named_text(path)
    return b'\0' in begins


def _kind_of_path(path: str) -> str:
    """The kind of a path, under which it is counted where it is left out: '.png', 'hidden'."""
    if os.path.basename(path).startswith('.'):
        return 'hidden'
    if os.path.isdir(path):
        return 'linked folder' if os.path.islink(path) else 'closed folder'
    if not os.path.isfile(path):
        return 'dangling link' if os.path.islink(path) else 'no file'
    return Path(path).suffix.lower() or 'without suffix'
