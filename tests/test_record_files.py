"""Files are read by what is in them: encodings, packing, JSON and tables, whatever they are called."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from lm.data.records import Counts
from lm.data.sources import open_source
from lm.errors import UsageError

WORDS = ('red', 'blue', 'zwölf')
RECORDS = {
    'text': [{'text': f'The {w} one.', 'n': i} for i, w in enumerate(WORDS)],
    'chat': [{'prompt': f'Say {w}.', 'completion': w} for w in WORDS],
    'pairs': [{'prompt': f'Say {w}.', 'chosen': w, 'rejected': 'no'} for w in WORDS],
}
ENCODINGS = ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32')
PACKED = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': zstandard.compress}


def lines(kind, **how):
    return ''.join(json.dumps(r, ensure_ascii=False, **how) + '\n' for r in RECORDS[kind])


def table(kind, between=','):
    rows = [list(RECORDS[kind][0]), *(map(str, r.values()) for r in RECORDS[kind])]
    return ''.join(between.join(f'"{cell}"' for cell in row) + '\r\n' for row in rows)


def read(path, kind='text'):
    counts, source = Counts(), open_source(str(path), kind)
    source.check()
    return list(source.read(counts)), counts


def words(records):
    """The word of each record of ours."""
    texts = [r.get('text') or (r.get('chosen') or r['messages'])[-1]['content'] for r in records]
    return [text.removeprefix('The ').removesuffix(' one.') for text in texts]


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('kind', RECORDS)
def test_a_mark_is_no_text_and_utf16_is_read(tmp_path, kind, encoding):
    forms = {
        'a.jsonl': lines(kind), 'a.json': json.dumps(RECORDS[kind], ensure_ascii=False, indent=2), 'a.csv': table(kind),
    }  # fmt: skip
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        records, counts = read(tmp_path / name, kind)
        assert words(records) == list(WORDS) and counts.read == 3 and not counts.dropped, name


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_plain_text_in_every_encoding(tmp_path, encoding):
    for name in ('a.txt', 'notes'):
        (tmp_path / name).write_bytes('Zwölf\r\n of them'.encode(encoding))
        assert [r['text'] for r in read(tmp_path / name)[0]] == ['Zwölf\r\n of them']


@pytest.mark.parametrize('end', PACKED)
def test_packed_files(tmp_path, end):
    texts = {
        'a.jsonl': lines('text'), 'b.json': json.dumps(RECORDS['text']), 'c.csv': table('text'),
        'd.tsv': table('text', '\t'), 'e.ndjson': lines('text'),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f'{name}{end}').write_bytes(PACKED[end](text.encode()))
        assert words(read(tmp_path / f'{name}{end}')[0]) == list(WORDS), name
    (tmp_path / f'f.txt{end}').write_bytes(PACKED[end](b'The red one.'))
    records, counts = read(tmp_path)
    assert words(records) == [*WORDS * 5, 'red'] and counts.read == 16, 'a folder finds them all'


def test_what_a_file_is_called_says_nothing_of_what_is_in_it(tmp_path):
    for name in ('c4.json', 'corpus', 'corpus.jsonl.old', 'corpus.JSONL'):
        (tmp_path / name).write_text(lines('text'))
        assert words(read(tmp_path / name)[0]) == list(WORDS), name
    (tmp_path / 'packed.jsonl').write_bytes(gzip.compress(lines('text').encode()))
    (tmp_path / 'list.jsonl').write_text(json.dumps(RECORDS['text'], indent=1))
    (tmp_path / 'objects.json').write_text('\n'.join(json.dumps(r, indent=1) for r in RECORDS['text']))
    for name in ('packed.jsonl', 'list.jsonl', 'objects.json'):
        assert words(read(tmp_path / name)[0]) == list(WORDS), name
    (tmp_path / 'code.c').write_text('{\n  return 1;\n}\n')
    assert len(read(tmp_path / 'code.c')[0]) == 1, 'a text that begins as an object does is a text'


@pytest.mark.parametrize('kind', ['text', 'chat'])
def test_records_in_an_object_around_them_all(tmp_path, kind):
    (tmp_path / 'a.json').write_text(json.dumps({'version': '1', 'data': RECORDS[kind]}))
    assert words(read(tmp_path / 'a.json', kind)[0]) == list(WORDS)
    (tmp_path / 'b.json').write_text(json.dumps({'data': RECORDS[kind]}, indent=1))
    assert words(read(tmp_path / 'b.json', kind)[0]) == list(WORDS)
    (tmp_path / 'one.json').write_text(json.dumps(RECORDS[kind][0]))
    assert words(read(tmp_path / 'one.json', kind)[0]) == [WORDS[0]], 'what is a record itself is none around others'


def test_two_frames_are_one_file_and_a_cut_one_is_named(tmp_path):
    data, path = lines('text').encode(), tmp_path / 'a.jsonl.zst'
    for compress in (zstandard.compress, gzip.compress, bz2.compress, lzma.compress):
        path.write_bytes(compress(data[:40]) + compress(data[40:]))
        assert words(read(path)[0]) == list(WORDS)
        path.write_bytes(compress(data)[:-5])
        with pytest.raises(UsageError, match=f'^{path} is damaged .*: restore it or leave it out') as error:
            read(path)
        assert '\n' not in str(error.value)


def test_what_is_wrong_in_json_and_tables_is_counted(tmp_path):
    (tmp_path / 'cut.json').write_text(json.dumps(RECORDS['chat'])[:-20])
    records, counts = read(tmp_path / 'cut.json', 'chat')
    assert words(records) == ['red', 'blue'] and counts.dropped == {'malformed': 1}
    assert counts.named == [f'{tmp_path}/cut.json:3: is no JSON object']
    (tmp_path / 'a.csv').write_bytes(b'prompt,completion\nq,a\nq,b\xff\nq,c,d\nq,\nq,"a\nb"\n')
    records, counts = read(tmp_path / 'a.csv', 'chat')
    assert words(records) == ['a', 'a\nb'] and counts.dropped == {'not_utf8': 1, 'malformed': 1, 'null': 1}


def test_columns_of_tables(tmp_path):
    (tmp_path / 'a.csv').write_text('body;n\nThe red one.;1\n')
    assert words(read(f'{tmp_path}/a.csv#body')[0]) == ['red']
    for name, kind, says in (
        ('a.csv', 'text', "has no column 'text': it has body, n"), ('a.csv', 'chat', 'has the fields body, n, but'),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            read(tmp_path / name, kind)


@pytest.mark.parametrize(('begin', 'says'), [(b'PK\x03\x04', 'a zip archive: unpack it'), (b'%PDF-1.7', 'a PDF')])
def test_what_is_neither_is_refused_by_what_it_is(tmp_path, begin, says):
    (tmp_path / 'a.jsonl').write_bytes(begin + bytes(100))
    with pytest.raises(UsageError, match=says):
        read(tmp_path / 'a.jsonl')
