"""The scripts of launch/."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import running

LAUNCH = Path(__file__).parents[1] / 'launch'
RESUME, LOCAL, POD = (LAUNCH / f'{name}.sh' for name in ('resume', 'local', 'tpu_pod'))
# Counts its starts in a file, and leaves with the statuses it is given, one a start.
COMMAND = 'n=$(cat "$0" 2>/dev/null || echo 0); echo $((n + 1)) >"$0"; shift "$n"; exit "$1"'


@pytest.mark.parametrize(('statuses', 'starts'), [('75 75 0', 3), ('75 1', 2), ('2 0', 1), ('0 75', 1)])
def test_resume_runs_again_while_the_command_is_preempted(tmp_path, statuses, starts):
    count = tmp_path / 'count'
    done = subprocess.run([RESUME, 'bash', '-c', COMMAND, count, *statuses.split()], timeout=20)
    assert done.returncode == int(statuses.split()[starts - 1]) and int(count.read_text()) == starts


def test_resume_passes_sigterm_on_and_leaves_with_what_comes(tmp_path):
    """The script itself was asked to stop, so it does not start the command again."""
    started = tmp_path / 'started'
    command = f'trap "exit 75" TERM; echo x >>{started}; while :; do sleep 0.05; done'
    script = subprocess.Popen([RESUME, 'bash', '-c', command])
    while not started.exists():
        time.sleep(0.02)
    time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=10) == 75 and started.read_text() == 'x\n'


def test_resume_without_a_command():
    done = subprocess.run([RESUME], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and done.stderr.startswith('usage:')


@pytest.mark.parametrize('script', sorted(LAUNCH.glob('*.sh')), ids=lambda script: script.name)
def test_scripts_are_sound(script):
    assert os.access(script, os.X_OK)
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    assert shellcheck, 'shellcheck is missing: install the test extra'
    for command in (['bash', '-n', script], [shellcheck, script]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- several processes on this machine ----


def local(n, command, *words, **env):
    """(status, stdout's lines, stderr's lines), each sorted."""
    done = subprocess.run(
        [LOCAL, str(n), '--', 'bash', '-c', command, *map(str, words)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **env},
    )  # fmt: skip
    return done.returncode, sorted(done.stdout.splitlines()), sorted(done.stderr.splitlines())


def test_local_starts_all_with_their_flags():
    status, out, err = local(3, 'echo "$@"; echo told >&2', 'x', '--config=a b')
    assert status == 0 and err == ['[0] told', '[1] told', '[2] told']
    (port,) = {line.partition('--coordinator=127.0.0.1:')[2].split()[0] for line in out}
    assert out == [f'--config=a b --coordinator=127.0.0.1:{port} --num_processes=3 --process_id={i}' for i in range(3)]


@pytest.mark.parametrize(
    ('statuses', 'worst'), [('0 0', 0), ('0 1', 1), ('75 1', 1), ('1 75', 1), ('2 1', 2), ('1 137', 137)]
)
def test_local_leaves_with_the_worst_status(statuses, worst):
    """One that was preempted is worse than one that is done, and better than one that failed."""
    assert local(2, 'i=${!#}; shift "${i#*=}"; exit "$1"', 'x', *statuses.split())[0] == worst


def test_local_begins_again_on_75(tmp_path):
    """All of them, at another port."""
    command = 'i=${!#}; echo "$1" >>"$0.$i"; [ "$(wc -l <"$0.$i")" -gt 2 ] || exit 75'
    assert local(2, command, tmp_path / 'starts')[0] == 0
    ports = [(tmp_path / f'starts.--process_id={i}').read_text().split() for i in range(2)]
    assert len(ports[0]) == 3 and ports[0] == ports[1]


def test_local_passes_a_signal_to_all(tmp_path):
    command = 'trap "echo stopped >&2; exit 75" TERM; touch "$0.${!#}"; while :; do sleep 0.05; done'
    arguments = [LOCAL, '2', '--', 'bash', '-c', command, tmp_path / 'up']
    script = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob('up.*'))) < 2:
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    _, err = script.communicate(timeout=20)
    assert script.returncode == 75 and sorted(err.splitlines()) == ['[0] stopped', '[1] stopped']


@pytest.mark.parametrize('words', [[], ['2'], ['2', '--'], ['x', '--', 'true'], ['0', '--', 'true'], ['2', 'true']])
def test_local_without_a_command(words):
    done = subprocess.run([LOCAL, *words], capture_output=True, text=True, timeout=10)
    assert done.returncode == 2 and done.stderr.startswith('usage:')


@pytest.mark.slow
def test_local_trains(lab, tmp_path):
    """For real; then one is killed, and the others end with it."""
    env = {**os.environ, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
    command = lambda **more: [LOCAL, '2', '--', sys.executable, '-m', 'lm.main', *lab.argv(tmp_path / 'run', **more)]
    done = subprocess.run(command(), capture_output=True, text=True, timeout=240, env=env, cwd=running.ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['step'] == 12 and '[0] xla: cpu, its defaults' in done.stderr
    shutil.rmtree(tmp_path / 'run')
    script = subprocess.Popen(command(steps=10_000), stderr=subprocess.PIPE, text=True, env=env, cwd=running.ROOT)
    running.wait_for_step(script, tmp_path / 'run', 3)
    for file in Path('/proc').glob('[0-9]*/cmdline'):
        words = file.read_bytes().split(b'\0')
        if b'lm.main' in words and b'--process_id=1' in words and f'--workdir={tmp_path}/run'.encode() in words:
            os.kill(int(file.parent.name), signal.SIGKILL)
    _, err = script.communicate(timeout=60)
    assert script.returncode == 137 and '[0] lm: process 1 of 2' in err


# ---- a TPU pod ----

# Stands for gcloud: notes what it is asked, and answers from a file of statuses, one a training; none left is 0.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >>"$FAKE/asked"
case $* in
  *describe*) cat "$FAKE/state" 2>/dev/null || exit 1 ;;
  *" create "*) [ -z "${REFUSED:-}" ] || exit 1; echo ACTIVE >"$FAKE/state" ;;
  *delete*) rm -f "$FAKE/state" ;;
  *scp*) sleep "${SLOW:-0}" ;;
  *setsid* | *"tail -n +1"* | *"kill -TERM"*) # with a WORKER they are done there
    if [ -n "${WORKER:-}" ]; then
      last=${!#}; cd "$WORKER" && bash -c "${last#--command=}"; status=$?
      case $* in *"kill -TERM"*) sleep "$LINGER" ;; esac
      exit $status
    fi ;;&
  *"tail -n +1"*)
    status=$(head -n 1 "$FAKE/statuses"); sed -i 1d "$FAKE/statuses"
    [ "$status" != 255 ] || echo SUSPENDED >"$FAKE/state"
    exit "${status:-0}" ;;
esac
"""
WORDS = [
    'pod',
    '--',
    '--config=configs/pretrain.py:1b',
    '--workdir=gs://bucket/runs/1b',
    "--config.data.mixture=it's a",
]


def surroundings(tmp_path, *, statuses='', **env):
    """The environment in which gcloud is the one above."""
    (tmp_path / 'gcloud').write_text(GCLOUD)
    (tmp_path / 'gcloud').chmod(0o755)
    (tmp_path / 'statuses').write_text(''.join(f'{status}\n' for status in statuses.split()))
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    place = {'ZONE': 'us-west4-a', 'ACCELERATOR': 'v5litepod-64', 'FAKE': str(tmp_path), 'PATH': path} | env
    return {**os.environ, **place}


def worker(tmp_path, python):
    """The lm folder of a worker in tmp_path, whose Python is this script."""
    file = tmp_path / 'lm' / '.venv' / 'bin' / 'python'
    file.parent.mkdir(parents=True)
    file.write_text(f'#!/usr/bin/env bash\n{python}\n')
    file.chmod(0o755)
    return tmp_path / 'lm'


def wait_for(file, text=''):
    end = time.monotonic() + 10
    while not (file.exists() and text in file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)


def pod(tmp_path, *words, **env):
    """(status, stdout, what gcloud was asked)."""
    env = surroundings(tmp_path, **env)
    done = subprocess.run([POD, *words], capture_output=True, text=True, timeout=60, env=env)
    asked = tmp_path / 'asked'
    return done.returncode, done.stdout, asked.read_text().splitlines() if asked.exists() else []


def test_a_pods_dry_run_prints_and_asks_nothing(tmp_path):
    status, out, asked = pod(tmp_path, '--dry-run', *WORDS)
    assert status == 0 and asked == []
    create, archive, copy, install, *_, follow, delete = out.replace('\\\n', ' ').splitlines()
    assert 'queued-resources create pod --node-id=pod --zone=us-west4-a --accelerator-type=v5litepod-64' in create
    assert '--runtime-version=v2-alpha-tpuv5-lite --spot' in create and '--worker=all' in copy
    assert archive.startswith('git -C') and '.[tpu,corpus,hub]' in out and '--coordinator=auto' in out
    assert '--worker=0' in follow and delete.strip().endswith('--force --quiet')
    assert '--spot' not in pod(tmp_path, '--dry-run', *WORDS, SPOT='0')[1]


def test_a_pods_command_arrives_as_it_was_written(tmp_path):
    """Through the shell of the worker and the one that outlives the connection."""
    pod(tmp_path, *WORDS)
    asked = (tmp_path / 'asked').read_text()
    sent = asked[asked.index('--command=cd lm && rm -f status log') :].partition('--command=')[2].partition('\n')[0]
    folder = worker(tmp_path, 'printf "%s\\n" "$@" >got; exit 75')
    subprocess.run(['bash', '-c', sent], cwd=tmp_path, check=True)
    wait_for(folder / 'status')
    assert (folder / 'got').read_text().splitlines() == ['-m', 'lm.main', '--coordinator=auto', *WORDS[2:]]
    assert (folder / 'status').read_text() == '75\n'


@pytest.mark.parametrize('linger', [0, pytest.param(6, marks=pytest.mark.slow)])
def test_a_signal_to_the_script_lets_the_run_on_a_pod_save(tmp_path, linger):
    """It waits for the status of the command that was told to stop, deletes the pod and does not begin again; also
    where the connection that told it to stop outlives it."""
    folder = worker(tmp_path, 'trap "touch saved; exit 75" TERM; touch up; while :; do sleep 0.1; done')
    env = surroundings(tmp_path, WORKER=str(tmp_path), LINGER=str(linger))
    script = subprocess.Popen([POD, *WORDS], env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(folder / 'up')
        wait_for(tmp_path / 'asked', 'tail -n +1')
        script.terminate()
        assert script.wait(timeout=20) == 75 and (folder / 'saved').exists()
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
    asked = (tmp_path / 'asked').read_text().splitlines()
    assert 'delete' in asked[-1] and sum(' create ' in line for line in asked) == 1


def test_a_signal_before_there_is_a_run_deletes_the_pod(tmp_path):
    env = surroundings(tmp_path, SLOW='0.5')
    script = subprocess.Popen([POD, *WORDS], env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path / 'asked', ' scp ')
    script.terminate()
    assert script.wait(timeout=20) == 143
    asked = (tmp_path / 'asked').read_text().splitlines()
    assert 'delete' in asked[-1] and not (tmp_path / 'state').exists()


@pytest.mark.parametrize(('statuses', 'rounds', 'status'), [('0', 1, 0), ('1', 1, 1), ('75 0', 2, 0), ('255 0', 2, 0)])
def test_a_preempted_pod_begins_again(tmp_path, statuses, rounds, status):
    """Told by status 75, or by machines that are gone; whatever comes, no pod is left behind."""
    left, _, asked = pod(tmp_path, *WORDS, statuses=statuses)
    assert left == status and sum(' create ' in line for line in asked) == rounds
    assert 'delete' in asked[-1] and not (tmp_path / 'state').exists()


def test_a_pod_that_is_refused_is_not_asked_for_again(tmp_path):
    status, _, asked = pod(tmp_path, *WORDS, REFUSED='1')
    assert status == 1 and sum(' create ' in line for line in asked) == 1


def test_a_pod_without_a_place(tmp_path):
    for words, env in ((['pod'], {}), (WORDS, {'ZONE': ''}), ([], {})):
        done = subprocess.run([POD, *words], capture_output=True, text=True, env={**os.environ, 'ZONE': 'z', **env})
        assert done.returncode == 2 and done.stderr.startswith('usage:')
