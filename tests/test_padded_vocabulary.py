"""A model has more rows than its tokenizer has ids: these are no text, are not drawn, and stand in no stage's way."""

import json
import sys

import folders
import numpy as np
import pytest

pytest.importorskip('tokenizers', reason="pip install 'lm[convert]'")
pytest.importorskip('safetensors', reason="pip install 'lm[convert]'")

from lm import chat, convert  # noqa: E402
from lm import main as lm_main  # noqa: E402
from lm.data.tokenizer import Tokenizer  # noqa: E402
from lm.errors import UsageError  # noqa: E402
from lm.interop.huggingface.folder import open_folder  # noqa: E402

ROWS, IDS = 384, 260


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run whose likeliest tokens are rows that no id stands for."""
    folder = tmp_path_factory.mktemp('padded')
    tensors = folders.weights('llama', ROWS)
    tensors['model.embed_tokens.weight'][IDS:] *= 100
    folders.make(folder / 'hf', rows=ROWS, tensors=tensors)
    convert.convert(convert.parse([str(folder / 'hf'), str(folder / 'run')]))
    return folder / 'run'


def told(capsys, monkeypatch, command, *words):
    """(status, stdout, stderr) of a command."""
    monkeypatch.setattr(sys, 'argv', ['lm', *map(str, words)])
    capsys.readouterr()
    return (command.main(), *capsys.readouterr())


def test_a_row_without_a_piece_is_not_drawn(run, capsys, monkeypatch):
    words = ['--prompt=Hello', '--max_new_tokens=12', '--temperature=1', '--seed=1']
    status, out, _ = told(capsys, monkeypatch, chat, run, *words)
    assert status == 0 and len(out) > 2, 'rows without a piece are empty texts'


def test_ids_beyond_the_vocabulary_are_no_text(run):
    tokenizer = Tokenizer.load(run / 'tokenizer')
    ids = tokenizer.encode('this')
    assert tokenizer.vocab_size == IDS and tokenizer.decode([IDS, *ids, ROWS - 1, 10**6]) == 'this'
    assert ''.join(tokenizer.decode_stream(iter([*ids, IDS]))) == 'this'
    assert tokenizer.is_token.tolist() == [True] * IDS


def test_a_hole_in_the_vocabulary_is_no_token(tmp_path):
    spec = folders.byte_level()
    del spec['model']['vocab']['th']
    spec['model']['merges'] = []
    spec['model']['vocab'] |= {'<|im_start|>': 258, '<|endoftext|>': 257, '<|im_end|>': 259}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    assert np.flatnonzero(~Tokenizer.load(tmp_path).is_token).tolist() == [256]


@pytest.mark.slow
def test_it_is_fine_tuned_and_taken_elsewhere(run, tmp_path, lab, capsys, monkeypatch):
    pytest.importorskip('gguf')
    turns = lambda i: [{'role': 'user', 'content': f'Say {i}.'}, {'role': 'assistant', 'content': f'{i}'}]
    (tmp_path / 'c.jsonl').write_text(''.join(json.dumps({'messages': turns(i)}) + '\n' for i in range(40)))
    settings = {
        'init_from': run, 'data__mixture': tmp_path / 'c.jsonl', 'data__replay': 0, 'steps': 1, 'seq_len': 48,
        'eval__max_new_tokens': 2, 'eval__rows': 2,
    }  # fmt: skip
    argv = lab.argv(tmp_path / 'sft', config='configs/sft.py', **lab.inherited | settings)
    lm_main.train(argv)
    for name in ('hf', 'it.gguf'):
        found = convert.convert(convert.parse([str(tmp_path / 'sft'), str(tmp_path / name), '--tokens=64']))
        assert found['kl'] < 1e-2
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['vocab_size'] == ROWS
    status, _, err = told(capsys, monkeypatch, lm_main, *argv, '--config.model.vocab_size=260')
    assert status == 2 and 'leave it out' in err


def test_another_tokenizer_than_the_parents_is_refused(run, tmp_path, lab, capsys, monkeypatch):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(folders.byte_level(merges=(('h', 't'),))))
    given = lab.inherited | {'init_from': run, 'data__tokenizer': tmp_path}
    status, _, err = told(capsys, monkeypatch, lm_main, *lab.argv(tmp_path / 'x', **given))
    assert status == 2 and 'gives other ids than those' in err and 'leave it out' in err


def test_tokens_without_a_row_are_left_out(tmp_path):
    """As Gemma 3's token for images is in its models of text."""
    spec = folders.byte_level()
    spec['added_tokens'].append(folders.symbol(IDS, '<image>', special=False))
    opened = open_folder(folders.make(tmp_path / 'hf', rows=IDS, spec=spec))
    assert any('no row for <image>' in note for note in opened.notes)
    assert '<image>' not in opened.tokenizer['tokenizer.json'].decode()
    with pytest.raises(UsageError, match='has 257 ids, and the model 250 rows'):
        open_folder(folders.make(tmp_path / 'less', rows=250))
