"""Optimizers: what a leaf is, AdamW and Muon by hand, layouts, weights that are not arrays."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from lm import sharding
from lm.model import parameters
from lm.model.param import matrix
from lm.training import muon, param_groups
from lm.training import optimizer as optim

ADAMW = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}
MUON = {**ADAMW, 'momentum': 0.9, 'dtype': jnp.float32}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gradients(cfg):
    """One normal array for each parameter, none in a special layout."""
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([normal(i, *x.shape) for i, x in enumerate(leaves)])


def update(optimizer, params, grads):
    """(updates, the state) of a first step, jitted."""
    fn = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p, step=0))
    return fn(params, grads)


# ---- what a leaf is ----


def test_matrices_decay_and_norms_biases_and_embeddings_do_not(tiny):
    cfg = dataclasses.replace(tiny, tied=False)
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg))
    params = {**params, 'layers': {**params['layers'], 'bias_q_NH': params['layers']['wq_DNH']}}
    matrices = {'wq_DNH', 'wk_DKH', 'wv_DKH', 'wo_NHD', 'w_gate_DF', 'w_up_DF', 'w_down_FD'}
    leaves = param_groups.infos_of(params)
    assert {leaf.name for leaf in leaves if leaf.decays} == matrices | {'head_DV'}
    assert {leaf.name for leaf in leaves if leaf.matrix} == matrices
    assert {leaf.name for leaf in leaves if not leaf.stacked} == {'embed_VD', 'final_norm_D', 'head_DV'}


@pytest.mark.parametrize(
    ('dims', 'rows', 'counts'),
    [('DNH', 1, 1), ('NHD', 3, 1), ('EDF', 2, 2), ('EFD', 3, 2), ('NDH', None, 1), ('D', None, 1)],
)
def test_the_letters_say_which_matrix_an_array_is(dims, rows, counts):
    leaf = param_groups.ParamInfo('wq_DNH', dims, stacked=True)
    assert (leaf.rows, leaf.counts, leaf.matrix) == (rows, counts, rows is not None)
    assert param_groups.ParamInfo('wq_DNH', dims, stacked=False).rows == (None if rows is None else rows - 1)


# ---- AdamW ----


def test_adamw_is_adamw():
    """Two steps by hand; decay is decoupled and multiplied by the rate."""
    params = {'score_D': jnp.array([1.0, -2.0]), 'final_norm_D': jnp.array([1.0])}
    optimizer = optim.adamw(lambda step: 0.1 * (step + 1), **ADAMW)
    opt, w, m, v = optimizer.init(params), np.array([1.0, -2.0, 1.0]), np.zeros(3), np.zeros(3)
    decay = np.array([0.1, 0.1, 0.0])
    for i, g in enumerate(([0.5, -1.0, 2.0], [1.0, 3.0, -1.0])):
        g = np.array(g)
        updates, opt = optimizer.update(
            {'score_D': jnp.asarray(g[:2]), 'final_norm_D': jnp.asarray(g[2:])}, opt, params, step=i
        )
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        m_hat, v_hat = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.95 ** (i + 1))
        w = w - 0.1 * (i + 1) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)
    np.testing.assert_allclose(np.concatenate([params['score_D'], params['final_norm_D']]), w, rtol=1e-5)


# ---- Muon ----


@pytest.mark.parametrize('shape', [(16, 16), (8, 64), (64, 8), (3, 2, 12, 20)], ids=str)
def test_newton_schulz_keeps_the_singular_vectors_and_makes_the_values_near_1(shape):
    x = jnp.asarray(normal(0, *shape))
    y = muon.newton_schulz(100.0 * x)
    U, _, Vt = np.linalg.svd(x, full_matrices=False)
    inner = np.swapaxes(U, -1, -2) @ y @ np.swapaxes(Vt, -1, -2)
    values = np.diagonal(inner, axis1=-2, axis2=-1)
    assert values.min() > 0.6 and values.max() < 1.25
    np.testing.assert_allclose(inner, values[..., None] * np.eye(inner.shape[-1]), atol=1e-4)
    np.testing.assert_array_equal(muon.newton_schulz(0 * x), 0)


def test_muon_is_muon(monkeypatch):
    """Two steps by hand: Nesterov's momentum, the matrix of each layer (and expert) made orthogonal alone, RMS 0.2,
    decoupled decay; AdamW for what is no matrix. Matrices of one shape, which share a pile, do not mix."""
    L, D, N, H, E, F = 2, 8, 3, 4, 3, 10
    shapes = {'wq_DNH': (L, D, N, H), 'wk_DNH': (L, D, N, H), 'wo_NHD': (L, N, H, D), 'w_up_EDF': (L, E, D, F)}
    flat = {'wq_DNH': (L, D, N * H), 'wk_DNH': (L, D, N * H), 'wo_NHD': (L, N * H, D), 'w_up_EDF': (L * E, D, F)}
    rows = (matrix('wk_DNH', 'D'), matrix('w_up_EDF', 'D'))
    monkeypatch.setattr(parameters, 'LAYER', (*parameters.LAYER, *rows))
    params = {name: jnp.asarray(normal(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    params = {'layers': {**params, 'attn_norm_D': jnp.ones((L, D))}}
    optimizer = optim.muon_adamw(lambda step: 0.1 * (step + 1), **MUON)
    adamw = optim.adamw(lambda step: 0.1 * (step + 1), **ADAMW)
    state, adam_state, mu = optimizer.init(params), adamw.init(params), dict.fromkeys(shapes, 0.0)
    for i in range(2):
        grads = {name: normal(10 * i + len(name), *x.shape) for name, x in params['layers'].items()}
        updates, state = optimizer.update({'layers': grads}, state, params, step=i)
        expected, adam_state = adamw.update({'layers': grads}, adam_state, params, step=i)
        np.testing.assert_array_equal(updates['layers']['attn_norm_D'], expected['layers']['attn_norm_D'])
        for name, shape in flat.items():
            mu[name] = 0.9 * mu[name] + 0.1 * grads[name]
            ahead = (0.9 * mu[name] + 0.1 * grads[name]).reshape(shape)
            made = np.stack([muon.newton_schulz(jnp.asarray(x)) for x in ahead]).reshape(grads[name].shape)
            moved = 0.2 * max(shape[1:]) ** 0.5 * made + 0.1 * np.asarray(params['layers'][name])
            np.testing.assert_allclose(updates['layers'][name], -0.1 * (i + 1) * moved, rtol=1e-3, atol=1e-5)
            assert set(state['moments']['layers'][name]) == {'mu'}


def test_the_update_of_every_matrix_has_the_same_rms(tiny):
    """0.2, as near as the singular values are to 1."""
    params = grads = gradients(tiny)
    updates, _ = update(optim.muon_adamw(lambda step: 1.0, **{**MUON, 'weight_decay': 0.0}), params, grads)
    for leaf, x in zip(param_groups.infos_of(params), jax.tree.leaves(updates), strict=True):
        if leaf.matrix:
            assert float(jnp.sqrt(jnp.mean(x**2))) == pytest.approx(0.2, rel=0.25), leaf.name


OPTIMIZERS = {
    'muon': optim.muon_adamw(lambda step: 0.1, **MUON),
    'adafactor': optim.adafactored(lambda step: 0.1, weight_decay=0.1),
}


@functools.cache
def on_one_device(name, cfg):
    with sharding.use_mesh({}, jax.devices()[:1]):
        grads = gradients(cfg)
        return jax.device_get(update(OPTIMIZERS[name], grads, grads)[0])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_are_the_same_on_every_mesh(mesh, tiny, name):
    """Three layers divide no mesh. Updates, and moments of their shape, stay where the parameters lie."""
    grads = gradients(tiny)
    placed = jax.device_put(grads, sharding.shardings(mesh, sharding.param_specs(grads)))
    updates, state = update(OPTIMIZERS[name], placed, placed)
    for leaf, got, expected in zip(
        param_groups.infos_of(grads), jax.tree.leaves(updates), jax.tree.leaves(on_one_device(name, tiny)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=str(leaf))
    there = lambda p, x: x.shape != p.shape or x.sharding.is_equivalent_to(p.sharding, p.ndim)
    lies = lambda p, u, m: [there(p, x) for x in (u, *m.values())]
    assert all(jax.tree.leaves(jax.tree.map(lies, placed, updates, state['moments'])))


def test_matrices_are_dealt_out_and_never_gathered(tiny):
    """Under fsdp and tensor each device gets whole matrices and no device all of them: only all-to-alls."""
    optimizer, grads = optim.muon_adamw(lambda step: 0.1, **MUON), gradients(tiny)
    with sharding.use_mesh({'fsdp': 2, 'seq': 2, 'tensor': 2}) as mesh:
        placed = jax.device_put(grads, sharding.shardings(mesh, sharding.param_specs(grads)))
        fn = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p, step=0))
        program = fn.lower(placed, placed).compile().as_text()
    assert set(re.findall(r'(all-[\w-]+|collective-permute)\(', program)) == {'all-to-all'}


def test_bfloat16_products_are_nearly_the_same(tiny):
    grads = gradients(tiny)
    half, full = (
        update(optim.muon_adamw(lambda step: 1.0, **{**MUON, 'dtype': d}), grads, grads)[0]
        for d in ('bfloat16', 'float32')
    )
    for leaf, a, b in zip(param_groups.infos_of(grads), jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < (0.05 if leaf.matrix else 1e-6), leaf


@struct.dataclass
class Adapter:
    """A low-rank change of a frozen base."""

    down: jax.Array
    up: jax.Array

    def dims(self, parent):
        return {'down': parent[0] + 'R', 'up': 'R' + parent[1:]}

    def einsum(self, eq, x):
        pytest.fail('an optimizer multiplies nothing')

    def dense(self):
        pytest.fail('an optimizer multiplies nothing')


def test_the_factors_of_an_adapter_are_trained_by_adamw(one_device):
    params = {'layers': {'wq_DNH': Adapter(jnp.asarray(normal(0, 2, 8, 4)), jnp.asarray(normal(1, 2, 4, 2, 4)))}}
    assert [leaf.dims for leaf in param_groups.infos_of(params)] == ['DR', 'RNH']
    got, expected = (
        update(make(lambda step: 0.1, **options), params, params)[0]
        for make, options in ((optim.muon_adamw, MUON), (optim.adamw, ADAMW))
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# ---- Adafactor ----


def test_adafactor_is_adafactor():
    """Two updates by hand of a matrix (the second's larger than it may be), each layer alone, and of a vector."""
    L, D, N, H = 2, 6, 2, 3
    optimizer = optim.adafactored(lambda step: 0.1, weight_decay=0.5)
    params = {'layers': {'wo_NHD': jnp.asarray(normal(0, L, N, H, D)), 'attn_norm_D': jnp.ones((L, D))}}
    state, kept = optimizer.init(params), [(np.zeros(D), np.zeros(N * H))] * L
    nu = np.zeros((L, D))
    for i, scale in enumerate((1.0, 10.0)):
        grads = {'layers': {'wo_NHD': scale * normal(3 + i, L, N, H, D), 'attn_norm_D': scale * normal(9 + i, L, D)}}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params, step=i)
        decay = 1 - (i + 1.0) ** -0.8
        clipped = lambda u: u / max(1.0, np.sqrt(np.mean(u**2)))
        for layer in range(L):
            g = grads['layers']['wo_NHD'][layer].reshape(N * H, D)
            row, col = kept[layer]
            row, col = decay * row + (1 - decay) * (g**2).mean(0), decay * col + (1 - decay) * (g**2).mean(1)
            kept[layer] = row, col
            moved = clipped(g / np.sqrt(np.outer(col, row) / row.mean())).reshape(N, H, D)
            expected = -0.1 * (moved + 0.5 * np.asarray(params['layers']['wo_NHD'][layer]))
            np.testing.assert_allclose(updates['layers']['wo_NHD'][layer], expected, rtol=1e-4, atol=1e-6)
        g = grads['layers']['attn_norm_D']
        nu = decay * nu + (1 - decay) * g**2
        expected = -0.1 * np.stack([clipped(u) for u in g / np.sqrt(nu)])
        np.testing.assert_allclose(updates['layers']['attn_norm_D'], expected, rtol=1e-4)


def test_adafactor_keeps_the_sides_of_each_matrix(tiny):
    """Bytes of the state: a few parts in a hundred of AdamW's, and no layer or word shares with another."""
    params = jax.eval_shape(lambda: parameters.init(jax.random.key(0), dataclasses.replace(tiny, dim=256, ffn_dim=512)))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    state = jax.eval_shape(optim.adafactored(lambda step: 0.1, weight_decay=0.1).init, params)
    adam = jax.eval_shape(optim.adamw(lambda step: 0.1, **ADAMW).init, params)
    assert size(adam) > 2 * size(params) and size(state) < 0.03 * size(adam)
    shapes = jax.tree.map(lambda x: x.shape, state['moments'], is_leaf=lambda x: hasattr(x, 'shape'))
    assert shapes['embed_VD'] == {'row': (256,), 'col': (256,)}
    assert shapes['layers']['w_gate_DF'] == {'row': (3, 256), 'col': (3, 512)}
    assert shapes['layers']['wo_NHD'] == {'row': (3, 256), 'col': (3, 4, 8)}
    assert shapes['layers']['q_norm_H'] == {'nu': (3, 8)}
