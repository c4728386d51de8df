"""A run that was stopped, killed or damaged and resumed is the run that was never stopped."""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import running
from running import assert_same, lines, measured, params, signal_at, status, steps_saved

from lm import main as lm_main
from lm import runtime
from lm.errors import Preempted, RunError, UsageError
from lm.runs import checkpoint, loading, rundir
from lm.stages import pretrain, runner
from lm.training import loop
from lm.training.recorder import Recorder

DEVICES = 8  # so that what runs in a process of its own can be compared with what runs in this one


@pytest.fixture
def whole(trained) -> Path:
    """An uninterrupted run."""
    return trained


def digest_of(workdir: Path) -> str:
    with running.all_devices():
        return checkpoint.digest(loading.load(str(workdir), warn=pytest.fail).params)


# ---- stopped ----


@pytest.mark.parametrize(
    ('number', 'step'),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        (signal.SIGINT, 5),
        pytest.param(signal.SIGTERM, 8, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(lab, whole, tmp_path, monkeypatch, number, step):
    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch:
        signal_at(patch, step, number)
        with pytest.raises(Preempted, match=rf'saved at step \d+ after {number.name}: run the same command again'):
            lab.train(workdir)
    at = status(workdir)
    assert at['state'] == 'preempted' and f'saved at step {steps_saved(workdir)[-1]} after' in at['reason']
    assert step <= steps_saved(workdir)[-1] <= step + 2
    lab.train(workdir)
    assert status(workdir)['state'] == 'done'
    assert_same(whole, workdir)


def test_a_signal_between_the_save_and_the_question_is_not_taken_for_saved(lab, whole, tmp_path, monkeypatch):
    """A signal that comes while a step's work is done is for the next step, which is saved before anyone is told so."""
    real = loop.save

    def save(state, step, hooks):
        real(state, step, hooks)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, 'save', save)
    with pytest.raises(Preempted, match='saved at step 5'):
        lab.train(tmp_path / 'run')
    assert steps_saved(tmp_path / 'run')[-1] == 5


@pytest.mark.slow
def test_the_last_step_is_not_preempted(lab, tmp_path, monkeypatch):
    signal_at(monkeypatch, 12, signal.SIGTERM)
    assert lab.train(tmp_path / 'run')['step'] == 12
    assert status(tmp_path / 'run')['state'] == 'done'


def test_the_second_ctrl_c_interrupts(lab, whole, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch:
        signal_at(patch, 6, signal.SIGINT, times=2)
        patch.setattr(sys, 'argv', ['lm.main', *lab.argv(workdir)])
        assert lm_main.main() == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith('lm: interrupted')
    assert status(workdir)['state'] == 'failed'
    lab.train(workdir)
    assert_same(whole, workdir)


def test_a_signal_before_the_first_step_ends_at_once(lab, tmp_path, monkeypatch):
    def compile_step(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail('went on')

    monkeypatch.setattr(runner, 'compile_step', compile_step)
    with pytest.raises(Preempted, match='before the first step'):
        lab.train(tmp_path / 'run')
    assert status(tmp_path / 'run')['state'] == 'preempted'


@pytest.mark.parametrize(('numbers', 'error'), [([15], Preempted), ([2], Preempted), ([2, 2], KeyboardInterrupt)])
def test_a_signal_that_a_destructor_drops_comes_again(numbers, error, capsys):
    """Python cannot leave a destructor by an exception, nor a callback of the garbage collector, which XLA has."""

    class Last:
        def __del__(self):
            os.kill(os.getpid(), numbers[-1])
            os.getpid()

    with pytest.raises(error), runtime.stop_request():
        with contextlib.suppress(Preempted):
            for number in numbers[:-1]:
                os.kill(os.getpid(), number)
        Last()
        time.sleep(5)
        pytest.fail('went on')
    assert 'ignored' not in capsys.readouterr().err


def test_a_run_that_is_done_says_so_again(lab, trained, tmp_path, capsys, monkeypatch):
    whole = shutil.copytree(trained, tmp_path / 'run')
    before = {p.name: p.read_bytes() for p in whole.glob('*.jsonl')}
    monkeypatch.setattr(sys, 'argv', ['lm.main', *lab.argv(whole)])
    assert lm_main.main() == 0
    out = capsys.readouterr().out
    assert (
        running.one_object(out)['step'] == 12
        and running.one_object(out)['eval/loss'] == measured(whole)[12, 'eval/loss']
    )
    assert before == {p.name: p.read_bytes() for p in whole.glob('*.jsonl')}
    assert status(whole)['state'] == 'done' and status(whole)['step'] == 12


@pytest.mark.slow
def test_more_steps_go_on_where_it_ended(lab, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    assert lab.train(tmp_path / 'run', steps=14)['step'] == 14
    assert sorted({step for step, _ in measured(tmp_path / 'run')}) == list(range(1, 15))


# ---- killed ----


@pytest.mark.slow
def test_killed_during_a_save(lab, whole, tmp_path):
    """A process dies inside its second save; the rest is done here. Random moments: tests/faults.py."""
    workdir = tmp_path / 'run'
    die = (
        'import os, sys\nfrom lm import main\nfrom lm.runs.checkpoint import Writer\nsave = Writer.save\n'
        'def dying(self, step, tree, **meta):\n'
        '    save(self, step, tree, **meta)\n'
        '    if step >= 6: os.kill(os.getpid(), 9)\n'
        'Writer.save = dying; main.train(sys.argv[1:])'
    )
    process = lab.start(workdir, devices=DEVICES, code=die, checkpoint__every=3)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert steps_saved(workdir) == [3] and any('tmp' in p.name for p in (workdir / 'checkpoints').iterdir())
    assert max(r['step'] for r in lines(workdir)) == 6
    lab.train(workdir, checkpoint__every=3)
    assert steps_saved(workdir) == [6, 9, 12] and not any('tmp' in p.name for p in (workdir / 'checkpoints').iterdir())
    assert_same(whole, workdir)


@pytest.mark.slow
def test_a_kill_before_anything_was_written_leaves_a_run_that_starts(lab, tmp_path, monkeypatch):
    """config.json comes first, so that what a kill leaves is a run, or nothing but a half-written file."""
    workdir = tmp_path / 'run'
    workdir.mkdir()
    (workdir / '.config.json.1a2b3c4d.tmp').write_text('{"con')
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, 'open', lambda self, folder: (_ for _ in ()).throw(RunError('killed here')))
        with pytest.raises(RunError):
            lab.train(workdir)
    assert lab.train(workdir)['step'] == 12
    assert not list(workdir.glob('.*.tmp'))


def test_lines_that_a_kill_cut_short_are_left_out(lab, whole, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    for step in (8, 12):
        shutil.rmtree(workdir / 'checkpoints' / str(step))
    for name, cut in (('metrics.jsonl', b'{"schema": 1, "st'), ('samples.jsonl', '{"text": "ä'.encode()[:-1])):
        with (workdir / name).open('ab') as f:
            f.write(cut)
    lab.train(workdir)
    assert_same(whole, workdir)


# ---- damaged ----


def test_a_damaged_checkpoint_is_named_and_saved_again(lab, whole, tmp_path, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    os.truncate(workdir / 'checkpoints' / '12' / 'meta' / 'metadata', 10)
    lab.train(workdir)
    assert f'checkpoint {workdir}/checkpoints/12 is damaged' in capsys.readouterr().err
    assert (
        'is damaged' in (workdir / 'log.txt').read_text() and 'resumed at step 8' in (workdir / 'log.txt').read_text()
    )
    assert steps_saved(workdir) == [4, 8, 12] and (workdir / 'checkpoints' / '12.damaged').exists()
    assert_same(whole, workdir)


def test_all_damaged_ends_with_an_error_and_changes_nothing(lab, whole, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    for step in steps_saved(workdir):
        os.truncate(workdir / 'checkpoints' / str(step) / 'meta' / 'metadata', 0)
    for _ in range(2):
        with pytest.raises(RunError, match='none of the 3 checkpoints'):
            lab.train(workdir)
    assert measured(workdir) == measured(whole) and status(workdir)['state'] == 'failed'


def test_a_newer_layout_is_refused_before_anything_is_written(lab, whole, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
    monkeypatch.setattr(checkpoint, 'LAYOUT', 0)
    with pytest.raises(UsageError, match='use a newer lm'):
        lab.train(workdir)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}


def test_what_only_looks_like_a_later_step_is_no_reason_to_refuse(lab, whole, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    (workdir / 'checkpoints' / '15').mkdir()
    assert lab.train(workdir)['step'] == 12
    assert (workdir / 'checkpoints' / '15.damaged').exists()
    assert 'resumed at step 12' in (workdir / 'log.txt').read_text()


# ---- one at a time, and again ----


@pytest.mark.slow
def test_two_at_once_do_not_train_in_one_workdir(lab, tmp_path):
    """The second is refused while the first runs, and goes on as soon as that is killed."""
    workdir = tmp_path / 'run'
    first = lab.start(workdir, devices=DEVICES, steps=100_000)
    running.wait_for_step(first, workdir, 2)
    before = (workdir / 'config.json').read_bytes()
    with pytest.raises(UsageError, match=rf'another process trains in {workdir}: wait for it or stop it'):
        lab.train(workdir)
    assert first.poll() is None and (workdir / 'config.json').read_bytes() == before
    running.kill(first)
    assert (workdir / rundir.LOCK).exists()
    assert lab.train(workdir, steps=max(12, *steps_saved(workdir), 0) + 1)['step'] >= 12
    assert not (workdir / rundir.LOCK).exists()


def test_a_lock_left_in_an_empty_folder_is_no_other_run(lab, tmp_path):
    (tmp_path / rundir.LOCK).write_text('')
    assert lab.train(tmp_path, steps=1)['step'] == 1


def test_a_first_try_that_failed_does_not_keep_its_settings(lab, whole, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            lab.train(workdir, optim__max_skips=7, checkpoint__every=100)
    assert (workdir / 'config.json').exists() and not steps_saved(workdir) and lines(workdir)
    lab.train(workdir)
    assert_same(whole, workdir)


def test_fewer_steps_than_were_done_are_refused(lab, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
    with pytest.raises(UsageError, match=f'{whole} is at step 12 already, steps=3: set more'):
        lab.train(whole, steps=3)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob('*')}


# ---- elsewhere ----


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_data(lab, whole, tmp_path, monkeypatch):
    workdir, same = tmp_path / 'run', []
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signal.SIGTERM)
        with pytest.raises(Preempted):
            lab.train(workdir)
    real = pretrain.Pretrain.source

    def make_source(task, start):
        """Compares each batch with that of a source which began at 0."""
        source, reference = real(task, start), real(task, 0)
        expected = [reference(None, i) for i in range(12)]

        def compared(state, i):
            batch = source(state, i)
            same.append((i, np.array_equal(*jax.device_get((batch['tokens_BT'], expected[i]['tokens_BT'])))))
            return batch

        return compared

    monkeypatch.setattr(pretrain.Pretrain, 'source', make_source)
    lab.train(workdir, mesh__data=2, mesh__tensor=2)
    assert same == [(i, True) for i in range(12 - len(same), 12)] and len(same) >= 5
    a, b = measured(whole), measured(workdir)
    assert a.keys() == b.keys()
    for key in a:
        if 'grad_norm' not in key[1] and 'accuracy' not in key[1]:
            assert b[key] == pytest.approx(a[key], rel=1e-3), key


def test_a_branch_takes_optimizer_and_position(lab, whole, tmp_path):
    """Continued from step 8 under the same settings, it is the same run; under others, it is a branch of it."""
    branch = tmp_path / 'branch'
    lab.train(branch, branch_from=f'{whole}@8', **lab.inherited)
    a, b = measured(whole), measured(branch)
    assert min(step for step, _ in b) == 9
    assert {k: v for k, v in a.items() if k[0] > 8} == b
    jax.tree.map(np.testing.assert_array_equal, params(whole), params(branch))
    lab.train(tmp_path / 'decay', branch_from=f'{whole}@8', optim__schedule='linear', **lab.inherited)
    assert measured(tmp_path / 'decay')[9, 'train/loss'] == a[9, 'train/loss']
    assert measured(tmp_path / 'decay')[12, 'train/loss'] != a[12, 'train/loss']


def test_a_branch_in_other_data_is_refused(lab, whole, tmp_path):
    other = {'batch_size': 16, 'seq_len': 16, 'seed': 1, 'data__heldout': 0.2, 'data__tokenizer': '/some/tokenizer'}
    for key, value in other.items():
        with pytest.raises(UsageError, match=rf'has other data: {key.replace("__", ".")} \(\S+ there, {value} now\)'):
            lab.train(tmp_path / 'run', branch_from=f'{whole}@8', **(lab.inherited | {key: value}))
    assert not (tmp_path / 'run').exists()


def test_a_branch_that_ends_before_it_begins(lab, whole, tmp_path):
    with pytest.raises(UsageError, match=rf'steps=12: {whole} is at step 12 already'):
        lab.train(tmp_path / 'run', branch_from=str(whole), **lab.inherited)
    assert not (tmp_path / 'run').exists()


def test_init_from_starts_at_0_with_the_weights_and_outlives_its_parent(lab, whole, tmp_path):
    """A run's directory is all that resuming it needs."""
    parent, child = tmp_path / 'parent', tmp_path / 'child'
    shutil.copytree(whole, parent)
    settings = {'init_from': str(parent), **lab.inherited}
    lab.train(child, **settings)
    found = measured(child)
    assert {step for step, _ in found} == set(range(1, 13))
    assert found[1, 'train/loss'] < measured(whole)[1, 'train/loss'] - 0.5
    saved = rundir.read_config(str(child))
    assert saved['parents'] == {'policy': {'path': str(parent), 'step': 12, 'digest': digest_of(whole)}}
    assert saved['config']['model'] == rundir.read_config(str(whole))['config']['model']
    model = 'tokenizer/tokenizer.model'
    assert (child / model).read_bytes() == (whole / model).read_bytes()
    shutil.rmtree(parent)
    shutil.rmtree(child / 'checkpoints' / '12')
    lab.train(child, **settings)
    assert 'resumed at step 8' in (child / 'log.txt').read_text() and measured(child) == found


def test_a_model_that_differs_from_the_parents_is_refused(lab, whole, tmp_path):
    for options, key in (({'model__dim': 64}, 'model.dim'), ({'config': f'{running.CONFIG}:depth=2'}, 'model.dim')):
        with pytest.raises(UsageError, match=rf'{key}=64 differs from {whole}, which has 32: leave it out'):
            lab.train(tmp_path / 'run', init_from=str(whole), **(lab.inherited | options))
    assert not (tmp_path / 'run').exists()
