"""Locks: one holder, none after it has died, and none asked for where there are none."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from running import ROOT

from lm import locks

_HOLDS = (
    'import sys, time; from lm import locks; lock = locks.take(sys.argv[1]); print("held", flush=True); time.sleep(60)'
)


def test_one_process_holds_it_until_it_is_killed(tmp_path):
    path = tmp_path / '.lock'
    child = subprocess.Popen([sys.executable, '-c', _HOLDS, path], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b'held\n'
    with pytest.raises(BlockingIOError):
        locks.take(path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert path.exists()
    lock = locks.take(path)
    assert lock.is_locked
    locks.drop(lock)
    assert not list(tmp_path.iterdir())


def test_what_is_let_go_of_meanwhile_is_had(tmp_path):
    """Its holder removes the file: what is held then is the file that is there, not the one that was."""
    path = tmp_path / '.lock'
    first = locks.take(path)
    threading.Timer(0.05, locks.drop, [first]).start()
    second = locks.take(path)
    assert second.is_locked and not first.is_locked
    with pytest.raises(BlockingIOError):
        locks.take(path)
    locks.drop(second)


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, 'flock', flock)
    lock = locks.take(tmp_path / '.lock')
    assert not lock.is_locked
    locks.drop(lock)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / '.lock').mkdir()
    with pytest.raises(IsADirectoryError):
        locks.take(tmp_path / '.lock')
