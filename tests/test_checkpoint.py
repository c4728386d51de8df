"""Checkpoints: what was saved comes back on any mesh, and damage is noticed, named and passed by."""

import json
import os
import random
import resource
import shutil
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.errors import RunError, UsageError
from lm.runs import checkpoint
from lm.runs.checkpoint import Writer

MESHES = {'fsdp8': {'fsdp': 8}, 'data2-fsdp2-tensor2': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'seq8': {'seq': 8}}


def make_tree(seed: int = 0):
    """Arrays of the kinds that a state has, on the current mesh."""
    key = jax.random.key(seed)
    params = {
        'embed_VD': jax.random.normal(key, (1024, 64)),
        'layers': {'wq_DNH': jax.random.normal(key, (2, 32, 4, 8))},
    }
    where = sharding.shardings(jax.sharding.get_mesh(), sharding.param_specs(params))
    params = jax.device_put(params, where)
    return {
        'step': jnp.int32(seed), 'trainable': params, 'opt': {'mu': jax.tree.map(lambda x: x * 0.1, params)},
        'rng': jax.random.key_data(key),
    }  # fmt: skip


def numpy(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


def equal(a, b) -> bool:
    same = lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes()
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def mesh8():
    with sharding.use_mesh({'fsdp': 8}) as mesh:
        yield mesh


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A folder with checkpoints 1, 2, 3; and what they hold."""
    folder = tmp_path_factory.mktemp('written') / 'checkpoints'
    with sharding.use_mesh({'fsdp': 8}), Writer(folder, keep=3) as writer:
        for step in (1, 2, 3):
            writer.save(step, make_tree(step))
            writer.wait()
        return folder, {step: numpy(make_tree(step)) for step in (1, 2, 3)}


@pytest.fixture
def three(written, tmp_path, mesh8):
    """A copy of them to damage: (folder, what they hold, tree of shapes to read into)."""
    folder, trees = written
    shutil.copytree(folder, tmp_path / 'checkpoints')
    return tmp_path / 'checkpoints', trees, checkpoint.abstract(make_tree())


def newest(folder, abstract, **options):
    """(step, tree as numpy, what was said) of the newest that holds."""
    said = []
    step, tree, _ = checkpoint.read_newest(folder, abstract, warn=said.append, **options)
    return step, numpy(tree), said


def data_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)


def arrays(checkpoint: Path) -> Path:
    """The file that holds most of the arrays."""
    return max(data_files(checkpoint), key=lambda p: p.stat().st_size)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


# ---- whole ones ----


@pytest.mark.parametrize('shape', MESHES.values(), ids=list(MESHES))
def test_any_mesh_reads_what_another_wrote(written, shape):
    folder, trees = written
    with sharding.use_mesh(shape):
        abstract = checkpoint.abstract(make_tree())
        step, tree, meta = checkpoint.read_newest(folder, abstract, warn=pytest.fail)
    assert (step, meta['step']) == (3, 3)
    assert equal(numpy(tree), trees[3])
    assert all(x.sharding == a.sharding for x, a in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True))


def test_checksums_do_not_depend_on_the_mesh(mesh):
    on_this = checkpoint.checksums(make_tree())
    with sharding.use_mesh({}, jax.devices()[:1]):
        assert checkpoint.checksums(make_tree()) == on_this


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'int8', 'uint8', 'int32', 'uint32', 'bool'])
def test_any_flipped_bit_changes_a_checksum(dtype, one_device):
    x = np.asarray(jnp.arange(60).reshape(3, 4, 5) % 2 if dtype == 'bool' else jnp.arange(60).reshape(3, 4, 5)).astype(
        dtype
    )
    whole = checkpoint.checksums({'x': jnp.asarray(x)})
    draw = random.Random(0)
    for _ in range(20):
        raw = bytearray(x.tobytes())
        raw[draw.randrange(len(raw))] ^= 1 if dtype == 'bool' else 1 << draw.randrange(8)
        assert checkpoint.checksums({'x': jnp.asarray(np.frombuffer(raw, x.dtype).reshape(x.shape))}) != whole
    swapped = x.copy()
    swapped[0, 0, 0], swapped[2, 3, 4] = x[2, 3, 4], x[0, 0, 0]
    assert checkpoint.checksums({'x': jnp.asarray(swapped)}) != whole
    assert checkpoint.checksums({'x': jnp.asarray(x)}) == whole


def test_a_part_of_the_tree_can_be_read_alone(three):
    folder, trees, abstract = three
    _, tree, said = newest(folder, {'trainable': abstract['trainable']})
    assert not said and equal(tree, {'trainable': trees[3]['trainable']})


def test_what_is_saved_is_the_state_at_the_save(tmp_path, mesh8):
    """The step that follows donates the buffers while they are still being written."""
    n = 1 << 20
    where = jax.NamedSharding(mesh8, jax.P('fsdp'))
    step = jax.jit(lambda x: {'x': x['x'] * 1.5 + 1}, donate_argnums=0)
    tree = {'x': jax.device_put(jnp.arange(n, dtype=jnp.float32), where)}
    abstract, at = checkpoint.abstract(tree), {}
    with Writer(tmp_path / 'checkpoints', keep=9) as writer:
        for i in range(1, 5):
            tree = step(tree)
            at[i] = np.array(tree['x'])
            writer.save(i, tree)
            for _ in range(5):
                tree = step(tree)
    for i, x in at.items():
        got, _ = checkpoint.read(tmp_path / 'checkpoints' / str(i), abstract)
        assert np.array_equal(np.asarray(got['x']), x)


def test_the_newest_stay(tmp_path, mesh8):
    with Writer(tmp_path / 'c', keep=2) as writer:
        for step in (2, 4, 6, 8):
            writer.save(step, make_tree(step))
    assert checkpoint.listed(tmp_path / 'c') == [8, 6]
    with Writer(tmp_path / 'c', keep=1) as writer:
        writer.save(10, make_tree(10))
    assert checkpoint.listed(tmp_path / 'c') == [10]


def test_there_is_none(tmp_path, mesh8):
    (tmp_path / 'c').mkdir()
    for folder in (tmp_path / 'c', tmp_path / 'no'):
        assert checkpoint.read_newest(folder, {}, warn=pytest.fail) is None


# ---- damaged ones ----


def test_every_flipped_byte_is_noticed_or_harmless(three):
    """Whatever is read is what was saved, wherever in the newest checkpoint a bit flips."""
    folder, trees, abstract = three
    draw, found = random.Random(1), {2: 0, 3: 0}
    files = data_files(folder / '3')
    for path in files * 2 + draw.choices(files, k=8):
        whole = path.read_bytes()
        flip(path, draw.randrange(len(whole)), draw.randrange(8))
        step, tree, said = newest(folder, abstract)
        assert equal(tree, trees[step]), path
        assert len(said) == (step == 2) and all(f'{folder}/3 is damaged' in line for line in said)
        found[step] += 1
        path.write_bytes(whole)
    assert found[2] > 5, found
    assert newest(folder, abstract)[0] == 3


def test_flips_within_the_arrays_are_noticed(three):
    """Orbax reads these without a word: the checksums alone notice."""
    folder, trees, abstract = three
    path = arrays(folder / '3')
    whole, noticed = path.read_bytes(), 0
    for part in range(1, 10):
        flip(path, len(whole) * part // 10, part % 8)
        step, tree, _ = newest(folder, abstract)
        assert equal(tree, trees[step])
        noticed += step == 2
        path.write_bytes(whole)
    assert noticed >= 5


def test_the_checksums_are_what_notices(three, monkeypatch):
    """With checksums that always agree, some damage passes: the two tests above can fail."""
    folder, trees, abstract = three
    monkeypatch.setattr(checkpoint, 'checksums', lambda tree: {})
    path = arrays(folder / '3')
    whole, passed = path.read_bytes(), 0
    for part in range(1, 10):
        flip(path, len(whole) * part // 10, part % 8)
        step, tree, _ = newest(folder, abstract)
        passed += not equal(tree, trees[step])
        path.write_bytes(whole)
    assert passed


@pytest.mark.parametrize('part', ['meta/metadata', 'arrays'])
@pytest.mark.parametrize('left', [0, 0.5, 0.9])
def test_a_truncated_file_is_noticed(three, part, left):
    folder, trees, abstract = three
    path = folder / '3' / part if '/' in part else arrays(folder / '3')
    os.truncate(path, int(path.stat().st_size * left))
    step, tree, said = newest(folder, abstract)
    assert step == 2 and equal(tree, trees[2])
    assert len(said) == 1 and f'{folder}/3 is damaged' in said[0] and 'the one before' in said[0]


@pytest.mark.parametrize('name', ['state', 'meta', 'state/manifest.ocdbt'])
def test_a_missing_part_is_noticed(three, name):
    folder, trees, abstract = three
    path = folder / '3' / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    step, tree, said = newest(folder, abstract)
    assert step == 2 and equal(tree, trees[2]) and len(said) == 1


def test_what_only_looks_like_a_step(three):
    folder, trees, abstract = three
    (folder / '9').mkdir()
    (folder / '8').write_text('a file')
    (folder / '0012').mkdir()
    (folder / '7.orbax-checkpoint-tmp-123').mkdir()
    (folder / 'notes').mkdir()
    step, tree, said = newest(folder, abstract, set_aside=True)
    assert step == 3 and equal(tree, trees[3])
    assert len(said) == 2 and '/9 is damaged' in said[0] and '/8 is damaged' in said[1]
    assert (folder / '9.damaged').exists() and (folder / '8.damaged').exists()


@pytest.mark.parametrize('folder', ['orbax', 'ours'])
def test_a_read_that_orbax_gave_up_is_not_told_twice(folder):
    """Its coroutine is destroyed some time later, where nobody can catch what it raises then."""
    found = {}
    exec(compile('async def read(): raise OSError', f'/lib/{folder}/checkpoint/read.py', 'exec'), found)
    coroutine = found['read']()
    coroutine.close()
    for error, told in ((OSError('truncated'), folder == 'orbax'), (RuntimeError('Event loop is closed'), True)):
        assert checkpoint._told_by_us(types.SimpleNamespace(object=coroutine, exc_value=error)) == told


def test_a_damaged_step_can_be_saved_again(three):
    folder, trees, abstract = three
    for again in range(2):
        (folder / '3' / 'meta' / 'metadata').unlink()
        assert newest(folder, abstract, set_aside=True)[0] == 2
        with Writer(folder, keep=3) as writer:
            writer.save(3, make_tree(3))
        step, tree, said = newest(folder, abstract)
        assert (step, said) == (3, []) and equal(tree, trees[3]), again
    assert {'3.damaged', '3.damaged.1'} <= {p.name for p in folder.iterdir()}


def test_all_damaged_is_an_error_that_stays_one(three):
    """Asked again, it must not take the run for a new one and begin at step 0."""
    folder, _, abstract = three
    for step in (1, 2, 3):
        (folder / str(step) / 'meta' / 'metadata').write_bytes(b'')
    for _ in range(2):
        with pytest.raises(RunError, match=f'none of the 3 checkpoints in {folder} can be read'):
            newest(folder, abstract, set_aside=True)


def test_a_newer_layout_is_refused(three, monkeypatch):
    folder, _, abstract = three
    monkeypatch.setattr(checkpoint, 'LAYOUT', checkpoint.LAYOUT + 1)
    with Writer(folder, keep=3) as writer:
        writer.save(4, make_tree(4))
    monkeypatch.undo()
    for look in (lambda: newest(folder, abstract), lambda: checkpoint.check_layout(folder)):
        with pytest.raises(UsageError, match='4 has layout 3, this version reads up to 2: use a newer lm'):
            look()


def test_a_rotten_layout_is_damage_and_not_a_newer_layout(three):
    folder, _, abstract = three
    path = folder / '3' / 'meta' / 'metadata'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'layout': 9}))
    checkpoint.check_layout(folder)
    step, _, said = newest(folder, abstract)
    assert step == 2 and 'seal' in said[0]


def test_what_a_kill_left_is_cleaned(three):
    folder, _, _ = three
    shutil.copytree(folder / '3', folder / '4.orbax-checkpoint-tmp')
    (folder / '5.orbax-checkpoint-tmp').mkdir()
    (folder / '6.orbax-checkpoint-tmp').mkdir()
    with Writer(folder, keep=3) as writer:
        writer.save(5, make_tree(5))
    assert not any('tmp' in p.name for p in folder.iterdir())
    step, tree, said = newest(folder, checkpoint.abstract(make_tree()))
    assert (step, said) == (5, []) and equal(tree, numpy(make_tree(5)))


# ---- by name ----


def test_a_step_by_name(three):
    folder, trees, abstract = three
    run = folder.parent
    step, tree, _ = checkpoint.find(f'{run}@2', abstract, warn=pytest.fail)
    assert step == 2 and equal(numpy(tree), trees[2])
    assert checkpoint.find(str(run), abstract, warn=pytest.fail)[0] == 3
    assert (checkpoint.locate(str(run)), checkpoint.locate(f'{run}@1')) == (3, 1)
    for name in ('7', 'x', '', '-1'):
        with pytest.raises(UsageError, match=r'has no checkpoint .*\(it has: 1, 2, 3\)'):
            checkpoint.find(f'{run}@{name}', abstract, warn=pytest.fail)
    with pytest.raises(UsageError, match='has no checkpoint: train or convert it first'):
        checkpoint.find(str(run / 'no'), abstract, warn=pytest.fail)


def test_a_damaged_step_by_name_has_no_stand_in(three):
    folder, _, abstract = three
    (folder / '3' / 'meta' / 'metadata').unlink()
    with pytest.raises(RunError, match='@3 is damaged'):
        checkpoint.find(f'{folder.parent}@3', abstract, warn=pytest.fail)
    said = []
    assert checkpoint.find(str(folder.parent), abstract, warn=said.append)[0] == 2
    assert said and (folder / '3').exists()  # a reader renames nothing


# ---- the disk ----


def test_a_save_that_fails_is_told_and_harms_nothing(three):
    """The system refuses to write; the error of a write in the background comes with the next call."""
    folder, trees, abstract = three
    handler, (soft, hard) = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.raises(RunError, match=f'a checkpoint in {folder} could not be written'),
            Writer(folder, keep=3) as writer,
        ):
            writer.save(4, make_tree(4))
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    step, tree, said = newest(folder, abstract)
    assert (step, said) == (3, []) and equal(tree, trees[3])
    with Writer(folder, keep=3) as writer:
        writer.save(4, make_tree(4))
    assert newest(folder, abstract)[0] == 4
