"""An `Opened` as a GGUF file: the first architecture that is its graph exactly, tensor by tensor, a few rows at a time.

Which architecture that is is asked of the reader: a model's settings are put as an architecture's metadata would have
them, read back, and compared.
"""

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm import files, progress
from lm.errors import RunError, UsageError
from lm.interop import graph
from lm.interop.gguf import arch as tables
from lm.interop.gguf import file, kquants, mixes, reader
from lm.interop.gguf.arch import ARCHS, Arch
from lm.interop.gguf.mixes import MIXES
from lm.interop.graph import DTYPES, Info, Tensor
from lm.interop.opened import Opened
from lm.model import parameters
from lm.model.layers import RopeScaling

QUANTIZATION_VERSION = 2  # of the blocks' layout
ALIGNMENT = 32  # the format's own
CONTEXT = 2048  # tokens, of a model that does not say: llama.cpp does not open a file without it


def write_gguf(opened: Opened, path: str | Path, *, quantize: str = 'BF16', say: Callable[[str], None]) -> None:
    """Writes a GGUF file. Raises UsageError, before anything is written, for what no architecture of GGUF is."""
    from lm.interop.tokenizers import conversion as tokenizers

    if quantize not in MIXES:
        raise UsageError(f'--quantize={quantize} is not one of {", ".join(MIXES)}')
    if opened.scored:
        raise UsageError(f'{opened.where}: a reward model has no GGUF form')
    name, arch = choose(opened.model)
    model = graph.PLAIN | dict(opened.model)
    if not model['context']:
        model['context'] = CONTEXT
        say(f'{opened.where} does not say how many tokens it reads at once: context_length is {CONTEXT}')
    plan = _plan(arch, model, quantize)
    metadata = _general(opened, name, quantize) | _described(name, arch, model)
    metadata |= tokenizers.to_gguf(opened.tokenizer, vocab_size=model['vocab_size'])
    for note in tokenizers.unlike_llama_cpp(opened.tokenizer):
        say(note)
    say(f'{path}: {len(plan)} tensors of architecture {name}, as {quantize}')
    with files.streamed(path) as write:
        write(header(name, metadata, plan))
        for tensor in progress.over(plan, 'tensors'):
            for data in _encoded(opened, arch, model, tensor):
                write(data.tobytes())
            write(bytes(-tensor.nbytes % ALIGNMENT))


# ---- which architecture ----


def choose(model: Mapping[str, Any]) -> tuple[str, Arch]:
    """The first architecture that is this graph exactly. Raises UsageError with the settings that the nearest lacks."""
    given = graph.PLAIN | dict(model)
    tried = ((name, (name, arch), _differences(name, arch, given)) for name, arch in ARCHS.items())
    return graph.first_exact('GGUF', tried)


def _differences(name: str, arch: Arch, model: Mapping[str, Any]) -> list[str]:
    """'model.KEY=THIS (ARCHITECTURE: THAT)' of the settings that a file of this architecture would not keep."""
    tensors = {t.name: Info('', t.name, t.kind, t.shape, 0, t.nbytes) for t in _plan(arch, model, 'F32')}
    seen = reader.graph(file.Header(_described(name, arch, model), tensors), name, arch, where=name)
    kind = (model['rope_scaling'] or 'none').split(',')[0]
    kept = kind == 'none' or (kind == 'linear' and arch.linear) or (kind == 'llama3' and arch.freqs)
    if kind == 'llama3' and kept:  # what we would not read back is not written
        options = {'theta': model['rope_theta'], 'head_dim': model['head_dim']}
        try:
            tables.llama3_scaling(tables.llama3_factors(model['rope_scaling'], **options), where=name, **options)
        except UsageError:
            kept = False
    seen['rope_scaling'] = model['rope_scaling'] if kept else None
    misses = graph.differences(_without_windows(model), _without_windows(seen), name)
    if arch.period and not model['window']:  # some versions of llama.cpp divide by a soft-cap of 0 then
        misses.append(f'model.window=None ({name}: a number)')
    if arch.square and (wide := model['heads'] * model['head_dim']) != model['dim']:
        misses.append(f'model.heads × model.head_dim={wide} ({name}: model.dim={model["dim"]})')
    return misses


def _without_windows(model: Mapping[str, Any]) -> dict[str, Any]:
    """The same graph with global layers for local ones that see all of its context, if that is all that they are."""
    whole = model['window'] and model['context'] and model['window'] >= model['context']
    alike = model['rope_theta_local'] in (None, model['rope_theta']) and not model['rope_scaling']
    if not (whole and alike):
        return dict(model)
    words = ['global' if kind == 'local' else kind for kind in graph.kinds(model)]
    return {**model, 'pattern': ','.join(words), 'window': None}


# ---- what the file says ----


def _general(opened: Opened, name: str, quantize: str) -> dict[str, Any]:
    stem = Path(opened.where.rstrip('/')).stem
    return {
        'general.architecture': name, 'general.type': 'model', 'general.name': stem or 'model',
        'general.file_type': MIXES[quantize][0], 'general.quantization_version': QUANTIZATION_VERSION,
    }  # fmt: skip


def _described(name: str, arch: Arch, model: Mapping[str, Any]) -> dict[str, Any]:
    """A graph as metadata of an architecture; what it has no key for is not there."""
    keys: dict[str, Any] = {gguf: model[key] for key, gguf in tables.SIZES.items()}
    keys |= {'attention.head_count_kv': model['kv_heads'], 'vocab_size': model['vocab_size']}
    keys |= dict.fromkeys(('attention.key_length', 'attention.value_length'), model['head_dim'])
    keys |= {'rope.dimension_count': model['head_dim'], 'rope.freq_base': float(model['rope_theta'])}
    keys['attention.layer_norm_rms_epsilon'] = float(model['norm_eps'])
    keys['context_length'] = model['context']
    scaling = RopeScaling.parse(model['rope_scaling'])
    if scaling and scaling.kind == 'linear' and arch.linear:
        keys |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': scaling.factor}
    if arch.period:
        keys['attention.sliding_window'] = model['window']
    if arch.period and arch.linear:
        keys['rope.freq_base_swa'] = float(model['rope_theta_local'] or model['rope_theta'])
    attention, logits = arch.softcaps
    keys['attn_logit_softcapping'] = model['attn_softcap'] if attention else None
    keys['final_logit_softcapping'] = model['logit_softcap'] if logits else None
    return {f'{name}.{key}': value for key, value in keys.items() if value is not None}


def _plan(arch: Arch, model: Mapping[str, Any], quantize: str) -> list[Tensor]:
    """The tensors of a file in their order."""
    top = tables.TOP | ({} if model['tied'] or not arch.untied else tables.HEAD)

    def kind_of(leaf: str, name: str, shape: tuple[int, ...], layer: int) -> tuple[str, int, int]:
        tied = 'head_DV' not in top
        kind = mixes.kind_of(name, shape, mix=quantize, layer=layer, layers=model['layers'], tied=tied)
        return kind, *file.BLOCKS[kind]

    plan = graph.plan(top | arch.layer, model, kind_of)
    if not arch.freqs or not (model['rope_scaling'] or '').startswith('llama3'):
        return plan
    half = model['head_dim'] // 2
    return [Tensor(tables.ROPE_FREQS, 'F32', (half,), 4 * half, '', 0), *plan]


def header(name: str, metadata: Mapping[str, Any], plan: list[Tensor]) -> bytes:
    """All before the first tensor."""
    gguf, data = file.package(), io.BytesIO()
    writer = gguf.GGUFWriter(None, name)
    for key, value in metadata.items():
        if key != 'general.architecture':  # the writer's own
            add_value(writer, key, value)
    for tensor in plan:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.fout, writer.state = [data], gguf.gguf_writer.WriterState.EMPTY  # as an open file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return data.getvalue() + bytes(-data.tell() % ALIGNMENT)


def add_value(writer: Any, key: str, value: Any) -> None:
    """Puts a value into the metadata, in the type that readers expect of such a one."""
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


# ---- the tensors ----


def _encoded(opened: Opened, arch: Arch, model: Mapping[str, Any], tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, a few rows at a time."""
    if tensor.name == tables.ROPE_FREQS:
        theta, head_dim = model['rope_theta'], model['head_dim']
        yield tables.llama3_factors(model['rope_scaling'], theta=theta, head_dim=head_dim).view(np.uint8)
        return
    stored = to_stored(opened.leaf(tensor.leaf).read(tensor.layer), tensor.leaf, tensor.shape, arch)
    for rows in graph.in_pieces(stored):
        yield encode(rows, tensor.kind, tensor.name)


def to_stored(ours: np.ndarray, leaf: str, shape: tuple[int, ...], arch: Arch) -> np.ndarray:
    """`reader.to_ours`, back: a view where that is possible."""
    if arch.interleaved and leaf.endswith(tables.ROTATED):  # halves -> neighbours
        *lead, wide = ours.shape
        ours = ours.reshape(*lead, 2, wide // 2).swapaxes(-1, -2).reshape(*lead, wide)
    if parameters.row(leaf).is_norm and arch.graph.get('norm_plus_one'):
        ours = ours.astype(np.float32) + 1
    return graph.to_stored(ours, leaf, shape)


def encode(rows: np.ndarray, kind: str, name: str) -> np.ndarray:
    """uint8 of rows [n, columns] (or a vector) in a kind. Raises RunError for numbers that it has no room for."""
    if kind not in DTYPES:
        try:
            return kquants.quantize(rows, kind)
        except ValueError as error:
            raise RunError(f'{name}: {error}: use BF16 or F32') from error
    with np.errstate(over='ignore'):
        out = np.ascontiguousarray(rows.astype(DTYPES[kind]))
    if kind == 'F16' and not np.isfinite(out).all() and np.isfinite(rows.astype(np.float32)).all():
        raise RunError(f'{name} has numbers above 65504, which F16 has no room for: use BF16 or F32')
    return out.view(np.uint8)
