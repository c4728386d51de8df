"""Parquet files, Hugging Face datasets, the table of named ones: the column and split asked for are what is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm import chat
from lm.data import hub, mixtures, sources
from lm.data.records import Counts
from lm.data.sources import open_source
from lm.errors import UsageError

ROWS = {'text': ['one', None, ' ', 'zwölf'], 'content': ['a', 'b', 'c', 'd'], 'n': [1, 2, 3, 4]}


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('LM_DATA', str(tmp_path / 'local'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))


def _read(name):
    counts, source = Counts(), open_source(str(name))
    source.check()
    return [r['text'] for r in source.read(counts)], counts


def _parquet(path, columns, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **kwargs)
    return str(path)


# ---- parquet ----


@pytest.mark.parametrize('group', [1, 3, 100])
def test_parquet_is_read_in_order_whatever_its_row_groups(tmp_path, group):
    path = _parquet(tmp_path / 'a.parquet', ROWS, row_group_size=group)
    texts, counts = _read(path)
    assert texts == ['one', 'zwölf'] and counts.read == 4 and counts.dropped == {'no_text': 1, 'empty': 1}
    assert _read(f'{path}#content')[0] == ['a', 'b', 'c', 'd']
    records = list(open_source(path).read(Counts()))
    assert [(r['id'], r['bytes'], r['source']) for r in records] == [('a.parquet:0', 3, path), ('a.parquet:3', 6, path)]


def test_no_more_than_a_row_group_is_asked_for(tmp_path, monkeypatch):
    path = _parquet(tmp_path / 'a.parquet', {'text': list('abcdef')}, row_group_size=2)
    asked = []

    class Watched(pq.ParquetFile):
        def iter_batches(self, *args, **kwargs):
            asked.append((kwargs['row_groups'], kwargs['columns']))
            return super().iter_batches(*args, **kwargs)

    monkeypatch.setattr(pq, 'ParquetFile', Watched)
    documents = open_source(path).read(Counts())
    assert next(documents)['text'] == 'a' and asked == [([0], ['text'])]
    assert len(list(documents)) == 5 and [groups for groups, _ in asked] == [[0], [1], [2]]


@pytest.mark.parametrize(
    'kind',
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_every_way_to_store_text_is_read(tmp_path, kind):
    path = _parquet(tmp_path / 'a.parquet', {'body': pa.array(['one', 'zwölf', 'one']).cast(kind), 'n': [1, 2, 3]})
    assert _read(path)[0] == ['one', 'zwölf', 'one'], 'the only text column needs no name'


def test_what_is_no_utf8_in_a_parquet_file_is_dropped_alone(tmp_path):
    values = pa.array([b'one', b'\xff\xfe', 'zwölf'.encode()])
    for kind in (pa.binary(), pa.string()):
        text = pa.Array.from_buffers(kind, 3, values.buffers())
        texts, counts = _read(_parquet(tmp_path / 'a.parquet', {'text': text}))
        assert texts == ['one', 'zwölf'] and counts.dropped == {'not_utf8': 1}


@pytest.mark.parametrize(
    ('columns', 'name', 'says'),
    [
        ({'a': ['x'], 'b': ['y']}, '', "a.parquet has no column 'text': it has a, b; name one"),
        ({'a': ['x'], 'n': [1]}, '#body', "a.parquet has no column 'body': it has a, n; name one"),
        ({'a': ['x'], 'n': [1]}, '#n', "a.parquet has no column 'n' that is text: it has a, n"),
        ({'text': [1]}, '', "a.parquet has no column 'text' that is text: it has text"),
    ],
)
def test_a_missing_column_is_one_line_before_anything_is_read(tmp_path, columns, name, says):
    _parquet(tmp_path / 'd' / 'a.parquet', columns)
    (tmp_path / 'd' / '0.jsonl').write_text('{"text": "read first"}')
    source = open_source(f'{tmp_path}/d{name}')
    with pytest.raises(UsageError, match=says) as e:
        source.check()
    assert '\n' not in str(e.value)


def test_damage_in_a_parquet_file_is_one_line(tmp_path):
    path = Path(_parquet(tmp_path / 'a.parquet', {'text': [f'{i}' * 50 for i in range(500)]}, compression='zstd'))
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[100:400] = bytes(300)
    for content in (b'', b'text', whole[: len(whole) // 2], bytes(middle)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f'^{path} is damaged or no parquet file') as e:
            _read(path)
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['text', 'chat'])
def test_a_page_without_its_checksum_is_damage_for_text_and_conversations(tmp_path, kind):
    values = ['first', 'mark', 'none']  # the one in the middle is in no statistics of the page
    columns = {'text': values, 'prompt': values, 'completion': values}
    options = {'compression': 'none', 'use_dictionary': False, 'write_page_checksum': True}
    path = Path(_parquet(tmp_path / 'a.parquet', columns, **options))
    assert len(list(open_source(str(path), kind).read(Counts()))) == 3
    path.write_bytes(path.read_bytes().replace(b'mark', b'bark'))
    with pytest.raises(UsageError, match='is damaged or no parquet file'):
        list(open_source(str(path), kind).read(Counts()))


def test_a_folder_and_a_pattern_find_parquet_too(tmp_path):
    _parquet(tmp_path / 'd' / 'sub' / 'a.parquet', {'text': ['one']})
    (tmp_path / 'd' / 'b.jsonl').write_text('{"text": "two"}')
    assert _read(tmp_path / 'd')[0] == ['two', 'one']
    assert _read(f'{tmp_path}/d/**/*.parquet#text')[0] == ['one']


# ---- Hugging Face ----


@pytest.mark.parametrize(
    ('text', 'name', 'config', 'split', 'column', 'folder'),
    [
        ('hf:c4', 'c4', None, None, None, None),
        ('hf:allenai/c4', 'allenai/c4', None, None, None, None),
        ('hf:allenai/c4/en.noclean@validation#body', 'allenai/c4', 'en.noclean', 'validation', 'body', None),
        ('hf:./here@test', './here', None, 'test', None, './here'),
        ('hf:/there#body', '/there', None, None, 'body', '/there'),
    ],
)
def test_an_address_is_read(text, name, config, split, column, folder):
    assert hub.parse(text) == (name, config, split, column, folder)


@pytest.mark.parametrize('text', ['hf:', 'hf:/', 'hf:a@', 'hf:a#', 'hf:@train'])
def test_an_address_of_nothing_is_one_line(text):
    with pytest.raises(UsageError, match='write hf:NAMESPACE/NAME'):
        hub.parse(text)


def _datasets():
    return pytest.importorskip('datasets', reason="pip install -e '.[hub]'")


def test_a_saved_dataset_is_read(tmp_path):
    datasets = _datasets()
    train = datasets.Dataset.from_dict(ROWS)
    train.save_to_disk(str(tmp_path / 'one'))
    datasets.DatasetDict(train=train, test=train.select([3])).save_to_disk(str(tmp_path / 'two'))
    texts, counts = _read(f'hf:{tmp_path}/one')
    assert texts == ['one', 'zwölf'] and counts.read == 4 and counts.dropped == {'no_text': 1, 'empty': 1}
    assert _read(f'hf:{tmp_path}/one#content')[0] == ['a', 'b', 'c', 'd']
    assert _read(f'hf:{tmp_path}/two@test')[0] == ['zwölf']
    before = open_source(f'hf:{tmp_path}/one').state
    assert open_source(f'hf:{tmp_path}/one').state == before
    train.select([0]).save_to_disk(str(tmp_path / 'one'))
    assert open_source(f'hf:{tmp_path}/one').state != before
    for name, says in (
        ('two@dev', "has no split 'dev', it has train, test"),
        ('one@dev', "has no split 'dev', it has train"),
        ('one#body', "has no column 'body': it has text, content, n"),
        ('one#n', "has no column 'n' that is text"),
        ('none', 'there is no folder'),
    ):
        with pytest.raises(UsageError, match=says) as e:
            open_source(f'hf:{tmp_path}/{name}')
        assert '\n' not in str(e.value)
    next((tmp_path / 'one').glob('*.arrow')).write_bytes(b'nonsense')
    with pytest.raises(UsageError, match='cannot be opened'):
        open_source(f'hf:{tmp_path}/one')


def test_a_folder_of_parquet_is_a_dataset(tmp_path):
    _datasets()
    for split in ('train', 'test'):
        _parquet(tmp_path / 'd' / 'data' / f'{split}-00000-of-00001.parquet', {'text': [split], 'n': [1]})
    assert _read(f'hf:{tmp_path}/d')[0] == ['train']
    assert _read(f'hf:{tmp_path}/d@test')[0] == ['test']
    with pytest.raises(UsageError, match='Unknown split "dev"'):
        open_source(f'hf:{tmp_path}/d@dev')


_OFFLINE = """
import sys, time
from lm.data.sources import open_source
from lm.errors import UsageError
open_source('hf:' + sys.argv[1])  # the library is there already, and offline all the same
began = time.perf_counter()
try:
    open_source(sys.argv[2])
except UsageError as e:
    print(e)
assert time.perf_counter() - began < 15
"""


@pytest.mark.parametrize(('name', 'says'), [('hf:no/such', 'name hf:./FOLDER'), ('c4', '$LM_DATA/c4')])
def test_a_name_that_is_not_to_be_had_is_one_line_at_once(tmp_path, name, says):
    _datasets().Dataset.from_dict(ROWS).save_to_disk(str(tmp_path / 'one'))
    # An address at which nobody listens stands for a machine without a network.
    env = {**os.environ, 'HF_HOME': str(tmp_path / 'hf'), 'HF_ENDPOINT': 'http://127.0.0.1:9'}
    command = [sys.executable, '-c', _OFFLINE, str(tmp_path / 'one'), name]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and says in done.stdout and not done.stderr
    assert 'the hub cannot be reached' in done.stdout


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[hub\]' in the checkout"):
        open_source(f'hf:{tmp_path}')


# ---- the table ----


def test_the_table_is_whole():
    for name, named in mixtures.NAMED.items():
        assert named.licence and named.holds and not any(name in names for names in sources.DEFAULTS.values())
        # Conversations and pairs are told by their fields, and need no column.
        assert ('#' in named.source) == (named.kind == 'text')
        if named.source.startswith('hf:'):
            address = hub.parse(named.source)
            assert address.split and '/' in address.name and not address.folder
        else:
            assert named.source.startswith('tfds:') and '@' in named.source


def _local(name, folder):
    """A local copy of a named dataset in which only the config, split and column of the table hold the right text."""
    rest, _, column = mixtures.NAMED[name].source.partition('#')
    _, _, split = rest.partition('@')
    config = hub.parse(rest).config
    rows = {'text': ['wrong'], 'title': ['wrong']} | {column: [f'right {name}']}
    for c in (config, 'other') if config else ('default',):
        for s in (split, 'other'):
            right = c in (config, 'default') and s == split
            _parquet(folder / c / f'{s}.parquet', rows if right else {key: ['wrong'] for key in rows})
    entries = [
        f'- config_name: {c}\n  data_files:\n'
        + ''.join(f'  - split: {s}\n    path: {c}/{s}.parquet\n' for s in (split, 'other'))
        for c in ((config, 'other') if config else ('default',))
    ]
    (folder / 'README.md').write_text('---\nconfigs:\n' + ''.join(entries) + '---\n')


@pytest.mark.parametrize(
    'name', [n for n, named in mixtures.NAMED.items() if named.kind == 'text' and named.source.startswith('hf:')]
)
def test_a_named_dataset_is_read_as_the_table_says(tmp_path, name):
    _datasets()
    _local(name, tmp_path / 'local' / name)
    assert _read(name)[0] == [f'right {name}']


def test_the_column_and_split_of_the_table_are_what_is_read(tmp_path, monkeypatch):
    _datasets()
    _local('fineweb-edu', tmp_path / 'local' / 'fineweb-edu')
    named = mixtures.NAMED['fineweb-edu']
    for wrong in ('sample-10BT@other#text', 'other@train#text', 'sample-10BT@train#title'):
        source = f'hf:HuggingFaceFW/fineweb-edu/{wrong}'
        monkeypatch.setitem(mixtures.NAMED, 'fineweb-edu', named._replace(source=source))
        assert _read('fineweb-edu')[0] == ['wrong']


def test_a_local_copy_may_be_the_config_alone(tmp_path):
    datasets = _datasets()
    datasets.Dataset.from_dict({'text': ['saved']}).save_to_disk(str(tmp_path / 'local' / 'c4'))
    _parquet(tmp_path / 'local' / 'fineweb' / 'x.parquet', {'text': ['files']})
    assert _read('c4')[0] == ['saved'] and _read('fineweb')[0] == ['files']


def test_a_named_dataset_of_tfds_is_read_from_where_it_lies(tmp_path):
    from lm.data import defaults

    class Wiki40b(defaults.Builder, skip_registration=True):
        BUILDER_CONFIGS = [defaults.tfds.core.BuilderConfig(name=c) for c in ('en', 'de')]

    def prepare(folder):
        for config in ('de', 'en'):
            options = {'data_dir': folder, 'config': config, 'file_format': 'array_record'}
            Wiki40b('wiki40b', ('text',), [{'text': config}], **options).download_and_prepare()

    with pytest.raises(UsageError, match='is not prepared in'):
        open_source('wiki40b')
    prepare(tmp_path / 'tfds')
    assert _read('wiki40b')[0] == ['en'] and _read('tfds:wiki40b/de')[0] == ['de']
    prepare(tmp_path / 'elsewhere')
    (tmp_path / 'local').mkdir()
    for copy in ('wiki40b', 'wiki40b/en', 'wiki40b/en/1.0.0'):
        link = tmp_path / 'local' / 'wiki40b'
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / 'elsewhere' / copy)
        assert _read('wiki40b')[0] == ['en']
        assert str(link) in open_source('wiki40b').state[0], 'the copy comes first'
    link.unlink()
    link.mkdir()
    with pytest.raises(UsageError, match='holds no prepared TFDS dataset'):
        open_source('wiki40b')


# ---- all of it ----


@pytest.mark.slow
def test_a_run_on_parquet_with_a_foreign_tokenizer_resumes_and_talks(lab, tmp_path, capsys):
    library = pytest.importorskip('tokenizers', reason="pip install -e '.[hub]'")
    texts = [json.loads(line)['text'] for line in (lab.folder / 'one.jsonl').read_text().splitlines()]
    mixture = _parquet(tmp_path / 'x.parquet', {'body': texts, 'n': list(range(len(texts)))}) + '#body'
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['</s>'], initial_alphabet=made.pre_tokenizer.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.save(str(tmp_path / 'tokenizer.json'))
    settings = {'data__mixture': mixture, 'data__tokenizer': str(tmp_path / 'tokenizer.json')}
    settings['optim__schedule'] = 'constant'  # which does not know how many steps there will be
    whole = lab.train(tmp_path / 'whole', **settings)
    lab.train(tmp_path / 'run', **settings, steps=4)
    (tmp_path / 'tokenizer.json').rename(tmp_path / 'gone.json')
    assert lab.train(tmp_path / 'run', **settings)['train/loss'] == whole['train/loss']
    capsys.readouterr()
    chat.talk(chat.parse([str(tmp_path / 'run'), '--raw', '--prompt', 'the </s> bucket', '--max_new_tokens', '4']))
    assert capsys.readouterr().out.startswith('the </s> bucket')
