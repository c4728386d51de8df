"""A run's model as a Flax NNX module: the same numbers, the same gradients, and the same parameters back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm import sharding
from lm.errors import UsageError
from lm.interop.nnx import from_nnx, opened, to_nnx
from lm.model import parameters, transformer
from lm.runs import lazy_checkpoint, loading

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def params(tiny):
    return jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), tiny)


@functools.partial(jax.jit, static_argnums=1)
def plain_loss(params, cfg):
    logits = transformer.logits(params, cfg, transformer.forward(params, cfg, TOKENS)[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@nnx.jit
def module_loss(module):
    return optax.softmax_cross_entropy_with_integer_labels(module(TOKENS)[:, :-1], TOKENS[:, 1:]).mean()


def test_it_computes_what_the_model_does(params, tiny):
    forward = jax.jit(lambda p: transformer.logits(p, tiny, transformer.forward(p, tiny, TOKENS)[0]))
    wanted = forward(params)
    np.testing.assert_allclose(nnx.jit(lambda m: m(TOKENS))(to_nnx(params, tiny)), wanted, atol=1e-5)


def test_its_gradients_are_the_models(params, tiny):
    found = nnx.grad(module_loss)(to_nnx(params, tiny))
    wanted = jax.grad(plain_loss)(params, tiny)
    named = {tuple(k for k in path if k != 'parameters'): leaf[...] for path, leaf in nnx.to_flat_state(found)}
    assert len(named) == len(jax.tree.leaves(wanted))
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        np.testing.assert_allclose(named[tuple(key.key for key in path)], leaf, atol=1e-6)


def test_a_module_that_was_trained_comes_back(params, tiny):
    module = to_nnx(params, tiny)
    jax.tree.map(np.testing.assert_array_equal, from_nnx(module), params)
    optimizer = nnx.Optimizer(module, optax.sgd(1.0), wrt=nnx.Param)
    optimizer.update(module, nnx.grad(module_loss)(module))
    back = from_nnx(module)
    stepped = jax.tree.map(lambda w, g: w - g, params, jax.grad(plain_loss)(params, tiny))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, stepped)
    assert plain_loss(back, tiny) < plain_loss(params, tiny)


def test_what_came_back_is_written_as_a_run(dialogues, tmp_path):
    """Trained, and with its vocabulary's padding."""
    run = str(dialogues.run('sft'))
    with sharding.use_mesh():
        model = loading.load(run, warn=pytest.fail)
        more = jax.tree.map(lambda x: x + 1, model.params)
        lazy_checkpoint.write_run(opened(to_nnx(more, model.cfg), lazy_checkpoint.open_run(run)), tmp_path / 'run')
        back = loading.load(str(tmp_path / 'run'), warn=pytest.fail)
    rows = model.cfg.vocab_size
    assert rows < len(more['embed_VD']), 'a padded vocabulary'
    found, wanted = dict(back.params), dict(more)
    np.testing.assert_array_equal(found.pop('embed_VD')[:rows], wanted.pop('embed_VD')[:rows])
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_module_of_another_graph_is_no_run_of_this_one(params, tiny, dialogues):
    cfg = dataclasses.replace(tiny, qkv_bias=True)
    module = to_nnx(parameters.init(jax.random.key(0), cfg), cfg)
    with pytest.raises(UsageError, match='not of one graph: layers/bias_k_KH'):
        opened(module, lazy_checkpoint.open_run(str(dialogues.run('sft'))))


def test_it_splits_and_merges_as_modules_do(params, tiny):
    graph, state = nnx.split(to_nnx(params, tiny))
    np.testing.assert_array_equal(nnx.merge(graph, state)(TOKENS), to_nnx(params, tiny)(TOKENS))
