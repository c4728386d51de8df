"""A model's graph as its settings `model.*` say it, and its tensors: the formats' readers and writers share these."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from lm.errors import UsageError
from lm.interop.opened import Leaf
from lm.model import parameters

# What a graph is where its architecture says nothing else.
PLAIN: dict[str, Any] = {
    'norms': 'pre', 'norm_plus_one': False, 'qk_norm': False, 'qk_norm_joint': False, 'qkv_bias': False,
    'activation': 'silu', 'query_scale': None, 'embed_scale': None, 'residual_scale': None, 'logit_scale': None,
    'pattern': None, 'window': None, 'rope_theta_local': None, 'rope_scaling': None, 'attn_softcap': None,
    'logit_softcap': None, 'context': None,
}  # fmt: skip
LETTERS = {'D': 'dim', 'N': 'heads', 'K': 'kv_heads', 'H': 'head_dim', 'F': 'ffn_dim', 'V': 'vocab_size'}
# The kinds of weights that are not quantized, as both formats name them.
DTYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
ROWS = 2**22  # elements that are turned into a file's kind at once


# ---- the graph ----


def shapes(leaf: str, model: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(a parameter's shape as we have it, as a file has it: [out, in], or one dim)."""
    row = parameters.row(leaf)
    shape, fan_in = row.shape({letter: model[key] for letter, key in LETTERS.items()}), len(row.contracted)
    if row.init == 'embedding':
        return shape, shape
    if not fan_in:
        return shape, (math.prod(shape),)
    return shape, (math.prod(shape[fan_in:]), math.prod(shape[:fan_in]))


def from_stored(tensor: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of this shape, of a file's tensor [out, in]: a view."""
    return (tensor.T if parameters.row(leaf).contracted else tensor).reshape(shape)


def to_stored(ours: np.ndarray, leaf: str, stored: tuple[int, ...]) -> np.ndarray:
    """`from_stored`, back: a view."""
    return ours.reshape(stored[::-1]).T if parameters.row(leaf).contracted else ours.reshape(stored)


def kinds(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of each layer: 'local', 'global' …"""
    pattern = model['pattern'] or ('local' if model['window'] else 'global')
    words = pattern.split(',')
    return tuple(words[i % len(words)] for i in range(model['layers']))


def scales(model: Mapping[str, Any]) -> dict[str, float]:
    """The factors of a graph, as numbers where the settings have None."""
    query = model['query_scale'] or model['head_dim'] ** -0.5
    return {'query_scale': query} | {key: model[key] or 1.0 for key in ('embed_scale', 'residual_scale', 'logit_scale')}


def differences(wanted: Mapping[str, Any], kept: Mapping[str, Any], name: str) -> list[str]:
    """'model.KEY=THIS (NAME: THAT)' of the settings that a format's NAME would not keep; of what differs by layer, the
    pattern."""
    a, b, misses = _comparable(wanted), _comparable(kept), {}
    for key in (key for key in b if a[key] != b[key]):
        if isinstance(a[key], tuple) or isinstance(b[key], tuple):
            misses[f'model.pattern={wanted["pattern"]} ({name} has other kinds of layer)'] = None
        else:
            misses[f'model.{key}={a[key]} ({name}: {b[key]})'] = None
    return list(misses)


def _comparable(model: Mapping[str, Any]) -> dict[str, Any]:
    """A graph's settings, equal where two graphs are: what each layer does, in the place of what says it."""
    words, shared = kinds(model), (model['rope_theta'], model['rope_scaling'])
    local = shared if model['pattern'] is None else (model['rope_theta_local'] or model['rope_theta'], None)
    turns = {'nope': (None, None), 'local': local, 'global': shared}
    m = {k: v for k, v in model.items() if k not in ('context', 'pattern', 'rope_theta_local')}
    m['window'] = _one([model['window'] if word == 'local' else None for word in words])
    m['rope_theta'], m['rope_scaling'] = (_one([turns[word][i] for word in words]) for i in range(2))
    return {k: _rounded(v) for k, v in (m | scales(model)).items()}


def _one(values: Sequence[Any]) -> Any:
    """The value that all layers have, or the list of what each has."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _rounded(value: Any) -> Any:
    """Float32's precision is all that the decoder has."""
    return float(str(np.float32(value))) if isinstance(value, float) and math.isfinite(value) else value


# ---- its tensors ----


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


def of_layers(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    """{parameter: the pattern of its tensors' names} of what each layer has, from what stands after a prefix that has
    {layer} in it."""
    return {f'layers/{leaf}': prefix + name for leaf, name in names.items()}


def names_of(patterns: Mapping[str, str], layers: int) -> dict[str, list[str]]:
    """{parameter: the name of its tensor, or those of its layers'}, of patterns with {layer} where it is of layers."""
    counts = {leaf: layers if leaf.startswith('layers/') else 1 for leaf in patterns}
    return {leaf: [pattern.format(layer=i) for i in range(counts[leaf])] for leaf, pattern in patterns.items()}


def matrices_of(patterns: Mapping[str, str], layers: int) -> dict[str, tuple[str, int]]:
    """{tensor's name: (leaf of the layers, layer)} of the matrices of the layers."""
    return {
        name: (parameter.removeprefix('layers/'), i)
        for parameter, names in names_of(patterns, layers).items() if parameters.row(parameter).matrix
        for i, name in enumerate(names)
    }  # fmt: skip


def plan(
    patterns: Mapping[str, str], model: Mapping[str, Any], kind_of: Callable[[str, str, tuple[int, ...], int], Any]
) -> list[Tensor]:
    """The tensors of a model in a file: those of no layer, then layer after layer.

    Args:
      kind_of: (parameter, tensor's name, its shape, layer) -> (its kind, elements a block, bytes a block).
    """
    found = []
    for leaf, names in names_of(patterns, model['layers']).items():
        _, stored = shapes(leaf, model)
        for layer, name in enumerate(names):
            kind, elements, size = kind_of(leaf, name, stored, layer)
            found.append(Tensor(name, kind, stored, math.prod(stored) // elements * size, leaf, layer))
    return sorted(found, key=lambda tensor: (tensor.leaf.startswith('layers/'), tensor.layer))


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
