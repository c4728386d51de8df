"""Progress: lines where there is no terminal, bars where there is one; and the table of results, which cuts no word."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import running

from lm import evaluate, progress

TERMINAL = """
import os, pty, sys
os.environ.update(COLUMNS='80', TERM='xterm')
pid, fd = pty.fork()
if not pid:
    os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])
out = b''
while True:
    try:
        piece = os.read(fd, 4096)
    except OSError:
        break
    if not piece:
        break
    out += piece
sys.stdout.buffer.write(out)
"""
WORK = """
import time
from lm import progress
progress.FIRST, progress.AGAIN = 0.5, 60
with progress.task('reading notes', 8) as task:
    with progress.task('looking'):
        time.sleep(2.2)
    progress.say('a line between')
    task.advance(5)
    time.sleep(1.2)
print('done')
"""


def test_without_a_terminal_silence_is_broken_by_a_line():
    done = subprocess.run([sys.executable, '-c', WORK], cwd=running.ROOT, capture_output=True, text=True, check=True)
    first, second, *_ = done.stderr.splitlines()
    assert re.fullmatch(r'reading notes 0/8: looking, 0:0\d', first)
    assert second == 'a line between'
    assert done.stdout == 'done\n'


def test_on_a_terminal_there_are_bars_which_go_away():
    done = subprocess.run([sys.executable, '-c', TERMINAL, WORK], cwd=running.ROOT, capture_output=True, check=True)
    shown = done.stdout.decode()
    assert 'looking' in shown and '5/8' in shown and 'a line between' in shown
    assert shown.count('\x1b[?25l') == shown.count('\x1b[?25h'), 'the cursor comes back'


def test_the_time_left_is_that_of_what_is_left(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, 'time', clock)
    task = progress.Task('training', 40)
    task.update(10)
    clock.now = 30.0
    task.update(20)
    assert (task.count(), task.time()) == ('20/40', '1:00 left')


FOUND = [
    {'run': f'runs/{name}', 'stage': 'dpo', 'step': 1350}
    | {
        f'eval/{source}/{key}': 0.5
        for source, keys in {
            'operations': ['ended', 'f1'], 'smalltalk': ['ended', 'f1'], 'botocore': ['bpb'], 'chitchat': ['bpb'],
            'programmatic': ['accuracy_per_token', 'accuracy'], 'decline': ['declined_invented', 'declined_real'],
        }.items()
        for key in keys
    }
    for name in ('pretrain', 'dpo-decline')
]  # fmt: skip


@pytest.mark.parametrize('width', [200, 110, 80, 60])
def test_no_word_of_the_table_is_cut_off(monkeypatch, capsys, width):
    monkeypatch.setattr(evaluate, 'width_of', lambda: width)
    evaluate.show(FOUND)
    out = capsys.readouterr().err
    assert max(map(len, out.splitlines())) <= width and '…' not in out
    words = [
        'operations',
        'smalltalk',
        'programmatic',
        'per token',
        'by reward',
        'invented',
        'botocore',
        'runs/dpo-decline',
    ]
    assert all(word in out for word in words), out
    assert out.count('0.500') == 20
