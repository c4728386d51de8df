"""The table of parameters: what is made of it agrees, and nothing is trained or exported that has no row."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lm.interop.gguf import arch as gguf_arch
from lm.interop.huggingface import families
from lm.model import parameters, sequences
from lm.model.feed_forward import FEED_FORWARDS
from lm.training.param_groups import infos_of

ROWS = (*parameters.TOP, *parameters.LAYER, *FEED_FORWARDS['gated'].rows, *parameters.REWARD_HEAD)
CHANGES = {
    'tied': {}, 'untied': {'tied': False, 'qkv_bias': True}, 'joint': {'qk_norm_joint': True, 'norms': 'post'},
    'both': {'norms': 'both', 'norm_plus_one': True, 'qk_norm': False},
}  # fmt: skip


@pytest.mark.parametrize('name', CHANGES)
def test_shapes_are_those_that_init_gives(name, tiny):
    cfg = dataclasses.replace(tiny, **CHANGES[name])
    found = jax.eval_shape(lambda key: parameters.init(key, cfg) | parameters.init_scores(key, cfg), jax.random.key(0))
    told = parameters.shapes(cfg, scored=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), told)
    assert set(told) - set(parameters.shapes(cfg)) == {row.name for row in parameters.REWARD_HEAD}


def test_a_name_has_one_row_and_another_has_none():
    assert max(collections.Counter(row.name for row in ROWS).values()) == 1
    assert parameters.row('layers/wo_NHD').contracted == 'NH'
    with pytest.raises(KeyError, match='w_other_DF is in no row'):
        parameters.row('w_other_DF')


def test_what_is_contracted_begins_a_parameters_letters():
    """A file of another format has it as [out, in]: `graph.shapes` cuts the letters there."""
    assert all(row.dims.startswith(row.contracted) for row in ROWS)
    assert all(row.contracted and row.decays for row in ROWS if row.matrix)


def test_other_formats_name_parameters_that_there_are():
    tables = [families.TOP, families.HEAD, families.SCORE, *(family.layer for family in families.FAMILIES)]
    tables += [gguf_arch.TOP, gguf_arch.HEAD, gguf_arch.BIASES, *(arch.layer for arch in gguf_arch.ARCHS.values())]
    assert {name.removeprefix('layers/') for table in tables for name in table} == {row.name for row in ROWS} - {
        'bias_score'
    }


def test_the_score_decays_and_its_bias_does_not(tiny):
    params = parameters.shapes(tiny, scored=True)
    infos = {info.name: info for info in infos_of(params)}
    assert infos['score_D'].decays and not infos['bias_score'].decays
    assert not infos['score_D'].matrix and not infos['bias_score'].matrix
    given = {'score_D': jnp.ones(tiny.dim), 'bias_score': jnp.float32(0.5)}
    assert sequences.token_scores(given, jnp.ones((1, 2, tiny.dim))).tolist() == [[tiny.dim + 0.5] * 2]
