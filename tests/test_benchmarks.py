"""The benchmarks' scripts run, here at a tiny shape: on the machine they are for, an hour costs money."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import pair_store

from lm.data import chats, pairs, pipeline

FOLDER = Path(__file__).parents[1] / 'benchmarks'


@pytest.mark.slow
def test_h100_runs_anywhere(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER.parent)
    h100 = importlib.import_module('h100')
    h100.main(
        [
            '--tiny',
            '--rounds=2',
            '--segments=3',
            '--remat=names',
            '--unroll',
            f'--profile={tmp_path}',
            '--decode_rows=1,8',
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert result['size'] == 'tiny' and result['attention'] == 'blocks'
    assert result['remat'] == 'names' and not result['scan']
    assert set(result['tried']) == {'2', '4', '8'}
    assert 0 < result['mfu'] < 2 and set(result['decode']) == {'1', '8'}
    assert all(0 < d['ratio'] < 1 and d['compile_seconds'] > 0 for d in result['decode'].values())
    assert list(tmp_path.rglob('*.xplane.pb'))


@pytest.mark.slow
def test_an_iteration_of_grpo_runs_anywhere(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.setattr(sys, 'argv', ['rl.py', '--tiny', '--rounds=1'])
    importlib.import_module('rl').main()
    result = json.loads(capsys.readouterr().out)
    for setting in ('fixed', 'ends'):
        ledger = result[setting]['ledger']
        parts = [ledger.pop(name) for name in ('generation', 'scoring', 'update')]
        assert min(parts) > 0 and sum(parts) == pytest.approx(ledger['total'], abs=1e-3)
    assert result['fixed']['ledger']['tokens'] == 128 > result['ends']['ledger']['tokens']


def test_the_sizes_are_those_that_the_bars_are_for(monkeypatch):
    """GPT-2's small, medium and XL have 124, 355 and 1558 million parameters; ours add no positions and no biases."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.chdir(FOLDER.parent)
    h100 = importlib.import_module('h100')
    counts = {}
    for size in h100.SIZES:
        config = h100.settings(size, h100.parse(['--attention=blocks']))
        cfg = h100.execution.model_config(config)
        assert (config.seq_len, cfg.vocab_size, cfg.head_dim, cfg.dim) == (1024, 50_304, 64, 64 * cfg.heads)
        counts[size] = h100.flops.per_token(cfg, seq_len=1) / 6e6
    assert counts == pytest.approx({'124M': 124, '350M': 355, '1.5B': 1558}, rel=0.02)


def test_a_conversion_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    importlib.import_module('convert').measure(['--size=tiny', f'--folder={tmp_path}', '--tokens=8'])
    result = json.loads(capsys.readouterr().out)
    assert result['largest'] == 0 and result['tokens'] == 8 and not list(tmp_path.iterdir())
    assert list(result['seconds']) == ['write', 'open', 'compare'] and 0 < result['bytes'] < 4 * result['parameters']


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ('convert', 'data', 'dpo', 'generate', 'rl', 'sft')]


@pytest.mark.parametrize('name', ['pretrain', *SLOW])
def test_a_mistake_is_one_line(name):
    done = subprocess.run([sys.executable, FOLDER / f'{name}.py', '--nonesuch'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == 'lm: unrecognized arguments: --nonesuch (--help lists the flags)\n'


@pytest.mark.skipif(importlib.util.find_spec('trl') is not None, reason='trl is installed')
@pytest.mark.parametrize('name', ['dpo', pytest.param('sft', marks=pytest.mark.slow)])
def test_a_peer_that_is_not_installed_is_one_line(name):
    done = subprocess.run([sys.executable, FOLDER / f'{name}.py', '--peer=trl'], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lm: --peer=trl is not installed: pip install -e '.[peers]'\n"


def sequence(rng, length):
    """(ids, trained) of a sequence of which the second half is to be learned."""
    return rng.integers(1, 100, length, dtype=np.uint16), (np.arange(length) >= length // 2).astype(np.uint8)


def store_of(folder, lengths):
    """Pairs of these lengths."""
    rng = np.random.default_rng(0)
    return pair_store(folder, [[tuple(x.tolist() for x in sequence(rng, n)) for n in pair] for pair in lengths])


def plain(example):
    return [(np.asarray(ids).tolist(), np.asarray(trained).astype(bool).tolist()) for ids, trained in example]


def test_the_peer_gets_the_conversations_that_our_rows_hold(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    sft, rng = importlib.import_module('sft'), np.random.default_rng(0)
    whole = [sequence(rng, n) for n in (5, 9, 12)]
    row = chats.segments_row(whole, 32, 0)
    batch = {f'{name.removesuffix("T")}BT': x[None] for name, x in row.items()}
    assert [plain(c) for c in sft.conversations(batch)] == [plain([c]) for c in whole]


def test_the_peer_gets_the_pairs_that_our_rows_hold(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    dpo = importlib.import_module('dpo')
    rng = np.random.default_rng(1)
    store = store_of(tmp_path / 'pairs', rng.integers(4, 40, (12, 2)).tolist())
    known = rng.standard_normal((12, 2)).astype(np.float32)
    rows = dataclasses.replace(pairs.in_order(store, seq_len=64), reference=known)
    batch = pipeline.stack([*(rows.row(i) for i in range(len(rows))), rows.empty])
    order = rows.plan.order.tolist()
    assert [plain(pair) for pair in dpo.responses(batch)] == [plain(store.pair(n)) for n in order]
    np.testing.assert_array_equal(dpo.reference([batch]), known[order])


@pytest.mark.parametrize(
    ('longest', 'seq_len', 'width'), [(20, 512, 128), (70, 512, 256), (70, 32, 64), (600, 512, 1024)]
)
def test_rows_of_pairs_are_as_wide_as_the_longest_pair_needs(tmp_path, monkeypatch, longest, seq_len, width):
    """Of the pairs that are used, cut to seq_len; never wider than two of seq_len."""
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    rows = pairs.in_order(store_of(tmp_path / 'pairs', [(10, 12), (longest, longest)]), seq_len=seq_len)
    assert rows.width == len(rows.row(0)['tokens_T']) == width
