"""Folders of Hugging Face's: config.json, safetensors, tokenizer. Read tensor by tensor, written tensor by tensor.

A safetensors file is 8 bytes of length, that much JSON ({name: dtype, shape, data_offsets}), and the tensors. It comes
from anywhere, so all of it is held against the size of the file before anything is allocated by it. Code that a folder
brings is never run, and weights in pickles are not read.
"""

import json
import math
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm import files
from lm.errors import RunError, UsageError
from lm.interop import families
from lm.interop.families import LM, SCORED
from lm.interop.gguf_arch import shapes
from lm.interop.opened import Leaf, Opened
from lm.model import transformer
from lm.model.transformer import ModelConfig

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
SMALL = 64 << 20  # bytes of a file that is read whole: tokenizer.json has up to 30 million
MAX_HEADER = 100 << 20  # bytes, as the format's own library has it
SHARD = 5_000_000_000  # bytes of a file that is written
DTYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
TORCH = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
IGNORED = ('rotary_emb.inv_freq',)  # old folders' copies of what follows from theta
TOKENIZER = (
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json',
    'added_tokens.json', 'chat_template.jinja', 'chat_template.json', CONFIG,
)  # fmt: skip


class Stored(NamedTuple):
    """A tensor of a file: where it lies, in bytes from the start."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


Fetch = Callable[[str, Stored], np.ndarray]  # a tensor by its name


# ---- in ----


def open_folder(path: str | Path, *, fetch: Fetch | None = None) -> Opened:
    """Opens a folder. Raises UsageError, in one line, for what is damaged, missing or not in our graph.

    Args:
      fetch: reads a tensor; None: from its file, alone.
    """
    folder, where = Path(path), str(path)
    config = _json(folder / CONFIG)
    family, scored = families.family_of(config, where)
    model = families.read_model(config, family, where)
    stored = _stored(folder)
    leaves = _leaves(stored, model, scored, where, fetch or (lambda _, tensor: read(tensor)))
    if scored:
        bias = config.get('reward_bias', 0.0)
        if not isinstance(bias, int | float) or not math.isfinite(bias):
            raise UsageError(f'{where}: reward_bias={bias!r} in config.json is no number')
        leaves['bias_score'] = Leaf((), np.dtype(np.float32), None, lambda layer: np.array(bias, np.float32))
    return Opened(where, model, leaves, _tokenizer(folder), scored=scored)


def read(tensor: Stored) -> np.ndarray:
    """A tensor, read and not mapped."""
    count = math.prod(tensor.shape)
    data = np.fromfile(tensor.path, np.uint8, count * tensor.dtype.itemsize, offset=tensor.offset)
    if data.size != count * tensor.dtype.itemsize:
        raise UsageError(f'{tensor.path}: was cut short while it was read')
    return data.view(tensor.dtype).reshape(tensor.shape)


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > SMALL:
            raise UsageError(f'{file} has {file.stat().st_size} bytes: that is no such file')
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f'{file} cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{file} is damaged ({" ".join(str(error).split())[:120]})') from None
    if not isinstance(value, dict):
        raise UsageError(f'{file} is damaged (it is no object)')
    return value


def _tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files as a run keeps them; none if the folder has none."""
    from lm.interop import tokenizers

    found = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    if not {'tokenizer.json', 'tokenizer.model'} & set(found):
        return {}
    if large := [str(file) for file in found.values() if file.stat().st_size > SMALL]:
        raise UsageError(f'{large[0]} is larger than {SMALL} bytes: that is no tokenizer')
    return tokenizers.from_huggingface({name: file.read_bytes() for name, file in found.items()})


def _stored(folder: Path) -> dict[str, Stored]:
    """Where each tensor of a folder lies."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = any(folder.glob('*.bin')) or any(folder.glob('*.pth'))
        hint = ': its weights are pickles, which can run code; save them as safetensors' if pickled else ''
        raise UsageError(f'{folder} has no {WEIGHTS} and no {INDEX}{hint}')
    named = _json(folder / INDEX).get('weight_map')
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UsageError(f'{folder / INDEX} is damaged (it has no weight_map)')
    found: dict[str, Stored] = {}
    for shard in sorted(set(named.values())):
        if Path(shard).name != shard or not shard.endswith('.safetensors'):
            raise UsageError(f'{folder / INDEX} names the file {shard!r}, which is no .safetensors file of the folder')
        tensors = read_header(folder / shard)
        if twice := sorted(set(found) & set(tensors)):
            raise UsageError(f'{folder / shard}: the tensor {twice[0]!r} is in another shard, too')
        found |= tensors
    if missing := sorted(set(named) - set(found)):
        raise UsageError(f'{folder}: the tensor {missing[0]!r} of {INDEX} is in no shard')
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies. Raises UsageError for whatever is wrong with the file."""

    def wrong(why: str) -> UsageError:
        return UsageError(f'{path}: a damaged safetensors file: {why}')

    try:
        size = path.stat().st_size
        with open(path, 'rb') as f:
            first = f.read(8)
            length = struct.unpack('<Q', first)[0] if len(first) == 8 else size
            if length > min(size - 8, MAX_HEADER):
                raise wrong(f'its header of {length} bytes does not fit its {size}')
            header = json.loads(f.read(length))
    except OSError as error:
        raise UsageError(f'{path} cannot be read ({error.strerror})') from None
    except (ValueError, RecursionError) as error:
        raise wrong(f'its header is no JSON ({" ".join(str(error).split())[:120]})') from None
    if not isinstance(header, dict):
        raise wrong('its header is no object')
    header.pop('__metadata__', None)
    found = {name: _tensor(path, name, told, 8 + length, wrong) for name, told in header.items()}
    end, before = 8 + length, ''
    for name, tensor in sorted(found.items(), key=lambda item: item[1].offset):
        if tensor.offset < end and math.prod(tensor.shape):
            raise wrong(f'the tensors {before!r} and {name!r} overlap')
        end, before = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize, name
        if end > size:
            raise wrong(f'the tensor {name!r} of shape {tensor.shape} reaches over the end of the file')
    return found


def _tensor(path: Path, name: str, told: Any, start: int, wrong: Callable[[str], UsageError]) -> Stored:
    told = told if isinstance(told, dict) else {}
    kind, shape, offsets = (told.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    whole = lambda x: isinstance(x, list) and all(type(n) is int and 0 <= n < 2**48 for n in x)
    if not whole(shape) or not whole(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise wrong(f'the tensor {name!r} has no shape and place that could be')
    if kind not in DTYPES:
        raise UsageError(f'{path}: the tensor {name!r} is of type {kind}; we read {", ".join(DTYPES)}')
    if math.prod(shape) * DTYPES[kind].itemsize != offsets[1] - offsets[0]:
        raise wrong(f'the tensor {name!r} of shape {shape} has not {offsets[1] - offsets[0]} bytes')
    return Stored(path, DTYPES[kind], tuple(shape), start + offsets[0])


def _names(model: Mapping[str, Any], *, scored: bool) -> list[str]:
    """The paths of a model's leaves that are tensors."""
    tree = transformer.names(ModelConfig(**{k: v for k, v in model.items() if k != 'scan'}))
    found = [name for name in tree if name != 'layers'] + [f'layers/{name}' for name in tree['layers']]
    return [*(name for name in found if not (scored and name == 'head_DV')), *(['score_D'] if scored else [])]


def _leaves(
    stored: Mapping[str, Stored], model: Mapping[str, Any], scored: bool, where: str, fetch: Fetch
) -> dict[str, Leaf]:
    """The parameters. Raises UsageError for a tensor that is missing, of another shape, or left over."""
    leaves, left = {}, {name for name in stored if not name.endswith(IGNORED)}
    if model['tied'] or scored:
        left.discard(families.HEAD)  # a copy of the embedding, or what a reward model has no use for
    for leaf in _names(model, scored=scored):
        layers = model['layers'] if leaf.startswith('layers/') else None
        names = [families.tensor_name(leaf, i, model['norms']) for i in range(layers or 1)]
        leaves[leaf] = _leaf(stored, leaf, names, layers, model, where, fetch)
        left.difference_update(names)
    if left:
        some = ', '.join(sorted(left)[:3])
        raise UsageError(
            f'{where}: has {len(left)} tensors that are not in our graph ({some}{", …" * (len(left) > 3)})'
        )
    return leaves


def _leaf(
    stored: Mapping[str, Stored], leaf: str, names: list[str], layers: int | None, model: Mapping[str, Any], where: str,
    fetch: Fetch,
) -> Leaf:  # fmt: skip
    """One parameter, of the tensors of these names."""
    ours, theirs = _shapes(leaf, model)
    for name in names:
        if name not in stored:
            raise UsageError(f'{where}: has no tensor {name!r}')
        if stored[name].shape != theirs:
            raise UsageError(f'{where}: {name!r} has the shape {stored[name].shape}; config.json makes it {theirs}')
    dtypes = {stored[name].dtype for name in names}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read_layer(i: int) -> np.ndarray:
        tensor = fetch(names[i], stored[names[i]])
        turned = tensor.T if tensor.ndim == 2 and leaf != 'embed_VD' else tensor
        return turned.reshape(ours).astype(dtype, copy=False)

    return Leaf(ours, dtype, layers, read_layer)


def _shapes(leaf: str, model: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(a parameter's shape as we have it, as a file has it)."""
    return ((model['dim'],), (1, model['dim'])) if leaf == 'score_D' else shapes(leaf, model)


# ---- out ----


def write_folder(opened: Opened, path: str | Path, *, say: Callable[[str], None]) -> None:
    """Writes a folder that transformers loads; it appears at once or not at all.

    Raises UsageError if `path` exists or no architecture is this graph, RunError if it cannot be written.
    """
    folder = Path(path)
    if folder.exists():
        raise UsageError(f'{folder} exists: name a new folder')
    name, config = families.choose(opened.model, opened.where)
    words, generation = _words(opened, say)
    config |= {'architectures': [name + (SCORED if opened.scored else LM)], **generation}
    config |= _scored(opened, say) if opened.scored else {}
    plan = list(_plan(opened))
    kinds = [_kind(opened, leaf) for leaf, _, _ in plan]
    config['torch_dtype'] = TORCH[max(set(kinds), key=kinds.count)]
    say(f'{folder}: {len(plan)} tensors of architecture {name}')
    made = folder.parent / f'.{folder.name}.{uuid.uuid4().hex[:8]}.tmp'
    try:
        for file, content in {**words, CONFIG: json.dumps(config, indent=2).encode()}.items():
            files.write_bytes(made / file, content)
        _write_weights(opened, made, plan)
        made.rename(folder)
    except OSError as error:
        raise RunError(f'{folder} cannot be written ({error.strerror or error})') from error
    finally:
        if made.exists():
            shutil.rmtree(made, ignore_errors=True)


def _words(opened: Opened, say: Callable[[str], None]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(the tokenizer's files, the ids of its symbols for config.json)."""
    if not opened.tokenizer:
        say(f'{opened.where} has no tokenizer: the folder has none')
        return {}, {}
    from lm.interop import tokenizers

    words = tokenizers.to_huggingface(opened.tokenizer, context=opened.model.get('context'))
    told = json.loads(words.get('generation_config.json', b'{}'))
    return words, {key: told[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id') if key in told}


def _scored(opened: Opened, say: Callable[[str], None]) -> dict[str, Any]:
    """What a reward model's config.json has beside."""
    bias = float(opened.leaves['bias_score'].read(0))
    if bias:
        say(f'transformers has no bias for a score: its scores are ours less {bias:.4g} (reward_bias in config.json)')
    return {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}, 'num_labels': 1, 'reward_bias': bias}


def _plan(opened: Opened) -> Iterator[tuple[str, str, int]]:
    """(leaf, tensor, layer) of all that is written, in the order of depth."""
    norms = opened.model['norms']
    for leaf in (name for name in opened.leaves if not name.startswith('layers/') and name != 'bias_score'):
        if not (opened.scored and leaf == 'head_DV'):
            yield leaf, families.tensor_name(leaf, 0, norms), 0
    for i in range(opened.model['layers']):
        for leaf in (name for name in opened.leaves if name.startswith('layers/')):
            yield leaf, families.tensor_name(leaf, i, norms), i


def _kind(opened: Opened, leaf: str) -> str:
    return next(kind for kind, dtype in DTYPES.items() if dtype == opened.leaves[leaf].dtype)


def _write_weights(opened: Opened, folder: Path, plan: list[tuple[str, str, int]]) -> None:
    """Writes the tensors, in shards if they are many."""
    size = lambda leaf: math.prod(opened.leaves[leaf].shape) * opened.leaves[leaf].dtype.itemsize
    shards: list[list[tuple[str, str, int]]] = [[]]
    filled = 0
    for item in plan:
        if shards[-1] and filled + size(item[0]) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size(item[0])
    if len(shards) == 1:
        return _write_shard(opened, folder / WEIGHTS, plan)
    names = [f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
    for name, items in zip(names, shards, strict=True):
        _write_shard(opened, folder / name, items)
    where = {tensor: name for name, items in zip(names, shards, strict=True) for _, tensor, _ in items}
    index = {'metadata': {'total_size': sum(size(leaf) for leaf, _, _ in plan)}, 'weight_map': where}
    files.write_bytes(folder / INDEX, json.dumps(index, indent=2).encode())


def _write_shard(opened: Opened, path: Path, plan: list[tuple[str, str, int]]) -> None:
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    at = 0
    for leaf, tensor, _ in plan:
        shape = _shapes(leaf, opened.model)[1]
        end = at + math.prod(shape) * opened.leaves[leaf].dtype.itemsize
        header[tensor] = {'dtype': _kind(opened, leaf), 'shape': list(shape), 'data_offsets': [at, end]}
        at = end
    content = json.dumps(header).encode()
    content += b' ' * (-len(content) % 8)
    with files.streamed(path) as write:
        write(struct.pack('<Q', len(content)) + content)
        for leaf, _, layer in plan:
            write(_theirs(opened, leaf, layer).tobytes())


def _theirs(opened: Opened, leaf: str, layer: int) -> np.ndarray:
    """A parameter as a file has it."""
    ours, shape = opened.leaves[leaf].read(layer), _shapes(leaf, opened.model)[1]
    if len(shape) == 1 or leaf in ('embed_VD', 'score_D'):
        return ours.reshape(shape)
    return ours.reshape(shape[::-1]).T
