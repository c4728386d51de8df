"""GGUF files: a reader of the header that believes nothing, and of tensors one by one.

The format (versions 2 and 3): magic, version, two counts; then metadata as typed key-value pairs; then a name, dims,
kind and offset for each tensor; then, aligned, the tensors. A file comes from anywhere, so every count, length and
offset is held against the size of the file before anything is allocated by it, and each mistake is one line.
"""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from etils import epath

from lm.errors import UsageError, install
from lm.interop.graph import DTYPES, Info

MAGIC = b'GGUF'
VERSIONS = (2, 3)  # 1 had counts of 32 bits, for some weeks of 2023
MAX_KEY = 65_535  # bytes of a key or of a tensor's name
MAX_DIMS = 4
MAX_DEPTH = 2  # arrays in arrays; nothing that we read has any
MAX_ELEMENTS = 2**24  # of an array: a vocabulary and its merges are far below
MAX_ALIGNMENT = 2**16
SMALLEST_PAIR, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes in the header

# Scalar types of metadata by their number; 8 is a string, 9 an array.
SCALARS = {
    0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
STRING, ARRAY = 8, 9
SMALLEST = {kind: np.dtype(code).itemsize for kind, code in SCALARS.items()} | {
    STRING: 8,
    ARRAY: 12,
}  # bytes of a value

# Kinds of tensors that we read by their number: (name, elements a block, bytes a block).
KINDS = {
    0: ('F32', 1, 4), 1: ('F16', 1, 2), 30: ('BF16', 1, 2), 2: ('Q4_0', 32, 18), 3: ('Q4_1', 32, 20),
    6: ('Q5_0', 32, 22), 7: ('Q5_1', 32, 24), 8: ('Q8_0', 32, 34), 10: ('Q2_K', 256, 84), 11: ('Q3_K', 256, 110),
    12: ('Q4_K', 256, 144), 13: ('Q5_K', 256, 176), 14: ('Q6_K', 256, 210),
}  # fmt: skip
BLOCKS = {name: (elements, size) for name, elements, size in KINDS.values()}
READ_AS = dict.fromkeys(BLOCKS, np.dtype(np.float32)) | DTYPES  # what `read` gives
CHUNK = 2**22  # bytes of a file that are turned into numbers at once


class Header(NamedTuple):
    """All that a file says before its tensors: values are int, float, bool, str and lists of them."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Info]


def read_header(path: str | Path) -> Header:
    """The header of a GGUF file. Raises UsageError, in one line that names the file, for whatever is wrong with it."""
    try:
        with open(path, 'rb') as f:
            if f.read(len(MAGIC)) != MAGIC:
                raise UsageError(f'{path}: no GGUF file (it does not begin with {MAGIC.decode()})')
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(path, data))
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror or error})') from None


def read(info: Info) -> np.ndarray:
    """A tensor: F32, F16 and BF16 as they are, others as float32.

    Nothing of the file stays mapped; a few MB of it are in memory at once beside the result.
    """
    if info.kind in DTYPES:
        return _bytes(info.path, info.at, info.nbytes).view(DTYPES[info.kind]).reshape(info.shape)
    quants, number = package().quants, package().GGMLQuantizationType[info.kind]
    out = np.empty((math.prod(info.shape[:-1]), info.shape[-1]), np.float32)
    width = info.nbytes // len(out)
    step = max(1, CHUNK // width)
    for i in range(0, len(out), step):
        n = min(step, len(out) - i)
        data = _bytes(info.path, info.at + i * width, n * width).reshape(n, width)
        out[i : i + n] = quants.dequantize(data, number)
    return out.reshape(info.shape)


def _bytes(path: epath.PathLike, offset: int, size: int) -> np.ndarray:
    """uint8 [size] of a file, read and not mapped."""
    try:
        data = np.fromfile(path, np.uint8, size, offset=offset)
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror or error})') from None
    if data.size != size:
        raise UsageError(f'{path}: was cut short while it was read')
    return data


def package() -> Any:
    """The package gguf, which knows how blocks are laid out."""
    try:
        import gguf
    except ImportError:
        raise UsageError(f'needs the package gguf: {install("convert")}') from None
    return gguf


# ---- the header ----


class _Cursor:
    """A place in a file, which moves over what is read and never past the end."""

    def __init__(self, path: str | Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def wrong(self, why: str) -> NoReturn:
        raise UsageError(f'{self.path}: a damaged GGUF file: {why}')

    def check(self, good: bool, why: str) -> None:
        if not good:
            self.wrong(why)

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        if n > self.size - self.at:
            self.wrong(f'{what} at byte {self.at} reaches over the end of the file')
        self.at += n
        return self.data[self.at - n : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), 'little')

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), 'little')

    def count(self, what: str, *, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each that are to follow."""
        n = self.u64(what)
        fits = n <= (self.size - self.at) // smallest
        self.check(fits, f'{what}: {n} of them cannot be in a file of {self.size} bytes')
        return n

    def text(self, what: str, *, longest: int | None = None) -> str:
        n = self.u64(what)
        if longest is not None and n > longest:
            self.wrong(f'{what} has {n} bytes, more than {longest}')
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            self.wrong(f'{what} before byte {self.at} is not valid UTF-8')


def _header(cursor: _Cursor) -> Header:
    cursor.take(len(MAGIC), 'the magic')
    version = cursor.u32('the version')
    if version not in VERSIONS:
        big = int.from_bytes(version.to_bytes(4, 'little'), 'big') in VERSIONS
        why = 'it is big-endian' if big else f'its version is {version}'
        raise UsageError(f'{cursor.path}: {why}; we read versions 2 and 3, little-endian')
    tensors = cursor.count('the number of tensors', smallest=SMALLEST_TENSOR)
    pairs = cursor.count('the number of metadata', smallest=SMALLEST_PAIR)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text('a key', longest=MAX_KEY)
        cursor.check(key not in metadata, f'it has the key {key!r} twice')
        metadata[key] = _value(cursor, cursor.u32(key), repr(key))
    return Header(metadata, _tensors(cursor, tensors, _alignment(cursor, metadata)))


def _value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    """A value of metadata of a type."""
    if kind == STRING:
        return cursor.text(what)
    if kind == ARRAY:
        return _array(cursor, what, depth)
    cursor.check(kind in SCALARS, f'{what} has the type {kind}, which there is not')
    return _numbers(cursor, kind, 1, what)[0]


def _array(cursor: _Cursor, what: str, depth: int) -> list[Any]:
    cursor.check(depth < MAX_DEPTH, f'{what} has arrays in arrays, more than {MAX_DEPTH} deep')
    kind = cursor.u32(what)
    cursor.check(kind in SMALLEST, f'{what} has elements of the type {kind}, which there is not')
    n = cursor.count(f'the elements of {what}', smallest=SMALLEST[kind])
    cursor.check(n <= MAX_ELEMENTS, f'{what} has {n} elements, more than {MAX_ELEMENTS}')
    if kind in SCALARS:
        return _numbers(cursor, kind, n, what)
    return [_value(cursor, kind, what, depth + 1) for _ in range(n)]


def _numbers(cursor: _Cursor, kind: int, n: int, what: str) -> list[Any]:
    dtype = np.dtype(SCALARS[kind])
    data = cursor.take(n * dtype.itemsize, what)
    cursor.check(dtype != np.bool_ or not data.strip(b'\0\1'), f'{what} is a bool that is neither 0 nor 1')
    return np.frombuffer(data, dtype).tolist()


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    """Bytes that each tensor's start is a multiple of."""
    n = metadata.get('general.alignment', 32)  # the format's own default
    if type(n) is not int or not 1 <= n <= MAX_ALIGNMENT or n & (n - 1):
        cursor.wrong(f'general.alignment={n!r} is no power of two up to {MAX_ALIGNMENT}')
    return n


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Info]:
    infos: dict[str, Info] = {}
    for _ in range(count):
        name = cursor.text("a tensor's name", longest=MAX_KEY)
        cursor.check(name not in infos, f'it has the tensor {name!r} twice')
        infos[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.at // alignment) * alignment
    placed = {name: info._replace(at=start + info.at) for name, info in infos.items()}
    _check_places(cursor, placed)
    return placed


def _tensor(cursor: _Cursor, name: str, alignment: int) -> Info:
    """A tensor as the header says it; `at` is from where tensors begin."""
    n = cursor.u32(f'the dims of {name!r}')
    cursor.check(1 <= n <= MAX_DIMS, f'the tensor {name!r} has {n} dims, not 1 to {MAX_DIMS}')
    shape = tuple(cursor.u64(f'a dim of {name!r}') for _ in range(n))[::-1]
    number, offset = cursor.u32(f'the kind of {name!r}'), cursor.u64(f'the offset of {name!r}')
    if number not in KINDS:
        readable = ', '.join(sorted(BLOCKS))
        raise UsageError(f'{cursor.path}: the tensor {name!r} is of kind {number}, not one that we read: {readable}')
    kind, elements, size = KINDS[number]
    fits = all(shape) and shape[-1] % elements == 0
    what = f'the tensor {name!r} of shape {shape}'
    cursor.check(fits, f'{what} cannot be of kind {kind}: blocks of {elements} in a row')
    cursor.check(offset % alignment == 0, f'the tensor {name!r} begins at {offset}, no multiple of {alignment}')
    nbytes = math.prod(shape) // elements * size
    return Info(cursor.path, name, kind, shape, offset, nbytes)


def _check_places(cursor: _Cursor, infos: Mapping[str, Info]) -> None:
    """Every tensor lies in the file, and none in another."""
    end, before = 0, ''
    for name, info in sorted(infos.items(), key=lambda item: item[1].at):
        cursor.check(info.at >= end, f'the tensors {before!r} and {name!r} overlap')
        end, before = info.at + info.nbytes, name
        what = f'the tensor {name!r} of shape {info.shape}'
        cursor.check(end <= cursor.size, f'{what} reaches over the end of the file')
