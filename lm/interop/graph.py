"""A model's graph as its settings `model.*` say it: what the formats' readers and writers share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.model import parameters

# What a graph is where its architecture says nothing else.
PLAIN: dict[str, Any] = {
    'norms': 'pre', 'norm_plus_one': False, 'qk_norm': False, 'qk_norm_joint': False, 'qkv_bias': False,
    'activation': 'silu', 'query_scale': None, 'embed_scale': None, 'residual_scale': None, 'logit_scale': None,
    'pattern': None, 'window': None, 'rope_theta_local': None, 'rope_scaling': None, 'attn_softcap': None,
    'logit_softcap': None, 'context': None,
}  # fmt: skip


def sizes(model: Mapping[str, Any]) -> dict[str, int]:
    """The size of each letter."""
    letters = {'D': 'dim', 'N': 'heads', 'K': 'kv_heads', 'H': 'head_dim', 'F': 'ffn_dim', 'V': 'vocab_size'}
    return {letter: model[key] for letter, key in letters.items()}


def shapes(leaf: str, model: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(a parameter's shape as we have it, as a file has it: [out, in], or one dim)."""
    row = parameters.row(leaf)
    shape, fan_in = row.shape(sizes(model)), len(row.contracted)
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
    m = {k: v for k, v in model.items() if k not in ('context', 'scan', 'pattern', 'rope_theta_local')}
    m['window'] = _one([model['window'] if word == 'local' else None for word in words])
    m['rope_theta'], m['rope_scaling'] = (_one([turns[word][i] for word in words]) for i in range(2))
    return {k: _rounded(v) for k, v in (m | scales(model)).items()}


def _one(values: Sequence[Any]) -> Any:
    """The value that all layers have, or the list of what each has."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _rounded(value: Any) -> Any:
    """Float32's precision is all that the decoder has."""
    return float(str(np.float32(value))) if isinstance(value, float) and math.isfinite(value) else value
