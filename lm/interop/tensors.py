"""Tensors of a file and parameters of a model, by one table of names: readers and writers of all formats share this."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from lm.errors import UsageError
from lm.interop.graph import shapes
from lm.interop.opened import Leaf

# The kinds of weights that are not quantized, as both formats name them.
DTYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
ROWS = 2**22  # elements that are turned into a file's kind at once


class Info(NamedTuple):
    """A tensor in a file.

    Attributes:
      kind: 'F32', 'Q4_K' …
      shape: as numpy has it.
      at, nbytes: bytes, `at` from the file's start.
    """

    path: epath.PathLike
    name: str
    kind: str
    shape: tuple[int, ...]
    at: int
    nbytes: int


Fetch = Callable[[Info], np.ndarray]


class Tensor(NamedTuple):
    """A tensor to write: layer `layer` of a parameter, or what no parameter is where `leaf` is ''."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    leaf: str
    layer: int


def names_of(top: Mapping[str, str], layer: Mapping[str, str], prefix: str, layers: int) -> dict[str, list[str]]:
    """{parameter: the name of its tensor, or those of its layers', which begin with prefix.format(i)}."""
    stacked = {f'layers/{leaf}': [prefix.format(i) + name for i in range(layers)] for leaf, name in layer.items()}
    return {leaf: [name] for leaf, name in top.items()} | stacked


def read_leaves(
    names: Mapping[str, Sequence[str]], tensors: Mapping[str, Info], model: Mapping[str, Any], *, where: str,
    shaped_by: str, dtypes: Mapping[str, np.dtype], read: Callable[[Info, str, tuple[int, ...]], np.ndarray],
) -> dict[str, Leaf]:  # fmt: skip
    """The parameters `names`. Raises UsageError for a tensor that is missing, or of another shape or kind.

    Args:
      shaped_by: the words before the shape that a tensor should have.
      dtypes: what a kind is read as; a parameter whose layers are of several is float32.
      read: (tensor, the parameter's name, its shape) -> the parameter.
    """

    def leaf_of(leaf: str, places: Sequence[str]) -> Leaf:
        shape, stored = shapes(leaf, model)
        for place in places:
            info = tensors.get(place)
            if info is None:
                raise UsageError(f'{where}: has no tensor {place!r}')
            if info.shape != stored:
                raise UsageError(f'{where}: the tensor {place!r} has the shape {info.shape}; {shaped_by} {stored}')
            if info.kind not in dtypes:
                raise UsageError(f'{where}: the tensor {place!r} is {info.kind}: F32, F16 and BF16 are read')
        infos = [tensors[place] for place in places]
        kinds = {dtypes[info.kind] for info in infos}
        dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        read_layer = lambda i: read(infos[i], leaf, shape).astype(dtype, copy=False)
        return Leaf(shape, dtype, len(places) if leaf.startswith('layers/') else None, read_layer)

    return {leaf: leaf_of(leaf, places) for leaf, places in names.items()}


def check_surplus(names: Iterable[str], ignored: tuple[str, ...], where: str) -> None:
    """Raises UsageError for tensors that are no parameters and end with none of `ignored`: it is another graph then."""
    odd = sorted(name for name in names if not name.endswith(ignored))
    if odd:
        some = ', '.join(odd[:3]) + (', …' if len(odd) > 3 else '')
        raise UsageError(f'{where}: has {len(odd)} tensors that are not in our graph ({some})')


def first_exact(form: str, candidates: Iterable[tuple[str, Any, list[str]]]) -> Any:
    """The first architecture, of (its name, what is returned, the settings that it lacks), that lacks none. Raises
    UsageError with the settings that the nearest lacks."""
    misses = []
    for name, found, missed in candidates:
        if not missed:
            return found
        misses.append((name, missed))
    name, missed = min(misses, key=lambda miss: len(miss[1]))
    raise UsageError(f'no architecture of {form} is this graph; {name} is but for {", ".join(missed)}')


def in_pieces(stored: np.ndarray) -> Iterator[np.ndarray]:
    """A tensor, a few rows at a time."""
    step = max(1, ROWS // math.prod(stored.shape[1:]))
    for at in range(0, len(stored), step):
        yield stored[at : at + step]
