"""How a model is run where the settings leave it open: one decision of architecture, platform and memory."""

import json

import pytest

from lm import config as configs
from lm import sharding
from lm.errors import UsageError
from lm.runs import execution, rundir

GIB = 2**30


def config(arg='', *words):
    return configs.load(f'configs/pretrain.py:{arg}', configs.split_settings(words)[1])[0]


@pytest.fixture
def platform(monkeypatch):
    """platform(name, memory of a device in bytes, None if it does not tell)."""

    def pretend(name, memory=None):
        monkeypatch.setattr(sharding, 'platform', lambda: name)
        monkeypatch.setattr(execution, 'memory_limit', lambda device: memory)

    return pretend


@pytest.mark.parametrize(
    ('name', 'layers', 'scan'), [('cpu', 8, False), ('cpu', 9, True), ('gpu', 24, False), ('tpu', 25, True)]
)
def test_deep_models_are_scanned_and_a_cpu_begins_earlier(platform, name, layers, scan):
    platform(name)
    own = config('', f'--config.model.layers={layers}')
    assert execution.resolve(own).scan == scan
    assert execution.resolve(config('', f'--config.model.layers={layers}', '--config.execution.scan=1')).scan


@pytest.mark.parametrize(
    ('memory', 'unrolled', 'scanned'),
    [(None, 'none', 'dots'), (80 * GIB, 'none', 'dots'), (13.5 * GIB, 'names', 'names'), (8 * GIB, 'full', 'full')],
)
def test_what_is_computed_again_is_what_memory_asks_for(platform, memory, unrolled, scanned):
    """350M: 5.3 GiB of state, and of 8,192 tokens twice what their backward pass keeps."""
    platform('gpu', memory)
    assert execution.resolve(config('350m')).remat == unrolled
    assert execution.resolve(config('350m', '--config.execution.scan=1')).remat == scanned
    assert execution.resolve(config('350m', '--config.execution.remat=dots')).remat == 'dots'


def test_what_a_run_was_trained_with_is_not_asked_for_to_use_it(platform):
    platform('cpu')
    own = config('', '--config.execution.attention=cudnn', '--config.execution.remat=full')
    with pytest.raises(UsageError, match='execution.attention=cudnn needs an NVIDIA GPU'):
        execution.resolve(own)
    found = execution.resolve(own, training=False)
    assert (found.attention.name, found.remat, found.dtype) == ('blocks', 'none', 'float32')


def test_a_run_with_the_names_of_before_is_the_same_run(tmp_path):
    saved = {'config': config().to_dict()}
    group = saved['config'].pop('execution')
    saved['config'] |= {'microbatch': 4, 'remat': 'names', 'attention': None, 'precision': {'compute': 'bfloat16'}}
    saved['config']['model'] |= {'scan': True}
    (tmp_path / 'config.json').write_text(json.dumps(saved))
    found = rundir.read_config(str(tmp_path))['config']
    wanted = {'microbatch': 4, 'remat': 'names', 'attention': None, 'dtype': 'bfloat16', 'scan': True}
    assert found['execution'] == wanted and set(group) == set(wanted)
    assert 'precision' not in found and 'scan' not in found['model'] and 'remat' not in found
    assert configs.differences(found, config().to_dict()) == {}
