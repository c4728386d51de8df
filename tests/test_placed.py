"""Weights at rest straight to where a run keeps them."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.errors import UsageError
from lm.interop import placed
from lm.interop.huggingface.folder import open_folder, write_folder
from lm.model import parameters, transformer
from lm.model.config import ModelConfig
from lm.runs import lazy_checkpoint, loading

GOLDEN = Path(__file__).parent / 'golden' / 'families'


def abstract_of(cfg: ModelConfig, mesh=None, dtype=jnp.float32):
    """The parameters of a run, with their shardings on the mesh."""
    tree = jax.eval_shape(partial(parameters.init, cfg=cfg), jax.random.key(0))
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)
    places = sharding.shardings(mesh, sharding.param_specs(tree))
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), tree, places)


@pytest.mark.parametrize('name', ['llama', 'gemma3', 'olmo2'])
def test_the_logits_are_those_of_transformers_however_they_are_split(name):
    """And the rows that pad the vocabulary to a multiple of 128 are 0."""
    with np.load(GOLDEN / name / 'logits.npz') as file:
        tokens, wanted = file['tokens'], file['logits']
    opened = open_folder(GOLDEN / name)
    cfg = ModelConfig(**opened.model)
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 4, 'seq': 1, 'tensor': 2, 'expert': 1})
    with jax.set_mesh(mesh):
        abstract = abstract_of(cfg, mesh)
        params = placed.arrays(opened, abstract)
        for found, spec in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
            assert found.sharding == spec.sharding and found.dtype == jnp.float32
    host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    assert host['embed_VD'].shape[0] == 128 and not host['embed_VD'][96:].any()
    found = transformer.logits(host, cfg, transformer.forward(host, cfg, jnp.asarray(tokens))[0])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_folder_is_loaded_onto_the_mesh_and_answers(tmp_path, dialogues):
    write_folder(lazy_checkpoint.open_run(str(dialogues.run('sft'))), tmp_path / 'folder', say=lambda line: None)
    with sharding.use_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4]):
        found = lazy_checkpoint.load(open_folder(tmp_path / 'folder'))
        wanted = loading.load(str(dialogues.run('sft')), warn=pytest.fail)
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
            assert (a.sharding, a.shape) == (b.sharding, b.shape)
        ids_BT = jnp.array([wanted.tokenizer.encode('a fish in the sea')])
        says = jax.jit(lambda p: transformer.logits(p, found.cfg, transformer.forward(p, found.cfg, ids_BT)[0]))
        np.testing.assert_array_equal(says(found.params), says(wanted.params))
    assert found.tokenizer.encode('a fish') == wanted.tokenizer.encode('a fish')
    assert (found.config['stage'], found.config['model']['dim']) == ('sft', found.cfg.dim)


def test_each_is_cast_and_every_layer_is_its_own():
    opened = open_folder(GOLDEN / 'llama')
    params = placed.arrays(opened, abstract_of(ModelConfig(**opened.model), dtype=jnp.bfloat16))
    for path, leaf in opened.leaves.items():
        node = params['layers'] if leaf.layers else params
        found = np.asarray(node[path.rpartition('/')[2]])
        for i in range(leaf.layers or 1):
            own = leaf.read(i)
            part = (found[i] if leaf.layers else found)[tuple(map(slice, own.shape))]
            np.testing.assert_array_equal(part, own.astype(jnp.bfloat16), err_msg=path)


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        ({'dim': 64}, 'has the shape .*, and the settings make it'),
        ({'layers': 4}, 'has the shape'),
        ({'vocab_size': 300, 'tied': True}, 'has head_DV beside'),
        ({'qk_norm': True}, 'has no layers/k_norm_H'),
    ],
)
def test_a_tree_of_another_model_is_refused(change, wanted):
    opened = open_folder(GOLDEN / 'llama')
    with pytest.raises(UsageError, match=wanted):
        placed.arrays(opened, abstract_of(ModelConfig(**{**opened.model, **change})))
