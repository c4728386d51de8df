"""The seam: einsum and lookup are jax.numpy's on every mesh, and the model does not know what a weight is."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from flax import struct
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.errors import UsageError
from lm.model import parameters, seam, transformer
from lm.model.config import ModelConfig

SIZES = {'B': 8, 'T': 8, 'D': 16, 'N': 4, 'K': 2, 'H': 4, 'F': 8, 'V': 32}
EQUATIONS = ('BTD,DNH->BTNH', 'BTD,DKH->BTKH', 'BTNH,NHD->BTD', 'BTD,DF->BTF', 'BTF,FD->BTD', 'BTD,DV->BTV')


def normal(seed, dims, **sizes):
    shape = tuple((SIZES | sizes)[d] for d in dims)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def place(mesh, params):
    return jax.device_put(params, sharding.shardings(mesh, sharding.param_specs(params)))


# ---- arrays ----


def test_einsum_and_lookup_are_those_of_jax_numpy_on_every_mesh(mesh):
    """Values and gradients of every equation of the model, from activations as the seam leaves them."""
    operands = {eq: [normal(i, dims) for i, dims in enumerate(seam.parse(eq))] for eq in EQUATIONS}
    tokens_BT = np.random.default_rng(0).integers(0, SIZES['V'], (8, 8), dtype=np.int32)
    table_VD, r_BTD = normal(7, 'VD'), normal(8, 'BTD')

    def all_of(einsum, lookup):
        def fn(operands, table_VD):
            outs = {eq: einsum(eq, x, w) for eq, (x, w, _) in operands.items()}
            outs['lookup'] = lookup(table_VD, tokens_BT)
            weighted = [jnp.sum(outs[eq] * operands[eq][2]) for eq in operands] + [jnp.sum(outs['lookup'] * r_BTD)]
            return sum(weighted), outs

        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))

    expected = all_of(jnp.einsum, lambda w, t: w[t])
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = jax.device_get(expected(operands, table_VD))
    put = lambda dims, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(dims, x.shape)))
    placed = {
        eq: [
            put(d, x, sharding.array_spec if i == 1 else sharding.activation_spec)
            for i, (d, x) in enumerate(zip(seam.parse(eq), xs, strict=True))
        ]
        for eq, xs in operands.items()
    }
    fn = all_of(seam.einsum, partial(seam.lookup, dtype=jnp.float32))
    got = fn(placed, put('VD', table_VD, sharding.array_spec))
    assert_close(got, expected)
    for eq, out in got[0][1].items():
        dims = 'BTD' if eq == 'lookup' else seam.parse(eq)[2]
        lies = jax.NamedSharding(mesh, sharding.activation_spec(dims, out.shape))
        assert out.sharding.is_equivalent_to(lies, out.ndim), (eq, out.sharding)


@pytest.mark.parametrize('eq', [*EQUATIONS, 'BTNH,DNH->BTD', 'BD,DNH->BNH', 'BTF,BTF->BT'])
def test_the_flat_product_is_the_einsum(eq):
    x, w = (normal(i, dims) for i, dims in enumerate(seam.parse(eq)[:2]))
    np.testing.assert_allclose(seam.einsum(eq, jnp.asarray(x), jnp.asarray(w)), np.einsum(eq, x, w), atol=1e-5)


def test_the_product_has_the_dtype_of_the_activations():
    x_BTD, w_DF = jnp.asarray(normal(0, 'BTD'), jnp.bfloat16), jnp.asarray(normal(1, 'DF'))
    assert seam.einsum('BTD,DF->BTF', x_BTD, w_DF).dtype == jnp.bfloat16


@pytest.mark.parametrize('mesh', ['fsdp2-seq2-tensor2'], indirect=True)
def test_shapes_that_do_not_fit_the_letters_are_refused(mesh):
    with pytest.raises(ValueError):
        seam.einsum('BTD,DF->BTF', jnp.ones((2, 2, 4)), jnp.ones((5, 8)))


# ---- the table ----


@pytest.mark.parametrize('mesh', ['fsdp2-seq2-tensor2'], indirect=True)
@pytest.mark.parametrize(
    ('dims', 'shape', 'expected'),
    [
        ('BT', (4, 8), P('fsdp', ('seq', 'tensor'))),
        ('BTD', (4, 8, 16), P('fsdp', ('seq', 'tensor'), None)),  # fsdp is taken by B, seq by T
        ('BTNH', (4, 8, 4, 4), P('fsdp', 'seq', 'tensor', None)),
        ('DNH', (16, 4, 4), P(('fsdp', 'seq'), 'tensor', None)),
        ('DKH', (16, 1, 4), P(('fsdp', 'seq'), None, None)),  # one kv head cannot be split
        ('VD', (32, 16), P('tensor', ('fsdp', 'seq'))),
        ('D', (6,), P('fsdp')),  # 6 is no multiple of 4
        ('BT', (3, 2), P(None, 'seq')),
    ],
)
def test_letters_claim_axes_in_order_once_and_where_they_divide(mesh, dims, shape, expected):
    assert sharding.array_spec(dims, shape) == expected


@pytest.mark.parametrize(
    'shape', [{'fsdp': 3}, {'fsdp': -1, 'data': -1}, {'row': 8}, {'fsdp': 0}, {'fsdp': -1, 'tensor': 16}, {'fsdp': -2}]
)
def test_a_mesh_that_is_none_is_refused(shape):
    with pytest.raises(UsageError):
        sharding.make_mesh(shape)


def test_a_free_axis_takes_what_is_left():
    assert dict(sharding.make_mesh({'fsdp': -1, 'tensor': 2}).shape) == dict(data=1, fsdp=4, seq=1, tensor=2, expert=1)


# ---- weights that are not arrays ----


@struct.dataclass
class Scaled:
    """A base times a scale for each of the last letter."""

    base: jax.Array
    scale: jax.Array

    def dims(self, parent):
        return {'base': parent, 'scale': parent[-1]}

    def einsum(self, eq, x):
        return seam.einsum(eq, x, self.base) * seam.gather(self.scale, seam.parse(eq)[1][-1])

    def dense(self):
        return self.base * self.scale


@struct.dataclass
class LowRank:
    """A base plus a product of rank R."""

    base: jax.Array
    down: jax.Array
    up: jax.Array

    def dims(self, parent):
        return {'base': parent, 'down': parent[0] + 'R', 'up': 'R' + parent[1:]}

    def einsum(self, eq, x):
        xd, wd, out = seam.parse(eq)
        inner = xd.replace(wd[0], 'R')
        low = seam.einsum(f'{xd},{wd[0]}R->{inner}', x, self.down)
        return seam.einsum(eq, x, self.base) + seam.einsum(f'{inner},R{wd[1:]}->{out}', low, self.up)

    def dense(self):
        return self.base + jnp.tensordot(self.down, self.up, 1)


def wrapped(params):
    """The parameters with toy weights in place of an attention, a feed-forward and the embedding (= head) weight."""
    rng = np.random.default_rng(3)
    new = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape, np.float32))
    layers = dict(params['layers'])
    q, down, embed = layers['wq_DNH'], layers['w_down_FD'], params['embed_VD']
    L, R = q.shape[0], 2
    layers['wq_DNH'] = LowRank(q, new(L, q.shape[1], R), new(L, R, *q.shape[2:]))
    layers['w_down_FD'] = Scaled(down, 1 + new(L, down.shape[-1]))
    return {**params, 'layers': layers, 'embed_VD': LowRank(embed, new(embed.shape[0], R), new(R, embed.shape[1]))}


def materialised(params):
    """The same in plain arrays."""
    is_toy = lambda x: isinstance(x, Scaled | LowRank)
    dense = lambda x: seam.dense(x) if is_toy(x) else x
    layers = {name: jax.vmap(dense)(x) for name, x in params['layers'].items()}
    return {**{name: dense(x) for name, x in params.items() if name != 'layers'}, 'layers': layers}


def loss(params, cfg, tokens_BT):
    h_BTD, _ = transformer.forward(params, cfg, tokens_BT)
    return transformer.nll(params, cfg, h_BTD, tokens_BT[:, ::-1], jnp.ones(tokens_BT.shape), z_coef=1e-2)[0]


value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)


@pytest.fixture(scope='module')
def toy():
    """(configuration, parameters with toy weights, tokens, loss and gradients of the dense equivalent)."""
    cfg = ModelConfig(vocab_size=60, vocab_multiple=64, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_dim=32)
    params = wrapped(jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), cfg))
    tokens_BT = np.random.default_rng(0).integers(0, 60, (4, 8), dtype=np.int32)
    expected = jax.jit(jax.value_and_grad(lambda p: loss(materialised(p), cfg, tokens_BT)))(params)
    return cfg, params, tokens_BT, jax.device_get(expected)


@pytest.mark.parametrize(
    ('mesh', 'scan'),
    [
        ('fsdp2-seq2-tensor2', True),
        pytest.param('fsdp2-seq2-tensor2', False, marks=pytest.mark.slow),
        pytest.param('tensor4', True, marks=pytest.mark.slow),
    ],
    indirect=['mesh'],
)
def test_the_model_does_not_know_what_a_weight_is(toy, mesh, scan):
    cfg, params, tokens_BT, expected = toy
    tokens_BT = sharding.shard_batch({'tokens_BT': tokens_BT})['tokens_BT']
    got = value_and_grad(place(mesh, params), dataclasses.replace(cfg, scan=scan), tokens_BT)
    assert_close(got, expected)


@pytest.mark.parametrize('mesh', ['fsdp2-seq2-tensor2'], indirect=True)
def test_the_fields_of_a_weight_lie_as_their_letters_say(toy, mesh):
    _, params, _, _ = toy
    specs = sharding.param_specs(params)
    d = ('fsdp', 'seq')
    assert specs['layers']['wq_DNH'] == LowRank(
        P(None, d, 'tensor', None), P(None, d, None), P(None, None, 'tensor', None)
    )
    assert specs['layers']['w_down_FD'] == Scaled(P(None, 'tensor', d), P(None, d))
    assert specs['embed_VD'] == LowRank(P('tensor', d), P('tensor', None), P(None, d))
    assert specs['layers']['wk_DKH'] == P(None, d, 'tensor', None) and specs['final_norm_D'] == P(d)


@pytest.mark.parametrize('mesh', ['fsdp2-seq2-tensor2'], indirect=True)
def test_parameters_are_born_where_they_stay(toy, mesh):
    cfg = toy[0]
    params = parameters.init_sharded(jax.random.key(0), cfg)
    here = math.prod(mesh.shape[a] for a in ('fsdp', 'seq', 'tensor'))
    assert params['layers']['wq_DNH'].addressable_shards[0].data.size * here == params['layers']['wq_DNH'].size
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        assert_close(params, parameters.init_sharded(jax.random.key(0), cfg), rtol=1e-6)


@pytest.mark.parametrize('mesh', ['one', 'tensor4'], indirect=True)
def test_the_gradient_of_a_frequent_word_is_not_summed_in_bfloat16(mesh):
    """8,192 times the same word: a bfloat16 sum of ones would stop at 256."""
    table_VD, tokens_BT = jnp.ones((8, 4)), jnp.zeros((8, 1024), jnp.int32)
    loss = lambda table_VD: jnp.sum(seam.lookup(table_VD, tokens_BT, dtype=jnp.bfloat16).astype(jnp.float32))
    gradient_VD = jax.jit(jax.grad(loss))(table_VD)
    np.testing.assert_array_equal(np.asarray(gradient_VD)[0], 8192.0)


def test_a_program_is_that_of_the_meshs_devices():
    """A CPU's transposes are made in memory; a mesh of TPUs, though none is here, has none of that."""

    def operations():
        x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        return str(jax.make_jaxpr(lambda x: seam.materialized_transpose(x) @ x)(x))

    tpu = jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu')
    mesh = sharding.make_mesh({}, jax.devices()[:1]).abstract_mesh.update(abstract_device=tpu)
    assert sharding.platform() == 'cpu' and 'optimization_barrier' in operations()
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.platform() == 'tpu' and 'optimization_barrier' not in operations()
