"""The default conversations and pairs: what is asked, what is held out, and what lengths alone would tell."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lm.data import corpora, operations, smalltalk
from lm.data.corpora import Operation
from lm.data.decline import _DECLINES, _NOUNS, REAL, decline, is_decline, known_nouns, plural
from lm.data.heldout import heldout_operation, is_heldout, leaks, normalized
from lm.data.prompts import load_prompts
from lm.data.records import Counts
from lm.data.sources import DEFAULTS, open_source
from lm.data.store import digest
from lm.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def some_operations():
    """Those of every fourth service, from the installed package."""
    found = list(corpora.operations())
    services = sorted({o.service for o in found})[::4]
    return [o for o in found if o.service in services]


def text(messages):
    [message] = messages
    return message['content']


def shorter_wins(pairs):
    """The share of pairs whose chosen side is the shorter one in characters; ties count half."""
    sizes = [tuple(sum(len(m['content']) for m in p[side]) for side in ('chosen', 'rejected')) for p in pairs]
    return sum((a < b) + 0.5 * (a == b) for a, b in sizes) / len(sizes)


def parts(records):
    """(training, held-out) records by their meta."""
    return [r for r in records if not r['meta']['heldout']], [r for r in records if r['meta']['heldout']]


# ---- operations ----


def test_operations_without_an_answer_are_counted_by_reason():
    same = 'For the latest version, use the other service.'
    found = [
        Operation('S3', 'PutObject', 'Adds an object to a bucket. It is new.'),
        Operation('S4', 'PutObject', 'Adds an object to a bucket.'),
        Operation('S3', 'PutObject', 'Adds an object twice.'),
        Operation('S3', 'GetIt', 'Gets it.'),
        Operation('S3', 'GetMore', 'Gets ' + 'much and ' * 50),
        Operation('S3', 'GetList', 'Gets the following attributes:'),
        Operation('S3', 'GetArn', 'See arn:aws:x {y} http://a.b for it.'),
        *(Operation('S3', f'Old{n}', same) for n in 'ABC'),
        Operation('S5', 'CreateTable', 'Makes a table of rows.'),
        Operation('S5', 'MakeTable', 'It makes a table of rows, as CreateTable does.'),
    ]
    assert heldout_operation('CreateTable') and not any(map(heldout_operation, ('PutObject', 'MakeTable')))
    counts = Counts()
    kept = operations.questions(found, counts)
    assert [(q.service, q.name, q.answer) for q in kept] == [
        ('S3', 'PutObject', 'Adds an object to a bucket.'),
        ('S5', 'CreateTable', 'Makes a table of rows.'),
    ]
    assert counts.read == len(found) == len(kept) + sum(counts.dropped.values())
    assert counts.dropped == {
        'duplicate': 2, 'short': 1, 'long': 1, 'unfinished': 1, 'symbols': 1, 'boilerplate': 3, 'heldout_answer': 1,
    }  # fmt: skip


def test_operation_questions_are_split_by_name(some_operations):
    records = list(operations.chats(some_operations, Counts()))
    train, held = parts(records)
    assert len(train) > 2000 and len(held) > 100
    assert all(r['meta']['heldout'] == heldout_operation(r['meta']['operation']) for r in records)
    assert not {r['meta']['operation'] for r in train} & {r['meta']['operation'] for r in held}
    answers = [normalized(r['messages'][1]['content']) for r in held]
    assert not any(leaks([r['messages'][1]['content'] for r in train], answers))
    first = records[0]
    assert [m['role'] for m in first['messages']] == ['user', 'assistant']
    assert (
        first['messages'][0]['content'] == f'What does {first["meta"]["operation"]} do in {first["meta"]["service"]}?'
    )


def test_the_question_is_worded_as_the_fixed_prompts_are():
    prompts = {p.id: p.text for p in load_prompts(ROOT / 'configs' / 'prompts.jsonl')}
    assert operations.Question('ECR', 'PutImage', '').text == prompts['operation-put-image']


# ---- programmatic ----


def test_programmatic_pairs_are_told_by_the_question_alone(some_operations):
    pairs = list(operations.programmatic(some_operations, Counts()))
    answers = {(o.service, ' '.join(o.first_sentence.split())): o.name for o in some_operations}
    for pair in pairs:
        meta, chosen, rejected = pair['meta'], text(pair['chosen']), text(pair['rejected'])
        assert normalized(chosen) != normalized(rejected)
        assert (meta['service'], chosen) in answers and (meta['service'], rejected) in answers
    train, held = parts(pairs)
    assert not {p['meta']['operation'] for p in train} & {p['meta']['operation'] for p in held}
    assert not any(heldout_operation(p['meta']['other']) for p in train), 'a held-out answer is in no training pair'
    assert 0.45 < shorter_wins(train) < 0.55 and 0.4 < shorter_wins(held) < 0.6
    # Who looks at the answers alone learns nothing: nearly all are chosen once and rejected once.
    rejected = [(p['meta']['service'], text(p['rejected'])) for p in train]
    assert len(set(rejected)) > 0.95 * len(rejected)


def test_nearly_equal_answers_are_no_pair():
    texts = ('Deletes the specified snapshot.', 'Deletes a snapshot.', 'Deletes your snapshots.', 'Copies an image.')
    found = [Operation('S', f'Snap{n}', t) for n, t in enumerate(texts)]
    assert not any(heldout_operation(o.name) for o in found)
    pairs = list(operations.programmatic(found, Counts()))
    assert len(pairs) == 4
    for pair in pairs:
        assert ('image' in text(pair['chosen'])) != ('image' in text(pair['rejected']))
    counts = Counts()
    assert not list(operations.programmatic(found[:3], counts)) and counts.dropped['no_other_answer'] == 3


# ---- decline ----


@pytest.fixture(scope='module')
def declines(some_operations):
    return list(decline(some_operations, Counts()))


def test_an_answer_that_declines_is_told_by_its_opening(some_operations):
    for words in _DECLINES:
        assert is_decline(words.format(service='S3', name='GetPanda'))
    assert is_decline(' i don’t know, sorry') and is_decline('"I do not know."')
    assert not is_decline("Creates what I don't know.") and not is_decline('I know it.') and not is_decline('')
    assert not any(is_decline(o.first_sentence) for o in some_operations)


def test_invented_operations_are_declined_and_real_ones_are_not(declines, some_operations):
    real = {(o.service, o.name): o.first_sentence for o in some_operations}
    for pair in declines:
        meta, chosen, rejected = pair['meta'], text(pair['chosen']), text(pair['rejected'])
        assert text(pair['prompt']) == operations.Question(meta['service'], meta['operation'], '').text
        assert is_decline(chosen) == meta['invented'] and is_decline(rejected) != meta['invented']
        assert ((meta['service'], meta['operation']) in real) != meta['invented']
        refusal = chosen if meta['invented'] else rejected
        assert meta['operation'] in refusal and meta['service'] in refusal
    for part in parts(declines):
        assert sum(p['meta']['invented'] for p in part) * (REAL + 1) == len(part) > 300


def test_what_is_invented_is_a_true_answer_of_the_same_verb(declines, some_operations):
    names_of = {}
    for o in some_operations:
        names_of.setdefault((o.service, ' '.join(o.first_sentence.split())), set()).add(o.name)
    for pair in (p for p in declines if p['meta']['invented']):
        names = names_of[pair['meta']['service'], text(pair['rejected'])]
        alike = [n for n in names if words_of(n)[0] == words_of(pair['meta']['operation'])[0]]
        assert any(heldout_operation(name) == pair['meta']['heldout'] for name in alike)


def words_of(name):
    return re.findall('[A-Z]+(?![a-z])|[A-Z][a-z]+', name)


@functools.cache
def singulars():
    return {plural(noun): noun for noun in known_nouns()}


def nouns_of(pair):
    """The invented nouns of a name, as one."""
    singular = singulars()
    words = [word.lower() for word in words_of(pair['meta']['operation'])[1:]]
    return {singular.get(word, word) for word in words}


def test_held_out_inventions_have_nouns_of_their_own(declines):
    train, held = ([p for p in part if p['meta']['invented']] for part in parts(declines))
    here, there = set.union(*map(nouns_of, train)), set.union(*map(nouns_of, held))
    assert not here & there and len(here) > 100 and len(there) > 50
    assert here | there <= known_nouns()
    assert len({p['id'] for p in declines}) == len(declines)


def test_the_invented_names_of_the_fixed_prompts_are_not_trained_on(declines):
    prompts = [p.text for p in load_prompts(ROOT / 'configs' / 'prompts.jsonl') if p.kind == 'invented']
    assert len(prompts) == 2
    train, _ = parts(declines)
    for word in ('Moonbase', 'Pancake'):
        assert any(word in prompt for prompt in prompts)
        assert not any(word in p['meta']['operation'] for p in train)
        assert word.lower() in _NOUNS.split(), 'it is held out, and no stranger'


def test_a_noun_that_a_service_uses_is_not_invented(some_operations):
    invented = next(p for p in decline(some_operations, Counts()) if p['meta']['invented'])
    (noun, *_) = nouns_of(invented)
    # Its answer is no use, and it exists all the same.
    used = [*some_operations, Operation('Zoo', f'List{plural(noun).capitalize()}', 'Lists.')]
    assert noun not in set.union(*(nouns_of(p) for p in decline(used, Counts()) if p['meta']['invented']))


# ---- chitchat ----


def test_small_talk_is_in_turns_and_holds_out_what_pretraining_does(monkeypatch):
    some = list(corpora.conversations())[::3]
    for module in (corpora, smalltalk):
        monkeypatch.setattr(module, 'conversations', lambda: iter(some))
    documents = {d['id']: d['text'] for d in corpora.chitchat_documents(Counts())}
    held = 0
    records = list(smalltalk.chats(Counts()))
    assert len(records) > 1200
    for record in records:
        assert [m['role'] for m in record['messages']] == ['user', 'assistant'] * (len(record['messages']) // 2)
        assert all(m['content'].strip() for m in record['messages'])
        document = documents[record['id'].partition('/')[0]]
        assert all(len(m['content']) <= smalltalk.MAX_REPLY for m in record['messages'][1::2])
        expected = is_heldout(digest(document.encode()), 0.02)
        assert smalltalk.heldout_chat(record, 0.02) == expected
        held += expected
    assert 0.01 < held / len(records) < 0.03


def test_an_empty_turn_joins_those_around_it():
    said = [('a', ['Hi', ' there']), ('b', [' ']), ('a', ['You?']), ('b', ['Yes']), ('a', ['Ok'])]
    conversation = {'messages': [[{'sender': who, 'text': t} for t in texts] for who, texts in said]}
    turns = smalltalk._turns(conversation)
    assert turns == ['Hi there You?', 'Yes', 'Ok']
    assert [m['content'] for m in smalltalk._messages(turns, ('user', 'assistant'))] == ['Hi there You?', 'Yes']


def test_ratings_share_a_prompt_and_a_length():
    counts = Counts()
    pairs = list(smalltalk.ratings(counts))
    train, held = parts(pairs)
    assert len(train) > 2000 and len(held) > 200 and counts.dropped['untouched'] > 2000
    assert not {text(p['prompt']) for p in train} & {text(p['prompt']) for p in held}
    assert not {i for p in train for i in p['id'].split('/')} & {i for p in held for i in p['id'].split('/')}
    for pair in pairs:
        assert pair['margin'] >= 2 and pair['prompt'][0]['role'] == 'user'
        for side in ('chosen', 'rejected'):
            roles = [m['role'] for m in pair[side]]
            assert roles == (['assistant', 'user'] * len(roles))[: len(roles)] and roles[-1] == 'assistant'
    assert 0.45 < shorter_wins(pairs) < 0.55


# ---- as sources ----


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A cache of the test's own, and few operations."""
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    found = [
        Operation('S3', f'{verb}{noun}', f'{verb}s the {noun.lower()} of a bucket in the region. It is new.')
        for verb in ('Get', 'Put', 'Tag', 'Copy', 'Move')
        for noun in ('Table', 'Policy', 'Index', 'Vault', 'Image', 'Queue', 'Topic', 'Stream')
    ]
    monkeypatch.setattr(corpora, 'operations', lambda: iter(found))
    return found


@pytest.mark.parametrize('name', ['operations', 'programmatic', 'decline'])
def test_a_default_source_gives_what_its_function_gives(few, name):
    kind = 'chat' if name == 'operations' else 'pairs'
    source = open_source(name, kind)
    counts, expected = Counts(), Counts()
    records = list(source.read(counts))
    makes = {'operations': operations.chats, 'programmatic': operations.programmatic, 'decline': decline}[name]
    made = list(makes(few, expected))
    keys = ('id', 'messages', 'meta') if kind == 'chat' else ('id', 'prompt', 'chosen', 'rejected', 'meta')
    assert records and [{k: r[k] for k in keys} for r in records] == made
    assert counts.dropped == expected.dropped and counts.read == len(records) + sum(counts.dropped.values())
    assert all(r['source'] == name and r['bytes'] > 0 for r in records) and source.kind == kind
    assert source.split and [source.split(r, 0.5) for r in records] == [r['meta']['heldout'] for r in records]
    assert list(open_source(name, kind).read(Counts())) == records, 'the second time from the cache'
    if kind == 'pairs':
        assert all(r['margin'] == 0 and r['label'] == 1 for r in records)


@pytest.mark.parametrize(('kind', 'name'), [(k, n) for k in ('chat', 'pairs') for n in DEFAULTS[k]])
def test_a_missing_package_is_named(monkeypatch, kind, name):
    for corpus in ('botocore', 'chitchat'):
        monkeypatch.setitem(corpora.PACKAGES, corpus, 'surely-not-installed')
    with pytest.raises(UsageError, match=r"pip install -e '\.\[corpus\]' in the checkout"):
        open_source(name, kind)


_ALL = """
import hashlib, json
from lm.data import defaults
from lm.data.records import Counts
for name, default in defaults.DEFAULTS.items():
    records = list(default.records(Counts()))
    print(name, len(records), hashlib.blake2b(json.dumps(records).encode(), digest_size=8).hexdigest())
"""


@pytest.mark.slow
def test_the_whole_of_them_is_the_same_in_every_process():
    """Every record, whatever the order of Python's sets; and what lengths tell, over all held-out pairs."""
    outputs = [
        subprocess.run(
            [sys.executable, '-c', _ALL], cwd=ROOT, env={**os.environ, 'PYTHONHASHSEED': seed}, capture_output=True
        ).stdout
        for seed in ('1', '2')
    ]
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 7
    train, held = parts(list(operations.programmatic(corpora.operations(), Counts())))
    assert 0.48 < shorter_wins(train) < 0.52 and 0.45 < shorter_wins(held) < 0.55
