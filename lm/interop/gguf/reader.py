"""A GGUF file as an `Opened`: its metadata as `model.*`, its tensors as parameters that are read one by one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UsageError
from lm.interop.gguf import arch as tables
from lm.interop.gguf import file
from lm.interop.gguf.arch import ARCHS, Arch
from lm.interop.graph import PLAIN, Fetch, Info, check_surplus, from_stored, names_of, read_leaves
from lm.interop.opened import Leaf, Opened
from lm.interop.tokenizers import files as tokenizer_files
from lm.model import parameters
from lm.settings import INT32_MAX

IGNORED = ('rope.freqs', 'attn_rot_embd.weight', 'rotary_emb.inv_freq')  # old files' copies of what follows from theta


def open_gguf(path: str | Path, *, fetch: Fetch = file.read) -> Opened:
    """A GGUF file of one of the architectures in `ARCHS`. Raises UsageError for what we cannot express.

    Args:
      fetch: reads a tensor.
    """
    from lm.interop.tokenizers import conversion as tokenizers

    header = file.read_header(path)
    name, arch = architecture(header.metadata, str(path))
    model = graph(header, name, arch, where=str(path))
    leaves = _leaves(path, header, arch, model, fetch)
    words, notes = tokenizer_files.fitted(tokenizers.from_gguf(header.metadata), model['vocab_size'])
    return Opened(str(path), model, leaves, words, notes=tuple(notes))


def architecture(metadata: Mapping[str, Any], where: str) -> tuple[str, Arch]:
    """The name of a file's architecture, and its table."""
    kind = metadata.get('general.type', 'model')
    if kind != 'model':
        first = ': name the run under it with --base=RUN' if kind == 'adapter' else ': name the file of the model'
        raise UsageError(f'{where}: is of the type {str(kind)[:40]!r}, and no model{first}')
    name = metadata.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHS:
        raise UsageError(f'{where}: the architecture {name!r} is not one of {", ".join(ARCHS)}')
    parts = metadata.get('split.count', 1)
    if parts not in (0, 1):
        raise UsageError(f'{where}: is one of {parts} parts: put them together first (llama-gguf-split --merge)')
    return name, ARCHS[name]


def graph(header: file.Header, name: str, arch: Arch, *, where: str) -> dict[str, Any]:
    """`model.*` of a file."""
    get = _Keys(header.metadata, name, where)
    for key, value in tables.NEUTRAL.items():
        if get.raw(key, value) != value:
            raise UsageError(f'{where}: {name}.{key}={get.raw(key, None)} is not in our graph')
    model: dict[str, Any] = {key: get.size(gguf) for key, gguf in tables.SIZES.items()}
    layers, heads, tensors = model['layers'], model['heads'], header.tensors
    if layers > len(tensors):
        raise UsageError(f'{where}: {name}.block_count={layers} is more than its {len(tensors)} tensors')
    model['kv_heads'] = kv_heads = get.size('attention.head_count_kv', heads)
    model['head_dim'] = head_dim = get.size('attention.key_length', model['dim'] // heads or None)
    for key in ('attention.value_length', 'rope.dimension_count'):
        if get.size(key, head_dim) != head_dim:
            raise UsageError(f'{where}: {name}.{key} is not the head dim {head_dim}: not in our graph')
    if heads % kv_heads or head_dim % 2:
        raise UsageError(f'{where}: {heads} heads, {kv_heads} of keys, of {head_dim} do not fit together')
    if (embed := tables.TOP['embed_VD']) not in tensors:
        raise UsageError(f'{where}: has no tensor {embed!r}')
    model['vocab_size'] = tensors[embed].shape[0]
    model['context'] = get.size('context_length', None)
    model['norm_eps'] = get.real('attention.layer_norm_rms_epsilon')
    model['rope_theta'] = get.real('rope.freq_base', 10_000.0)
    model['tied'] = not (arch.untied and tables.HEAD['head_DV'] in tensors)
    model = PLAIN | model | arch.graph | _gemma(get, arch, model)
    if name == 'llama':
        model['qkv_bias'] = tables.BIASES['layers/bias_q_NH'].format(layer=0) in tensors
        window = get.size('attention.sliding_window', None)  # Mistral's
        model['window'] = window if window and window < (model['context'] or INT32_MAX) else None
    return model


def scaling(path: str | Path, header: file.Header, arch: Arch, model: Mapping[str, Any]) -> str | None:
    """model.rope_scaling of a file."""
    get = _Keys(header.metadata, header.metadata['general.architecture'], str(path))
    factor = get.real('rope.scaling.factor', get.real('rope.scale_linear', 1.0))  # the second of older files
    kind = get.raw('rope.scaling.type', 'linear')
    if kind not in ('none', 'linear') or (kind == 'linear' and factor != 1 and not arch.linear):
        raise UsageError(f'{path}: rotary scaling of type {kind!r} is not in our graph: we have linear and llama3')
    linear = f'linear,factor={tables.plain_number(factor)}' if kind == 'linear' and factor != 1 else None
    info = header.tensors.get(tables.ROPE_FREQS)
    if info is not None and not arch.freqs:
        name = tables.ROPE_FREQS
        raise UsageError(f'{path}: has {name}, which its architecture does not use: it is not what it says')
    if info is None:
        return linear
    factors = file.read(info).astype(np.float32).reshape(-1)
    options = {'theta': model['rope_theta'], 'head_dim': model['head_dim'], 'where': str(path)}
    found = tables.llama3_scaling(factors, **options)
    if linear and found:
        raise UsageError(f'{path}: has linear scaling of rotary positions and {tables.ROPE_FREQS}: not in our graph')
    return found or linear


def to_ours(tensor: np.ndarray, leaf: str, shape: tuple[int, ...], arch: Arch) -> np.ndarray:
    """A parameter of this path and shape, from a file's tensor; a view where that is possible."""
    ours = from_stored(tensor, leaf, shape)
    if arch.interleaved and leaf.endswith(tables.ROTATED):  # neighbours -> halves
        ours = ours.reshape(*shape[:-1], shape[-1] // 2, 2).swapaxes(-1, -2).reshape(shape)
    return ours - ours.dtype.type(1) if parameters.row(leaf).is_norm and arch.graph.get('norm_plus_one') else ours


class _Keys:
    """Metadata of one architecture, of the types that we want. Raises UsageError for others."""

    def __init__(self, metadata: Mapping[str, Any], name: str, where: str) -> None:
        self.metadata, self.name, self.where = metadata, name, where

    def raw(self, key: str, default: Any) -> Any:
        """The value; of a list, which has one a layer, the one value that all have."""
        value = self.metadata.get(f'{self.name}.{key}', default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            return value[0]
        return value

    def size(self, key: str, *default: int | None) -> Any:
        """A whole number from 1; None only as the default."""
        fits = lambda value: type(value) is int and 1 <= value <= INT32_MAX
        return self._checked(key, default, fits, f'a whole number from 1 to {INT32_MAX}')

    def real(self, key: str, *default: float | None) -> Any:
        """A positive number as its shortest text in float32, 1e-05 for 9.99999974e-06; None only as the default."""
        fits = lambda value: type(value) in (int, float) and 0 < value < 2.0**128
        value = self._checked(key, default, fits, 'a positive number')
        return None if value is None else float(str(np.float32(value)))

    def _checked(self, key: str, default: tuple[Any, ...], fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.raw(key, *default or (None,))
        if not fits(value) and not (default and value is None):
            raise UsageError(f'{self.where}: {self.name}.{key}={value!r} is not {wanted}')
        return value


def _gemma(get: _Keys, arch: Arch, model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that Gemma has beside: local layers, soft-caps, scales; {} for others."""
    if arch.period is None:
        return {}
    attention, logits = arch.softcaps
    wide = model['dim'] // model['heads'] if model['layers'] == arch.scaled else model['head_dim']
    local = get.real('rope.freq_base_swa', 10_000.0 if arch.linear else model['rope_theta'])
    window = get.size('attention.sliding_window', None if arch.linear else 4096)
    return {
        'embed_scale': model['dim'] ** 0.5,
        'query_scale': wide**-0.5,
        'window': window,
        'pattern': _pattern(get, arch.period) if window else None,
        'rope_theta_local': local if window and local != model['rope_theta'] else None,
        'attn_softcap': get.real('attn_logit_softcapping', attention) if attention else None,
        'logit_softcap': get.real('final_logit_softcapping', logits),
    }


def _pattern(get: _Keys, period: int) -> str:
    """The kinds of layer."""
    period = get.raw('attention.sliding_window_pattern', period)
    if type(period) is not int or not 2 <= period <= 64:
        raise UsageError(f'{get.where}: {get.name}.attention.sliding_window_pattern={period!r} is not in our graph')
    return ','.join(['local'] * (period - 1) + ['global'])


def _leaves(path: str | Path, header: file.Header, arch: Arch, model: dict[str, Any], fetch: Fetch) -> dict[str, Leaf]:
    """The parameters; settles model['rope_scaling'], which a tensor says."""
    model['rope_scaling'] = scaling(path, header, arch, model)
    top = tables.TOP | ({} if model['tied'] else tables.HEAD)
    biases = tables.BIASES if model['qkv_bias'] else {}
    names = names_of(top | arch.layer | biases, model['layers'])

    def read(info: Info, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        return to_ours(fetch(info), leaf, shape, arch)

    leaves = read_leaves(
        names, header.tensors, model, where=str(path), shaped_by='its metadata make it', dtypes=file.READ_AS, read=read
    )
    left = set(header.tensors).difference(*names.values())
    check_surplus(left, (*IGNORED, tables.ROPE_FREQS), str(path))
    return leaves
