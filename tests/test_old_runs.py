"""Runs that an older lm has saved are opened, measured, taken elsewhere, gone on from and resumed.

tests/data/old_runs.tar.xz holds two tiny runs of each stage as commit 2c68fb2 left them, with `SETTINGS` and `OWN`, on
one CPU device with XLA_FLAGS=--xla_force_host_platform_device_count=1, in the folder where its data lies; only log.txt
and tensorboard/ were left out, and the folder's name out of Orbax's commit_success.txt. What they must still say was
computed by that code as well. A test that fails here means that people cannot open their runs: teach the code to read
them, and never make the archive anew.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import pytest
import running
from checks import refused

from lm import sharding
from lm.runs import checkpoint, loading

ARCHIVE = Path(__file__).parent / 'data' / 'old_runs.tar.xz'
# By run, the digest of the weights for use: with optim.ema their average.
DIGESTS = {
    'pretrain-adamw': '93da3025dd896cc1',
    'pretrain-muon': '201cd218775a8c67',
    'sft-adamw': '5b167f77e5954114',
    'sft-muon': '00e042fb27ea1fb3',
    'reward-adamw': '299bec29b1fee328',
    'reward-muon': '4f961b8080746f3b',
    'dpo-adamw': '55e917b8d4bb28c2',
    'dpo-muon': '747d3684393c9877',
}
# train/loss of the two steps after the last saved one: of the first with the weights, of the second with the
# optimizer's state as well.
GONE_ON = {'pretrain-adamw': (6.0164518, 5.8668971), 'pretrain-muon': (6.1214004, 6.0246625)}
SETTINGS = {
    'batch_size': 8, 'seq_len': 48, 'optim.lr': 3e-3, 'optim.schedule': 'cosine', 'optim.final': 0.1,
    'optim.warmup': 1, 'data.heldout': 0.1, 'checkpoint.every': 1, 'checkpoint.keep': 1, 'log.every': 1,
    'eval.every': 2, 'eval.rows': 4, 'eval.max_new_tokens': 4, 'eval.prompts': 'prompts.jsonl',
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    'adamw': {'optim.name': 'adamw'},
    'muon': {'optim.name': 'muon', 'optim.ema': 0.9},
    'pretrain': {
        'data.mixture': 'one.jsonl:0.7,two.jsonl:0.3', 'model.vocab_size': 300, 'model.dim': 16, 'model.layers': 1,
        'model.heads': 4, 'model.kv_heads': 2, 'model.head_dim': 4, 'model.ffn_dim': 32,
    },
    'sft': {'data.mixture': 'chats.jsonl'},
    'reward': {'data.mixture': 'pairs.jsonl'},
    'dpo': {'data.mixture': 'pairs.jsonl', 'nll': 0.1},
    'dpo-muon': {'loss': 'kto', 'reference': 'live'},
}  # fmt: skip
PARENTS = {'sft': 'pretrain', 'reward': 'sft', 'dpo': 'sft'}
old_runs = pytest.mark.parametrize('run', DIGESTS)


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
    """The runs of before and their data in one folder, which nobody may change; a cache of their own."""
    folder = tmp_path_factory.mktemp('old')
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path_factory.mktemp('cache')))
        before = {p: p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}
        yield folder
    assert before.items() <= {p: p.stat().st_mtime_ns for p in folder.rglob('*')}.items(), 'a test has changed a run'


@pytest.fixture(autouse=True)
def beside_them(unpacked, monkeypatch):
    monkeypatch.chdir(unpacked)


def typed(run: str, workdir: Path | str, **settings: Any) -> list[str]:
    """The command line of a run, as it was when it began but for `settings`, which have __ for a point."""
    stage, optimizer = run.split('-')
    given = SETTINGS | OWN[optimizer] | OWN[stage] | OWN.get(run, {})
    if stage in PARENTS:
        given['init_from'] = f'{PARENTS[stage]}-{optimizer}'
    given |= {key.replace('__', '.'): value for key, value in settings.items()}
    config = running.ROOT / 'configs' / f'{stage}.py'
    return [f'--config={config}', f'--workdir={workdir}', *(f'--config.{k}={v}' for k, v in given.items())]


def last(run: str, kind: str) -> dict[str, float]:
    """What a run of before had measured last."""
    metrics = {k: v for line in running.lines(Path(run)) for k, v in line.items()}
    return {key: value for key, value in metrics.items() if key.startswith(kind)}


@old_runs
def test_the_weights_are_those_that_were_saved(run):
    with sharding.use_mesh():
        model = loading.load(run, warn=pytest.fail)
        assert checkpoint.digest(model.params) == DIGESTS[run]
    assert model.step == 2 and {x.dtype.name for x in jax.tree.leaves(model.params)} == {'float32'}


@old_runs
def test_it_is_talked_to(call, run):
    raw = ['--raw'] if run.startswith('pretrain') else []
    answer = call('chat', run, *raw, '--prompt=the bucket', '--max_new_tokens=1', '--temperature=0')
    if run.startswith('reward'):
        return refused(answer, f'{run} is a reward model and gives scores, not answers')
    status, out, err = answer
    assert (status, err) == (0, '') and out.endswith('\n')


@old_runs
def test_it_is_taken_elsewhere(call, run, tmp_path):
    """To a folder of Hugging Face's, which is read again and must say the same."""
    status, out, err = call('convert', run, tmp_path / 'folder', '--tokens=32')
    assert status == 0, err
    assert json.loads(out)['largest'] < 1e-4
    assert (tmp_path / 'folder' / 'model.safetensors').exists()


@old_runs
def test_it_measures_what_it_measured(call, run):
    """On its own data, by the settings in its config.json: what the code of then wrote into metrics.jsonl."""
    task = 'preferences' if run.startswith('reward') else 'heldout'
    status, out, err = call('evaluate', run, '--rows=4', f'--tasks={task}')
    assert status == 0, err
    found, wanted = running.one_object(out), last(run, 'eval/')
    shared = sorted(found.keys() & wanted.keys())
    assert len(shared) >= 7
    assert [found[key] for key in shared] == pytest.approx([wanted[key] for key in shared], rel=1e-4)


@pytest.mark.parametrize('run', [pytest.param('pretrain-adamw', marks=pytest.mark.slow), 'pretrain-muon'])
def test_it_is_resumed(call, run, tmp_path):
    """With the optimizer's state and the place in the data: the steps that follow are those that followed then."""
    workdir = shutil.copytree(run, tmp_path / 'run')
    status, _, err = call('main', *typed(run, workdir, steps=4))
    assert status == 0 and 'resumed at step 2' in err, err
    losses = [running.measured(workdir)[step, 'train/loss'] for step in (1, 2, 3, 4)]
    assert losses[2:] == pytest.approx(GONE_ON[run], rel=1e-5)
    assert losses[1] == last(run, 'train/')['train/loss']


@pytest.mark.parametrize('run', [run for run in DIGESTS if run not in GONE_ON])
def test_what_cannot_be_resumed_is_said(call, run, tmp_path):
    """The version of how conversations and pairs are stored is part of what their data are known by, and was raised
    since then: pairs come in another order. (Conversations do not, and are refused all the same.)"""
    workdir = shutil.copytree(run, tmp_path / 'run')
    refused(call('main', *typed(run, workdir, steps=3)), f'{workdir} was trained on other data', progress=None)


@pytest.mark.parametrize('run', ['sft-muon', 'dpo-muon'])
def test_a_stage_begins_with_it(call, run, tmp_path):
    quick = {'optim__name': 'adamw', 'optim__ema': None}  # to compile
    status, _, err = call('main', *typed(run, tmp_path / 'new', steps=1, **quick))
    parent = f'{PARENTS[run.split("-")[0]]}-{run.split("-")[1]}'
    assert status == 0 and f'weights from {parent} at step 2' in err, err
    assert json.loads((tmp_path / 'new' / 'config.json').read_text())['parents']['policy']['path'] == parent


@pytest.mark.parametrize('run', GONE_ON)
def test_a_branch_goes_on_from_it(call, run, tmp_path):
    """As if it was resumed, in another folder."""
    status, out, err = call('main', *typed(run, tmp_path / 'new', steps=4, branch_from=run))
    assert status == 0, err
    assert running.one_object(out)['train/loss'] == pytest.approx(GONE_ON[run][1], rel=1e-5)
