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
