"""First contact with own data: one file, a folder of anything, a little of it, and the wrong kind of it."""

import json
import sys
from pathlib import Path

import pytest
import running

from lm import inspect
from lm import main as lm_main

LINES = [
    f'{number} of the words in this line are here for the tokenizer, and the others are not.' for number in range(400)
]
CHAT = {'messages': [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'Me.'}]}
PAIR = {'prompt': 'Who?', 'chosen': 'Me.', 'rejected': 'You.'}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """refusal(words) -> the one line with which lm.main refuses."""

    def run(words):
        monkeypatch.setattr(sys, 'argv', ['lm.main', *map(str, words)])
        capsys.readouterr()
        assert lm_main.main() == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith('lm: ')
        return line

    return run


@pytest.fixture
def shown(monkeypatch, capsys, lab):
    """shown(mixture, **settings) -> what lm.inspect prints of it."""

    def run(mixture, **settings):
        words = lab.argv(None, data__mixture=mixture, **settings)
        monkeypatch.setattr(sys, 'argv', ['lm.inspect', '--rows=0', *map(str, words)])
        capsys.readouterr()
        assert inspect.main() == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def jsonl(path: Path, *records) -> Path:
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def row_of(table: str) -> list[str]:
    """The numbers of a source in the table that lm.inspect prints."""
    return next(line for line in table.splitlines() if '100%' in line).split('100%')[1].split()


# ---- one text file ----


@pytest.fixture(scope='module')
def trained(lab, tmp_path_factory):
    """(the text, the run's directory, what was said) of a run on one text file at the settings for prompts."""
    folder = tmp_path_factory.mktemp('one-file')
    text = folder / 'input.txt'
    text.write_text('\n'.join(LINES))
    settings = {
        'steps': 2, 'eval__every': 2, 'checkpoint__every': 1, 'data__heldout': 0.02, 'eval__prompts': None,
        'model__vocab_size': 5000,
    }  # fmt: skip
    lab.train(folder / 'run', data__mixture=text, **settings)
    return text, folder / 'run', settings


def test_one_text_file_trains_and_its_end_is_held_out(trained):
    text, run, _ = trained
    log = (run / 'log.txt').read_text()
    assert 'the last ' in log and 'read 1, dropped nothing' in log
    size = len(text.read_bytes())
    held_out = int(log.partition('the last ')[2].split()[0].replace(',', ''))
    assert 0.01 * size < held_out < 0.04 * size
    assert f'eval/{text}/bpb' in running.lines(run)[-1]


def test_samples_of_a_run_on_own_data_are_of_its_end(trained):
    text, run, _ = trained
    samples = running.lines(run, 'samples.jsonl')
    assert len({s['prompt_id'] for s in samples}) > 1 and all(len(s['prompt_id']) == 16 for s in samples)
    assert all(s['prompt'] in text.read_text()[-2000:] for s in samples)


def test_a_small_corpus_has_a_smaller_vocabulary_and_goes_on(lab, trained):
    text, run, settings = trained
    saved = json.loads((run / 'config.json').read_text())
    assert 300 < saved['config']['model']['vocab_size'] < 5000
    assert 'too little for a vocabulary of 5,000' in (run / 'log.txt').read_text()
    lab.train(run, data__mixture=text, **settings | {'steps': 3})
    assert running.status(run)['step'] == 3 and 'resumed at step 2' in (run / 'log.txt').read_text()


def test_inspect_tells_of_it_too(lab, trained, monkeypatch, capsys):
    words = lab.argv(None, data__mixture=trained[0], model__vocab_size=5000)
    monkeypatch.setattr(sys, 'argv', ['lm.inspect', '--rows=0', *map(str, words)])
    assert inspect.main() == 0 and 'too little for a vocabulary of 5,000' in capsys.readouterr().err


def test_a_few_texts_of_which_one_is_nearly_all(shown, tmp_path):
    (tmp_path / 'book.txt').write_text('\n'.join(LINES))
    (tmp_path / 'note.txt').write_text(LINES[0])
    read, kept, held_out, _, _ = row_of(shown(tmp_path, data__heldout=0.02))
    assert (read, kept, held_out) == ('2', '2', '1')


def test_a_text_without_spaces_or_lines(shown, tmp_path):
    (tmp_path / 'dna.txt').write_text('ACGTTGCAAC' * 300)
    assert row_of(shown(tmp_path / 'dna.txt'))[:3] == ['1', '1', '1']


def test_more_characters_than_the_vocabulary_has_room_for(shown, tmp_path):
    (tmp_path / 'cjk.txt').write_text('\n'.join(chr(0x4E00 + i * 7 % 3000) * 3 for i in range(6000)))
    assert row_of(shown(tmp_path / 'cjk.txt', model__vocab_size=1000))[0] == '1'


def test_a_text_that_is_too_short_to_be_cut(lab, refusal, tmp_path):
    (tmp_path / 'short.txt').write_text('a few words')
    said = refusal(lab.argv(tmp_path / 'run', data__mixture=tmp_path / 'short.txt'))
    assert 'too short to hold out its end' in said and not (tmp_path / 'run').exists()


def test_one_text_said_many_times_is_told_of(lab, refusal, tmp_path):
    jsonl(tmp_path / 'same.jsonl', *[{'text': 'a few words'}] * 50)
    said = refusal(lab.argv(tmp_path / 'run', data__mixture=tmp_path / 'same.jsonl'))
    assert 'too short to hold out its end (49 of 50 read were duplicates): add more' in said


def test_a_text_that_is_null_is_told_of(lab, refusal, tmp_path):
    own = jsonl(tmp_path / 'null.jsonl', *[{'text': None, 'id': i} for i in range(8)])
    assert 'null.jsonl:1: text is null' in refusal(lab.argv(tmp_path / 'run', data__mixture=own))


# ---- a folder ----


def test_a_folder_reads_what_is_text_and_counts_the_rest_by_kind(shown, tmp_path):
    for i, name in enumerate(['a.txt', 'b.md', 'c.rst', 'deep/d', 'deep/e.py']):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('\n'.join(LINES[i * 80 :]))
    jsonl(tmp_path / 'f.jsonl', *({'text': line} for line in LINES))
    for name in ('g.png', 'h.PNG', 'deep/i.zip'):
        (tmp_path / name).write_bytes(b'\x89PNG\0\0')
    (tmp_path / '.git').mkdir()
    (tmp_path / '.git' / 'config').write_text('not a document')
    (tmp_path / 'deep' / '.DS_Store').write_text('nor this')
    (tmp_path / 'deep' / 'link.txt').symlink_to('gone.txt')
    (tmp_path / 'elsewhere').symlink_to('deep')
    out = shown(tmp_path)
    assert row_of(out)[:2] == ['412', '405']
    assert '.png 2, .zip 1, dangling link 1, hidden 2, linked folder 1' in out


def test_a_folder_of_conversations_counts_what_is_no_table(lab, dialogues, shown, tmp_path):
    del dialogues
    (tmp_path / 'photo.png').write_bytes(b'\0')
    jsonl(tmp_path / 'a.jsonl', *({'text': line} for line in LINES))
    assert '.png 1' in shown(f'{tmp_path}#text')


# ---- the wrong kind ----


@pytest.mark.parametrize(
    ('record', 'stage'), [(CHAT, 'sft'), (PAIR, 'reward'), ({'instruction': 'a', 'output': 'b'}, 'sft')]
)
def test_what_is_no_text_names_the_stage_that_takes_it(lab, refusal, tmp_path, record, stage):
    file = jsonl(tmp_path / 'a.jsonl', *[record] * 3)
    said = refusal(lab.argv(tmp_path / 'run', data__mixture=file))
    assert f'{file}:1: has no text' in said and f'configs/{stage}.py' in said


def test_parquet_of_conversations_names_the_stage_that_takes_it(lab, refusal, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({'messages': ['[]'], 'source': ['x']}), tmp_path / 'a.parquet')
    assert 'configs/sft.py' in refusal(lab.argv(tmp_path / 'run', data__mixture=tmp_path / 'a.parquet'))


def test_a_default_source_of_another_kind_names_its_stage(lab, refusal, tmp_path):
    assert 'configs/sft.py' in refusal(lab.argv(tmp_path / 'run', data__mixture='operations'))


@pytest.mark.parametrize(
    'name',
    ['roneneldan/TinyStories', 'https://huggingface.co/datasets/roneneldan/TinyStories', 'roneneldan/TinyStories/'],
)
def test_the_name_of_a_dataset_on_the_hub_is_known(lab, refusal, tmp_path, name):
    assert 'hf:roneneldan/TinyStories names' in refusal(lab.argv(tmp_path / 'run', data__mixture=name))


def test_one_held_out_document_is_warned_of(lab, tmp_path):
    file = jsonl(tmp_path / 'a.jsonl', *({'text': line} for line in LINES[:20]))
    lab.train(tmp_path / 'run', steps=1, data__mixture=file, data__heldout=1e-9)
    assert '1 held out (too few' in (tmp_path / 'run' / 'log.txt').read_text()
