"""The benchmarks' scripts run, here at a tiny shape: on the machine they are for, an hour costs money."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / 'benchmarks'


@pytest.mark.slow
def test_h100_runs_anywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER.parent)
    h100 = importlib.import_module('h100')
    h100.main(['--tiny', '--rounds=2', '--segments=3', '--remat=names', '--unroll', f'--profile={tmp_path}'])
    result = json.loads(capsys.readouterr().out)
    assert result['size'] == 'tiny' and result['attention'] == 'blocks'
    assert result['remat'] == 'names' and not result['scan']
    assert set(result['tried']) == {'2', '4', '8'}
    assert 0 < result['mfu'] < 2 and 0 < result['decode']['ratio'] < 1
    assert list(tmp_path.rglob('*.xplane.pb'))


def test_the_sizes_are_those_that_the_bars_are_for(monkeypatch):
    """GPT-2's small, medium and XL have 124, 355 and 1558 million parameters; ours add no positions and no biases."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER.parent)
    h100 = importlib.import_module('h100')
    counts = {}
    for size in h100.SIZES:
        config = h100.settings(size, h100.parse(['--attention=blocks']))
        cfg = h100.runs.model_config(config)
        assert (config.seq_len, cfg.vocab_size, cfg.head_dim, cfg.dim) == (1024, 50_304, 64, 64 * cfg.heads)
        counts[size] = h100.flops.per_token(cfg.sizes, layers=cfg.layers, seq_len=1) / 6e6
    assert counts == pytest.approx({'124M': 124, '350M': 355, '1.5B': 1558}, rel=0.02)


@pytest.mark.parametrize('name', ['data', 'generate', 'pretrain'])
def test_a_mistake_is_one_line(name):
    done = subprocess.run([sys.executable, FOLDER / f'{name}.py', '--nonesuch'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == 'lm: unrecognized arguments: --nonesuch (--help lists the flags)\n'
