"""Ctrl-C and SIGTERM: what each command makes of them, in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT

from lm import interrupts, runtime
from lm.errors import Preempted, RunError, run_command
from lm.interrupts import Interrupted

COMMANDS = ('main', 'chat', 'evaluate', 'convert', 'inspect')


def started(code: str) -> subprocess.Popen:
    """A process that hears signals from its first line on, and says 'go' when it is to be sent one."""
    code = f'from lm import interrupts\ninterrupts.install()\nimport contextlib, os, sys, time\n{code}'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'go\n'
    return process


def ended(process: subprocess.Popen, number: int = signal.SIGINT) -> tuple[int, str]:
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    return process.returncode, err


@pytest.mark.parametrize('name', COMMANDS)
def test_a_command_that_still_imports_leaves_with_one_line(name):
    """From the first of our lines on: the package's, which is there as soon as Python has begun."""
    code = f'import runpy, sys; sys.argv = ["-m"]; import lm; print("go", flush=True); runpy.run_module("lm.{name}")'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == 'go\n'
    time.sleep(0.05)
    assert ended(process) == (130, 'lm: interrupted\n')


@pytest.mark.parametrize(
    ('number', 'status', 'said'), [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'stopped by SIGTERM')]
)
def test_nothing_can_drop_it(number, status, said):
    """Neither a destructor, nor a handler of every exception, nor the garbage collector."""
    process = started(
        'import gc\n'
        'class Last:\n'
        '    def __del__(self):\n'
        '        print("go", flush=True); time.sleep(5)\n'
        'with contextlib.suppress(BaseException):\n'
        '    Last()\n'
        'time.sleep(5)'
    )
    assert ended(process, number) == (status, f'lm: {said}\n')


def test_a_main_thread_that_is_in_a_librarys_code_is_left(tmp_path):
    """It comes to no handler for 20 s; what is half done is undone all the same."""
    file = tmp_path / 'half'
    file.write_text('')
    process = started(
        'import ctypes, signal\n'
        'signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n'  # as if it never came back to Python
        f'with interrupts.means("half is removed"), interrupts.undoing(lambda ending: os.unlink({str(file)!r})):\n'
        '    print("go", flush=True)\n'
        '    ctypes.CDLL(None).sleep(20)'
    )
    begun = time.monotonic()
    assert ended(process) == (130, 'lm: interrupted: half is removed\n')
    assert time.monotonic() - begun < 10 and not file.exists()


def test_the_second_leaves_what_takes_long_to_undo():
    process = started(
        'with interrupts.undoing(lambda ending: time.sleep(20)):\n    print("go", flush=True); time.sleep(20)'
    )
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    assert ended(process)[0] == 130 and time.monotonic() - begun < 5


def test_training_says_at_once_that_it_saves(capfd):
    with runtime.stop_request() as request:
        request.patient = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        assert request and 'SIGINT: saves after the steps under way and leaves' in capfd.readouterr().err
        with pytest.raises(Interrupted, match='since the last checkpoint is lost') as second:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert second.value.status == RunError.status
    with pytest.raises(Preempted, match='before the first step'), runtime.stop_request():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_it_hears_again_where_it_was_heard_before():
    before = signal.getsignal(signal.SIGINT)
    with (
        interrupts.heard(),
        contextlib.suppress(Interrupted),
        interrupts.reacting(lambda name: Interrupted(), raises=True),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        pytest.fail('went on')
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fault_of_ours_is_a_traceback_and_status_1(capsys):
    """Not Python's own end, which crashes where threads of XLA's are at work."""
    assert run_command(lambda: {}['no such key']) == 1
    assert "KeyError: 'no such key'" in capsys.readouterr().err
