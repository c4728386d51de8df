"""Functions in worker processes: whatever one of them does, the others are answered, and alike however many work."""

import time

import pytest

from lm import workers
from lm.errors import UsageError


def pool(**options):
    return workers.Pool('scripted:act', **({'seconds': 0.3, 'size': 1} | options))


@pytest.mark.parametrize(
    ('what', 'problem'),
    [
        ('raise', "KeyError: 'x'"),
        ('exit', 'SystemExit: 3'),
        ('die', 'it ended, or took over 0.3 s'),
        ('sleep', 'it ended, or took over 0.3 s'),
        ('spin', 'it ended, or took over 0.3 s'),
        ('allocate', 'MemoryError'),
        ('print', 'EOFError: EOF when reading a line'),
        ('object', 'TypeError: object is no number'),
    ],
)
def test_one_call_fails_and_the_next_is_answered(what, problem):
    failed, after = pool().map([[what, 'x'], ['value', 7]])
    assert failed == (None, problem) and after == (7, None)


def test_a_call_that_hangs_is_ended_within_its_time(monkeypatch):
    begin = time.monotonic()
    pool().map([['sleep']])
    assert time.monotonic() - begin < 0.3 * workers.CLOCK + 5


def test_outcomes_do_not_depend_on_the_number_of_workers():
    calls = [['random', i] for i in range(6)] + [['numpy']]
    one, three = pool().map(calls), pool(size=3).map(list(reversed(calls)))
    assert one == three[::-1] and one[-1].value == 0.5
    assert len({tuple(o.value) for o in one[:-1]}) == 6, 'each call has a state of its own'


def test_arguments_that_are_no_json_fail_alone():
    assert [o.problem is None for o in pool().map([['value', object()], ['value', 1]])] == [False, True]


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('nowhere.at:all', "No module named 'nowhere'"),
        ('math:nothing', "module 'math' has no attribute 'nothing'"),
        ('math:pi', 'TypeError: it is no function'),
    ],
)
def test_a_function_that_there_is_not(name, wanted):
    found = workers.Pool(name, seconds=1, called='reward.verify=x')
    with pytest.raises(UsageError, match=wanted) as error:
        found.map([[1]])
    assert str(error.value).startswith('reward.verify=x: ')


def test_workers_end_with_their_pool():
    found = pool()
    found.probe()
    worker = found._idle.get()
    found._idle.put(worker)
    found.close()
    assert worker._process.returncode is not None
