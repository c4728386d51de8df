"""What a run writes and when it stops: files, time, non-finite steps, a full disk."""

import contextlib
import errno
import json
import os
import re
import shutil
import struct
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import lines, measured, status, steps_saved
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lm import files, sharding
from lm import main as lm_main
from lm.errors import Preempted, RunError
from lm.runs import checkpoint, loading
from lm.runtime import StopRequest
from lm.stages import pretrain
from lm.training import flops, loop
from lm.training import ledger as ledgers
from lm.training.ledger import Ledger
from lm.training.loop import Hooks, Meter
from lm.training.recorder import Recorder


@pytest.fixture
def whole(trained) -> Path:
    return trained


def command(monkeypatch, capsys, argv) -> tuple[int, list[str]]:
    """(exit status, the lines on stderr that are no progress) of lm.main."""
    monkeypatch.setattr(sys, 'argv', ['lm.main', *argv])
    status = lm_main.main()
    out, err = capsys.readouterr()
    assert 'Traceback' not in err and (not out or status == 0)
    return status, [line for line in err.splitlines() if line.startswith('lm: ')]


# ---- the directory ----


def test_the_directory_is_the_model(whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {
        'config.json',
        'status.json',
        'checkpoints',
        'tokenizer',
        'metrics.jsonl',
        'samples.jsonl',
        'tensorboard',
        'log.txt',
    }
    saved = json.loads((whole / 'config.json').read_text())
    assert {'config', 'parents', 'versions', 'commit', 'data', 'tokenizer'} <= set(saved)
    assert (
        saved['config']['steps'] == 12
        and saved['config']['execution']['microbatch'] == 8
        and saved['versions']['jax'] == jax.__version__
    )
    assert saved['config']['execution']['dtype'] == 'float32'


def test_metrics(whole):
    trained = [r for r in lines(whole) if 'train/loss' in r]
    evaluated = [r for r in lines(whole) if 'eval/loss' in r]
    assert [r['step'] for r in trained] == list(range(1, 13)) and [r['step'] for r in evaluated] == [6, 12]
    assert all(r['schema'] == 2 for r in lines(whole))
    for r in trained:
        assert {
            'train/loss',
            'train/grad_norm',
            'train/lr',
            'train/skipped',
            'perf/tokens_per_s',
            'perf/mfu',
            'perf/goodput',
        } <= set(r)
        assert 0 < r['perf/mfu'] < 1 and 0 < r['perf/goodput'] < 1
    assert trained[-1]['train/loss'] < trained[0]['train/loss'] and evaluated[1]['eval/bpb'] < evaluated[0]['eval/bpb']
    rates = [r['train/lr'] for r in trained[2:]]  # after the warmup
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


def test_an_evaluation_without_prompts_has_no_samples(tmp_path):
    """Of a few single answers none that is held out need be a good one."""
    recorder = hooks(tmp_path / 'run').recorder
    recorder.samples([])
    assert not (tmp_path / 'run' / 'samples.jsonl').exists()


def test_samples(whole):
    records = lines(whole, 'samples.jsonl')
    assert [r['step'] for r in records] == [6, 6, 12, 12]
    assert all({'prompt_id', 'stage', 'step', 'text', 'ended', 'score', 'temperature'} <= set(r) for r in records)
    assert {r['stage'] for r in records} == {'pretrain'}


def events(folder: Path) -> dict[tuple[int, str], float]:
    """The scalars as TensorBoard shows them: each file in turn; a session's start forgets the steps from it on."""
    found: dict[tuple[int, str], float] = {}
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from('<Q', data, at)
            event, at = Event.FromString(data[at + 12 : at + 12 + size]), at + 16 + size
            if event.session_log.status == SessionLog.START:
                found = {k: v for k, v in found.items() if k[0] < event.step}
            shown = [v for v in event.summary.value if v.WhichOneof('value') == 'simple_value']
            found |= {(event.step, v.tag): v.simple_value for v in shown}
    return found


def scalars(workdir: Path) -> dict[tuple[int, str], float]:
    return {(r['step'], k): v for r in lines(workdir) for k, v in r.items() if k not in ('schema', 'step', 'time')}


def test_tensorboard_has_the_same_scalars(whole):
    assert events(whole / 'tensorboard') == {k: pytest.approx(v, rel=1e-6) for k, v in scalars(whole).items()}


@pytest.mark.slow
def test_tensorboard_forgets_what_a_resumed_run_does_again(lab, tmp_path, monkeypatch):
    """Killed at step 7, resumed at 4: step 5, which is logged no more, is gone."""
    workdir = tmp_path / 'run'
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, 'status', lambda self, state, step=None, **more: [].pop() if step == 7 else None)
        with pytest.raises(IndexError):
            lab.train(workdir)
    assert (6, 'train/loss') in events(workdir / 'tensorboard')
    lab.train(workdir, log__every=6)
    assert len(list((workdir / 'tensorboard').iterdir())) == 2
    assert (5, 'train/loss') not in events(workdir / 'tensorboard')
    assert events(workdir / 'tensorboard') == {k: pytest.approx(v, rel=1e-6) for k, v in scalars(workdir).items()}


def test_records_are_what_tensorboard_reads(whole):
    """Length, its masked CRC-32C, the bytes, theirs; the check value of CRC-32C is that of RFC 3720."""
    from tensorboardX.crc32c import crc32c

    assert crc32c(b'123456789') == 0xE3069283
    masked = lambda b: (((crc32c(b) >> 15) | (crc32c(b) << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    data = next((whole / 'tensorboard').iterdir()).read_bytes()
    (size,) = struct.unpack_from('<Q', data)
    assert struct.unpack_from('<I', data, 8)[0] == masked(data[:8])
    assert struct.unpack_from('<I', data, 12 + size)[0] == masked(data[12 : 12 + size])
    assert Event.FromString(data[12 : 12 + size]).file_version == 'brain.Event:2'


def test_the_log_has_what_the_terminal_showed(lab, tmp_path, capsys):
    lab.train(tmp_path / 'run', steps=2)
    shown = capsys.readouterr().err.splitlines(keepends=True)
    err = ''.join(line for line in shown if not re.search(r', \d+:\d\d$', line))  # but for how long something takes
    assert (tmp_path / 'run' / 'log.txt').read_text() == err
    assert 'parameters' in err and 'goodput' not in err and 'total' in err


@pytest.mark.slow
def test_the_choice_of_attention_is_told_and_is_the_platforms_own(lab, tmp_path):
    """A run that was trained with a kernel which this platform lacks can be loaded, and goes on without it."""
    lab.train(tmp_path / 'run', steps=2, attention='dense')
    assert 'attention: dense (as set)' in (tmp_path / 'run/log.txt').read_text()
    file = tmp_path / 'run/config.json'
    file.write_text(file.read_text().replace('"attention": "dense"', '"attention": "cudnn"'))
    with sharding.use_mesh():
        assert loading.load(str(tmp_path / 'run'), warn=pytest.fail).cfg.attention == 'blocks'
    lab.train(tmp_path / 'run', steps=4)
    assert 'attention: blocks (cpu)' in (tmp_path / 'run/log.txt').read_text()


def test_status_follows_the_run(lab, tmp_path, monkeypatch):
    seen = []
    real = files.write_json
    spy = lambda path, value: (seen.append(value) if path.name == 'status.json' else None, real(path, value))
    monkeypatch.setattr(files, 'write_json', spy)
    lab.train(tmp_path / 'run', steps=2)
    assert [(s['state'], s['step']) for s in seen] == [('compiling', 0), ('training', 1), ('training', 2), ('done', 2)]
    assert abs(seen[-1]['time'] - time.time()) < 60
    assert {'steps', 'seconds_left', 'tokens_per_s'} <= set(seen[1]) and seen[2]['seconds_left'] == 0


# ---- the loop ----


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(ledgers.time, 'monotonic', lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_ledger(clock):
    ledger = Ledger()
    for part, seconds in (('prepare', 5), ('step', 3), ('eval', 1), ('step', 1)):
        with ledger(part):
            clock.pass_(seconds)
    assert ledger.seconds == {'prepare': 5, 'compile': 0, 'data': 0, 'step': 4, 'eval': 1, 'checkpoint': 0}
    assert (ledger.total, ledger.goodput) == (10, 0.4)
    with ledger('data'):
        clock.pass_(10)
        assert ledger.spent('data') == 10 and ledger.spent('step') == 4 and ledger.spent('step', 'data') == 14
    assert 'step 4.0 s' in ledger.line() and 'total 20.0 s' in ledger.line()
    with pytest.raises(KeyError), ledger('step'):
        clock.pass_(1)
        raise KeyError
    assert ledger.seconds['step'] == 5


def hooks(workdir=None, **changes) -> Hooks:
    recorder = Recorder()
    if workdir is not None:
        workdir.mkdir()
        recorder.open(workdir)
    values = {
        'recorder': recorder, 'ledger': Ledger(), 'writer': NoWriter(), 'evaluate': lambda state, i: {},
        'cost': flops.Cost(3.0, 1.0), 'ceiling': flops.Ceiling(1000.0), 'log_every': 2, 'eval_every': 100,
        'save_every': 100, 'max_skips': 2, 'profile': None,
    } | changes  # fmt: skip
    return Hooks(**values)


class NoWriter:
    def __init__(self):
        self.steps = []

    def save(self, step, tree, **meta):
        self.steps.append(step)

    def wait(self):
        pass

    def check(self):
        pass

    def set_aside(self, after):
        self.steps = [step for step in self.steps if step <= after]


@pytest.mark.parametrize('part', [1.0, 0.5], ids=['full', 'while-the-batch-is-half'])
def test_speed_counts_the_steps_and_their_seconds(clock, part):
    """Each step takes a second, all of it waiting for its metrics; what lies between does not count."""
    h = hooks(batches=lambda i: part * i)
    meter = Meter(h)
    values = {'loss': np.float32(1), 'grad_norm': np.float32(1), 'skipped': np.int32(0)}
    values |= {'tokens': np.int32(part * 50), 'targets': np.int32(part * 50)}
    for step in range(1, 7):
        with h.ledger('step'):
            clock.pass_(1)
            meter.read(step, values, {}, steps=6)
        with h.ledger('eval'):
            clock.pass_(7)
        assert h.recorder.last.get('perf/tokens_per_s', part * 50) == part * 50
    assert h.recorder.last['perf/mfu'] == pytest.approx(part * 0.2)
    assert h.recorder.last['perf/goodput'] == pytest.approx(6 / 41)


class State:
    """What the loop asks of a state."""

    def __init__(self, step=0):
        self.step, self.trainable, self.opt, self.rng, self.ema = jnp.int32(step), {}, {}, {}, None


def metrics(**changes):
    counts = {'tokens': jnp.int32(50), 'targets': jnp.int32(50)}
    return {'loss': jnp.float32(1), 'grad_norm': jnp.float32(1), 'skipped': jnp.int32(0), **counts} | changes


def test_metrics_are_fetched_after_the_next_step_is_dispatched(monkeypatch):
    order = []
    real = Meter.read
    monkeypatch.setattr(
        Meter, 'read', lambda self, step, *a, **k: (order.append(f'read {step}'), real(self, step, *a, **k))
    )
    ready = metrics()
    step = lambda state, batch: (order.append(f'step {batch}'), (state, ready))[1]
    loop.run_loop(State(), lambda state, i: i + 1, step, steps=4, stop=StopRequest(), hooks=hooks(eval_every=3))
    assert order == ['step 1', 'step 2', 'read 1', 'step 3', 'read 2', 'read 3', 'step 4', 'read 4']


def test_everything_up_to_a_checkpoint_is_written_before_it(tmp_path):
    h = hooks(tmp_path / 'run', log_every=1, save_every=2)
    seen = []
    h.writer.save = lambda step, tree, **meta: seen.append((step, max(r['step'] for r in lines(tmp_path / 'run'))))
    ready = metrics()
    loop.run_loop(State(), lambda state, i: i, lambda s, b: (s, ready), steps=5, stop=StopRequest(), hooks=h)
    assert seen == [(2, 2), (4, 4), (5, 5)]


def test_an_implicit_transfer_in_a_step_is_an_error_and_in_a_source_none():
    ready, add = metrics(), jax.jit(lambda x: x + 1)
    add(jnp.ones(3))
    guilty = lambda *args: add(np.ones(3, np.float32))
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        step = lambda state, batch: (guilty(), (state, ready))[1]
        loop.run_loop(State(), lambda state, i: i, step, steps=2, stop=StopRequest(), hooks=hooks())
    loop.run_loop(State(), guilty, lambda s, b: (s, ready), steps=2, stop=StopRequest(), hooks=hooks())


def test_preemption_waits_for_its_save():
    order, stop = [], StopRequest()
    h = hooks()
    h.writer.save = lambda step, tree, **meta: order.append(step)
    h.writer.wait = lambda: order.append('waited')
    stop.signal = 'SIGTERM'
    ready = metrics()
    with pytest.raises(Preempted, match='saved at step 1 after SIGTERM'):
        loop.run_loop(State(), lambda state, i: i, lambda s, b: (s, ready), steps=5, stop=stop, hooks=h)
    assert order == [1, 'waited']


SLOW_TRACES = [pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 9, 1), (0, 5, 1), (0, 3, 0))]


@pytest.mark.parametrize(('first', 'steps', 'traces'), [(5, 9, 1), (7, 9, 0), *SLOW_TRACES])
def test_the_profiler_writes_a_trace(tmp_path, first, steps, traces):
    """Of steps 4 to 6, also where a process begins or ends among them, and of nothing else."""
    h, ready = hooks(tmp_path / 'run', profile=4), metrics()
    loop.run_loop(State(first), lambda state, i: i, lambda s, b: (s, ready), steps=steps, stop=StopRequest(), hooks=h)
    assert len(list((tmp_path / 'run').rglob('*.xplane.pb'))) == traces
    assert ('profile in' in (tmp_path / 'run' / 'log.txt').read_text()) == bool(traces)


# ---- steps that are not finite ----


def test_a_bounded_number_of_bad_steps_is_passed_over(tmp_path):
    """Two in a row may be skipped, any number apart; three in a row stop the run."""
    good, bad = metrics(), metrics(loss=jnp.float32('nan'), skipped=jnp.int32(1))
    run = lambda pattern, h: loop.run_loop(
        State(),
        lambda state, i: pattern[i],
        lambda s, b: (s, bad if b == 'x' else good),
        steps=len(pattern),
        stop=StopRequest(),
        hooks=h,
    )
    run('.xx.xx.x', hooks())
    h = hooks(tmp_path / 'run', log_every=1)
    with pytest.raises(RunError, match='3 non-finite steps in a row up to step 6'):
        run('.x.xxx....', h)
    assert not h.writer.steps
    assert [r['train/loss'] for r in lines(tmp_path / 'run')] == [1, None, 1, None, None]  # JSON has no NaN
    assert 'step 5 skipped: loss nan' in (tmp_path / 'run' / 'log.txt').read_text()


def test_what_gives_no_finite_loss_pushes_no_checkpoint_out():
    """Nothing is saved among skipped steps, and what was saved just before a streak that stops the run is set aside."""
    good, bad = metrics(), metrics(loss=jnp.float32('nan'), skipped=jnp.int32(1))

    def saved_by(pattern, steps):
        h = hooks(save_every=1)
        step = lambda s, b: (s, bad if b == 'x' else good)
        with contextlib.nullcontext() if 'xxx' not in pattern else pytest.raises(RunError, match='non-finite'):
            loop.run_loop(State(), lambda state, i: pattern[i], step, steps=steps, stop=StopRequest(), hooks=h)
        return h.writer.steps

    assert saved_by('..x.xx.', 7) == [1, 2, 4, 7]
    assert saved_by('..xxx...', 8) == [1]


def test_a_rate_that_explodes_leaves_no_checkpoint_of_it(lab, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / 'run'
    argv = lab.argv(workdir, optim__lr=1e30, optim__warmup=0, optim__max_skips=3, checkpoint__every=1)
    code, said = command(monkeypatch, capsys, argv)
    assert code == 1 and len(said) == 1 and '4 non-finite steps in a row' in said[0]
    assert status(workdir)['state'] == 'failed' and 'non-finite' in status(workdir)['reason']
    assert sum(r['train/skipped'] for r in lines(workdir) if 'train/skipped' in r) >= 3
    assert checkpoint.listed(workdir / 'checkpoints') == []
    assert (workdir / 'checkpoints' / '1.damaged').is_dir()


def test_one_bad_batch_is_skipped_and_the_run_goes_on(lab, tmp_path, monkeypatch):
    """A batch whose loss is not a number changes nothing but the step's number."""
    real = pretrain.Pretrain.source

    def make_source(*args, **options):
        source = real(*args, **options)

        def poisoned(state, i):
            batch = source(state, i)
            return batch | {'weights_BT': batch['weights_BT'] * (jnp.nan if i == 4 else 1)}

        return poisoned

    monkeypatch.setattr(pretrain.Pretrain, 'source', make_source)
    monkeypatch.setattr(loop.jax, 'transfer_guard', lambda level: jax.transfer_guard_host_to_device('allow'))
    out = lab.train(tmp_path / 'run')
    found = {r['step']: r for r in lines(tmp_path / 'run') if 'train/loss' in r}
    assert [step for step, r in found.items() if r['train/skipped']] == [5]
    assert found[6]['train/loss'] < found[1]['train/loss'] and out['step'] == 12


def test_the_last_line_is_json_when_a_figure_is_not_a_number(tmp_path):
    recorder = Recorder()
    recorder.metrics(1, {'train/loss': float('nan'), 'perf/mfu': float('inf'), 'train/lr': 0.1})
    assert recorder.last == {'step': 1, 'train/loss': None, 'perf/mfu': None, 'train/lr': 0.1}


# ---- a full disk ----


@pytest.fixture(scope='module')
def four_steps(lab, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp('four') / 'run'
    lab.train(workdir, steps=4)
    return workdir


FILES = {'metrics.jsonl': True}
FILES |= dict.fromkeys(['config.json', 'tfevents', 'log.txt', 'samples.jsonl', 'status.json', 'tokenizer.model'], False)


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if q else pytest.mark.slow) for n, q in FILES.items()])
def test_a_full_disk_ends_the_run_with_one_line(lab, four_steps, tmp_path, monkeypatch, capsys, name):
    workdir = shutil.copytree(four_steps, tmp_path / 'run')
    before = measured(workdir)
    real = files._write

    def write(path, data, mode):
        if name in path.name:
            raise OSError(errno.ENOSPC, 'No space left on device')
        real(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, '_write', write)
        code, said = command(patch, capsys, lab.argv(workdir, steps=8))
    assert code == 1 and len(said) == 1 and 'No space left on device' in said[0] and name in said[0]
    if name not in ('config.json', 'status.json', 'log.txt'):
        assert status(workdir)['state'] == 'failed'
    assert steps_saved(workdir) == [4] and not list(workdir.rglob('.*.tmp'))
    lab.train(workdir, steps=8)
    assert {k: v for k, v in measured(workdir).items() if k[0] <= 4} == before and steps_saved(workdir) == [4, 8]


# What is put before the command in a process of its own, so that its second save fails.
FULL = {
    'in the background': """
import resource, signal
from lm.runs.checkpoint import Writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Writer.save
def limited(self, step, tree, **meta):
    if step >= 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    save(self, step, tree, **meta)
Writer.save = limited
""",
    'at its start': """
import orbax.checkpoint as ocp
serialize = ocp.type_handlers.ArrayHandler.serialize
async def full(self, *args, **kwargs):
    raise OSError(28, 'No space left on device')
ocp.type_handlers.ArrayHandler.serialize = full
""",
}


@pytest.mark.slow
@pytest.mark.parametrize('when', FULL)
def test_a_disk_that_fills_while_a_checkpoint_is_written(lab, four_steps, tmp_path, when):
    """The process ends at once, whatever Orbax still waits for."""
    workdir = shutil.copytree(four_steps, tmp_path / 'run')
    code = FULL[when] + 'from lm import errors, main; errors.leave(main.main())'
    out, err = lab.start(workdir, devices=8, code=code).communicate(timeout=90)
    said = [line for line in err.splitlines() if line.startswith('lm: ')]
    assert len(said) == 1 and 'could not be written' in said[0] and not out and 'Traceback' not in err, err
    assert steps_saved(workdir) == [4]
    if when == 'at its start':
        assert status(workdir)['state'] == 'failed' and 'No space left' in said[0]
        lab.train(workdir)
        assert steps_saved(workdir) == [4, 8, 12]


def test_a_write_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'a' / 'file.json'
    files.write_json(path, {'x': 1})
    real = os.fsync
    monkeypatch.setattr(files.os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, 'Input/output error')))
    with pytest.raises(RunError, match=r'file.json cannot be written \(Input/output error\)'):
        files.write_json(path, {'x': 2})
    monkeypatch.setattr(files.os, 'fsync', real)
    assert json.loads(path.read_text()) == {'x': 1} and [p.name for p in path.parent.iterdir()] == ['file.json']
    (path.parent / '.file.json.12345678.tmp').write_text('')
    files.sweep(path.parent)
    assert [p.name for p in path.parent.iterdir()] == ['file.json']


def test_damaged_lines_are_left_out_and_named(lab, four_steps, tmp_path, capsys):
    workdir = shutil.copytree(four_steps, tmp_path / 'run')
    before = measured(workdir)
    path = workdir / 'metrics.jsonl'
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"schema": 1, "st\xff\n' + b'\0\0\n' + b''.join(rest))
    capsys.readouterr()
    lab.train(workdir, steps=5)
    err = capsys.readouterr().err
    assert all(f'{path}:{n} is damaged' in err for n in (2, 3))
    assert {k: v for k, v in measured(workdir).items() if k[0] <= 4} == before


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / 'lines.jsonl'
    assert files.read_json_lines(path) == []
    files.Growing(path).add_line(json.dumps({'text': 'ä'}, ensure_ascii=False))
    line = json.dumps({'text': 'äö'}, ensure_ascii=False).encode()
    for cut in range(len(line)):
        path.write_bytes('{"text": "ä"}\n'.encode() + line[:cut])
        assert files.read_json_lines(path) == [{'text': 'ä'}], cut
    path.write_bytes(line)
    assert files.read_json_lines(path) == [{'text': 'äö'}]
