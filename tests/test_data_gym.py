"""Sets of reasoning-gym as data: drawn once, held out by seed and by question, refused with a reason."""

import importlib.util
import json

import pytest

from lm.data import gym
from lm.data.records import Counts
from lm.data.sources import open_source, parse_mixture
from lm.errors import UsageError

SMALL = 'gym:chain_sum(min_terms=2,max_terms=2,max_digits=1,size=150,heldout=60)'


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    pytest.importorskip('reasoning_gym')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield patch


@pytest.fixture(scope='module')
def pool(cache):
    """One worker for all tests: to start one takes a second or two."""
    found = gym._pool(size=1)
    cache.setattr(gym, '_pool', lambda **options: found)
    cache.setattr(found, 'close', lambda: None)
    return found


def test_a_mixture_with_arguments():
    text = 'gym:chain_sum(min_terms=2,max_terms=3):0.5, gym:gcd:0.3,a(1).txt:0.2'
    names = ['gym:chain_sum(min_terms=2,max_terms=3)', 'gym:gcd', 'a(1).txt']
    assert parse_mixture(text) == tuple(zip(names, (0.5, 0.3, 0.2), strict=True))


def test_what_a_name_says():
    found = gym.parse('gym:some_set(size=9, seed=4, operators=["+", "-"], deep=true, words=none)')
    assert found[1:] == ('some_set', '{"deep": true, "operators": ["+", "-"], "words": null}', 9, 500, 4)


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('gym:9', 'write gym:NAME or gym:NAME'),
        ('gym:gcd(', 'write gym:NAME or gym:NAME'),
        ('gym:gcd(1)', 'write KEY=VALUE,… with plain values'),
        ('gym:gcd(size=size)', 'write KEY=VALUE,… with plain values'),
        ('gym:gcd(size=1,size=2)', 'write KEY=VALUE,… with plain values'),
        ('gym:gcd(**{})', 'write KEY=VALUE,… with plain values'),
        ('gym:gcd(size=0)', 'size=0 must be a whole number, 1 to 10,000,000'),
        ('gym:gcd(heldout=1.5)', 'heldout=1.5 must be a whole number'),
        ('gym:gcd(seed=-1)', 'seed=-1 must be a whole number, 0 to 2,147,483,647'),
        ('gym:coin_flip', 'is refused: one answer to everything (0) earns 92 % of the reward'),
        ('gym:knight_swap', 'is refused: its items depend on the process that makes them'),
        ('gym:rush_hour(size=5)', 'is refused: its items have no answer to show'),
        ('gym:codeio', 'is refused: its items differ each time they are made'),
    ],
)
def test_what_is_refused_at_once(name, wanted):
    with pytest.raises(UsageError) as error:
        open_source(name, 'chat')
    assert wanted in str(error.value) and '\n' not in str(error.value)


def test_the_package_is_an_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match=r"'gym:gcd' needs the package reasoning-gym: pip install -e '.\[gym\]'"):
        open_source('gym:gcd', 'chat')


@pytest.mark.parametrize(('kind', 'what'), [('text', 'text'), ('pairs', 'pairs of answers')])
def test_they_are_conversations(kind, what):
    with pytest.raises(UsageError, match=f'holds conversations, not {what}; .*configs/sft.py'):
        open_source('gym:gcd', kind)


def test_held_out_questions_are_none_of_training_s(pool):
    counts = Counts()
    records = list(open_source(SMALL, 'chat').read(counts))
    questions = [record['messages'][0]['content'] for record in records]
    heldout = [record['meta']['heldout'] for record in records]
    seeds = {part: [int(r['id']) for r in records if r['meta']['heldout'] == part] for part in (False, True)}
    assert len(set(questions)) == len(questions)
    assert counts.read == 210 and counts.dropped['duplicate'] > 9 and counts.dropped['heldout_in_training'] > 9
    assert sum(counts.dropped.values()) + len(records) == 210 and 9 < sum(heldout) < 60
    assert max(seeds[False]) < 150 and min(seeds[True]) >= gym.HELDOUT
    for record in records:
        question, answer = (message['content'] for message in record['messages'])
        assert int(answer) == eval(question.rpartition(':')[2].removesuffix('='))


def test_items_are_the_same_in_another_cache(pool, tmp_path):
    before = gym.items(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path))
        assert gym.items(SMALL) == before
    assert not set(before) & set(gym.items(SMALL.replace('size', 'seed=1000,size')))


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('chain_sums', 'reasoning-gym has no set chain_sums (did you mean chain_sum?)'),
        ('chain_sum(terms=2)', 'has no parameter terms (did you mean min_terms?)'),
        ('chain_sum(min_terms=5,max_terms=2)', 'its items cannot be made (AssertionError: max_terms must be >= min_te'),
        ('chain_sum(max_terms=2,max_digits=1,size=3000,heldout=3)', ', heldout_in_training 3): give it parameters'),
    ],
)
def test_what_the_package_refuses(cache, pool, name, wanted):
    with pytest.raises(UsageError) as error:
        gym.items(f'gym:{name}')
    assert wanted in str(error.value)


def test_the_table_names_sets_that_there_are(pool):
    sets, _ = pool.map([['known', 'gcd']])[0].value
    assert set(gym.REFUSED) | set(gym.OURS) <= set(sets)
    assert all(json.dumps(own) for own in gym.OURS.values())
