"""Messages that say what was meant, and how to get what is missing."""

import tomllib

import pytest
import running

from lm import convert
from lm import main as lm_main
from lm.config import base, nearest, override
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError, install

PROJECT = tomllib.loads((running.ROOT / 'pyproject.toml').read_text())['project']


@pytest.mark.parametrize(
    ('key', 'meant'),
    [('optim.learning_rate', 'optim.lr'), ('learning_rate', 'optim.lr'), ('OPTIM.LR', 'optim.lr'), ('LR', 'optim.lr'),
     ('max_steps', 'steps'), ('Steps', 'steps'), ('max-seq-length', 'seq_len'), ('n_layer', 'model.layers'),
     ('momentum', 'optim.momentum'), ('optim.momentun', 'optim.momentum')],
)  # fmt: skip
def test_an_unknown_setting_names_the_one_that_was_meant(key, meant):
    with pytest.raises(UsageError, match=rf'^unknown setting {key} \(did you mean {meant}\?\)$'):
        override(base(), key, '1')


@pytest.mark.parametrize(
    ('word', 'words', 'meant'), [('AdamW', ['muon', 'adamw'], 'adamw'), ('q4_k', ['F32', 'Q4_K_M'], 'Q4_K_M')]
)
def test_hints_compare_without_case(word, words, meant):
    assert nearest(word, words) == f' (did you mean {meant}?)'
    assert nearest('xyz', words) == ''


@pytest.mark.parametrize(('word', 'kind'), [('q4_k_m', 'Q4_K_M'), ('bf16', 'BF16'), ('Q8_0', 'Q8_0')])
def test_a_kind_of_quantization_may_be_written_in_small_letters(word, kind):
    assert convert.parse(['a', 'b.gguf', f'--quantize={word}']).quantize == kind


def test_an_unknown_kind_of_quantization_is_shown_as_it_was_typed(tmp_path):
    flags = convert.parse(['a', str(tmp_path / 'b.gguf'), '--quantize=q4km'])
    with pytest.raises(UsageError, match=r'--quantize=q4km \(did you mean Q4_K_M\?\) is not one of'):
        convert.check(flags, 'gguf', 'run')


@pytest.mark.parametrize('extra', PROJECT['optional-dependencies'])
def test_what_an_extra_brings_is_installed_from_the_checkout(extra):
    assert f"pip install -e '.[{extra}]'" in install(extra)


def test_extras_name_this_distribution_and_no_other():
    assert PROJECT['name'] == 'lm-jax'  # another is called lm in the index
    of_ours = [
        d for extra in PROJECT['optional-dependencies'].values() for d in extra if d.startswith(('lm[', 'lm-jax'))
    ]
    assert of_ours and all(d.startswith('lm-jax[') for d in of_ours)
    asked = {name for d in of_ours for name in d.partition('[')[2].rstrip(']').split(',')}
    assert asked <= set(PROJECT['optional-dependencies'])


@pytest.mark.parametrize('damage', [lambda b: b[: len(b) // 2], lambda b: b.replace(b'<|end|>', b'<|en\xbe|>')])
def test_a_damaged_tokenizer_is_one_line_with_its_path(lab, tmp_path, damage):
    train_tokenizer(running.WORDS, vocab_size=290).save(tmp_path / 'words')
    file = tmp_path / 'words' / 'tokenizer.model'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        UsageError, match=f'^the tokenizer {file} is not a SentencePiece model, or is damaged: restore it'
    ):
        lm_main.train(lab.argv(tmp_path / 'other', data__tokenizer=file.parent))
