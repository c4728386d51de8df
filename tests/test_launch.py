"""The scripts of launch/."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

RESUME = Path(__file__).parents[1] / 'launch' / 'resume.sh'
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
