"""Token stores: a stream of documents on disk, memory-mapped, and the spool that shuffles documents on the way there.

A store is a directory: `tokens.bin` (uint16, or uint32 for a vocabulary over 65,536), each document `<bos> ids <eos>`
(without <bos> where the tokenizer puts none), and `offsets.npy` (int64, [documents + 1]), where each begins. Opening
and reading it takes no memory to speak of.
"""

import hashlib
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from etils import epath

from lm.data.tokenizer import Tokenizer

_HEADER = struct.Struct('<16s16sI')
# Any constant will do; another one changes the order of all data.
_SALT = bytes(16)
_BUCKETS = 64
_BUFFER_BYTES = 64 << 20
_CHUNK_CHARACTERS = 1 << 21
_LONGEST_PART = 1 << 18  # characters: an encoder takes fifty times the memory, and longer for longer texts
_VERIFIED_BYTES = 1 << 28
_READ_BYTES = 1 << 20
# [size, CRC-32] of each file of a store; stores from before have [size] of a large one.
Checksums = dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class TokenStore:
    """`tokens` [tokens] uint16 or uint32 and `offsets` [documents + 1] int64, both memory-mapped."""

    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    pad_id: int = 0

    @classmethod
    def open(cls, directory: epath.Path, *, vocab_size: int, pad_id: int, checksums: Checksums) -> 'TokenStore':
        """Raises OSError or ValueError unless the files have the checksums that they had when they were written."""
        verify(directory, checksums)
        tokens = np.memmap(directory / 'tokens.bin', dtype=token_dtype(vocab_size), mode='r')
        return cls(tokens, np.load(directory / 'offsets.npy', mmap_mode='r'), pad_id)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, [tokens of i], with its <eos> and <bos>, if there is one."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.tokens)


def checksums_of(directory: epath.Path, names: Sequence[str] = ('tokens.bin', 'offsets.npy')) -> Checksums:
    """The size and the CRC-32 of each of a store's files."""
    return {name: [os.stat(directory / name).st_size, _crc(directory / name)] for name in names}


def verify(directory: epath.Path, checksums: Checksums) -> None:
    """Raises ValueError unless each of these files is as it was when it was written.

    Every start does this. A gibibyte takes about a second; of a file of more than a quarter of that only the size is
    compared, since a start must not take longer the more data there is.
    """
    for name, (size, *crc) in checksums.items():
        path = directory / name
        if os.stat(path).st_size != size or (crc and size < _VERIFIED_BYTES and _crc(path) != crc[0]):
            raise ValueError(f'{path} has changed')


def _crc(path: epath.Path) -> int:
    """Read and not mapped: pages of a map would count as this process's memory."""
    crc = 0
    with path.open('rb') as f:
        while chunk := f.read(_READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def read(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A copy of array[start:stop]; of a memory-mapped one it is read, so that going through all of it maps no page."""
    if not isinstance(array, np.memmap) or start >= stop:
        return np.array(array[start:stop])
    items = int(np.prod(array.shape[1:]))
    offset = array.offset + start * items * array.dtype.itemsize
    found = np.fromfile(str(array.filename), array.dtype, (min(stop, len(array)) - start) * items, offset=offset)
    return found.reshape(-1, *array.shape[1:])


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def digest(data: bytes) -> bytes:
    """16 bytes that stand for a content."""
    return hashlib.blake2b(data, digest_size=16).digest()


class Spool:
    """Documents on disk in buckets by shuffle key: written in any order, read back in the order of the keys.

    The key is a hash of the content, so the order depends on nothing else. Memory is bounded by a bucket, a 64th of
    the text, and the buffer.
    """

    def __init__(self, directory: epath.Path):
        directory.mkdir(parents=True)
        self._paths = [directory / f'{i:02d}' for i in range(_BUCKETS)]
        self._buffers: list[list[bytes]] = [[] for _ in range(_BUCKETS)]
        self._buffered = 0
        self.documents = 0
        self.bytes = 0

    def add(self, content: bytes, content_digest: bytes) -> None:
        key = _shuffle_key(content_digest)
        record = _record(key, content_digest, content)
        self._buffers[key[0] % _BUCKETS].append(record)
        self._buffered += len(record)
        self.documents += 1
        self.bytes += len(content)
        if self._buffered > _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        for path, buffer in zip(self._paths, self._buffers, strict=True):
            if buffer:
                with path.open('ab') as f:
                    f.writelines(buffer)
                buffer.clear()
        self._buffered = 0

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """(digest, content) of every document, in the order of the keys within each bucket."""
        self.flush()
        for path in self._paths:
            if path.exists():
                for _, content_digest, content in sorted(_records(path.read_bytes())):
                    yield content_digest, content

    def pop(self, choose: Callable[[Iterator[tuple[bytes, bytes]]], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """Takes out the document, as (digest, content), that `choose` (min or max) picks; reads all of them for it."""
        chosen = choose(self.read())
        path = self._paths[_shuffle_key(chosen[0])[0] % _BUCKETS]
        left = [record for record in _records(path.read_bytes()) if record[1:] != chosen]
        path.write_bytes(b''.join(_record(*record) for record in left))
        self.documents -= 1
        self.bytes -= len(chosen[1])
        return chosen


def _shuffle_key(content_digest: bytes) -> bytes:
    """Another hash than the content's own, which decides what is held out. Not the run's seed: every run reads the
    same stores, and its seed shuffles their rows.
    """
    return digest(_SALT + content_digest)


def _record(key: bytes, content_digest: bytes, content: bytes) -> bytes:
    return _HEADER.pack(key, content_digest, len(content)) + content


def _records(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    at = 0
    while at < len(data):
        key, content_digest, size = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        yield key, content_digest, data[at : at + size]
        at += size


def write_store(directory: epath.Path, texts: Iterable[str], tokenizer: Tokenizer) -> int:
    """Encodes texts, chunk by chunk, into a store at `directory`; returns how many tokens it holds."""
    directory.mkdir(parents=True)
    dtype, offsets, written = token_dtype(tokenizer.vocab_size), array('q', [0]), 0
    with (directory / 'tokens.bin').open('wb') as f:
        for chunk in _chunks(texts):
            continued = [not part.first for part in chunk]
            encoded = tokenizer.encode_batch([part.text for part in chunk], continued=continued)
            for part, ids in zip(chunk, encoded, strict=True):
                begin = [tokenizer.bos_id] if part.first and tokenizer.adds_bos else []
                ids = np.array([*begin, *ids, *([tokenizer.eos_id] if part.last else [])], dtype)
                f.write(ids.tobytes())
                written += len(ids)
                offsets.extend([written] if part.last else [])
    np.save(directory / 'offsets.npy', np.array(offsets, np.int64))
    return written


class _Part(NamedTuple):
    """A document, or a part of a long one; `first` and `last`: its first and its last character are in it."""

    text: str
    first: bool
    last: bool


def _parts(text: str) -> Iterator[_Part]:
    """A text in parts that an encoder has the memory for, each ended by a line's end or before a space if there is one:
    no piece reaches over these."""
    at = 0
    while len(text) - at > _LONGEST_PART:
        line, word = (text.rfind(mark, at + 1, at + _LONGEST_PART) for mark in '\n ')
        end = line + 1 if line > at else word if word > at else at + _LONGEST_PART
        yield _Part(text[at:end], at == 0, False)
        at = end
    yield _Part(text[at:], at == 0, True)


def _chunks(texts: Iterable[str]) -> Iterator[list[_Part]]:
    chunk: list[_Part] = []
    size = 0
    for part in (part for text in texts for part in _parts(text)):
        chunk.append(part)
        size += len(part.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
