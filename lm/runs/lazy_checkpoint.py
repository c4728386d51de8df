"""A run's weights as they lie on disk: read and written layer by layer, never all of them in memory.

Orbax keeps a tree as arrays of TensorStore's in one key-value store (OCDBT), each under the dotted path of its leaf,
and a list of them beside it (`_METADATA`). Training reads and writes whole trees through Orbax. Here arrays are opened
one by one, so that a model of any size is converted within the memory of its largest leaf; what is written is what
Orbax restores (0.12), with the checksums of `lm.runs.checkpoint`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from lm import config as configs
from lm import files, progress, settings, sharding
from lm.config import Config, split_run
from lm.data import cache
from lm.data.chat_template import TEMPLATE_FILE
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.interop import placed
from lm.interop.adapter import OpenedAdapter, Stack
from lm.interop.opened import Leaf, Opened, by_path
from lm.interop.tokenizers import files as tokenizer_files
from lm.model import parameters, quantized, seam
from lm.model.config import ModelConfig
from lm.runs import checkpoint, execution, foreign, loading, reward_scale, rundir, saved_config
from lm.runs.saved_config import Parent

CACHE_BYTES = 256 << 20  # of decoded chunks: training writes a stack as one, and it is read a layer at a time
CHUNK_BYTES = 32 << 20  # of what is written: what is read at once
ITEM = 'trainable'  # what training saves its weights as


# ---- reading ----


def open_run(run: str) -> Opened:
    """Opens 'DIR' (its newest checkpoint that holds) or 'DIR@STEP': the average of the weights if it kept one. An
    adapter is merged into its base, in float32, as it is read.

    Every leaf is read once to verify its checksum. Raises UsageError if there is no such run or checkpoint, or an
    adapter's base has changed, RunError if nothing in it can be read.
    """
    if (other := foreign.find(run)) is not None:
        return other
    saved, notes = rundir.read_config(run), []
    step = checkpoint.locate(run)
    folder, asked = split_run(run)
    directory = files.absolute(folder) / 'checkpoints'
    for at in [step] if asked else checkpoint.listed(directory):
        try:
            leaves = _verified(directory / str(at), saved)
            if saved_config.about(saved).quantized is not None:
                leaves = _made_dense(saved, leaves)
            if saved_config.about(saved).adapter is None:
                return _opened(run, saved, leaves, at, notes)
            own = _adapter(run, saved, leaves)
            base = own.over(_open_base(saved))
            return _opened(run, saved, base.leaves, at, notes)
        except (ValueError, FileNotFoundError) as error:
            notes.append(f'checkpoint {directory / str(at)} is damaged: {error}')
    raise RunError(notes[-1] if asked else f'no checkpoint in {directory} can be read: {notes[-1]}')


def _opened(run: str, saved: Mapping[str, Any], leaves: Mapping[str, Leaf], step: int, notes: list[str]) -> Opened:
    config, about = saved['config'], saved_config.about(saved)
    model = configs.base().model.to_dict() | config['model']  # a run may be older than a setting
    model['context'] = model.get('context') or config['seq_len']
    folder, scored, scale = epath.Path(rundir.tokenizer_folder(run)), about.output == 'scores', None
    try:
        scale = reward_scale.read(folder.parent, step) if scored else None
    except RunError as error:  # it was not evaluated yet
        notes.append(str(error))
    try:
        Tokenizer.load(folder)  # refuses what is damaged, by its path
        tokenizer = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        if about.output == 'text':  # else whoever opens what is written would take it for one that answers
            tokenizer.pop(TEMPLATE_FILE, None)
    except OSError as error:
        raise RunError(f'the tokenizer of {run} cannot be read: {error}') from error
    found = Opened(run, model, leaves, tokenizer, scored=scored, scale=scale, notes=tuple(notes))
    _expected(found, ModelConfig(**model))
    return found


def _open_base(saved: Mapping[str, Any]) -> Opened:
    """The model under an adapter. Raises UsageError if it is not what it was when the adapter was trained."""
    base = saved_config.base_of(saved)
    loading.check_digest(base, now := _parent(base.path))
    if (other := foreign.find(base.path)) is not None:
        return other
    return open_run(f'{split_run(base.path)[0]}@{now.step}')  # where it is damaged, one before it is another base


def _parent(run: str) -> Parent:
    """A run as what weights come from, by what its checkpoint says of itself; another form's model by what it holds."""
    if (other := foreign.find(run)) is not None:
        return Parent(run, 0, _digest(other))
    saved, step = rundir.read_config(run), checkpoint.locate(run)
    meta = checkpoint.read_meta(files.absolute(split_run(run)[0]) / 'checkpoints' / str(step))
    item, role = saved_config.weights_item(saved['config']), saved_config.about(saved).trains
    return Parent(run, step, checkpoint.saved_digest(meta, item, role))


def _digest(model: Opened) -> str:
    """`checkpoint.digest` of the weights of another form's model, float32, read a layer at a time."""
    sums = {}
    for name, shape in _expected(model, execution.model_config(foreign.config_of(model), training=False)).items():
        leaf, words = model.leaves[name], np.zeros(2, np.uint32)
        own = shape if leaf.layers is None else shape[1:]
        for i in range(leaf.layers or 1):
            x, padded = leaf.read(i), np.zeros(own, np.float32)
            padded[tuple(map(slice, x.shape))] = x
            words = words + checkpoint.checksum_of(padded, i * padded.size)
        sums[checkpoint.leaf_key(name.split('/'))] = [int(w) for w in words]
    return cache.fingerprint(sums)


def open_adapter(run: str) -> tuple[OpenedAdapter, Opened]:
    """(the adapter that 'DIR' or 'DIR@STEP' is, the model under it).

    Raises UsageError if it is none, and as `open_run`; RunError if it cannot be read.
    """
    saved = rundir.read_config(run)
    if saved_config.about(saved).adapter is None:
        raise UsageError(f'{run} is no adapter, it has all of its weights: convert it to a folder or a GGUF file')
    step = checkpoint.locate(run)
    path = files.absolute(split_run(run)[0]) / 'checkpoints' / str(step)
    try:
        own = _adapter(run, saved, _verified(path, saved))
    except (ValueError, FileNotFoundError) as error:
        raise RunError(f'checkpoint {path} is damaged: {error}') from error
    return own, _open_base(saved)


def _adapter(run: str, saved: Mapping[str, Any], own: Mapping[str, Leaf]) -> OpenedAdapter:
    """The adapter whose arrays these leaves are."""
    cfg, about = execution.model_config(saved['config'], training=False), saved_config.about(saved)
    assert about.adapter is not None
    scored = about.output == 'scores'
    tree = loading.abstract_adapter(
        about.adapter, loading.abstract_params(cfg, 'base'), cfg, saved['config'], scored=scored
    )
    is_weight, stacks, arrays = lambda x: isinstance(x, seam.Weight), {}, {}
    for path, weight in jax.tree.leaves_with_path(tree, is_leaf=is_weight):
        name = '/'.join(key.key for key in path)
        if is_weight(weight):
            stacks[name] = Stack(cfg.layers, functools.partial(_filled, weight, name, own))
        else:
            arrays[name] = own[name]
    return OpenedAdapter(run, saved_config.base_of(saved).path, stacks, arrays, scored=scored)


def _made_dense(saved: Mapping[str, Any], own: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The leaves of a run whose weights are quantized, those as float32."""
    about = saved_config.about(saved)
    cfg = execution.model_config(saved['config'], training=False)
    tree = loading.abstract_params(cfg, about.role, about.quantized)
    is_weight = lambda x: isinstance(x, seam.Weight)
    found = {}
    for path, weight in jax.tree.leaves_with_path(tree, is_leaf=is_weight):
        name = '/'.join(key.key for key in path)
        if is_weight(weight):
            read = lambda i, weight=weight, name=name: np.asarray(_dense(_filled(weight, name, own, i)))
            found[name] = Leaf(weight.shape, np.dtype(np.float32), cfg.layers, read)
        else:
            found[name] = own[name]
    return found


_dense: Any = jax.jit(seam.dense)


def _filled(weight: Any, name: str, own: Mapping[str, Leaf], layer: int) -> Any:
    return jax.tree.map_with_path(lambda path, x: own[f'{name}/{path[-1].name}'].read(layer), weight)


def _verified(path: epath.Path, saved: Mapping[str, Any]) -> dict[str, Leaf]:
    """The leaves of one checkpoint. Raises ValueError for what is missing or damaged, by name."""
    meta, leaves, item = checkpoint.read_meta(path), {}, saved_config.weights_item(saved['config'])
    inside = (item,) if meta['layout'] == 1 else (item, saved_config.about(saved).trains)
    store = _Store(path / 'state')
    for key in (k for k in meta['checksums'] if k.startswith(checkpoint.leaf_key(inside))):
        names = checkpoint.leaf_names(key)[len(inside) :]
        try:
            array = store.open('.'.join((*inside, *names)))
            words = sum(checkpoint.checksum_of(piece, at) for at, piece in _whole_pieces(array, stacked=len(names) > 1))
        except ValueError as error:  # tensorstore's, of whatever it finds wrong
            raise ValueError(f'{key} cannot be read ({str(error).splitlines()[0][:160]})') from error
        if [int(w) for w in np.asarray(words, np.uint32)] != meta['checksums'][key]:
            raise ValueError(f'checksum of {key} is wrong')
        leaves['/'.join(names)] = _leaf(array, names, saved['config']['model']['vocab_size'])
    if not leaves:
        raise ValueError(f'{item} is not in it')
    return leaves


class _Store:
    """The arrays of a checkpoint's state, however Orbax was told to keep them."""

    def __init__(self, path: epath.Path) -> None:
        told = json.loads((path / '_METADATA').read_text())
        if not isinstance(told, dict):
            raise ValueError('state/_METADATA is no object')
        self._driver = 'zarr3' if told.get('use_zarr3') else 'zarr'
        self._url = _url(path)
        self._ocdbt = (path / 'manifest.ocdbt').exists()
        self._context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})

    def open(self, name: str) -> Any:
        kvstore = {'driver': 'ocdbt', 'base': self._url, 'path': f'{name}/'} if self._ocdbt else f'{self._url}{name}/'
        spec = {'driver': self._driver, 'kvstore': kvstore, 'recheck_cached_data': 'open'}
        return ts.open(spec, read=True, open=True, context=self._context).result()


def _url(path: epath.Path) -> str:
    text = os.fspath(path)
    return f'{text}/' if '://' in text else f'file://{text}/'


def _leaf(array: Any, names: Sequence[str], vocab_size: int) -> Leaf:
    """A leaf that reads itself, a layer at a time, without the vocabulary's padding."""
    stacked = len(names) > 1
    own = array.shape[1:] if stacked else array.shape
    letters = sharding.dims_of(names[-1]) or ' ' * len(own)  # none: a number, or a field of a weight
    cut = tuple(slice(vocab_size if letter == 'V' else None) for letter in letters)
    layers = int(array.shape[0]) if stacked else None

    def read(layer: int) -> np.ndarray:
        return np.asarray(array[(layer, *cut) if stacked else cut or ...].read().result())

    shape = tuple(min(n, vocab_size) if part.stop else n for n, part in zip(own, cut, strict=True))
    return Leaf(tuple(map(int, shape)), np.dtype(array.dtype.numpy_dtype), layers, read)


def _whole_pieces(array: Any, *, stacked: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(elements before it, piece) of an array with its padding, a layer or some rows at a time."""
    array = array if array.shape else array[ts.newaxis]
    row = math.prod(array.shape[1:])
    rows = 1 if stacked else _rows(array.shape, array.dtype.numpy_dtype)
    for at in range(0, array.shape[0], rows):
        yield at * row, np.asarray(array[at : min(at + rows, array.shape[0])].read().result())


def _rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The number of rows of an array of this shape that fit a chunk."""
    return max(1, min(shape[0], CHUNK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize)))


def load(opened: Opened) -> loading.Model:
    """A model of any form on the current mesh, its weights straight to their devices: no run is written.

    Raises UsageError if it has settings that we do not know, or is no model of its settings.
    """
    config = foreign.config_of(opened)
    cfg = execution.model_config(config, training=False)
    params = placed.arrays(opened, loading.abstract_params(cfg, foreign.about_of(opened).role))
    saved = {'config': config.to_dict(), 'about': foreign.about_of(opened)._asdict()}
    return loading.Model(params, cfg, tokenizer_files.loaded(opened.tokenizer), saved, 0)


# ---- writing ----


def write_run(opened: Opened, workdir: epath.PathLike, *, quantize: str | None = None) -> None:
    """Writes a run with one checkpoint, 0, in the dtypes that the leaves have, or the matrices of its layers quantized
    (`lm.model.quantized`); it appears at once or not at all.

    Raises UsageError if `workdir` exists, or the model has settings that we do not know; RunError if it cannot be
    written.
    """
    workdir = files.absolute(workdir)
    if workdir.exists():
        raise UsageError(f'{workdir} exists: name a new folder')
    config = foreign.config_of(opened)
    with files.new_folder(workdir) as made:
        foreign.write_tokenizer(opened, made / 'tokenizer')
        fingerprint = Tokenizer.load(made / 'tokenizer').fingerprint
        about = foreign.about_of(opened)._replace(quantized=quantize)
        more = {'about': about._asdict(), 'converted_from': opened.where}
        rundir.write_config(made, config, {}, data=None, tokenizer=fingerprint, **more)
        if opened.scored:  # scores without a scale are taken as they are
            reward_scale.write(made, 0, reward_scale.Scale(*(opened.scale or (0.0, 1.0))))
        _write_checkpoint(opened, execution.model_config(config, training=False), made / 'checkpoints' / '0', quantize)


def write_adapter_run(adapter: OpenedAdapter, base: str, workdir: epath.PathLike) -> None:
    """Writes a run that is an adapter over the run `base`, with one checkpoint, 0; it appears at once or not at all.

    Raises UsageError if `workdir` exists, RunError if it cannot be written.
    """
    workdir, under = files.absolute(workdir), rundir.read_config(base)
    if workdir.exists():
        raise UsageError(f'{workdir} exists: name a new folder')
    about = saved_config.about(under)._replace(adapter='lora')
    about = about._replace(data='pairs', output='scores') if adapter.scored else about
    stage = 'reward' if adapter.scored else 'sft'
    config = configs.base({'reward': settings.Reward, 'sft': settings.Sft}[stage])
    config.model.update({key: value for key, value in under['config']['model'].items() if key in config.model})
    config.stage, config.steps, config.init_from, config.seq_len = stage, 0, base, under['config']['seq_len']
    config.lora.update(_lora_of(adapter))
    cfg = execution.model_config(config, training=False)
    wanted = loading.abstract_adapter('lora', loading.abstract_params(cfg, 'base'), cfg, config, scored=adapter.scored)
    tree = jax.tree.map_with_path(functools.partial(_placed, adapter, config), wanted)
    parent = _parent(base)
    with files.new_folder(workdir) as made:
        tokenizer = epath.Path(rundir.tokenizer_folder(base))
        for path in tokenizer.iterdir():
            files.write_bytes(made / 'tokenizer' / path.name, path.read_bytes())
        more = {'about': about._asdict(), 'converted_from': adapter.where, 'data': None}
        rundir.write_config(made, config, {'base': parent}, tokenizer=under.get('tokenizer'), **more)
        if adapter.scored:
            reward_scale.write(made, 0, reward_scale.Scale(0.0, 1.0))
        with checkpoint.Writer(made / 'checkpoints', keep=1) as writer:
            writer.save(0, {ITEM: {about.trains: tree}})


def _lora_of(adapter: OpenedAdapter) -> dict[str, Any]:
    """The settings of the group `lora` under which a run has these factors, but for what multiplies B: `_placed`."""
    first = {name.removeprefix('layers/').rpartition('_')[0]: stack.read(0) for name, stack in adapter.stacks.items()}
    ranks = {name: weight.a.shape[-1] for name, weight in first.items()}
    one = next(iter(first.values()))
    return {
        'rank': max(ranks.values()), 'targets': ','.join(f'{name}:{rank}' for name, rank in ranks.items()),
        'alpha': float(one.scale * one.a.shape[-1]), 'dora': one.magnitude is not None,
    }  # fmt: skip


def _placed(adapter: OpenedAdapter, config: Config, path: Any, wanted: Any) -> Any:
    """One array of an adapter on the current mesh. What multiplies the product in its file and not by the settings is
    in B."""
    if len(path) == 1:
        return jax.device_put(adapter.arrays[path[0].key].read(0), wanted.sharding)
    stack, field = adapter.stacks[f'{path[0].key}/{path[1].key}'], path[2].name

    def layer(i: int) -> np.ndarray:
        weight = stack.read(i)
        by = weight.scale * weight.a.shape[-1] / config.lora.alpha if field == 'b' else 1.0
        return np.asarray(vars(weight)[field] * np.float32(by))

    return jax.device_put(np.stack([layer(i) for i in range(stack.layers)]), wanted.sharding)


def _write_checkpoint(opened: Opened, cfg: ModelConfig, path: epath.Path, quantize: str | None) -> None:
    """Writes a parameter at a time, of all layers, with Orbax's partial saves."""
    from orbax.checkpoint.experimental import v1 as orbax  # takes seconds

    context = orbax.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    expected, inside = _expected(opened, cfg), (ITEM, foreign.about_of(opened).role)
    sums, dtypes = {}, {}

    def save(tree: Any) -> None:
        for place, array in jax.tree.leaves_with_path(tree):
            key = jax.tree_util.keystr(place)
            sums[key], dtypes[key] = [int(w) for w in checkpoint.checksum_of(array, 0)], array.dtype.name
        orbax.partial.save(path, jax.device_put(tree))  # of what numpy has, Orbax keeps one copy more

    with context, _told(path):
        for name, shape in progress.over(expected.items(), 'tensors'):
            save(_nested((*inside, *name.split('/')), _stacked(opened, name, shape, quantize)))
        orbax.partial.finalize(path)
    meta = {'layout': checkpoint.LAYOUT, 'step': 0, 'checksums': sums, 'dtypes': dtypes}
    files.write_text(path / 'meta' / 'metadata', json.dumps(checkpoint.sealed(meta)))


def _nested(names: Sequence[str], leaf: Any) -> Any:
    """Dicts in dicts down to a leaf."""
    return functools.reduce(lambda tree, name: {name: tree}, reversed(names), leaf)


def _stacked(opened: Opened, name: str, shape: tuple[int, ...], quantize: str | None) -> Any:
    """A parameter of this shape, with layers and padding, or one that is quantized."""
    leaf = opened.leaves[name]
    if quantize is not None and leaf.layers is not None and parameters.row(name).matrix:
        layers = [_quantized(opened, name, i, quantize) for i in range(leaf.layers)]
        return jax.tree.map(lambda *x: np.stack(x), *layers)
    found = np.zeros(shape, leaf.dtype)
    for i, into in enumerate([found] if leaf.layers is None else found):
        x = leaf.read(i)
        into[tuple(map(slice, x.shape))] = x  # what the vocabulary is padded with stays 0
    return found


def _quantized(opened: Opened, name: str, layer: int, kind: str) -> Any:
    """One layer's matrix quantized, on the host. Raises UsageError for numbers that are not finite."""
    w, row = opened.leaves[name].read(layer), parameters.row(name)
    if not np.isfinite(w).all():
        raise UsageError(
            f'{opened.where}: {name} of layer {layer} has numbers that are not finite: nothing is quantized'
        )
    return jax.device_get(_quantize(w, row.dims, row.contracted, kind))


_quantize: Any = jax.jit(quantized.quantize, static_argnums=(1, 2, 3))


def _expected(opened: Opened, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape with layers and padding} of what the model needs. Raises RunError if that is not what is there."""
    role = foreign.about_of(opened).role
    wanted = {name: x.shape for name, x in by_path(loading.shapes(cfg, role)).items()}
    if odd := sorted(set(wanted) ^ set(opened.leaves)):
        what = 'lacks' if odd[0] in wanted else 'has'
        raise RunError(f'{opened.where} {what} {odd[0]}, unlike a model of its settings: it cannot be converted')
    for name, x in by_path(loading.shapes(dataclasses.replace(cfg, vocab_multiple=1), role)).items():
        leaf = opened.leaves[name]
        own = (x.shape[0], x.shape[1:]) if name.startswith('layers/') else (None, x.shape)
        if (leaf.layers, leaf.shape) != own:
            raise RunError(f'{opened.where}: {name} has the shape {leaf.layers} × {leaf.shape}, not {wanted[name]}')
    return wanted


@contextlib.contextmanager
def _told(path: epath.Path) -> Iterator[None]:
    """Turns what TensorStore could not write into a RunError that says why."""
    try:
        yield
    except ValueError as error:
        why = str(error).splitlines()[0].split(' [')[0].rpartition('": ')[2]
        raise RunError(f'{path} cannot be written ({why})') from error
