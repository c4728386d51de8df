"""Several processes train one run: they meet, take their rows, agree when to stop, and name who is gone."""

import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import running
from running import lines, measured, status, steps_saved

from lm import sharding
from lm.errors import Preempted, RunError, UsageError
from lm.multihost import hub, processes, rank
from lm.multihost.rank import Rank, Topology

N = 3


made: list[Rank] = []


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No long grace, and no connection that outlives its test."""
    monkeypatch.setattr(rank, 'GRACE', 0.2)
    yield
    for member in made:
        member._leaving = True  # or it would end this process
    for member in made:
        if member._line is not None:
            member._line.close()
        if member._hub is not None:
            member._hub.close()
    made.clear()


def new_member(where: str, count: int, index: int, wait: int = 20) -> Rank:
    made.append(Rank(Topology(where, count, index), wait))
    return made[-1]


# ---- meeting ----


def meet(*, facts=({}, {}, {}), ids=(0, 1, 2), counts=(N, N, N), wait=20):
    """What each of the processes that come is told: a Rank, or the UsageError's line."""
    where = running.coordinator()

    def come(facts, index, count):
        try:
            member = new_member(where, count, index, wait)
            member.enter(facts)
            return member
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(len(ids)) as pool:
        return list(pool.map(come, facts, ids, counts))


def refusal(told: list) -> str:
    """The one line that all were told."""
    assert len(set(told)) == 1 and isinstance(told[0], str)
    return told[0]


def test_processes_that_fit_meet():
    assert all(isinstance(member, Rank) for member in meet(facts=[{'jax': '1', 'optim.lr': 0.1}] * N))


@pytest.mark.parametrize(
    ('facts', 'line'),
    [
        (({'lr': 1}, {'lr': 1}, {'lr': 2}), r'process 2 has lr=2, process 0 has 1: start'),
        (({'lr': 1, 'jax': 'a'}, {'lr': 2, 'jax': 'b'}, {}), r'process 1 has jax=b, process 0 has a \(and in 1 more\)'),
        (({}, {}, {'commit': 'f00'}), r'process 2 has commit=f00, process 0 has None: start'),
    ],
)
def test_a_difference_is_refused_by_name(facts, line):
    assert re.match(line, refusal(meet(facts=facts)))


def test_two_with_the_same_id_are_refused():
    told = meet(ids=(0, 1, 1))
    assert all('two processes came with --process_id=1 (' in line for line in told)


def test_another_number_of_processes_is_refused():
    assert 'process 1 was started with --num_processes=4, process 0 with 3' in refusal(meet(counts=(N, 4, N)))


def test_who_does_not_come_is_named():
    begun = time.monotonic()
    told = meet(ids=(0, 2), wait=1)
    assert 'of 3 processes these did not come: 1' in refusal(told) and time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ('error', 'status', 'line'), [(None, 1, 'process 1 of 3 has died'), (Preempted('a'), 75, 'process 1: a')]
)
def test_one_that_ends_while_all_wait_is_named(error, status, line):
    where = running.coordinator()
    first, second = new_member(where, N, 0), new_member(where, N, 1)
    with ThreadPoolExecutor(2) as pool:
        entered = [pool.submit(member.enter, {}) for member in (first, second)]
        while len(first._hub._lines) < 2:
            time.sleep(0.01)
        second.leave(error) if error else second._line.close()
        with pytest.raises((RunError, Preempted), match=line) as found:
            entered[0].result()
        assert found.value.status == status
        assert isinstance(entered[1].exception(), (UsageError, Preempted))


def test_without_process_0_the_others_say_so():
    (told,) = meet(ids=(1,), wait=1)
    assert 'process 0 was not to be reached at 127.0.0.1:' in told


def test_a_port_in_use():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        where = f'127.0.0.1:{taken.getsockname()[1]}'
        with pytest.raises(UsageError, match=f'--coordinator={where}: process 0 cannot listen there'):
            new_member(where, 2, 0)


def test_a_stranger_at_the_port_is_ignored():
    where = running.coordinator()
    first = new_member(where, 2, 0)
    with socket.create_connection(hub.address(where)) as stranger, ThreadPoolExecutor(2) as pool:
        stranger.sendall(b'GET / HTTP/1.1\r\n\r\n')
        entered = [pool.submit(m.enter, {}) for m in (first, new_member(where, 2, 1))]
        assert len({e.result() for e in entered}) == 1
        assert stranger.recv(1) == b''


@pytest.mark.parametrize(
    ('words', 'line'),
    [
        ((None, 2, None), '--num_processes and --process_id need --coordinator'),
        (('localhost:1', None, 0), 'needs --num_processes=N and --process_id=I'),
        (('localhost:1', 0, 0), '--num_processes=0 must be at least 1'),
        (('localhost:1', 2, 2), '--process_id=2 must be from 0 to 1'),
        (('localhost:1', 2, -1), '--process_id=-1 must be from 0 to 1'),
        (('localhost', 2, 0), '--coordinator=localhost must be HOST:PORT'),
        (('localhost:70000', 2, 0), '--coordinator=localhost:70000 must be HOST:PORT'),
        (('auto', None, None), '--coordinator=auto: this is no cluster that JAX knows'),
    ],
)
def test_flags_that_name_no_place(words, line):
    with pytest.raises(UsageError, match=line):
        processes.place(*words, wait=1)


def test_alone():
    assert processes.place(None, None, None, wait=1) is None is processes.place('localhost:1', 1, 0, wait=1)
    assert processes.first() and processes.all_gather(3) == [3] and processes.stops_after(4, None) is None


# ---- agreeing ----


@pytest.fixture
def members():
    found = meet()
    for member in found:
        member.watch()
    return found


def test_each_knows_what_every_one_said(members):
    with ThreadPoolExecutor(N) as pool:
        for number in range(3):
            told = list(pool.map(lambda m: m.all_gather([m.topology.index, number]), members))  # noqa: B023
            assert told == [[[0, number], [1, number], [2, number]]] * N


@pytest.mark.parametrize('who', range(N))
def test_all_stop_after_the_same_step(members, who):
    """Though each is elsewhere when the signal comes, and nobody has passed that step."""
    stopped = [0] * N
    paces = [0.001, 0.003, 0.0005]

    def run(member):
        index = member.topology.index
        for step in range(1, 2_000):
            time.sleep(paces[index])
            if why := member.stops_after(step, 'SIGTERM' if index == who and step >= 40 else None):
                assert why == f'SIGTERM to process {who}'
                stopped[index] = step
                return

    with ThreadPoolExecutor(N) as pool:
        list(pool.map(run, members))
    # 40 itself if the answer comes while the one who asked is still in that call
    assert len(set(stopped)) == 1 and stopped[0] >= 40


def test_a_process_past_its_last_step_keeps_nobody_waiting(members):
    """It asks no more, and the others find a step to stop after all the same."""
    for member in members:
        assert member.stops_after(7, None) is None
    for step in range(8, 1000):
        time.sleep(0.001)
        if members[1].stops_after(step, 'SIGTERM'):
            return
    pytest.fail('it never stopped')


# ---- the relay ----


def test_the_relay_passes_bytes_and_never_the_end():
    with socket.create_server(('127.0.0.1', 0)) as service:
        near = socket.create_connection(('127.0.0.1', hub.relay('127.0.0.1', service.getsockname()[1])))
        far, _ = service.accept()
        near.sendall(b'there')
        assert far.recv(5) == b'there'
        far.sendall(b'back')
        assert near.recv(4) == b'back'
        far.close()
    near.settimeout(0.3)
    near.sendall(b'into the void')
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.close()


# ---- rows ----


@pytest.mark.parametrize('rows', [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 5, 6], list(range(8))])
def test_a_block_is_cut_from_the_rows_that_are_here(rows):
    batch = np.arange(8 * 6).reshape(8, 6)
    for first, last in ((rows[0], rows[0] + 1), (rows[2], rows[3] + 1)):
        index = (slice(first, last), slice(2, 4))
        np.testing.assert_array_equal(sharding._block(batch[rows], rows, index), batch[index])


def test_one_process_has_all_rows(mesh):
    assert sharding.local_rows(8, 16) is None


# ---- two processes of four devices against one of eight ----


def start(lab, workdir, *words, devices=1, differing=({}, {}), **settings) -> list[subprocess.Popen]:
    """Two processes with so many devices each, which find each other at a free port."""
    several = [f'--coordinator={running.coordinator()}', '--num_processes=2', *words]
    return [
        lab.start(workdir, *several, f'--process_id={i}', devices=devices, **settings, **differing[i]) for i in range(2)
    ]


def assert_done(started: list[subprocess.Popen]) -> None:
    told = running.ended(started)
    assert [code for code, _, _ in told] == [0] * len(told), told


@pytest.fixture(scope='module')
def pair(lab, tmp_path_factory) -> Path:
    """A run of two processes with four devices each."""
    workdir = tmp_path_factory.mktemp('pair') / 'run'
    (status_0, out, _), (status_1, nothing, _) = running.ended(start(lab, workdir, devices=4))
    assert (status_0, status_1, nothing) == (0, 0, '') and running.one_object(out)['step'] == 12
    return workdir


@pytest.fixture
def one(trained) -> Path:
    """The same run of one process with eight."""
    return trained


def back_to(workdir: Path, step: int, target: Path) -> Path:
    """A copy of a run as it was at a checkpoint."""
    shutil.copytree(workdir, target)
    for later in steps_saved(target):
        if later > step:
            shutil.rmtree(target / 'checkpoints' / str(later))
    return target


@pytest.mark.slow
def test_two_processes_train_what_one_trains(pair, one):
    running.assert_measured_alike(pair, one)
    assert steps_saved(pair) == steps_saved(one) and status(pair)['state'] == 'done'
    assert len(list((pair / 'tensorboard').iterdir())) == 1
    names = lambda workdir: sorted(p.name for p in workdir.iterdir())
    assert names(pair) == names(one)


@pytest.mark.slow
def test_what_two_saved_one_resumes_and_two_resume(lab, pair, tmp_path):
    alone, both = (back_to(pair, 4, tmp_path / name) for name in ('alone', 'both'))
    lab.train(alone)
    running.assert_measured_alike(alone, pair)
    assert_done(start(lab, both, devices=4))
    assert measured(both) == measured(pair)


@pytest.mark.slow
def test_what_one_saved_two_resume(lab, one, tmp_path):
    both = back_to(one, 8, tmp_path / 'both')
    assert_done(start(lab, both))
    running.assert_measured_alike(both, one)


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'seq', 'tensor'])
def test_an_axis_that_crosses_the_processes(lab, tmp_path, axis):
    """Along seq and tensor both read the same rows, and each puts its part of them on its devices."""
    settings = {'mesh__fsdp': 1, f'mesh__{axis}': 2, 'steps': 3, 'execution__microbatch': 4}
    assert_done(start(lab, tmp_path / 'two', **settings))
    assert_done([lab.start(tmp_path / 'one', devices=2, **settings)])
    running.assert_measured_alike(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_sigterm_to_one_stops_both_at_the_same_step(lab, tmp_path, who):
    workdir = tmp_path / 'run'
    started = start(lab, workdir, checkpoint__every=10_000, eval__every=10_000, steps=10_000)
    running.wait_for_step(started[0], workdir, 3)
    started[who].send_signal(signal.SIGTERM)
    (code_0, _, told_0), (code_1, _, told_1) = running.ended(started)
    (step,) = steps_saved(workdir)
    saved = f'lm: saved at step {step} after SIGTERM to process {who}: run the same command again to go on'
    at_once, *rest = (told_0, told_1)[who]
    assert code_0 == code_1 == 75 and rest == (told_1, told_0)[who] == [saved]
    assert at_once.startswith('lm: SIGTERM: saves after the steps under way and leaves')
    assert status(workdir)['state'] == 'preempted' and lines(workdir)[-1]['step'] == step


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_the_death_of_one_ends_the_other_in_a_line_that_names_it(lab, tmp_path, who):
    started = start(lab, tmp_path / 'run', steps=10_000, eval__every=10_000, checkpoint__every=10_000)
    running.wait_for_step(started[0], tmp_path / 'run', 3)
    started[who].kill()
    begun = time.monotonic()
    code, _, told = running.ended(started, 60)[1 - who]
    assert time.monotonic() - begun < 60 and code == 1
    assert len(told) == 1 and re.match(rf'lm: process {who} of 2 \(.*, pid \d+\) has died: start all', told[0])
    if who == 1:
        assert 'process 1 of 2' in status(tmp_path / 'run')['reason']


@pytest.mark.slow
def test_what_differs_is_refused_before_anything_is_written(lab, tmp_path):
    started = start(lab, tmp_path / 'run', differing=({}, {'optim__lr': 0.5}))
    line = 'lm: process 1 has optim.lr=0.5, process 0 has 0.003: start all of them alike'
    assert [(code, told) for code, _, told in running.ended(started)] == [(2, [line])] * 2
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_dry_run_of_two(lab, tmp_path):
    (code_0, out, _), (code_1, nothing, _) = running.ended(start(lab, tmp_path / 'run', '--dry_run'))
    assert code_0 == code_1 == 0 and running.one_object(out)['dry_run'] and nothing == ''
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_mistake_that_all_would_find_is_told_once_by_each(lab, pair):
    told = running.ended(start(lab, pair, seq_len=16))
    assert [code for code, _, _ in told] == [2, 2]
    assert all('holds another run: seq_len (32 there, 16 now)' in line for _, _, (line,) in told)


@pytest.mark.slow
def test_processes_without_a_shared_cache_prepare_their_own(lab, one, tmp_path, monkeypatch):
    several, started = [f'--coordinator={running.coordinator()}', '--num_processes=2'], []
    for i in range(2):
        monkeypatch.setenv('LM_CACHE', str(tmp_path / f'cache{i}'))
        started.append(lab.start(tmp_path / 'run', *several, f'--process_id={i}', steps=12, eval__every=12))
    assert_done(started)
    losses = lambda workdir: [r['train/loss'] for r in lines(workdir) if 'train/loss' in r]
    np.testing.assert_allclose(losses(tmp_path / 'run'), losses(one), rtol=2e-5)
    assert all((tmp_path / f'cache{i}' / 'prepared').exists() for i in range(2))


# Process 1's own trouble with a part of the checkpoint of step 12 that it alone reads.
BLIND = """
import sys
from lm import errors, main
from lm.runs import checkpoint
real = checkpoint._restore
def restore(path, abstract):
    if path.name == '12' and '--process_id=1' in sys.argv:
        raise ValueError('it cannot be read')
    return real(path, abstract)
checkpoint._restore = restore
errors.leave(main.main())
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_left_by_both(lab, one, tmp_path):
    """They go on from the one before, together."""
    workdir = back_to(one, 12, tmp_path / 'run')
    assert_done(start(lab, workdir, code=BLIND))
    running.assert_measured_alike(workdir, one)
    assert (workdir / 'checkpoints' / '12.damaged').exists()
    assert 'is damaged: process 1: it cannot be read' in (workdir / 'log.txt').read_text()
