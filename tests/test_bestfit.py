"""Best-fit packing: nothing lost, nothing twice, nothing too long, and hardly a place left over."""

from collections import Counter

import numpy as np
import pytest

from lm.data import bestfit


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def drawn(seed, count, most):
    return np.random.default_rng(seed).integers(1, most + 1, count).astype(np.int64)


def sizes(lengths):
    return bestfit.Sizes(
        len(lengths), lengths.tolist(), lambda start, stop: (lengths[start:stop], lengths[start:stop] < 0)
    )


def by_hand(lengths, capacity):
    """The largest first, each into the fullest row that has room: the same, without a sorted list."""
    rows, free = [], []
    for thing in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if free[r] >= lengths[thing]]
        row = min(fits, key=lambda r: (free[r], r), default=len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(thing)
        free[row] -= lengths[thing]
    return rows


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('most', [5, 40, 64])
def test_a_window_is_packed_by_best_fit(seed, most):
    lengths = drawn(seed, 200, most).tolist()
    plan = bestfit.Plan.of(np.arange(200), np.array(lengths), 64)
    rows = [plan[r].tolist() for r in range(len(plan))]
    assert rows == by_hand(lengths, 64)
    assert Counter(i for row in rows for i in row) == Counter(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64


@pytest.mark.parametrize('window', [1, 7, 4096])
def test_a_plan_holds_each_thing_once_and_no_row_overflows(monkeypatch, window):
    monkeypatch.setattr(bestfit, 'WINDOW', window)
    lengths = drawn(0, 500, 64)
    lengths[::9] = 0  # left out
    plan = bestfit.plan(sizes(lengths), 64)
    rows = [plan[r].tolist() for r in range(len(plan))]
    assert Counter(i for row in rows for i in row) == Counter(np.flatnonzero(lengths).tolist())
    assert max(lengths[row].sum() for row in rows) <= 64
    assert all(len({i // window for i in row}) == 1 for row in rows), 'a plan takes the memory of one window'


def test_hardly_a_place_is_left_over():
    lengths = drawn(1, 8_000, 200)
    plan = bestfit.plan(sizes(lengths), 256)
    assert lengths.sum() / (len(plan) * 256) > 0.98


def test_a_plan_is_made_once(monkeypatch):
    lengths = drawn(2, 300, 30)
    first = bestfit.plan(sizes(lengths), 32)
    monkeypatch.setattr(bestfit, '_write', lambda *args: pytest.fail('it was there'))
    again = bestfit.plan(sizes(lengths), 32)
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.starts, again.starts)


def test_other_lengths_or_another_capacity_have_another_plan():
    """As many things of other lengths: the same conversations in the words of another tokenizer."""
    short, long = drawn(3, 100, 8), drawn(3, 100, 8) + 8
    bestfit.plan(sizes(short), 16)
    for lengths, capacity in ((long, 16), (short, 24)):
        plan = bestfit.plan(sizes(lengths), capacity)
        assert [plan[r].tolist() for r in range(len(plan))] == by_hand(lengths.tolist(), capacity)


def test_nothing_to_pack():
    assert len(bestfit.plan(sizes(np.zeros(5, np.int64)), 16)) == 0
