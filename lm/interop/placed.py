"""The weights of an `Opened` straight to where a run keeps them, never whole in the memory of the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.errors import UsageError
from lm.interop.opened import Leaf, Opened, by_path


def arrays(opened: Opened, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as `abstract` describes them: a tree of jax.ShapeDtypeStruct with or without shardings.

    Each is cast to its dtype, and where it has more rows of the vocabulary than the model these are 0. Of what is on
    the host at once, the most is the share of this host's devices in one parameter. Raises UsageError for a tree that
    is not this model's.
    """
    paths = by_path(abstract)
    missing, surplus = sorted(set(paths) - set(opened.leaves)), sorted(set(opened.leaves) - set(paths))
    if missing or surplus:
        words = [f'has no {name}' for name in missing[:1]] + [f'has {name} beside' for name in surplus[:1]]
        raise UsageError(f'{opened.where}: is another model than the settings describe: it {" and ".join(words)}')
    for path, spec in paths.items():
        _check(opened, path, spec)
    placed = {path: _array(opened.leaves[path], spec) for path, spec in paths.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: placed['/'.join(k.key for k in path)], dict(abstract))


def _check(opened: Opened, path: str, spec: Any) -> None:
    """The shapes agree but for the padding of the vocabulary."""
    leaf, wanted = opened.leaves[path], tuple(spec.shape)
    own = leaf.shape if leaf.layers is None else (leaf.layers, *leaf.shape)
    letters = sharding.dims_of(path).rjust(len(own))
    agrees = lambda letter, have, want: have == want or (letter == 'V' and have < want)
    if len(own) != len(wanted) or not all(map(agrees, letters, own, wanted)):
        raise UsageError(f'{opened.where}: {path} has the shape {own}, and the settings make it {wanted}')


def _array(leaf: Leaf, spec: Any) -> jax.Array:
    """One parameter on its devices, each of which gets its part of each layer as that is read."""
    shape, dtype = tuple(spec.shape), np.dtype(spec.dtype)
    where = spec.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spans = {_span(index, shape) for index in where.addressable_devices_indices_map(shape).values()}
    parts = {span: np.zeros([stop - start for start, stop in span], dtype) for span in spans}
    stacked = leaf.layers is not None
    for layer in range(leaf.layers or 1):
        wanted = {span: part for span, part in parts.items() if not stacked or span[0][0] <= layer < span[0][1]}
        if not wanted:
            continue
        found = leaf.read(layer)
        for span, part in wanted.items():
            span, into = (span[1:], part[layer - span[0][0]]) if stacked else (span, part)
            piece = found[tuple(slice(*ends) for ends in span)]  # what the layer does not have stays 0
            into[tuple(map(slice, piece.shape))] = piece
    return jax.make_array_from_callback(shape, where, lambda index: parts[_span(index, shape)])


def _span(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each axis."""
    return tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
