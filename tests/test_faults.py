"""Runs that are killed, starved and damaged at random end as if nothing had happened to them."""

from collections import Counter

import faults
import pytest


@pytest.mark.slow
def test_thirty_rounds_of_faults():
    seen = faults.rounds(range(30))
    met = Counter(what.split(' at ')[0] for what in seen.elements())
    assert met['too late'] < sum(met[end] for end in faults.ENDS), seen
    for end in faults.ENDS:
        assert met[end], f'no {end} among the thirty: {seen}'
    for moment in faults.MOMENTS:
        assert any(what.endswith(f' at {moment}') for what in seen), f'nothing at {moment}: {seen}'
    assert seen['full disk, told'] and seen['damage, named'], seen


@pytest.mark.slow
def test_fifty_presses_of_ctrl_c():
    """At random moments over all commands: no traceback, no crash, no 0 that is none."""
    seen = faults.presses(50)
    assert sum(seen.values()) == 50
    for name in ('main', 'chat', 'evaluate', 'convert', 'inspect'):
        assert any(what.startswith(name) and not what.endswith(' 0') for what in seen), seen
