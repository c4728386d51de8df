"""What a run has made is not thrown away in silence: checkpoints that are gone, a run that is done, a full disk."""

import errno
import os
import shutil

import orbax.checkpoint as ocp
import pytest
import running
from running import lines, measured, status, steps_saved

from lm.errors import RunError, UsageError
from lm.runs import checkpoint
from lm.stages import runner


@pytest.fixture(scope='module')
def done(lab, tmp_path_factory):
    """A run of eight steps, which is done."""
    workdir = tmp_path_factory.mktemp('done') / 'run'
    lab.train(workdir, steps=8)
    return workdir


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done, tmp_path / 'run')
    return tmp_path / 'run'


def files_of(workdir):
    return {p.name: p.read_bytes() for p in workdir.iterdir() if p.is_file()}


@pytest.mark.parametrize('gone', ['the folder', pytest.param('what is in it', marks=pytest.mark.slow)])
@pytest.mark.parametrize('steps', [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_lost_its_checkpoints_is_not_begun_again(lab, copy, gone, steps):
    before = files_of(copy)
    shutil.rmtree(copy / 'checkpoints')
    if gone == 'what is in it':
        (copy / 'checkpoints').mkdir()
    with pytest.raises(
        UsageError, match=f'{copy} is done, with 8 steps, and its checkpoints are gone: bring .*checkpoints back'
    ):
        lab.train(copy, steps=steps)
    assert files_of(copy) == before


def test_nor_is_one_that_lost_its_status_too(lab, copy):
    shutil.rmtree(copy / 'checkpoints')
    (copy / 'status.json').unlink()
    before = files_of(copy)
    with pytest.raises(UsageError, match='has metrics.jsonl of steps that were taken, and no status.json'):
        lab.train(copy, steps=8)
    assert files_of(copy) == before


def test_nor_is_one_that_was_stopped_after_a_checkpoint(lab, tmp_path, monkeypatch):
    workdir, save = tmp_path / 'run', checkpoint.Writer.save
    killed = lambda self, step, tree, **meta: save(self, step, tree, **meta) if step < 8 else [].pop()
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(checkpoint.Writer, 'save', killed)
        lab.train(workdir)
    assert steps_saved(workdir) == [4] and status(workdir)['saved'] == 4
    shutil.rmtree(workdir / 'checkpoints')
    with pytest.raises(UsageError, match='was saved at step 4, and its checkpoints are gone'):
        lab.train(workdir)


def test_one_that_never_had_a_checkpoint_begins_again(lab, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(checkpoint.Writer, 'save', lambda self, step, tree, **meta: [].pop())
        lab.train(workdir, steps=4)
    assert lines(workdir) and status(workdir)['saved'] is None
    assert lab.train(workdir, steps=4)['step'] == 4


def test_a_run_that_is_done_says_so_and_compiles_nothing(lab, copy, monkeypatch, capsys):
    before, numbers = measured(copy), {p: p.read_bytes() for p in copy.glob('*.jsonl')}
    monkeypatch.setattr(runner, 'compile_step', lambda *args: pytest.fail('this compiles'))
    last = lab.train(copy, steps=8)
    assert last['step'] == 8 and last['eval/loss'] == before[8, 'eval/loss']
    assert 'is done, with 8 steps: set more, or name another --workdir' in capsys.readouterr().err
    assert numbers == {p: p.read_bytes() for p in copy.glob('*.jsonl')}
    assert (status(copy)['state'], status(copy)['step'], status(copy)['saved']) == ('done', 8, 8)


def test_a_run_that_is_done_and_damaged_goes_on_from_before(lab, copy, capsys):
    before = measured(copy)
    file = max((copy / 'checkpoints' / '8' / 'state').rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0)
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))  # one byte alone may be of what nothing refers to
    assert lab.train(copy, steps=8)['step'] == 8
    assert 'damaged' in capsys.readouterr().err and measured(copy) == before


def test_a_disk_that_fills_under_a_checkpoint_is_told_at_once(lab, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def serialize(self, *args, **kwargs):
        raise full

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, 'serialize', serialize)
    with pytest.raises(RunError, match='could not be written .the disk is full, No space left on device; free space'):
        lab.train(tmp_path / 'run', steps=8)
    assert lines(tmp_path / 'run')[-1]['step'] <= 4
    assert 'the disk is full' in status(tmp_path / 'run')['reason']


def test_a_save_that_fails_in_the_background_ends_the_run_before_the_next_one(lab, tmp_path, monkeypatch):
    """Orbax tells at the next save; the loop asks after every step."""
    asked = []

    def check(self):
        asked.append(1)
        if len(asked) == 6:
            with self._guarded():
                raise ValueError(f'UNKNOWN: writing x: {os.strerror(errno.ENOSPC)} [source locations]')

    monkeypatch.setattr(checkpoint.Writer, 'check', check)
    with pytest.raises(RunError, match='the disk is full'):
        lab.train(tmp_path / 'run', steps=8, checkpoint__every=8)
    assert len(asked) == 6 and running.steps_saved(tmp_path / 'run') == []
