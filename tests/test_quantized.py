"""Quantized weights as mathematics: their codes, the product, its gradient, on every mesh."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.errors import UsageError
from lm.model import adapters, parameters, quantized, seam, transformer
from lm.model.config import ModelConfig

CFG = ModelConfig(
    vocab_size=64, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn_dim=128, attention='dense', scan=True
)
KINDS = ('int8', 'int8:32', 'int4', 'int4:32', 'nf4')


def drawn(*shape, key=0):
    return 0.3 * jax.random.normal(jax.random.key(key), shape, jnp.float32)


@pytest.mark.parametrize(
    'kind', [pytest.param(k, marks=() if k in ('int8', 'nf4') else pytest.mark.slow) for k in KINDS]
)
def test_a_model_says_what_its_dense_weights_say_on_every_mesh(mesh, kind):
    """Loss, and the gradients that pass through, beside those of the same weights as arrays."""
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        base = parameters.init(jax.random.key(0), CFG)
        lying = jax.device_get(quantized.quantized(base, kind))
    tokens_BT = np.asarray(np.random.default_rng(0).integers(0, 64, (8, 8), dtype=np.int32))

    def loss(embed_VD, params, tokens_BT, dense):
        params = adapters.merged(params) if dense else params
        hidden_BTD, _ = transformer.forward({**params, 'embed_VD': embed_VD}, CFG, tokens_BT)
        return jnp.sum(jnp.square(hidden_BTD[..., 0]))

    put = jax.tree.map(jax.device_put, lying, sharding.shardings(mesh, sharding.param_specs(lying)))
    tokens = sharding.shard_batch({'tokens_BT': tokens_BT})['tokens_BT']
    grad = jax.jit(jax.value_and_grad(loss), static_argnames='dense')
    with_codes = grad(put['embed_VD'], put, tokens, dense=False)
    with_arrays = grad(put['embed_VD'], put, tokens, dense=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), with_codes, with_arrays)


def dense_by_hand(w: quantized.Quantized) -> np.ndarray:
    """[I, outputs] of whole numbers and their scales, in float64: the definition, group by group."""
    codes, scale = np.asarray(w.codes), np.asarray(w.scale, np.float64)
    if w.kind == 'int4':
        codes = np.stack([codes >> 4, codes & 15], 1).reshape(-1, codes.shape[1]).astype(int) - 8
    group = len(codes) // len(scale)
    return np.stack([codes[i] * scale[i // group] for i in range(len(codes))])


@pytest.mark.parametrize('kind, most', [('int8', 1 / 254), ('int8:32', 1 / 254), ('int4', 1 / 8), ('int4:128', 1 / 8)])
def test_whole_numbers_are_within_half_a_step(kind, most):
    """Of a group's largest number; but int4 has no +8, so that its far end may be a whole step away."""
    w = drawn(256, 8)
    lying = quantized.quantize(w, 'DF', 'D', kind)
    dense = np.asarray(lying.dense())
    np.testing.assert_allclose(dense, dense_by_hand(lying), atol=1e-7)
    groups = np.abs(np.asarray(w)).reshape(len(lying.scale), -1, 8)
    error = np.abs(dense - w).reshape(groups.shape)
    assert np.all(error <= groups.max(1, keepdims=True) * most * 1.02)
    assert error.max() > groups.max() * most / 8  # it is no copy


def test_the_code_book_is_the_published_one():
    """Quantiles of a normal distribution, eight below zero and nine above (QLoRA, appendix E)."""
    from statistics import NormalDist

    inverse, offset = NormalDist().inv_cdf, 0.9677083
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    found = np.sort([*above, 0.0, *below]) / max(above)
    np.testing.assert_allclose(quantized.NF4, found, atol=1e-6)
    book = quantized.dynamic_map()
    assert len(set(book.tolist())) == 256 and book.min() > -1 and book.max() == 1


def test_nf4_takes_the_nearest_code_and_its_scales_cost_little():
    w = drawn(4, 16, 96)  # two letters of inputs: groups run over them
    lying = quantized.quantize(w, 'NHD', 'NH', 'nf4')
    assert lying.codes.shape == (32, 96) and lying.scale.shape == (1, 96) and lying.steps.shape == (1,)
    flat, largest = np.asarray(w, np.float64).reshape(64, 96), np.abs(np.asarray(w)).reshape(64, 96).max(0)
    book = np.asarray(quantized.NF4)
    nearest = book[np.abs(flat[..., None] / largest[:, None] - book).argmin(-1)] * largest
    dense = np.asarray(lying.dense()).reshape(64, 96)
    off = np.abs(np.asarray(lying._scales()).reshape(-1) / largest - 1)  # of scales in 8 bits
    assert off.max() < 0.02 and off.max() > 0
    np.testing.assert_allclose(dense, nearest, rtol=0.021)


def test_zeros_stay_zeros():
    for kind in KINDS:
        w = drawn(128, 4).at[:, 1].set(0)
        np.testing.assert_array_equal(quantized.quantize(w, 'DF', 'D', kind).dense()[:, 1], 0)


def test_no_product_keeps_a_dense_weight_for_its_gradient():
    """What the backward pass of a product reads is the codes."""
    w = quantized.quantize(drawn(128, 64), 'DF', 'D', 'nf4')
    _, back = jax.vjp(lambda x: seam.einsum('BTD,DF->BTF', x, w), drawn(1, 8, 128))
    kept = [x for x in jax.tree.leaves(back) if getattr(x, 'shape', ()) in ((128, 64), (64, 128))]
    assert not kept


def test_a_group_that_does_not_divide_names_one_that_does():
    with pytest.raises(UsageError, match='do not divide the 96 inputs of a matrix: take nf4:32'):
        quantized.quantize(drawn(96, 4), 'DF', 'D', 'nf4')
    with pytest.raises(UsageError, match='take int8'):
        quantized.quantize(drawn(48, 4), 'DF', 'D', 'int4:32')


def test_nf4_is_that_of_bitsandbytes():
    """Its codes bit for bit; of its scales' codes one in a hundred may be a neighbour, for the mean is a sum."""
    golden = np.load(Path(__file__).parent / 'golden' / 'nf4.npz')
    np.testing.assert_array_equal(np.asarray(quantized.NF4, np.float32), golden['book'])
    np.testing.assert_allclose(quantized.dynamic_map(), golden['dynamic'], atol=1e-7)
    lying = jax.jit(partial(quantized.quantize, letters='DF', inputs='D', text='nf4'))(golden['w'].T)
    by_output = lambda x: np.asarray(x).T.reshape(-1)
    np.testing.assert_array_equal(by_output(lying.codes), golden['codes'])
    off = by_output(lying.scale).astype(int) - golden['scale']
    assert np.abs(off).max() <= 1 and np.count_nonzero(off) <= len(off) / 100
    np.testing.assert_allclose(lying.steps, golden['steps'], rtol=1e-6)
    np.testing.assert_allclose(lying.offset, golden['offset'], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(lying.dense()).T, golden['dense'], rtol=0.02, atol=1e-8)
