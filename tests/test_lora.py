"""LoRA as mathematics: the product beside a matrix, its start, its scale, what is left out and what stays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

from lm import config as configs
from lm import settings, sharding
from lm.errors import UsageError
from lm.model import adapters, lora, parameters, seam, transformer
from lm.model.config import ModelConfig
from lm.model.roles import assemble

CFG = ModelConfig(
    vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_dim=32, attention='dense', scan=True
)
MATRICES = ['wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down']
KINDS = {
    'plain': {}, 'rs': {'scale': 'rs'}, 'dora': {'dora': True}, 'pissa': {'start': 'pissa'},
    'both': {'dora': True, 'start': 'pissa'}, 'some': {'targets': 'wq:2,w_down'},
}  # fmt: skip


def asked(**changed):
    """The settings of the group `lora`, of rank 4."""
    return dict(configs.base(settings.Sft).lora) | {'rank': 4} | changed


def made(**changed):
    """(a model, an adapter of it whose every array has been moved)."""
    base = parameters.init(jax.random.key(0), CFG)
    adapter = lora.init(jax.random.key(1), base, asked(**changed))
    moved = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    keep = lambda path, x: x if path[-1].name.startswith('start') else moved(path, x)
    return base, jax.tree.map_with_path(keep, adapter)


def layer(tree, i=0):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize('kind', ['plain', 'both', pytest.param('pissa', marks=pytest.mark.slow)])
def test_the_product_is_that_of_the_dense_weight_on_every_mesh(mesh, kind):
    """Loss and gradients of a whole model, of factors beside the matrices and merged into them."""
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        base, adapter = jax.device_get(jax.jit(lambda: made(alpha=4.0, **KINDS[kind]))())
    tokens_BT = np.asarray(np.random.default_rng(0).integers(0, 64, (8, 8), dtype=np.int32))

    def loss(adapter, base, tokens_BT, merge):
        params = assemble({'adapter': adapter}, {'base': base})['policy']
        params = adapters.merged(params) if merge else params
        hidden_BTD, _ = transformer.forward(params, CFG, tokens_BT)
        return jnp.sum(jnp.square(hidden_BTD[..., 0]))

    # The lengths of DoRA's columns have no gradient, which those of a merged weight would have.
    grad = loss if kind == 'both' else jax.value_and_grad(loss)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = jax.device_get(jax.jit(grad, static_argnums=3)(adapter, base, tokens_BT, True))
    place = lambda tree: jax.device_put(tree, sharding.shardings(mesh, sharding.param_specs(tree)))
    tokens_BT = jax.device_put(tokens_BT, jax.NamedSharding(mesh, sharding.array_spec('BT', (8, 8))))
    got = jax.jit(grad, static_argnums=3)(place(adapter), place(base), tokens_BT, False)
    start = lambda tree: jax.tree.map_with_path(lambda p, x: x * ('start' not in jax.tree_util.keystr(p)), tree)
    assert_close(start(got), start(expected), rtol=2e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_at_first_the_model_is_what_it_was(one_device, kind):
    base = parameters.init(jax.random.key(0), CFG)
    adapter = lora.init(jax.random.key(1), base, asked(**KINDS[kind]))
    weights = adapters.over(base, adapter)['layers']
    for name, leaf in adapter['layers'].items():
        x = np.random.default_rng(0).standard_normal(base['layers'][name].shape[1:-1], np.float32)
        merged = jax.lax.map(seam.dense, weights[name])
        np.testing.assert_allclose(merged, base['layers'][name], atol=1e-6, err_msg=name)
        assert (leaf.start_a is None) == (KINDS[kind].get('start') != 'pissa'), x.shape
        if leaf.start_a is None:
            inputs = lora._sides(parameters.row(name), base['layers'][name].shape[1:])[0]
            assert not leaf.b.any() and 0.8 < np.abs(leaf.a).max() * inputs**0.5 <= 1
            assert np.std(leaf.a) * (3 * inputs) ** 0.5 == pytest.approx(1, abs=0.15)
    assert list(adapter['layers']) == (['wq_DNH', 'w_down_FD'] if kind == 'some' else list(weights_of(base)))


def weights_of(base):
    return {name: w for name, w in base['layers'].items() if parameters.row(name).matrix}


def test_every_matrix_of_the_layers_has_factors_and_nothing_else():
    base = parameters.init(jax.random.key(0), dataclasses.replace(CFG, qkv_bias=True, tied=False))
    adapter = lora.init(jax.random.key(1), base, asked())
    assert [name.rpartition('_')[0] for name in adapter['layers']] == MATRICES and set(adapter) == {'layers'}


def test_a_scale_is_alpha_over_the_rank_or_over_its_root():
    for kind, expected in (('alpha/r', 32 / 16), ('rs', 32 / 4)):
        assert lora.scale_of(asked(scale=kind), 16) == expected
    base, adapter = made(targets='wq:1,wv:4', scale='rs')
    assert {name: leaf.scale for name, leaf in adapter['layers'].items()} == {'wq_DNH': 32, 'wv_DKH': 16}
    w = layer(adapters.over(base, adapter)['layers']['wq_DNH'])
    expected = np.float64(w.base) + 32 * np.tensordot(np.float64(w.a), np.float64(w.b), 1)
    np.testing.assert_allclose(w.dense(), expected, rtol=1e-5, atol=1e-6)


def test_pissa_begins_with_the_principal_components():
    """As far from the matrix as the best approximation of its rank is, and training moves only what it trains."""
    base = parameters.init(jax.random.key(0), CFG)
    adapter = lora.init(jax.random.key(1), base, asked(start='pissa'))
    for name, leaf in adapter['layers'].items():
        for i in range(CFG.layers):
            inputs, outputs = lora._sides(parameters.row(name), base['layers'][name].shape[1:])
            w = np.float64(base['layers'][name][i]).reshape(inputs, outputs)
            product = leaf.scale * np.float64(leaf.a[i]).reshape(inputs, 4) @ np.float64(leaf.b[i]).reshape(4, outputs)
            best = np.sqrt(np.sum(np.linalg.svd(w, compute_uv=False)[4:] ** 2))
            assert np.linalg.norm(w - product) == pytest.approx(best, rel=1e-3), name
    found = adapters.ADAPTERS['lora'].rates(adapter, asked(plus=8.0))['layers']['wq_DNH']
    assert (found.a, found.b, found.start_a, found.start_b) == (1, 8, 0, 0)


def test_the_lengths_of_dora_have_no_gradient():
    """DoRA, eq. 5 and 11: the direction's gradient is as if its length were a number."""
    base, adapter = made(dora=True, targets='wq')
    w = layer(adapters.over(base, adapter)['layers']['wq_DNH'])
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16), np.float32))

    def ours(b):
        return jnp.sum(jnp.square(dataclasses.replace(w, b=b).einsum('BTD,DNH->BTNH', x_BTD)))

    length = np.sqrt(np.sum(np.square(w._sum()), 0))

    def expected(b):
        v = w.base + w.scale * jnp.tensordot(w.a, b, 1)
        return jnp.sum(jnp.square(jnp.einsum('BTD,DNH->BTNH', x_BTD, v) * (w.magnitude / length)))

    assert_close(jax.grad(ours)(w.b), jax.grad(expected)(w.b))
    np.testing.assert_allclose(lora.lengths(w.dense(), 1), w.magnitude, rtol=1e-5)


def test_dropout_leaves_out_part_of_what_a_reads_where_there_is_a_key(one_device):
    base, adapter = made(dropout=0.5, targets='wq')
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8, 16), np.float32))
    product = lambda w, x: w.einsum('BTD,DNH->BTNH', x)
    plain = layer(adapters.over(base, adapter)['layers']['wq_DNH'])
    alone = product(dataclasses.replace(plain, b=0 * plain.b), x_BTD)
    keyed = [layer(adapters.over(base, lora.with_keys(adapter, jax.random.key(k)))['layers']['wq_DNH']) for k in (0, 1)]
    dropped = [product(w, x_BTD) - alone for w in (*keyed, keyed[0])]
    np.testing.assert_array_equal(dropped[0], dropped[2])
    assert not np.allclose(dropped[0], dropped[1])
    mean = np.mean([keyed[0]._dropped(jnp.ones((64, 8, 16))), keyed[1]._dropped(jnp.ones((64, 8, 16)))])
    assert mean == pytest.approx(1, abs=0.05)  # what stays is divided by the part that does
    assert set(np.unique(keyed[0]._dropped(jnp.ones((64, 8, 16))))) == {0, 2}
    one, two = (layer(lora.with_keys(adapter, jax.random.key(0))['layers']['wq_DNH'], i).key for i in (0, 1))
    assert not np.array_equal(one, two)
    assert lora.with_keys(made()[1], jax.random.key(0))['layers']['wq_DNH'].key is None


def test_what_cannot_be_is_refused_by_name():
    base = parameters.init(jax.random.key(0), CFG)
    for changed, wanted in (
        ({'rank': 9}, 'a rank of 9 is more than wk has (8): set at most 8'),
        ({'targets': 'wq:17'}, 'a rank of 17 is more than wq has (16): set at most 16'),
        ({'targets': 'wq,w_dwn'}, r'lora.targets: w_dwn \(did you mean w_down\?\) is not one of wq, wk, wv, wo'),
        ({'targets': 'q_proj'}, 'q_proj is not one of wq, wk'),
        ({'targets': 'wq:x'}, 'the rank in wq:x must be a whole number, at least 1'),
        ({'targets': 'wq:0'}, 'the rank in wq:0 must be'),
    ):
        with pytest.raises(UsageError, match=wanted.replace('(8)', r'\(8\)').replace('(16)', r'\(16\)')):
            lora.init(jax.random.key(1), base, asked(**changed))
