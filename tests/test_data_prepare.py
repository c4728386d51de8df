"""Preparation: dedup, a stable split, counts, fingerprints, the cache; and once with the real corpora."""

import importlib.util
import itertools
import json
import random
import shutil
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import corpora
from lm.data.heldout import heldout_operation, normalized
from lm.data.pipeline import PERIOD, batches, mix
from lm.data.prepare import prepare
from lm.data.store import Spool, digest
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError

WORDS = [''.join(random.Random(i).choices('aeioubdklmnrst', k=2 + i % 6)) for i in range(300)]


def _text(i):
    return ' '.join(random.Random(i).choices(WORDS, k=20 + i % 30)) + f'\nnumber {i} ▁ ü.'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def _jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return str(path)


def _prepare(mixture, **kwargs):
    arguments: dict[str, Any] = dict(vocab_size=400, tokenizer=None, heldout=0.2, progress=lambda line: None) | kwargs
    return prepare(mixture=mixture, **arguments)


def _documents(prepared, number, split):
    source = prepared.sources[number]
    store = source.train if split == 'train' else source.heldout
    documents = [store.document(i) for i in range(store.documents)]
    tokenizer = prepared.tokenizer
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
    return [tokenizer.decode(d.tolist()) for d in documents]


def test_documents_come_out_as_they_went_in_once_and_split(tmp_path):
    a, b = [_text(i) for i in range(200)], [_text(i) for i in range(190, 260)]
    mixture = f'{_jsonl(tmp_path / "a.jsonl", a + a[:7])}:3,{_jsonl(tmp_path / "b.jsonl", b + [" "])}:1'
    prepared = _prepare(mixture)
    train = [_documents(prepared, n, 'train') for n in range(2)]
    heldout = [_documents(prepared, n, 'heldout') for n in range(2)]
    assert sorted(train[0] + heldout[0]) == sorted(a)
    assert sorted(train[1] + heldout[1]) == sorted(b[10:]), 'the first source keeps what both hold'
    assert [s.weight for s in prepared.sources] == [0.75, 0.25]
    counts = [s.counts for s in prepared.sources]
    assert counts[0]['read'] == 207 and counts[0]['dropped'] == {'duplicate': 7} and counts[0]['kept'] == 200
    assert counts[1]['read'] == 71 and counts[1]['dropped'] == {'duplicate': 10, 'empty': 1}
    for n in range(2):
        assert counts[n]['train_documents'] == len(train[n]) and counts[n]['heldout_documents'] == len(heldout[n])
        assert counts[n]['train_bytes'] == sum(len(t.encode()) for t in train[n])
        assert counts[n]['train_tokens'] == len(prepared.sources[n].train)
        assert counts[n]['heldout_tokens'] == len(prepared.sources[n].heldout)
    assert 0.1 < counts[0]['heldout_documents'] / 200 < 0.3


def test_bytes_of_rows_are_the_bytes_of_the_text(tmp_path):
    prepared = _prepare(_jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(100)]))
    [source] = prepared.sources
    from lm.data.pipeline import heldout_batches

    batches = heldout_batches(source, batch_size=4, seq_len=32)
    total = sum((prepared.tokenizer.bytes_of_ids[b['targets_BT']] * b['weights_BT']).sum() for b in batches)
    assert total == source.counts['heldout_bytes']


def test_a_document_never_moves_between_the_parts(tmp_path):
    path = tmp_path / 'a.jsonl'
    few = _prepare(_jsonl(path, [_text(i) for i in range(100)]))
    heldout = set(_documents(few, 0, 'heldout'))
    more = _prepare(_jsonl(path, [_text(i) for i in reversed(range(300))]))
    assert heldout == set(_documents(more, 0, 'heldout')) & {_text(i) for i in range(100)}
    larger = _prepare(str(path), heldout=0.4)
    assert set(_documents(more, 0, 'heldout')) < set(_documents(larger, 0, 'heldout'))


def test_the_order_follows_the_content_and_not_the_file(tmp_path):
    texts = [_text(i) for i in range(100)]
    one = _prepare(_jsonl(tmp_path / 'a.jsonl', texts))
    order = _documents(one, 0, 'train')
    other = _prepare(_jsonl(tmp_path / 'a.jsonl', texts[::-1]))
    assert _documents(other, 0, 'train') == order and order != [t for t in texts if t in set(order)]
    assert other.fingerprint == one.fingerprint, 'the same documents are the same data'


def test_the_fingerprint_knows_documents_weights_and_tokenizer(tmp_path):
    texts = [_text(i) for i in range(100)]
    a, b = _jsonl(tmp_path / 'a.jsonl', texts), _jsonl(tmp_path / 'b.jsonl', [_text(i) for i in range(100, 200)])
    one, other = _prepare(a).tokenizer, _prepare(b).tokenizer
    one.save(tmp_path / 'one')
    other.save(tmp_path / 'other')
    given = {'tokenizer': str(tmp_path / 'one')}
    prints = [
        _prepare(f'{a}:1,{b}:1', **given).fingerprint,
        _prepare(f'{a}:1,{b}:2', **given).fingerprint,
        _prepare(f'{a}:1,{b}:1', tokenizer=str(tmp_path / 'other')).fingerprint,
        _prepare(f'{a}:1,{b}:1', heldout=0.3, **given).fingerprint,
    ]
    _jsonl(tmp_path / 'a.jsonl', [*texts[:-1], 'another'])
    prints.append(_prepare(f'{a}:1,{b}:1', **given).fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_second_time_nothing_is_done(tmp_path):
    path = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(100)])
    said = []
    first = _prepare(path, progress=said.append)
    assert any('reading' in line for line in said) and any('encoding' in line for line in said)
    said.clear()
    second = _prepare(path, progress=said.append)
    assert not said and second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.sources[0].train.tokens, first.sources[0].train.tokens)


def test_a_given_tokenizer_is_used(tmp_path):
    path = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(100)])
    trained = _prepare(path).tokenizer
    trained.save(tmp_path / 'run' / 'tokenizer')
    other = _jsonl(tmp_path / 'b.jsonl', [_text(i) for i in range(500, 600)])
    given = _prepare(other, tokenizer=str(tmp_path / 'run' / 'tokenizer'))
    assert given.tokenizer.fingerprint == trained.fingerprint
    with pytest.raises(UsageError, match='has 400 ids and the model 399 rows'):
        _prepare(other, tokenizer=str(tmp_path / 'run' / 'tokenizer'), vocab_size=399)
    with pytest.raises(UsageError, match='no tokenizer at'):
        _prepare(other, tokenizer=str(tmp_path))


def test_weights_follow_the_tokens_where_none_are_given(tmp_path):
    a = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(300)])
    b = _jsonl(tmp_path / 'b.jsonl', [_text(i) for i in range(300, 400)])
    prepared = _prepare(f'{a},{b}')
    sizes = [len(s.train) for s in prepared.sources]
    assert [s.weight for s in prepared.sources] == [size / sum(sizes) for size in sizes]


def test_the_tokenizer_learns_from_the_mixture(tmp_path):
    """A word that only the light source uses becomes a piece when its source is heavy."""
    a = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(300)])
    b = _jsonl(tmp_path / 'b.jsonl', ['xylophone ' * 5 + _text(i) for i in range(300, 400)])
    light, heavy = _prepare(f'{a}:1000,{b}:1').tokenizer, _prepare(f'{a}:1,{b}:1000').tokenizer
    assert len(heavy.encode(' xylophone')) < len(light.encode(' xylophone'))


@pytest.mark.parametrize(
    ('texts', 'heldout', 'says'),
    [
        ([], 0.2, 'no documents'),
        ([' '], 0.2, 'no documents.*empty 1'),
        (['one document'], 1e-9, 'longest text has 12 bytes, too short'),
        (['one document'] * 3, 0.999999999, 'longest text has 12 bytes, too short'),
        (['one'], 0.0, 'between 0 and 1'),
        (['one'], 1.0, 'between 0 and 1'),
    ],
)
def test_too_little_data_is_one_line(tmp_path, texts, heldout, says):
    with pytest.raises(UsageError, match=says) as e:
        _prepare(_jsonl(tmp_path / 'a.jsonl', texts), heldout=heldout)
    assert '\n' not in str(e.value)


def test_every_source_is_checked_before_the_first_is_read(tmp_path):
    a = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(20)])
    pq.write_table(pa.table({'body': ['one'], 'title': ['two']}), tmp_path / 'b.parquet')
    said = []
    with pytest.raises(UsageError, match="b.parquet has no column 'text': it has body, title"):
        _prepare(f'{a}:1,{tmp_path}/b.parquet:1', vocab_size=300, progress=said.append)
    assert not said


def test_parquet_and_jsonl_give_the_same_data(tmp_path):
    texts = [_text(i) for i in range(40)]
    (tmp_path / 'one').mkdir()
    (tmp_path / 'two').mkdir()
    _jsonl(tmp_path / 'one' / 'a.jsonl', texts)
    pq.write_table(pa.table({'text': [*texts, None, texts[0]]}), tmp_path / 'two' / 'a.parquet', row_group_size=7)
    one, two = (_prepare(f'{tmp_path}/{name}', vocab_size=300) for name in ('one', 'two'))
    np.testing.assert_array_equal(one.sources[0].train.tokens, two.sources[0].train.tokens)
    counts = two.sources[0].counts
    assert (counts['read'], counts['kept'], counts['dropped']) == (42, 40, {'no_text': 1, 'duplicate': 1})


@pytest.mark.parametrize(('heldout', 'part', 'nearest'), [(1e-9, 'heldout', min), (1 - 1e-9, 'train', max)])
@pytest.mark.parametrize('count', [12, 30])
def test_a_part_that_would_be_empty_gets_the_nearest_document(tmp_path, count, heldout, part, nearest):
    texts = [_text(i) for i in range(count)]
    prepared = _prepare(_jsonl(tmp_path / 'a.jsonl', texts), heldout=heldout, vocab_size=300)
    moved = nearest(texts, key=lambda t: digest(t.encode()))
    assert _documents(prepared, 0, part) == [moved]
    assert sorted(_documents(prepared, 0, 'train') + _documents(prepared, 0, 'heldout')) == sorted(texts)
    counts = prepared.sources[0].counts
    assert counts[f'{part}_documents'] == 1 and counts[f'{part}_bytes'] == len(moved.encode())
    assert counts['train_bytes'] + counts['heldout_bytes'] == sum(len(t.encode()) for t in texts)
    assert counts['kept'] == count


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize('damage', [_flip, _cut, lambda path: path.write_bytes(b''), lambda path: path.unlink()])
@pytest.mark.parametrize(
    'file', ['prepared.json', 'tokenizer/tokenizer.model', '0/train/tokens.bin', '0/heldout/offsets.npy']
)
def test_damage_in_the_cache_is_one_line_that_names_the_folder(tmp_path, file, damage):
    path = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(20)])
    _prepare(path, vocab_size=300)
    [directory] = (tmp_path / 'cache' / 'prepared').iterdir()
    damage(directory / file)
    with pytest.raises(UsageError, match=f'{directory} is damaged .*delete that folder') as e:
        _prepare(path, vocab_size=300)
    assert '\n' not in str(e.value)
    shutil.rmtree(directory)
    _prepare(path, vocab_size=300)


@pytest.mark.parametrize('content', ['5', 'null', '[]', '{}'])
def test_an_index_of_another_kind_is_damage_too(tmp_path, content):
    path = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(20)])
    _prepare(path, vocab_size=300)
    [directory] = (tmp_path / 'cache' / 'prepared').iterdir()
    (directory / 'prepared.json').write_text(content)
    with pytest.raises(UsageError, match='is damaged'):
        _prepare(path, vocab_size=300)


def test_a_whole_file_with_another_content_is_damage_too(tmp_path):
    texts = [_text(i) for i in range(20)]
    path = _jsonl(tmp_path / 'a.jsonl', texts)
    _prepare(path, vocab_size=300)
    [directory] = (tmp_path / 'cache' / 'prepared').iterdir()
    index = (directory / 'prepared.json').read_text()
    (directory / 'prepared.json').write_text(index.replace('"read": 20', '"read": 21'))
    with pytest.raises(UsageError, match='prepared.json has changed'):
        _prepare(path, vocab_size=300)
    (directory / 'prepared.json').write_text(index)
    train_tokenizer(texts[:5], vocab_size=300).save(directory / 'tokenizer')
    with pytest.raises(UsageError, match='the tokenizer has changed'):
        _prepare(path, vocab_size=300)


def test_weights_of_any_size_that_is_let_in_can_be_prepared(tmp_path):
    a = _jsonl(tmp_path / 'a.jsonl', [_text(i) for i in range(40)])
    b = _jsonl(tmp_path / 'b.jsonl', [_text(i) for i in range(40, 80)])
    for light in (1e-9, 3e4):
        prepared = _prepare(f'{a}:{light * 3e4},{b}:{light}', vocab_size=300)
        assert [source.weight for source in prepared.sources] == pytest.approx([3e4 / 30_001, 1 / 30_001])
        assert mix(prepared, seq_len=8, seed=0).shares.tolist() == [PERIOD - 1, 1]
    with pytest.raises(UsageError, match='none of 16,384 rows would be its own: give it at least'):
        _prepare(f'{a}:4e4,{b}:1', vocab_size=300)
    with pytest.raises(UsageError, match='from 1e-09 to 1e\\+09'):
        _prepare(f'{a}:1e308,{b}:1e308', vocab_size=300)


def test_text_without_spaces_is_prepared(tmp_path):
    texts = [''.join(random.Random(i).choices('春夏秋冬山水火木金土日月星風', k=60)) for i in range(30)]
    prepared = _prepare(_jsonl(tmp_path / 'a.jsonl', texts), vocab_size=300)
    assert sorted(_documents(prepared, 0, 'train') + _documents(prepared, 0, 'heldout')) == sorted(texts)
    assert prepared.tokenizer.decode(prepared.tokenizer.encode('a  b ▁')) == 'a  b ▁'


def test_a_failed_preparation_leaves_nothing(tmp_path):
    with pytest.raises(UsageError):
        _prepare(_jsonl(tmp_path / 'a.jsonl', ['too little']), heldout=0.5)
    assert not list((tmp_path / 'cache' / 'prepared').iterdir())


def test_the_spool_gives_the_same_order_whenever_it_is_flushed(tmp_path):
    contents = [_text(i).encode() for i in range(200)]
    one, two = Spool(tmp_path / 'one'), Spool(tmp_path / 'two')
    for content in contents:
        one.add(content, digest(content))
    for content in reversed(contents):
        two.add(content, digest(content))
        two.flush()
    assert list(one.read()) == list(two.read())
    assert sorted(content for _, content in one.read()) == sorted(contents)
    assert one.documents == 200 and one.bytes == sum(map(len, contents))


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(p) for p in ('botocore', 'chitchat_dataset')), reason="pip install -e '.[corpus]'"
)
def test_the_real_corpora():
    began = time.perf_counter()
    mixture = 'botocore:0.7,chitchat:0.3'
    prepared = _prepare(mixture, vocab_size=4096, heldout=0.02)
    first = time.perf_counter() - began
    botocore, chitchat = (source.counts for source in prepared.sources)
    assert botocore['train_tokens'] > 3e6 and chitchat['train_tokens'] > 3e6
    assert {'short', 'duplicate', 'symbols', 'heldout_answer'} <= botocore['dropped'].keys()
    for counts in (botocore, chitchat):
        assert counts['read'] == counts['kept'] + sum(counts['dropped'].values())
        assert counts['heldout_documents'] > 50
        assert counts['train_bytes'] / counts['train_tokens'] > 3
    _assert_no_answer_leaks(prepared)
    began = time.perf_counter()
    assert _prepare(mixture, vocab_size=4096, heldout=0.02).fingerprint == prepared.fingerprint
    second = time.perf_counter() - began
    # The promise is 40 s and 2 s on two cores; a shared machine gets some slack.
    assert first < 80 and second < 4, (first, second)
    mixture = mix(prepared, seq_len=256, seed=0)
    for batch in itertools.islice(batches(mixture, batch_size=32, start=10**6), 20):
        assert batch['tokens_BT'].shape == (32, 256) and batch['tokens_BT'].max() < 4096
        assert 0.9 < batch['weights_BT'].mean() <= 1


def _assert_no_answer_leaks(prepared):
    answers = {normalized(o.first_sentence) for o in corpora.operations() if heldout_operation(o.name)}
    store = prepared.sources[0].train
    sample = range(0, store.documents, 40)
    text = '\n'.join(f' {normalized(prepared.tokenizer.decode(store.document(i).tolist()))} ' for i in sample)
    assert len(answers) > 500 and not [a for a in answers if f' {a} ' in text]
