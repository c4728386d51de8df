"""The step: exact accumulation, what is skipped, clipping, schedules, decay masks, FLOPs, layouts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from jax.experimental.compilation_cache import compilation_cache

from lm import sharding
from lm.errors import UsageError
from lm.losses.objective import measured, normalised
from lm.model import parameters
from lm.stages.language import next_token_loss
from lm.training import flops
from lm.training import optimizer as optim
from lm.training import step as training

ADAMW = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}


# ---- a loss of two terms with weights of their own, small enough to run many times ----


def toy_loss():
    """A squared error over masked tokens, a size over masked rows, and a metric that is no term."""

    def terms(models, batch, key):
        del key
        out_BT = jnp.tanh(jnp.einsum('BTD,D->BT', batch['x_BTD'], models['policy']['score_D'])) + models['reference']
        fit = jnp.sum(batch['weights_BT'] * (out_BT - batch['y_BT']) ** 2)
        size = jnp.sum(batch['rows_B'] * jnp.sum(out_BT**2, axis=1))
        return {'fit': fit, 'size': size}, {'mean': jnp.sum(batch['weights_BT'] * out_BT)}

    def denominators(batch):
        tokens = jnp.sum(batch['weights_BT'])
        return {'fit': tokens, 'size': jnp.sum(batch['rows_B']), 'mean': tokens}

    return training.Loss(terms, denominators, {'fit': 1.0, 'size': 0.3})


def toy_batch(masked_rows=()):
    rng = np.random.default_rng(0)
    batch = {
        'x_BTD': rng.standard_normal((8, 4, 3), np.float32),
        'y_BT': rng.standard_normal((8, 4), np.float32),
        'weights_BT': (rng.random((8, 4)) * (rng.random((8, 4)) < 0.5)).astype(np.float32),
        'rows_B': (rng.random(8) < 0.6).astype(np.float32),
    }
    batch['weights_BT'][list(masked_rows)] = 0
    batch['rows_B'][list(masked_rows)] = 0
    return batch


def toy_state(optimizer):
    policy = {'score_D': jnp.arange(1.0, 4.0)}
    return training.create({'policy': policy}, {'reference': jnp.float32(0.1)}, optimizer, 0)


def run(loss, batch, *, microbatches=1, clip=1e9, optimizer=None):
    optimizer = optimizer or optax.sgd(0.1)
    step = training.make_step(loss, optimizer, clip=clip, microbatches=microbatches)
    state, metrics = jax.jit(step)(toy_state(optimizer), batch)
    return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize('microbatches', [2, 4, 8])
@pytest.mark.parametrize('masked', [(), (1, 3, 5, 7)], ids=['ragged', 'a-microbatch-fully-masked'])
def test_accumulation_equals_one_batch(microbatches, masked):
    """Parameters and metrics; rows 1, 3, … are whole microbatches whatever their number."""
    one, many = (run(toy_loss(), toy_batch(masked), microbatches=n) for n in (1, microbatches))
    assert_close(many[0].trainable, one[0].trainable, 1e-6)
    assert_close(many[1], one[1], 1e-6)


def test_the_objective_is_what_it_says():
    """Against sums and weights by hand."""
    batch = toy_batch()
    (_, metrics), w = run(toy_loss(), batch), np.arange(1.0, 4.0)
    out_BT = np.tanh(batch['x_BTD'] @ w) + 0.1
    weights_BT, rows_B = batch['weights_BT'], batch['rows_B']
    fit = np.sum(weights_BT * (out_BT - batch['y_BT']) ** 2) / weights_BT.sum()
    size = np.sum(rows_B * np.sum(out_BT**2, axis=1)) / rows_B.sum()
    expected = {
        'fit': fit,
        'size': size,
        'mean': np.sum(weights_BT * out_BT) / weights_BT.sum(),
        'loss': fit + 0.3 * size,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_batch_in_which_nothing_counts_changes_nothing():
    state, metrics = run(toy_loss(), toy_batch(range(8)), microbatches=2)
    np.testing.assert_array_equal(state.trainable['policy']['score_D'], [1, 2, 3])
    assert metrics['loss'] == metrics['grad_norm'] == metrics['skipped'] == 0 and np.isnan(metrics['fit'])
    assert jax.grad(lambda x: normalised(x, x * 0))(1.0) == 0
    assert np.isnan(measured(jnp.zeros(()), jnp.zeros(()))) and measured(jnp.ones(()), jnp.full((), 4.0)) == 0.25


def test_each_microbatch_and_each_step_has_a_key_of_its_own():
    def terms(models, batch, key):
        return {'fit': jnp.sum(models['policy']['score_D']) * 0}, {
            'mean': jax.random.uniform(key) * batch['rows_B'].size
        }

    loss = training.Loss(terms, lambda batch: {'fit': jnp.float32(1), 'mean': jnp.float32(8)}, {'fit': 1.0})
    step = jax.jit(training.make_step(loss, optax.sgd(0.1), clip=1.0, microbatches=2))
    state, first = step(toy_state(optax.sgd(0.1)), toy_batch())
    _, second = step(state, toy_batch())
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = np.mean([jax.random.uniform(jax.random.fold_in(key, j)) for j in range(2)])
    assert first['mean'] == pytest.approx(float(expected)) and second['mean'] != first['mean']


@pytest.mark.parametrize('poison', ['gradient', 'loss'])
def test_a_step_that_is_not_finite_changes_no_bit(poison):
    """Neither parameters nor moments; the step counts, so that the data goes on."""
    optimizer = optim.adamw(lambda _: 0.1, **ADAMW)
    step = jax.jit(training.make_step(toy_loss(), optimizer, clip=1.0, microbatches=2))
    state, metrics = step(toy_state(optimizer), toy_batch())
    assert metrics['skipped'] == 0
    bad = toy_batch()
    bad['y_BT'][2, 1] = bad['weights_BT'][2, 1] = 1
    if poison == 'gradient':
        bad['x_BTD'][2, 1, 0] = np.nan
    else:
        bad['y_BT'][2, 1] = 1e30  # overflows the loss; the tanh is saturated there
        bad['x_BTD'][2, 1] = 1e5
    after, metrics = step(state, bad)
    assert metrics['skipped'] == 1 and after.step == state.step + 1
    assert not np.isfinite(metrics['loss'])
    jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get(((after.trainable, after.opt), (state.trainable, state.opt)))
    )
    again, metrics = step(after, toy_batch())
    assert metrics['skipped'] == 0 and np.any(
        again.trainable['policy']['score_D'] != after.trainable['policy']['score_D']
    )


def test_a_step_without_any_gradient_changes_no_bit():
    """Momentum alone would move the weights on, and Muon's update has one size."""
    optimizer = optim.adamw(lambda _: 0.1, **ADAMW)
    step = jax.jit(training.make_step(toy_loss(), optimizer, clip=1.0, microbatches=2))
    state, _ = step(toy_state(optimizer), toy_batch())
    idle = toy_batch()
    idle['weights_BT'][:] = idle['rows_B'][:] = 0
    after, metrics = step(state, idle)
    assert (metrics['skipped'], metrics['grad_norm'], metrics['loss'], after.step) == (0, 0, 0, state.step + 1)
    jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get(((after.trainable, after.opt), (state.trainable, state.opt)))
    )


def test_the_global_norm_is_clipped_and_logged_as_it_was():
    (free, metrics), (clipped, same) = (run(toy_loss(), toy_batch(), clip=c) for c in (1e9, 0.05))
    moved = [np.linalg.norm(s.trainable['policy']['score_D'] - np.arange(1.0, 4.0)) / 0.1 for s in (free, clipped)]
    assert metrics['grad_norm'] == same['grad_norm'] == pytest.approx(moved[0], rel=1e-4)
    assert metrics['grad_norm'] > 0.05 and moved[1] == pytest.approx(0.05, rel=1e-4)
    grads = {'a': jnp.array([3.0]), 'b': jnp.array([[4.0]])}
    assert optim.clip(grads, optax.tree.norm(grads), 10.0)['b'] == 4
    small = optim.clip(grads, optax.tree.norm(grads), 1.0)
    np.testing.assert_allclose([small['a'][0], small['b'][0, 0]], [0.6, 0.8], rtol=1e-6)


# ---- the real step ----


@pytest.fixture
def model(tiny):
    return dataclasses.replace(tiny, layers=2, scan=True)


@functools.cache
def one_batch_on_one_device(cfg):
    return jax.device_get(one_update(cfg, sharding.make_mesh({}, jax.devices()[:1]), 1))


# An epsilon that does not blow rounding up to a step of ±lr.
OPTIMIZER = optim.adamw(lambda _: 0.1, **{**ADAMW, 'eps': 1e-3})


def model_batch(cfg, rows=8, T=16):
    rng = np.random.default_rng(0)
    weights_BT = (rng.random((rows, T)) < rng.random((rows, 1))).astype(np.float32)
    weights_BT[3] = 0
    return {
        'tokens_BT': rng.integers(0, cfg.vocab_size, (rows, T), dtype=np.int32),
        'targets_BT': rng.integers(0, cfg.vocab_size, (rows, T), dtype=np.int32),
        'weights_BT': weights_BT,
        'segments_BT': np.ones((rows, T), np.int32),
        'positions_BT': np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)).copy(),
    }


def new_state(cfg, optimizer=OPTIMIZER):
    params = parameters.init_sharded(jax.random.key(0), cfg)
    return jax.jit(lambda p: training.create({'policy': p}, {}, optimizer, 0))(params)


def one_update(cfg, mesh, microbatches):
    """(params after a step, metrics, the state) of the real loss on a mesh."""
    with jax.set_mesh(mesh):
        step = training.make_step(next_token_loss(cfg, z_loss=1e-2), OPTIMIZER, clip=0.5, microbatches=microbatches)
        return jax.jit(step, donate_argnums=0)(new_state(cfg), sharding.shard_batch(model_batch(cfg)))


@pytest.mark.parametrize(
    'shape',
    [pytest.param({'data': 2}, marks=pytest.mark.slow), {'fsdp': 2, 'seq': 2, 'tensor': 2}],
    ids=['data2', 'mixed'],
)
def test_accumulation_over_a_mesh_equals_one_batch_on_one_device(model, shape):
    """AdamW, z-loss and clipping included."""
    alone, expected = one_batch_on_one_device(model)
    devices = jax.devices()[: math.prod(shape.values())]
    state, metrics = one_update(model, sharding.make_mesh(shape, devices), 4)
    assert_close(state.trainable, alone.trainable, 1e-4)
    assert_close(metrics, expected, 1e-5)
    lie = lambda p, moments: [m.sharding.is_equivalent_to(p.sharding, p.ndim) for m in moments.values()]
    same = jax.tree.map(lie, state.trainable, state.opt['moments'])
    assert all(jax.tree.leaves(same)), 'a moment does not lie where its parameter does'
    assert not state.trainable['policy']['embed_VD'].sharding.is_fully_replicated or 'fsdp' not in shape


def test_rows_are_split_over_microbatches_without_moving(model):
    mesh = sharding.make_mesh({'data': 4, 'tensor': 2})
    with jax.set_mesh(mesh):
        x_BT = sharding.shard_batch({'x_BT': np.arange(16).reshape(8, 2)})['x_BT']
        fn = jax.jit(lambda x: training.split_rows(x, 2))
        parts = fn(x_BT)
        np.testing.assert_array_equal(parts, np.arange(16).reshape(4, 2, 2).swapaxes(0, 1))
        assert not any(
            op in fn.lower(x_BT).compile().as_text() for op in ('all-gather', 'all-to-all', 'collective-permute')
        )


# ---- no involuntary rematerialization ----

REMATERIALIZED = 'nvoluntary full rematerialization'


@pytest.fixture
def said(capfd):
    """What XLA wrote to the terminal, as a function.

    Of a program that is in the cache of compiled ones it says nothing.
    """
    folder = jax.config.values['jax_compilation_cache_dir']
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.reset_cache()
    yield lambda: ''.join(capfd.readouterr())
    jax.config.update('jax_compilation_cache_dir', folder)
    compilation_cache.reset_cache()


def test_the_capture_sees_the_message(said):
    """An embedding split by vocabulary and dimension, looked up as XLA pleases."""
    with sharding.use_mesh({'fsdp': 2, 'seq': 2, 'tensor': 2}) as mesh:
        w_VD = jax.device_put(
            np.ones((64, 32), np.float32), jax.NamedSharding(mesh, sharding.array_spec('VD', (64, 32)))
        )
        tokens_BT = sharding.shard_batch({'tokens_BT': np.ones((8, 16), np.int32)})['tokens_BT']
        to = jax.P('fsdp', 'seq', None)
        jax.jit(jax.grad(lambda w: jnp.sum(w.at[tokens_BT].get(out_sharding=to) ** 2))).lower(w_VD).compile()
    assert REMATERIALIZED in said()


@pytest.mark.parametrize(
    'shape',
    [
        {'fsdp': 2, 'seq': 2, 'tensor': 2},
        pytest.param({'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
        pytest.param({'seq': 4, 'tensor': 2}, marks=pytest.mark.slow),
    ],
    ids=lambda shape: '-'.join(f'{a}{n}' for a, n in shape.items()),
)
def test_no_compiled_step_rematerializes_involuntarily(model, shape, said):
    """The whole step on meshes that split batch, sequence, vocabulary and storage."""
    cfg = dataclasses.replace(model, remat='full')
    optimizer = optim.muon_adamw(lambda _: 0.1, momentum=0.95, dtype=jnp.bfloat16, **ADAMW)  # moves most about
    with sharding.use_mesh(shape):
        step = training.make_step(next_token_loss(cfg, z_loss=1e-4), optimizer, clip=1.0, microbatches=1)
        jax.jit(step, donate_argnums=0).lower(
            new_state(cfg, optimizer), sharding.shard_batch(model_batch(cfg))
        ).compile()
    assert REMATERIALIZED not in said()


# ---- optimizer ----


def rates(name, **change):
    options = {'lr': 2.0, 'steps': 100, 'warmup': 10, 'decay': 0.2, 'final': 0.1} | change
    return np.asarray(jax.vmap(optim.schedule(name, **options))(jnp.arange(options['steps'] + 1)))


@pytest.mark.parametrize('name', optim.SCHEDULES)
def test_schedules_warm_up_to_the_rate(name):
    rate = rates(name)
    np.testing.assert_allclose(rate[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-5)
    assert np.all(np.diff(rate[10:]) <= 1e-6), 'and never rise after it'
    np.testing.assert_allclose(rate[-1], 2.0 if name == 'constant' else 0.2, rtol=1e-5)
    assert rates(name, warmup=0)[0] == pytest.approx(2.0)
    assert np.max(rates(name, steps=4, warmup=1000, decay=1.0)) <= 2.0


def test_schedules_fall_as_their_names_say():
    np.testing.assert_allclose(rates('cosine')[55], 0.2 + 1.8 / 2, rtol=1e-5)
    np.testing.assert_allclose(rates('linear')[55], 2.0 - 1.8 / 2, rtol=1e-5)
    wsd = rates('wsd')
    assert np.all(wsd[10:81] == 2.0)
    np.testing.assert_allclose(np.diff(wsd[80:]), -1.8 / 20, rtol=1e-3)
    assert np.all(rates('constant')[10:] == 2.0)


def test_an_unknown_schedule_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match='cosine'):
        optim.schedule('cosin', lr=1.0, steps=1, warmup=0, decay=0.1, final=0.0)


def test_a_skipped_step_leaves_the_rate_where_it_is_logged():
    """The rate is the step's, however many updates were skipped before it."""
    optimizer = optim.adamw(lambda step: jnp.where(step == 1, 0.1, 0.0), **ADAMW)
    step = jax.jit(training.make_step(toy_loss(), optimizer, clip=1.0))
    bad = toy_batch()
    bad['x_BTD'][...] = np.nan
    state, metrics = step(toy_state(optimizer), bad)
    after, _ = step(state, toy_batch())
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after.trainable, state.trainable)
    assert metrics['skipped'] == 1 and all(jax.tree.leaves(changed))


# ---- FLOPs ----


def test_flops_are_six_a_weight_plus_the_half_of_attention_that_is_seen(tiny):
    cfg, T = dataclasses.replace(tiny, tied=False), 32
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg))
    matrices = {p[-1].key: x.size for p, x in jax.tree.leaves_with_path(params) if 'norm' not in p[-1].key}
    del matrices['embed_VD']
    attention = lambda seen: 3 * cfg.layers * 2 * (2 * cfg.heads * cfg.head_dim * seen)  # q·k and p·v, thrice
    count = lambda window=None: flops.per_token(dataclasses.replace(cfg, window=window), seq_len=T)
    assert count() == 6 * sum(matrices.values()) + attention(T / 2)
    seen = np.mean([min(t + 0.5, 8) for t in range(T)])  # a window of 8: the triangle, then a band
    assert count(window=8) == pytest.approx(6 * sum(matrices.values()) + attention(seen), rel=1e-3)
    assert count(window=T) == count(window=10 * T) == count()
