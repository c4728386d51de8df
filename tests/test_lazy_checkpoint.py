"""Runs at rest: written a piece at a time they are what Orbax restores, and what is damaged is passed by."""

import dataclasses
import math
import resource
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from lm import config as configs
from lm import sharding
from lm.data.chat_template import DEFAULT
from lm.data.tokenizer import train_tokenizer
from lm.errors import RunError, UsageError
from lm.evals import agreement
from lm.interop.opened import Leaf, Opened
from lm.model.config import ModelConfig
from lm.runs import checkpoint, lazy_checkpoint, loading

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope='module')
def words():
    return train_tokenizer(agreement.TEXT.splitlines(), vocab_size=384)


@pytest.fixture
def make(words):
    """make(scored=…, **model.*) -> a random model, its vocabulary padded in memory; bfloat16 but for the norms."""

    def made(*, scored=False, **changed):
        config = configs.base()
        shape = {'vocab_size': 390, 'dim': 32, 'layers': 3, 'heads': 4, 'kv_heads': 2, 'head_dim': 8, 'ffn_dim': 48}
        config.model.update(shape | {'tied': False, 'context': 64} | changed)
        model = dict(config.model)
        shapes = loading.shapes(ModelConfig(**model), 'reward' if scored else 'policy')
        flat = jax.tree_util.tree_leaves_with_path(shapes)
        draw = np.random.default_rng(0)
        leaves = {}
        for path, x in flat:
            name, dtype = '/'.join(k.key for k in path), np.dtype('float32') if 'norm' in path[-1].key else BFLOAT16
            letters, stacked = sharding.dims_of(name), name.startswith('layers/')
            own = tuple(390 if d == 'V' else n for d, n in zip(letters, x.shape[1 if stacked else 0 :], strict=True))
            values = (0.2 * draw.standard_normal(((x.shape[0] if stacked else 1), *own))).astype(dtype)
            leaves[name] = Leaf(own, dtype, x.shape[0] if stacked else None, lambda i, values=values: values[i, ...])
        saved = {**words.saved, 'chat_template.jinja': DEFAULT.encode()}
        return Opened('a random one', model, leaves, saved, scored=scored)

    return made


@pytest.mark.parametrize('scored', [False, True], ids=['plain', 'reward'])
def test_what_is_written_in_pieces_is_what_orbax_restores_on_a_mesh(make, monkeypatch, tmp_path, scored):
    monkeypatch.setattr(checkpoint, 'PIECE', 512)
    source = make(scored=scored)
    lazy_checkpoint.write_run(source, tmp_path / 'run')
    with sharding.use_mesh({'fsdp': 2, 'tensor': 4}):
        model = loading.load(str(tmp_path / 'run'), warn=pytest.fail)
        params = jax.device_get(model.params)
    assert model.config['stage'] == ('reward' if scored else 'sft') and model.config['seq_len'] == 64
    for name, leaf in source.leaves.items():
        found = params['layers'][name.removeprefix('layers/')] if leaf.layers else params[name]
        wanted = np.stack([leaf.read(i) for i in range(leaf.layers)]) if leaf.layers else leaf.read(0)
        padded = [(0, n - m) for n, m in zip(found.shape, wanted.shape, strict=True)]
        wanted = np.pad(wanted, padded) if padded else wanted
        np.testing.assert_array_equal(found, wanted.astype(np.float32), err_msg=name)
    again = lazy_checkpoint.open_run(str(tmp_path / 'run'))
    assert again.model == source.model and again.tokenizer.items() >= source.tokenizer.items()
    assert {n: (x.shape, x.dtype, x.layers) for n, x in again.leaves.items()} == {
        n: (x.shape, x.dtype, x.layers) for n, x in source.leaves.items()
    }
    assert agreement.compare(source, again, tokens=40).largest == 0


def test_a_damaged_checkpoint_is_passed_by_and_told(make, tmp_path):
    with sharding.use_mesh({}, jax.devices()[:1]):
        lazy_checkpoint.write_run(make(), tmp_path / 'run')
        params = loading.load(str(tmp_path / 'run'), warn=pytest.fail).params
        with checkpoint.Writer(tmp_path / 'run' / 'checkpoints', keep=3) as writer:  # as training goes on from it
            writer.save(1, {'trainable': {'policy': params}})
            writer.save(2, {'trainable': {'policy': jax.tree.map(lambda x: x + 1, params)}})
    folder = tmp_path / 'run' / 'checkpoints' / '2' / 'state'
    data = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    opened = lazy_checkpoint.open_run(str(tmp_path / 'run'))
    np.testing.assert_array_equal(opened.leaves['final_norm_D'].read(0), params['final_norm_D'])
    (note,) = opened.notes
    assert 'checkpoints/2 is damaged' in note
    with pytest.raises(RunError, match='checkpoints/2 is damaged'):
        lazy_checkpoint.open_run(f'{tmp_path / "run"}@2')
    assert not lazy_checkpoint.open_run(f'{tmp_path / "run"}@0').notes


def test_a_damaged_tokenizer_is_named_by_its_path(make, tmp_path):
    lazy_checkpoint.write_run(make(), tmp_path / 'run')
    path = tmp_path / 'run' / 'tokenizer' / 'tokenizer.model'
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises(UsageError, match=f'the tokenizer {path} .*damaged: restore it'):
        lazy_checkpoint.open_run(str(tmp_path / 'run'))


def test_writing_holds_one_parameter_and_opening_one_layer_of_it(make, tmp_path):
    """By what numpy allocates; the whole is 12 layers."""
    source = make(layers=12, dim=256, ffn_dim=1024)
    lazy_checkpoint.write_run(make(), tmp_path / 'first')  # with what Orbax imports
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    layer = sum(size(leaf) for leaf in source.leaves.values() if leaf.layers)
    largest = max(size(leaf) * (leaf.layers or 1) for leaf in source.leaves.values())
    tracemalloc.start()
    try:
        lazy_checkpoint.write_run(source, tmp_path / 'run')
        assert tracemalloc.get_traced_memory()[1] < 2.5 * largest
        tracemalloc.reset_peak()
        lazy_checkpoint.open_run(str(tmp_path / 'run'))
        assert tracemalloc.get_traced_memory()[1] < 4 * layer
    finally:
        tracemalloc.stop()


def test_a_leaf_is_read_a_layer_at_a_time(make, monkeypatch, tmp_path):
    sizes = []

    class Counted:
        """An array of TensorStore's that notes how much of it is asked for."""

        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __getitem__(self, index):
            return Counted(self.array[index])

        def read(self):
            sizes.append(math.prod(self.shape))
            return self.array.read()

    lazy_checkpoint.write_run(make(), tmp_path / 'run')
    plain = lazy_checkpoint._Store.open
    monkeypatch.setattr(lazy_checkpoint._Store, 'open', lambda store, name: Counted(plain(store, name)))
    opened = lazy_checkpoint.open_run(str(tmp_path / 'run'))
    assert sizes
    for leaf in opened.leaves.values():
        sizes.clear()
        leaf.read((leaf.layers or 1) - 1)
        assert sizes == [math.prod(leaf.shape)]


@pytest.mark.parametrize('change', ['lacks', 'has', 'shape', 'setting'])
def test_what_does_not_fit_together_is_one_line_and_writes_nothing(make, tmp_path, change):
    source = make()
    leaves, model = dict(source.leaves), dict(source.model)
    odd = leaves['final_norm_D']
    if change == 'lacks':
        del leaves['final_norm_D']
    if change == 'has':
        leaves['score_D'] = odd
    if change == 'shape':
        leaves['final_norm_D'] = odd._replace(shape=(31,))
    if change == 'setting':
        model['nonesuch'] = 1
    with pytest.raises(UsageError if change == 'setting' else RunError, match='a random one'):
        lazy_checkpoint.write_run(dataclasses.replace(source, leaves=leaves, model=model), tmp_path / 'run')
    assert not list(tmp_path.iterdir())
    lazy_checkpoint.write_run(source, tmp_path / 'run')
    with pytest.raises(UsageError, match='exists'):
        lazy_checkpoint.write_run(source, tmp_path / 'run')


def test_a_full_disk_is_one_line_and_leaves_nothing(make, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(RunError, match=r'0 cannot be written \(.*File too large') as caught:
            lazy_checkpoint.write_run(make(), tmp_path / 'run')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())
