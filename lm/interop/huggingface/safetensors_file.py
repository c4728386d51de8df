"""Files of the safetensors format: a header that is checked before anything is read, and tensors one by one.

The format (huggingface/safetensors): eight bytes that say how long the header is, the header, a JSON object of names,
types, shapes and places, then the tensors without gaps. The package reads whole files or maps them; here a tensor is
read when it is asked for and nothing else stays in memory, and a hostile header costs no more than its own bytes.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from lm.errors import RunError, UsageError
from lm.interop.graph import DTYPES, Info

SIZES = {kind: dtype.itemsize for kind, dtype in DTYPES.items()} | {  # bytes of an element; others than weights, too
    'F64': 8, 'I64': 8, 'U64': 8, 'I32': 4, 'U32': 4, 'I16': 2, 'U16': 2, 'I8': 1, 'U8': 1, 'BOOL': 1, 'F8_E4M3': 1,
    'F8_E5M2': 1, 'F8_E8M0': 1, 'C64': 8,
}  # fmt: skip
MOST_HEADER = 100_000_000  # bytes: the format's own limit
ALIGNMENT = 8  # of the first tensor, as the package writes it


def read_header(path: epath.PathLike) -> dict[str, Info]:
    """{name: tensor} of a file. Raises UsageError for whatever is not as the format says."""
    path = epath.Path(path)
    try:
        size = path.stat().length
        with path.open('rb') as f:
            length = int.from_bytes(f.read(8), 'little')
            if size < 8 or not 2 <= length <= min(MOST_HEADER, size - 8):
                raise UsageError(f'{path}: is no whole safetensors file (a header of {length} bytes in {size})')
            text = f.read(length)
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror or error})') from None
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path}: its header is damaged ({error})') from None
    if not isinstance(found, dict):
        raise UsageError(f'{path}: its header is damaged (no object)')
    tensors = {name: _info(path, name, x, 8 + length) for name, x in found.items() if name != '__metadata__'}
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError('a name twice')
    return found


def _info(path: epath.Path, name: str, told: Any, begin: int) -> Info:
    """One entry of a header, whose bytes are as many as its shape and type say."""
    told = told if isinstance(told, dict) else {}
    kind = told.get('dtype')
    if not isinstance(kind, str) or kind not in SIZES:
        raise UsageError(f'{path}: the tensor {name!r} is of the type {kind!r}, which is not read')
    shape, places = _sizes(told.get('shape')), _sizes(told.get('data_offsets'))
    if shape is None or places is None or len(places) != 2:
        raise UsageError(f'{path}: the tensor {name!r} has no proper shape and place')
    nbytes = math.prod(shape) * SIZES[kind]
    if places[1] - places[0] != nbytes:
        raise UsageError(f'{path}: the tensor {name!r} has {places[1] - places[0]} bytes; its shape makes it {nbytes}')
    return Info(path, name, kind, tuple(shape), begin + places[0], nbytes)


def _sizes(found: Any) -> list[int] | None:
    fits = isinstance(found, list) and len(found) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in found)
    return found if fits else None


def _check_places(path: epath.Path, tensors: Mapping[str, Info], begin: int, size: int) -> None:
    """Raises UsageError unless the tensors fill the rest of the file, one after the other."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].at, item[1].nbytes)):
        if info.at != begin:
            raise UsageError(f'{path}: the tensor {name!r} overlaps another, or there is a gap before it')
        begin += info.nbytes
    if begin != size:
        what = 'is cut short' if begin > size else 'has bytes after its last tensor'
        raise UsageError(f'{path}: {what} ({size} bytes, not {begin}): get it again')


def read(info: Info) -> np.ndarray:
    """A tensor of one of DTYPES. Raises RunError if the file has changed since."""
    try:
        with epath.Path(info.path).open('rb') as f:
            f.seek(info.at)
            data = f.read(info.nbytes)
    except OSError as error:
        raise RunError(f'{info.path}: cannot be read ({error.strerror or error})') from error
    if len(data) != info.nbytes:
        raise RunError(f'{info.path}: has become shorter while it was read')
    return np.frombuffer(data, DTYPES[info.kind]).reshape(info.shape)


def kind_of(dtype: np.dtype) -> str:
    """The format's name of a dtype. Raises UsageError if weights are not stored in it here."""
    kinds = {known: kind for kind, known in DTYPES.items()}
    if dtype not in kinds:
        raise UsageError(f'weights of {dtype} have no place in a safetensors file: cast them to float32 or bfloat16')
    return kinds[dtype]


def header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """All before the first tensor of a file that holds these, {name: (kind, shape)}, in their order."""
    told: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # without it `transformers` does not load the file
    at = 0
    for name, (kind, shape) in tensors.items():
        nbytes = math.prod(shape) * SIZES[kind]
        told[name] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [at, at + nbytes]}
        at += nbytes
    text = json.dumps(told, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, 'little') + text
