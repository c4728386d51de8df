"""The cache: stable names, nothing half after a kill, two builders at once."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.data import cache
from lm.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def test_fingerprint_is_the_same_everywhere_and_differs_with_the_value():
    assert cache.fingerprint({'b': [1, 'é'], 'a': None}) == cache.fingerprint({'a': None, 'b': [1, 'é']})
    assert cache.fingerprint({'a': 1}) != cache.fingerprint({'a': 2})
    assert cache.fingerprint({'a': 1}) == '1f8c00645b7df6ce', 'a new fingerprint orphans every cache: is it meant?'


def _writes(text):
    def fill(path):
        (path / 'x').write_text(text)

    return fill


def test_a_thing_is_built_once_and_its_key_lies_beside():
    calls = []

    def fill(path):
        calls.append(path)
        (path / 'x').write_text('1')

    first, second = cache.build('k', {'a': 1}, fill), cache.build('k', {'a': 1}, fill)
    assert first == second and len(calls) == 1
    assert sorted(p.name for p in first.iterdir()) == ['key.json', 'x']
    assert cache.build('k', {'a': 2}, fill) != first and len(calls) == 2


def test_a_failed_build_leaves_nothing():
    def fail(path):
        (path / 'x').write_text('half')
        raise ValueError('no')

    with pytest.raises(ValueError):
        cache.build('k', {}, fail)
    assert list((cache.cache_dir() / 'k').iterdir()) == []


def test_a_full_disk_is_one_line():
    def fail(path):
        raise OSError(28, 'No space left on device')

    with pytest.raises(RunError, match='disk is full.*LM_CACHE'):
        cache.build('k', {}, fail)


_SLOW = """
import sys, time
from lm.data import cache
def fill(path):
    (path / 'x').write_text('half')
    print('started', flush=True)
    time.sleep(60)
cache.build('k', {'a': 1}, fill)
"""


def test_a_killed_build_is_not_taken_for_a_whole_one_and_is_swept():
    root = Path(__file__).parent.parent
    child = subprocess.Popen([sys.executable, '-c', _SLOW], cwd=root, stdout=subprocess.PIPE)
    assert child.stdout and child.stdout.readline() == b'started\n'
    [left] = (cache.cache_dir() / 'k').iterdir()
    old = time.time() - 2 * cache._ABANDONED_SECONDS
    os.utime(left, (old, old))
    cache._sweep(cache.cache_dir() / 'k')
    assert left.exists(), 'a build that is alive was swept'
    child.send_signal(signal.SIGKILL)
    child.wait()
    os.utime(left, (old, old))
    built = cache.build('k', {'a': 1}, _writes('whole'))
    assert (built / 'x').read_text() == 'whole'
    assert list(built.parent.iterdir()) == [built]


def test_where_there_are_no_locks_nothing_is_swept(monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', flock)
    left = cache.cache_dir() / 'k' / f'{cache._TEMPORARY}left'
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    built = cache.build('k', {'a': 1}, _writes('whole'))
    assert left.exists() and sorted(p.name for p in built.iterdir()) == ['key.json', 'x']


def test_the_slower_of_two_builders_takes_the_other_ones():
    def slow(path):
        cache.build('k', {'a': 1}, _writes('quick'))
        (path / 'x').write_text('slow')

    built = cache.build('k', {'a': 1}, slow)
    assert (built / 'x').read_text() == 'quick'
    assert list(built.parent.iterdir()) == [built]


def test_a_bucket_and_a_file_are_refused_as_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('LM_CACHE', 'gs://bucket/x')
    with pytest.raises(UsageError, match='local'):
        cache.cache_dir()
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'file'))
    with pytest.raises(UsageError, match='set LM_CACHE'):
        cache.build('k', {}, lambda path: None)
