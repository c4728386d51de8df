"""The models that are known by name: the shape of each, by how many parameters it is published to have."""

import json
from functools import partial

import jax
import pytest
from running import load_config

from lm import presets
from lm.errors import UsageError
from lm.model import parameters
from lm.runs import execution, lineage
from lm.stages import find

# As published, without the padding of the vocabulary; Granite's counted by hand: embedding, layers, last norm.
PARAMETERS = {
    'llama2-7b': 6_738_415_616,
    'llama3-8b': 8_030_261_248,
    'llama3-70b': 70_553_706_496,
    'llama3.2-1b': 1_235_814_400,
    'llama3.2-3b': 3_212_749_824,
    'smollm2-135m': 134_515_008,
    'smollm2-360m': 361_821_120,
    'smollm2-1.7b': 1_711_376_384,
    'smollm3-3b': 3_075_098_624,
    'mistral-7b': 7_241_732_096,
    'qwen2-0.5b': 494_032_768,
    'qwen2-1.5b': 1_543_714_304,
    'qwen2-7b': 7_615_616_512,
    'qwen3-0.6b': 596_049_920,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-4b': 4_022_468_096,
    'qwen3-8b': 8_190_735_360,
    'olmo2-7b': 7_298_617_344,
    'gemma-2b': 2_506_172_416,
    'gemma2-2b': 2_614_341_888,
    'gemma3-1b': 999_885_952,
    'granite3-2b': 49_155 * 2048 + 40 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 2048,
}


@pytest.mark.parametrize('name', PARAMETERS)
def test_a_known_model_has_its_parameters(name):
    cfg = execution.model_config(load_config(arg=name))
    shapes = jax.eval_shape(partial(parameters.init, cfg=cfg), jax.random.key(0))
    padding = (cfg.sizes['V'] - cfg.vocab_size) * cfg.dim * (1 if cfg.tied else 2)
    assert sum(x.size for x in jax.tree.leaves(shapes)) - padding == PARAMETERS[name]


def test_every_known_model_is_counted():
    assert set(presets.PRESETS) - {'124m', '350m', '1b', '8b', '70b'} == set(PARAMETERS)


def test_a_run_older_than_a_setting_of_the_model_has_its_default(tmp_path):
    old = load_config().to_dict()
    for key in ('norms', 'pattern', 'qkv_bias', 'context'):
        del old['model'][key]
    (tmp_path / 'config.json').write_text(json.dumps({'config': old}))
    child = load_config(f'--config.init_from={tmp_path}')
    child.model.norms = 'post'  # as a stage's own file may have it
    lineage.inherit_model(child, find(child.stage).about, {'init_from'}, weights=False)
    assert child.model.norms == 'pre'
    lineage.inherit_model(child, find(child.stage).about, {'init_from', 'model.norms'}, weights=False)
    child.model.norms = 'post'
    with pytest.raises(UsageError, match='model.norms=post differs from .*, which has pre: leave it out'):
        lineage.inherit_model(child, find(child.stage).about, {'init_from', 'model.norms'}, weights=False)
