"""Mixtures and sources: what is read, what is dropped and why, and one line for what cannot be."""

import json
import sys
from pathlib import Path

import pytest

from lm.data import corpora, defaults
from lm.data.heldout import heldout_operation, leaks, normalized
from lm.data.markup import strip_html
from lm.data.prompts import load_prompts
from lm.data.records import Counts
from lm.data.sources import PERIOD, open_source, parse_mixture
from lm.errors import UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def _read(name):
    counts = Counts()
    return list(open_source(str(name)).read(counts)), counts


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('botocore:0.7,chitchat:0.3', (('botocore', 0.7), ('chitchat', 0.3))),
        ('botocore, chitchat', (('botocore', None), ('chitchat', None))),
        ('tfds:wiki40b/en:2,notes/*.txt:1e-1', (('tfds:wiki40b/en', 2.0), ('notes/*.txt', 0.1))),
        ('tfds:wiki40b/en', (('tfds:wiki40b/en', None),)),
        ('my.jsonl:.5', (('my.jsonl', 0.5),)),
    ],
)
def test_mixture_is_read(text, expected):
    assert parse_mixture(text) == expected


_BAD_WEIGHTS = ['0', '-1', 'nan', 'NaN', 'inf', '-Infinity', '1e308', '1e-320']


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('', 'is empty'),
        (' , ', 'is empty'),
        ('a:1,b', "give every source of the mixture a weight, or none: 'b' has none"),
        ('a,b:1', "'a' has none"),
        ('a,a', "names 'a' twice"),
        ('a:1,a:2', "names 'a' twice"),
        (':3', "the weight in ':3' must be a number from .* after a name"),
        ('a:0.5,0.3', "'0.3' in the data mixture is a weight without a source"),
        ('0.5', "'0.5' in the data mixture is a weight without a source"),
        ('a:0.5:0.3,b:0.2', "'a:0.5:0.3' in the data mixture has two weights"),
        ('a:,b:1', "'a:' in the data mixture has no weight after its colon"),
        ('hf:', "'hf:' in the data mixture names no dataset: write hf:NAME"),
        ('a:1,b:1e-5', "the weight 1e-05 of 'b' is so small beside the others.*at least 6e-05"),
        ('a:1e9,b:1e-9', 'so small beside the others'),
        *((f'a:{weight},b:1', f"the weight in 'a:{weight}' must be a number") for weight in _BAD_WEIGHTS),
    ],
)
def test_weights_that_do_not_fit_are_one_line(text, says):
    with pytest.raises(UsageError, match=says) as e:
        parse_mixture(text)
    assert '\n' not in str(e.value)


def test_a_weight_that_is_let_in_is_worth_a_row():
    """The lightest that is let in, and the heaviest that is not."""
    assert parse_mixture(f'a:1,b:{0.51 / PERIOD}')
    with pytest.raises(UsageError, match='so small'):
        parse_mixture(f'a:1,b:{0.49 / PERIOD}')


def test_jsonl_counts_what_it_drops_by_reason(tmp_path):
    path = tmp_path / 'a.jsonl'
    lines = [
        b'{"text": "one", "id": "first", "lang": "en"}',
        b'{"body": "no text"}',
        b'{"text": 5}',
        b'{"text": "cut',
        b'[1, 2]',
        b'{"text": "\xff\xfe"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": " \\n "}',
        b'',
        '{"text": "zwölf"}'.encode(),
    ]
    path.write_bytes(b'\n'.join(lines))
    records, counts = _read(path)
    assert [(r['text'], r['bytes'], r['source']) for r in records] == [('one', 3, str(path)), ('zwölf', 6, str(path))]
    assert records[0]['id'] == 'first' and records[0]['meta'] == {'lang': 'en'} and records[1]['id'] == 'a.jsonl:10'
    assert counts.read == 9
    assert counts.dropped == {'no_text': 2, 'malformed': 2, 'not_utf8': 2, 'empty': 1}


def test_jsonl_has_other_columns_too(tmp_path):
    path = tmp_path / 'a#1.jsonl'
    path.write_text('{"body": "one", "text": "no"}\n{"text": "no"}\n')
    records, counts = _read(f'{path}#body')
    assert [(r['text'], r['meta']) for r in records] == [('one', {'text': 'no'})]
    assert counts.dropped == {'no_body': 1}
    assert [r['text'] for r in _read(path)[0]] == ['no', 'no'], 'a # in the name of a file is its own'
    (tmp_path / 'b.txt').write_text('one')
    for name, says in ((f'{tmp_path}/b.txt#body', 'is plain text'), (f'{tmp_path}/b.txt#', 'write PATH#COLUMN')):
        with pytest.raises(UsageError, match=says):
            open_source(name)


def test_directory_and_pattern_read_a_document_a_file(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.txt').write_bytes(b'first\r\n')
    (tmp_path / 'sub' / 'b.txt').write_text('second')
    (tmp_path / 'c.jsonl').write_text(json.dumps({'text': 'third'}))
    (tmp_path / 'd.txt').write_bytes(b'\xff\xfe\x00')
    (tmp_path / 'ignored.png').write_bytes(b'\x89PNG')
    records, counts = _read(tmp_path)
    assert [r['text'] for r in records] == ['first\r\n', 'third', 'second']
    assert counts.read == 5 and counts.dropped == {'not_utf8': 1, '.png': 1}
    assert [r['text'] for r in _read(tmp_path / '*.txt')[0]] == ['first\r\n']


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('botocor', "did you mean 'botocore'"),
        ('zzz', 'known: botocore, chitchat, c4'),
        ('finewebedu', "did you mean 'fineweb-edu'"),
        ('chitchat:half', 'a weight is a number after a colon'),
        ('no/such.jsonl', 'does not exist'),
        ('no/such/*.txt', 'matches no file'),
        ('tfds:no_such_thing', 'download_and_prepare'),
    ],
)
def test_missing_sources_say_what_to_do(name, says):
    with pytest.raises(UsageError, match=says.replace('(', r'\(')) as e:
        open_source(name)
    assert '\n' not in str(e.value)


def test_empty_directory_is_refused(tmp_path):
    (tmp_path / 'd').mkdir()
    with pytest.raises(UsageError, match='holds no'):
        open_source(str(tmp_path / 'd'))


def test_state_of_a_file_changes_with_it(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('one')
    before = open_source(str(path)).state
    assert open_source(str(path)).state == before
    path.write_text('three')
    assert open_source(str(path)).state != before


def test_missing_corpus_package_is_named(monkeypatch):
    monkeypatch.setitem(corpora.PACKAGES, 'botocore', 'surely-not-installed')
    with pytest.raises(UsageError, match=r"pip install -e '\.\[corpus\]' in the checkout"):
        open_source('botocore')


def test_prepared_tfds_is_read_and_a_tfrecord_one_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))

    example = lambda key, text: {'id': key, 'source': 'tiny', 'text': text, 'meta': '{}'}

    class Tiny(defaults.Builder, skip_registration=True):
        def _split_generators(self, dl_manager):
            return super()._split_generators(dl_manager) | {'dev': iter([(0, example('d', 'fourth'))])}

    examples = [example('a', 'first'), example('b', ''), example('c', 'third')]
    Tiny('tiny', tuple(examples[0]), examples, data_dir=tmp_path, file_format='array_record').download_and_prepare()
    records, counts = _read('tfds:tiny')
    assert [r['text'] for r in records] == ['first', 'third']
    assert counts.read == 3 and counts.dropped == {'empty': 1}
    assert [r['text'] for r in _read('tfds:tiny@dev')[0]] == ['fourth']
    assert [r['text'] for r in _read('tfds:tiny@train#id')[0]] == ['a', 'b', 'c']
    with pytest.raises(UsageError, match="has no split 'test', it has train, dev"):
        open_source('tfds:tiny@test')
    with pytest.raises(UsageError, match="has no column 'body': it has id, meta, source, text"):
        _read('tfds:tiny#body')
    info = tmp_path / 'tiny' / '1.0.0' / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UsageError, match='needs TensorFlow'):
        open_source('tfds:tiny')
    with pytest.raises(UsageError, match='needs TensorFlow'):
        open_source('tfds:tiny@train#text')
    assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(
    ('html', 'text'),
    [
        ('<p>One &lt;two&gt; &amp; three.</p> <p>Four.</p>', 'One <two> & three.\n\nFour.'),
        ('<p>Set <code> <a href="x">Name</a> </code> .</p>', 'Set `Name`.'),
        ('<p>As:</p> <ul> <li> <p>a</p> </li> <li> <p>b</p> </li> </ul> <p>End.</p>', 'As:\n- a\n- b\n\nEnd.'),
        ('<note> <p>Careful.</p> </note>', 'Note: Careful.'),
        ('<dl> <dt>A</dt> <dd> <p>first</p> </dd> <dt>B</dt> <dd>second</dd> </dl>', 'A\nfirst\n\nB\nsecond'),
        ('use <region>.amazonaws.com here', 'use <region>.amazonaws.com here'),
        ('plain\u2028text', 'plain text'),
    ],
)
def test_html_becomes_what_a_reader_sees(html, text):
    assert strip_html(html) == text


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('Creates an image. It is new.', 'Creates an image.'),
        ('Lists keys, e.g. Amazon ones. More.', 'Lists keys, e.g. Amazon ones.'),
        ('Note: old.\n\nDeletes a bucket. Now.', 'Deletes a bucket.'),
        ('No stop at the end\nnext', 'No stop at the end'),
    ],
)
def test_first_sentence(text, sentence):
    assert corpora.first_sentence(text) == sentence


def test_heldout_names_are_few_and_fixed():
    names = [f'Get{a}{b}' for a in range(100) for b in range(100)]
    share = sum(map(heldout_operation, names)) / len(names)
    assert 0.04 < share < 0.06
    # Fixed for ever: what a published model was not trained on must stay what it is tested on.
    assert heldout_operation('CreateTable') and not heldout_operation('PutImage')


def test_leaks_finds_answers_as_whole_words_only():
    texts = ['It says: `Deletes` the\ncluster.', 'Deletes the clusters.', 'nothing', 'predeletes the cluster']
    assert leaks(texts, [normalized('Deletes the cluster.')]) == [True, False, False, False]


def test_code_share_tells_prose_from_placeholders():
    assert corpora.code_share('The name of the bucket that holds the object.') == 0
    assert corpora.code_share('arn:aws:iam::123456789012:role/x {placeholder} http://a.b') == 1


def test_prompts_are_the_twelve(tmp_path):
    prompts = load_prompts(Path(__file__).parent.parent / 'configs' / 'prompts.jsonl')
    kinds = [p.kind for p in prompts]
    assert [kinds.count(k) for k in ('operation', 'invented', 'chat', 'raw')] == [4, 2, 3, 3]
    for absent in ('absent', '.'):
        with pytest.raises(UsageError, match='no prompts'):
            load_prompts(tmp_path / absent)


_GOOD = b'{"id": "a", "kind": "raw", "text": "one\xe2\x80\xa8line"}\n\n'


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        (b'{"id": "b", "kind": "raw"}', 'exactly id, kind and text'),
        (b'nonsense', 'exactly id, kind and text'),
        (b'[]', 'exactly id, kind and text'),
        (b'{"id": "b", "kind": "x", "text": "t"}', 'must be one of'),
        (b'{"id": "b", "kind": "raw", "text": "caf\xe9"}', 'not UTF-8'),
        (b'{"id": "b", "kind": "raw", "text": 5}', 'text must be'),
        (b'{"id": "b", "kind": "raw", "text": " "}', 'text must be'),
        (b'{"id": "b", "kind": "raw", "text": "\\ud800"}', 'text must be'),
        (b'{"id": 1, "kind": "raw", "text": "t"}', 'id must be'),
        (b'{"id": "b", "kind": ["raw"], "text": "t"}', 'kind must be'),
    ],
)
def test_a_bad_prompt_is_one_line_with_its_place(tmp_path, line, says):
    path = tmp_path / 'p.jsonl'
    path.write_bytes(_GOOD)
    assert load_prompts(path)[0].text == 'one\u2028line'
    path.write_bytes(b'\xef\xbb\xbf' + _GOOD)
    assert load_prompts(path)[0].id == 'a', 'with a byte order mark'
    path.write_bytes(_GOOD + line)
    with pytest.raises(UsageError, match=f'p.jsonl:3.*{says}') as e:
        load_prompts(path)
    assert '\n' not in str(e.value)
