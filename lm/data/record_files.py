"""Files of records and of text: what is in them is told by how they begin, and by their names where that says nothing.

    JSON Lines, whatever the file is called; a JSON list, or objects one after the other, as .json files have them;
    .csv and .tsv with a header; parquet; else plain text. Each but parquet may be compressed (gzip, zstd, bzip2, xz),
    and in UTF-8, UTF-16 or UTF-32, with a byte order mark or, for UTF-16, without.

Lines that are not UTF-8 are found one by one, so that each spoils itself alone.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import IO, Any, Literal

from lm.data import parquet
from lm.errors import UsageError

Format = Literal['parquet', 'lines', 'json', 'csv', 'text']
_BEGIN = 1 << 16  # bytes by which a file is judged
_FOREIGN = {
    b'PK\x03\x04': 'a zip archive: unpack it', b'ARROW1': 'an Arrow file: name its folder as hf:FOLDER',
    b'%PDF-': 'a PDF: extract its text', b'\x89PNG': 'an image', b'\xff\xd8\xff': 'an image', b'GIF8': 'an image',
    b'7z\xbc\xaf': 'a 7z archive: unpack it', b'SQLite format 3\x00': 'a database', b'\x89HDF': 'an HDF5 file',
}  # fmt: skip
_PACKED = ('.gz', '.gzip', '.zst', '.zstd', '.bz2', '.xz')
LINES, TABLES = ('.jsonl', '.ndjson', '.jsonlines'), ('.csv', '.tsv')
# The longest first: UTF-32 begins as UTF-16 does.
_MARKS = {
    codecs.BOM_UTF32_LE: 'utf-32-le', codecs.BOM_UTF32_BE: 'utf-32-be', codecs.BOM_UTF8: 'utf-8',
    codecs.BOM_UTF16_LE: 'utf-16-le', codecs.BOM_UTF16_BE: 'utf-16-be',
}  # fmt: skip
_ZEROS = 0.3  # of a text in UTF-16 so many bytes are 0, all on one side
Line = tuple[int, dict[str, Any], str | None]  # its number, the object, why there is none


def plain_name(path: str) -> str:
    """A file's name in small letters, without what says how it is compressed."""
    name = path.lower()
    return next((name.removesuffix(end) for end in _PACKED if name.endswith(end)), name)


def is_named_text(path: str) -> bool:
    """Tells whether a file is text by its name, whatever it looks like."""
    return plain_name(path).endswith(('.txt', '.md'))


def format_of(path: str) -> Format:
    """The format of a file. Raises UsageError if it is none of these, or cannot be unpacked."""
    name, begin = plain_name(path), begin_of(path)
    if begin.startswith(b'PAR1') or name.endswith('.parquet'):
        return 'parquet'
    if foreign := next((what for magic, what in _FOREIGN.items() if begin.startswith(magic)), None):
        raise UsageError(f'{path} is {foreign}')
    if name.endswith(TABLES):
        return 'csv'
    if is_named_text(path):
        return 'text'
    return _json_format(name, _decoded(begin))


def _json_format(name: str, begin: str) -> Format:
    """The format of a file by its first line that is not blank: a whole object makes it lines of objects."""
    text = begin.lstrip()
    line, newline, _ = text.partition('\n')
    value = _value(line)
    if isinstance(value, dict):
        return 'lines'
    if name.endswith('.json'):
        return 'json'
    if not name.endswith(LINES):
        return 'text'
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value) and not _is_conversation(value)
    cut = not newline and len(begin) > 1 and text.startswith('[')  # a list on one long line
    return 'json' if is_list or cut or line.strip() in ('{', '[') else 'lines'


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- bytes and characters ----


def begin_of(path: str) -> bytes:
    """The bytes by which a file is judged, unpacked."""
    with opened(path) as file:
        return file.read(_BEGIN)


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked; reading what is damaged raises UsageError."""
    with open(path, 'rb') as file:
        begin = file.read(6)
        file.seek(0)
        unpack = next((unpack for magic, unpack in _UNPACK.items() if begin.startswith(magic)), None)
        yield io.BufferedReader(_Unpacked(path, unpack(file)), _BEGIN) if unpack else file


def _chunks(unpack: Callable[[Any], Any]) -> Callable[[IO[bytes]], Iterator[bytes]]:
    """A function that unpacks a file as a module of the standard library does."""
    return lambda file: iter(partial(unpack(file).read1, _BEGIN), b'')


def _unpack_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Unpacks any number of frames. The package's own reader takes a file that is cut off for a whole one."""
    import zstandard  # few files are packed so

    unpacker, frame = zstandard.ZstdDecompressor(), None
    while packed := file.read(_BEGIN):
        while packed:
            frame = frame or unpacker.decompressobj()
            if unpacked := frame.decompress(packed):
                yield unpacked
            packed = frame.unused_data if frame.eof else b''
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError('the file ended before its last frame did')


_UNPACK = {
    b'\x1f\x8b': _chunks(gzip.open), b'\x28\xb5\x2f\xfd': _unpack_zstd, b'BZh': _chunks(bz2.open),
    b'\xfd7zXZ\x00': _chunks(lzma.open),
}  # fmt: skip


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file, of which damage is one line with its name."""

    def __init__(self, path: str, chunks: Iterator[bytes]):
        self._path, self._chunks, self._ready = path, chunks, b''

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            self._ready = self._ready or next(self._chunks, b'')
        except Exception as e:  # each library has errors of its own
            reason = ' '.join(str(e).split())[:200] or type(e).__name__
            raise UsageError(f'{self._path} is damaged ({reason}): restore it or leave it out') from e
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def encoding_of(begin: bytes) -> tuple[str, int]:
    """(how a file's characters are written, how many bytes of a mark come first), by the byte order mark that it begins
    with, or by the zeros of UTF-16 in it; else UTF-8."""
    for mark, name in _MARKS.items():
        if begin.startswith(mark):
            return name, len(mark)
    even, odd = (begin[side::2].count(0) / max(1, len(begin) // 2) for side in (0, 1))
    if odd > _ZEROS > 10 * even:
        return 'utf-16-le', 0
    return ('utf-16-be' if even > _ZEROS > 10 * odd else 'utf-8'), 0


def _decoded(begin: bytes) -> str:
    encoding, skip = encoding_of(begin)
    return begin[skip:].decode(encoding, errors='ignore')


def read_whole(path: str) -> bytes:
    """A text file in UTF-8 without a mark; bytes that are not what they should be as they are."""
    with opened(path) as file:
        data = file.read()
    encoding, skip = encoding_of(data[:_BEGIN])
    try:
        return data[skip:] if encoding == 'utf-8' else data[skip:].decode(encoding).encode()
    except UnicodeError:
        return data


@contextlib.contextmanager
def _after_mark(path: str) -> Iterator[tuple[IO[bytes], str]]:
    """(a file's bytes after its mark, how its characters are written)."""
    encoding, skip = encoding_of(begin_of(path))
    with opened(path) as file:
        file.read(skip)
        yield file, encoding


def lines_of(path: str) -> Iterator[tuple[int, bytes]]:
    """(number, line in UTF-8) of each line of a file that is not blank; the mark is not part of the first."""
    with _after_mark(path) as (file, encoding):
        lines: Iterable[bytes] = file
        if encoding != 'utf-8':
            text = io.TextIOWrapper(file, encoding, errors='replace', newline='\n')
            lines = (line.encode(errors='replace') for line in text)
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


# ---- rows ----


def read_rows(path: str, form: Format, columns: Sequence[str] | None = None) -> Iterator[Line]:
    """(number, the object, why there is none or None) of each row of a file of lines, JSON or a table: a line's number
    in the file, else the row's.

    Args:
      columns: of a parquet file, those that are read; None: all.
    """
    if form == 'parquet':
        rows = enumerate(parquet.read_rows(path, columns))
        return ((number, row or {}, 'not_utf8' if row is None else None) for number, row in rows)
    return {'lines': _line_rows, 'json': _json_rows, 'csv': _csv_rows}[form](path)


def _line_rows(path: str) -> Iterator[Line]:
    lines = lines_of(path)
    first = list(islice(lines, 2))
    for number, line in chain(first, lines):
        value, reason = _parsed_line(line)
        if len(first) == 1 and (inside := _wrapped(value)):
            yield from inside
        else:
            yield number, value, reason


def _parsed_line(line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        value = json.loads(line.decode('utf-8'))
    except UnicodeDecodeError:
        return {}, 'not_utf8'
    except (ValueError, RecursionError):
        return {}, 'malformed'
    return _as_row(value)


def _as_row(value: Any) -> tuple[dict[str, Any], str | None]:
    """A row of a JSON value; a list of messages is a conversation."""
    if _is_conversation(value):
        return {'messages': value}, None
    return (value, None) if isinstance(value, dict) else ({}, 'malformed')


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    keys = set(value) if isinstance(value, dict) else set()
    return bool(keys & {'role', 'from'} and keys & _SAID and not keys & _OF_A_RECORD)


def _json_rows(path: str) -> Iterator[Line]:
    """The items of lists, or objects one after the other, or what one object around all of them holds; a list of
    messages is one. What follows damage is lost with it: one row counts for all of that."""
    try:
        text = read_whole(path).decode()
    except UnicodeDecodeError:
        yield 1, {}, 'not_utf8'
        return
    decoder, at, number = json.JSONDecoder(), 0, 0
    between = re.compile(r'[\s,\[\]]*')  # of a list that is closed before the end, too
    while (begin := _match_end(between, text, at)) < len(text):
        opening = text.rfind('[', at, begin)
        number += 1
        try:
            value, at = decoder.raw_decode(text, begin)
            if opening >= 0 and not text[opening + 1 : begin].strip() and _is_message(value):
                listed, end = decoder.raw_decode(text, opening)
                value, at = (listed, end) if _is_conversation(listed) else (value, at)
        except (ValueError, RecursionError):
            yield number, {}, 'malformed'
            return
        if number == 1 and _match_end(between, text, at) == len(text) and (inside := _wrapped(value)):
            yield from inside
        else:
            yield number, *_as_row(value)


_OF_A_RECORD = {'text', 'prompt', 'instruction', 'question', 'messages', 'chosen'}
_OF_A_MESSAGE, _SAID = {'role', 'from', 'function'}, {'content', 'value', 'tool_calls'}


def _wrapped(value: Any) -> list[Line]:
    """The rows of {"data": [record, …]}, whatever it calls them; none of what is a record itself."""
    if not isinstance(value, dict) or _OF_A_RECORD & set(value):
        return []
    lists = [x for x in value.values() if isinstance(x, list) and x and all(isinstance(item, dict) for item in x)]
    if len(lists) != 1 or _OF_A_MESSAGE & set(lists[0][0]):
        return []
    return [(i, item, None) for i, item in enumerate(lists[0], 1)]


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _csv_rows(path: str) -> Iterator[Line]:
    """The rows of a table under its header; an empty cell has nothing in it."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default is 128 KiB, less than a document
    with _after_mark(path) as (file, encoding):
        errors = 'surrogateescape' if encoding == 'utf-8' else 'replace'
        text = io.TextIOWrapper(file, encoding, errors=errors, newline='')
        rows = csv.DictReader(text, delimiter=_delimiter(path, _decoded(begin_of(path))), restkey='', strict=True)
        number = 1
        try:
            for number, row in enumerate(rows, 2):
                extra = row.pop('', None)
                bad = 'malformed' if extra else _not_utf8(row)
                yield number, {} if bad else {key: value or None for key, value in row.items()}, bad
        except csv.Error:
            yield number + 1, {}, 'malformed'


def _not_utf8(row: dict[str, Any]) -> str | None:
    try:
        ''.join(value for value in row.values() if value).encode()
    except UnicodeEncodeError:
        return 'not_utf8'
    return None


def _delimiter(path: str, begin: str) -> str:
    """The mark that stands most often between the names of the header."""
    return '\t' if plain_name(path).endswith('.tsv') else max(',;\t', key=begin.partition('\n')[0].count)


def csv_columns(path: str) -> list[str]:
    """The names in the header of a table."""
    begin = _decoded(begin_of(path)).lstrip('\ufeff')
    return next(csv.reader(io.StringIO(begin, newline=''), delimiter=_delimiter(path, begin)), [])
