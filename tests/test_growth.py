"""The batch that grows: every row once and in order, exact weights, no work for what is not there, exact resuming."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from running import lines, measured

from lm import config as configs
from lm import main as lm_main
from lm.data.growth import Growth
from lm.data.pipeline import batches, mix
from lm.data.prepare import prepare
from lm.errors import UsageError
from lm.stages import runner
from lm.training import step as training


@pytest.mark.parametrize(('microbatches', 'steps'), [(4, 10), (3, 2), (8, 4), (5, 1), (4, 0), (1, 5)])
def test_the_batch_grows_evenly_and_rows_follow_each_other(microbatches, steps):
    growth = Growth(2, microbatches, steps)
    counts = [growth.count(i) for i in range(steps + 5)]
    assert counts[0] == (1 if steps else microbatches) and counts[steps:] == [microbatches] * 5
    assert np.all(np.diff(counts) >= 0) and (steps < microbatches or np.max(np.diff(counts)) <= 1)
    assert [growth.first(i + 1) - growth.first(i) for i in range(steps + 5)] == [2 * n for n in counts]
    for i in range(steps + 5):
        assert growth.steps_in(growth.first(i)) == growth.steps_in(growth.first(i + 1) - 1) == i


@pytest.mark.parametrize('hosts', [1, 2])
def test_batches_have_each_row_once_in_whole_microbatches(lab, hosts):
    """And are those of the plan whatever step is asked for first, and however many hosts share a batch."""
    prepared = prepare(mixture=lab.mixture, vocab_size=300, tokenizer=None, heldout=0.1, progress=print)
    growth, n = Growth(2, 4, 6), 4
    mixture = mix(prepared, seq_len=32, seed=0)
    plain = batches(mixture, batch_size=8, start=0)
    expected = np.concatenate([next(plain)['tokens_BT'] for _ in range(6)])

    def batch(step):
        parts = [range(h * 8 // hosts, (h + 1) * 8 // hosts) for h in range(hosts)]
        found = [next(batches(mixture, batch_size=8, start=step, growth=growth, rows=rows)) for rows in parts]
        return {name: np.concatenate([f[name] for f in found]) for name in found[0]}

    seen = []
    for step in range(8):
        got, count = batch(step), growth.count(step)
        real = np.arange(8) % n < count
        assert np.all(got['weights_BT'][~real] == 0) and np.all(got['segments_BT'][~real] == 0)
        assert np.all(got['weights_BT'][real].sum(1) > 0)
        seen.append(got['tokens_BT'][real])
    seen = np.concatenate(seen)
    np.testing.assert_array_equal(seen, expected[: len(seen)])


def accumulated(counts, batch, microbatches=4):
    """(the trainable after a step, its metrics) of a loss that is a weighted mean."""
    terms = lambda models, part, key: ({'fit': jnp.sum(part['weights_B'] * (models['policy'] - part['x_B']) ** 2)}, {})
    loss = training.Loss(terms, lambda b: {'fit': jnp.sum(b['weights_B'])}, {'fit': 1.0})
    optimizer = optax.sgd(0.1)
    step = training.make_step(loss, optimizer, clip=None, microbatches=microbatches, counts=counts)
    return jax.device_get(jax.jit(step)(training.create({'policy': jnp.float32(1)}, {}, optimizer, 0), batch))


def test_a_step_of_fewer_microbatches_is_one_of_a_smaller_batch_and_does_not_look_at_the_rest():
    x_B, weights_B = np.arange(8, dtype=np.float32), np.array([1, 2, 0, 0, 1, 1, 0, 0], np.float32)
    (state, metrics) = accumulated(np.array([2, 4], np.int32), {'x_B': x_B, 'weights_B': weights_B})
    own = np.arange(8) % 4 < 2
    alone, expected = accumulated(None, {'x_B': x_B[own], 'weights_B': weights_B[own]}, 2)
    np.testing.assert_allclose(state.trainable['policy'], alone.trainable['policy'], rtol=1e-6)
    assert metrics['fit'] == pytest.approx(expected['fit'], rel=1e-6)
    x_B[~own] = np.nan  # 0 · NaN is NaN: it would be seen
    assert accumulated(np.array([2, 4], np.int32), {'x_B': x_B, 'weights_B': weights_B})[1]['skipped'] == 0


GROWING = {
    'optim__name': 'muon',
    'execution__microbatch': 2,
    'optim__batch_warmup': 6,
    'mesh__data': 2,
    'mesh__fsdp': 1,
    'mesh__tensor': 4,
}


@pytest.fixture(scope='module')
def growing(lab, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('growing') / 'run'
    lab.train(workdir, **GROWING)
    return workdir


@pytest.mark.slow
def test_resumed_while_it_grows(lab, growing, tmp_path):
    """From steps 4 (growing) and 8 (full): the same losses, and the same rows."""
    for keep in (4, 8):
        workdir = tmp_path / f'run{keep}'
        shutil.copytree(growing, workdir)
        for step in (8, 12):
            if step > keep:
                shutil.rmtree(workdir / 'checkpoints' / str(step))
        lab.train(workdir, **GROWING)
        assert measured(workdir) == measured(growing)


@pytest.mark.slow
def test_tokens_are_counted_as_they_are(lab, growing):
    growth = Growth(2, 4, 6)
    rows = sum(2 * growth.count(i) for i in range(12))
    said = (growing / 'log.txt').read_text()
    assert f'{rows * 32:,} tokens in 12 steps' in said
    found = {r['step']: r['perf/tokens_per_s'] for r in lines(growing) if 'perf/tokens_per_s' in r}
    assert set(found) == set(range(1, 13)) and min(found.values()) > 0
    dry = lm_main.train(lab.argv(None, '--dry_run', **GROWING))
    assert dry['tokens'] == rows * 32


def test_an_epoch_is_as_many_steps_as_its_rows_make(lab, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, '_fit', lambda task, *rest: seen.append(task.config.steps))
    lab.train(tmp_path / 'plain', steps='none')
    lab.train(tmp_path / 'growing', steps='none', **GROWING)
    rows = seen[0] * 8
    assert rows - 8 < Growth(2, 4, 6).first(seen[1]) <= rows + 8 and seen[1] > seen[0]


def test_what_cannot_grow_is_refused(lab, trained, tmp_path):
    for more in ([], [('execution.microbatch', '8')]):
        with pytest.raises(
            UsageError, match='optim.batch_warmup=5 grows the batch by microbatches: set execution.microbatch below'
        ):
            configs.load('configs/pretrain.py', [('optim.batch_warmup', '5'), ('batch_size', '8'), *more])
    growing = shutil.copytree(trained, tmp_path / 'growing')  # it is refused by what the settings say
    saved = json.loads((growing / 'config.json').read_text())
    for key, value in GROWING.items():
        group, _, name = key.rpartition('__')
        (saved['config'][group] if group else saved['config'])[name] = value
    (growing / 'config.json').write_text(json.dumps(saved))
    for change in ({'execution__microbatch': 4}, {'optim__batch_warmup': 5}):
        key = next(iter(change)).replace('__', '.')
        with pytest.raises(UsageError, match=f'has other data: {key} '):
            lab.train(tmp_path / 'run', **(GROWING | lab.inherited | change), branch_from=f'{growing}@4')


@pytest.mark.slow
def test_a_small_batch_takes_less_time():
    """Half of the microbatches in well under the time of all."""

    def terms(models, part, key):
        x = part['x_BD']
        for _ in range(20):
            x = jnp.tanh(x @ models['policy'])
        return {'fit': jnp.sum(x)}, {}

    loss = training.Loss(terms, lambda b: {'fit': jnp.float32(1)}, {'fit': 1.0})
    state = training.create({'policy': jnp.eye(256)}, {}, optax.sgd(0.0), 0)
    batch = {'x_BD': jnp.ones((1024, 256))}
    took = {}
    for count in (2, 8):
        step = training.make_step(loss, optax.sgd(0.0), clip=None, microbatches=8, counts=np.array([count], np.int32))
        fn = jax.jit(step).lower(state, batch).compile({'xla_backend_optimization_level': 3})
        jax.block_until_ready(fn(state, batch))
        best = []
        for _ in range(5):
            begun = time.perf_counter()
            jax.block_until_ready(fn(state, batch))
            best.append(time.perf_counter() - begun)
        took[count] = min(best)
    assert took[2] < 0.6 * took[8]
