"""The switches of the decoder, by the families that use them: what holds for the default graph holds for each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES
from families import BASE, FAMILIES, TOKENS, made

from lm import sharding
from lm.errors import UsageError
from lm.model import kv_cache, parameters, transformer
from lm.model.layers import RopeScaling

SWITCHES = ('qwen2', 'olmo2', 'gemma3', 'granite')  # all that the others have, `nope` layers aside


@pytest.fixture(params=[pytest.param(f, marks=() if f in SWITCHES else pytest.mark.slow) for f in FAMILIES])
def cfg(request):
    return dataclasses.replace(BASE, **FAMILIES[request.param])


@functools.partial(jax.jit, static_argnums=1)
def logits(params, cfg, tokens=TOKENS, **rows):
    return transformer.logits(params, cfg, transformer.forward(params, cfg, tokens, **rows)[0])


@pytest.mark.parametrize(
    'family', [pytest.param(f, marks=() if f in ('smollm3', 'gemma3') else pytest.mark.slow) for f in FAMILIES]
)
def test_scanned_is_unrolled(family):
    """Of several kinds of layers above all."""
    cfg = dataclasses.replace(BASE, **FAMILIES[family])
    params = made(cfg)
    scanned = dataclasses.replace(cfg, scan=True, remat='full')
    np.testing.assert_allclose(logits(params, scanned), logits(params, cfg), atol=2e-5)


def test_read_with_a_cache_is_read_at_once(cfg):
    params = made(cfg)

    @jax.jit
    def in_parts(params):
        cache, parts = kv_cache.empty_cache(cfg, 8, 16), []
        for at, until in ((0, 7), (7, 8), (8, 16)):
            h, cache = kv_cache.forward_cached(params, cfg, TOKENS[:, at:until], cache)
            parts.append(transformer.logits(params, cfg, h))
        return jnp.concatenate(parts, 1)

    np.testing.assert_allclose(in_parts(params), logits(params, cfg), atol=3e-5)


def test_packed_is_unpacked(cfg):
    params = made(cfg)
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), jnp.array([9, 7]), total_repeat_length=16), (8, 16))
    positions = jnp.concatenate([jnp.arange(9), jnp.arange(7)])[None].repeat(8, 0)
    packed = logits(params, cfg, segments_BT=segments, positions_BT=positions)
    apart = jnp.concatenate([logits(params, cfg, TOKENS[:, :9]), logits(params, cfg, TOKENS[:, 9:])], 1)
    np.testing.assert_allclose(packed, apart, atol=3e-5)


def test_a_layer_alone_is_a_layer_of_the_model(cfg):
    params = made(cfg)

    @jax.jit
    def by_layer(params):
        x = transformer.embed(params, cfg, TOKENS)
        for i, layer in enumerate(parameters.unstack(params['layers'], cfg.layers)):
            x = transformer.layer(layer, cfg, x, number=i)
        return transformer.logits(params, cfg, transformer.final_norm(params, cfg, x))

    np.testing.assert_allclose(by_layer(params), logits(params, cfg), atol=2e-5)


def loss(params, cfg, tokens):
    h, _ = transformer.forward(params, cfg, tokens)
    weights = jnp.ones(tokens.shape, jnp.float32)
    if sharding.axis_sizes():
        weights = jax.reshard(weights, sharding.activation_spec('BT', weights.shape))
    return sum(jax.tree.leaves(transformer.nll(params, cfg, h, tokens, weights, z_coef=1e-2)))


QUICK = {('gemma3', 'fsdp2-seq2-tensor2')}


@pytest.mark.parametrize(
    ('family', 'mesh_name'),
    [
        pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for name in ('data8', 'fsdp2-seq2-tensor2', 'tensor4')
    ],
)
def test_sharded_is_one_device(family, mesh_name):
    """Four devices along `tensor` divide the heads and not those of the keys."""
    cfg = dataclasses.replace(BASE, **FAMILIES[family], scan=True)
    params, shape = made(cfg), MESHES[mesh_name]
    wanted = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, cfg, jnp.asarray(TOKENS))
    with sharding.use_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))]) as mesh:
        there = jax.device_put(params, sharding.shardings(mesh, sharding.param_specs(params)))
        tokens = sharding.shard_batch({'tokens_BT': TOKENS.astype(np.int32)})['tokens_BT']
        found = jax.device_get(jax.jit(jax.value_and_grad(loss), static_argnums=1)(there, cfg, tokens))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(np.max(np.abs(b)))))
    jax.tree.map(close, found, jax.device_get(wanted))


def test_local_layers_see_their_window_and_global_ones_all():
    cfg = dataclasses.replace(BASE, layers=1, pattern='local,global', window=4)
    whole = dataclasses.replace(cfg, pattern='global')
    slope = lambda cfg: jax.jit(jax.grad(lambda bump_TD: jnp.sum(_last(made(cfg), cfg, bump_TD))))(jnp.zeros((16, 32)))
    reach = lambda cfg: np.flatnonzero(np.any(np.abs(slope(cfg)) > 0, axis=1))
    assert list(reach(cfg)) == [12, 13, 14, 15] and list(reach(whole)) == list(range(16))


def _last(params, cfg, bump_TD):
    """The last token's hidden state, with something added to what the layers read."""
    x = transformer.embed(params, cfg, jnp.asarray(TOKENS[:1])) + bump_TD
    return transformer.layer(parameters.unstack(params['layers'], 1)[0], cfg, x, number=0)[0, -1]


def test_layers_without_positions_do_not_know_the_order_before_them():
    cfg = dataclasses.replace(BASE, layers=1, pattern='nope')
    params, other = made(cfg), TOKENS.copy()
    other[:, :10] = TOKENS[:, :10][:, ::-1]
    np.testing.assert_allclose(logits(params, cfg)[:, -1], logits(params, cfg, other)[:, -1], atol=1e-5)
    rotary = dataclasses.replace(cfg, pattern=None)
    assert np.max(np.abs(logits(params, rotary)[:, -1] - logits(params, rotary, other)[:, -1])) > 1e-3


def test_llama3_slows_down_long_wavelengths_alone():
    scaling = RopeScaling.parse('llama3,factor=8,low=1,high=4,original=8192')
    turns = np.array([5.0, 4.0, 2.5, 1.0, 0.5])  # over 8,192 tokens
    frequency = 2 * np.pi * turns / 8192
    # half of the way from 1 to 4 turns: half kept, half an eighth
    np.testing.assert_allclose(scaling.slowed(frequency) / frequency, [1, 1, 0.5625, 1 / 8, 1 / 8], rtol=1e-6)
    assert RopeScaling.parse('linear,factor=4').slowed(np.array([2.0])) == 0.5


@pytest.mark.parametrize(
    ('settings', 'wanted'),
    [
        ({'rope_scaling': 'yarn,factor=4'}, 'must be linear,factor=N or llama3'),
        ({'rope_scaling': 'llama3,factor=4,low=4,high=1'}, 'must be linear,factor=N or llama3'),
        ({'rope_scaling': 'linear,factor=x'}, 'must be linear,factor=N or llama3'),
        ({'pattern': 'local,global'}, 'has local layers: set model.window'),
        ({'pattern': 'global,rope'}, "'rope' is not one of local, global, nope"),
        ({'norms': 'before'}, 'model.norms=before is not one of pre, post, both'),
        ({'activation': 'relu'}, 'model.activation=relu is not one of silu, gelu'),
        ({'layers': 0}, 'model.layers=0 must be from 1 to'),
    ],
)
def test_a_graph_that_there_is_not_is_refused(settings, wanted):
    with pytest.raises(UsageError, match=wanted):
        dataclasses.replace(BASE, **settings)
