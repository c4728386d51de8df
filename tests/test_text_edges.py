"""The edges of a text: a space, <bos> or nothing before it, as the makers of a tokenizer have it.

The library `tokenizers` reads the makers' file as it is, and so is the reference for its ids.
"""

import functools
import json
import random
import sys

import folders
import numpy as np
import pytest

library = pytest.importorskip('tokenizers', reason="pip install 'lm[convert]'")

from lm.data.chat_template import ChatTemplate  # noqa: E402
from lm.data.prepare import prepare  # noqa: E402
from lm.data.tokenizer import Tokenizer  # noqa: E402
from lm.errors import UsageError  # noqa: E402
from lm.evals import heldout  # noqa: E402
from lm.interop.tokenizers.conversion import from_gguf, to_gguf  # noqa: E402

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{{ '[I]' + m.content if m.role == 'user' else m.content + eos_token }}"
    '{% endfor %}'
)
SAID = [('user', 'Hi'), ('assistant', ' Hio'), ('user', 'oi')]
SCHEMES = ('always', 'first', 'never')


def load(folder, spec, **settings):
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(spec))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>', 'bos_token': '<s>'} | settings))
    return Tokenizer.load(folder)


def theirs(spec, text):
    return read(json.dumps(spec)).encode(text, add_special_tokens=False).ids


read = functools.cache(library.Tokenizer.from_str)


def texts(count=300):
    """Those that begin with a space aside, where the library's Metaspace leaves one out."""
    draw = random.Random(0)
    found = (''.join(draw.choices('Hio[I] é\n', k=draw.randrange(12))) for _ in range(count))
    return [text for text in found if not text.startswith(' ')]


# ---- a space ----


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_text_begins_with_the_makers_space(tmp_path, scheme):
    spec = folders.sentencepiece(scheme)
    ours, plain = load(tmp_path / 'a', spec), load(tmp_path / 'b', folders.sentencepiece('never'))
    assert ours.prepend_scheme == scheme
    assert ours.encode_batch(texts()) == [theirs(spec, text) for text in texts()]
    for text in [*texts(), ' Hi', '  ', '▁Hi', '</s> <s>', '\0 ']:
        ids = ours.encode(text)
        assert ours.decode(ids) == text and ''.join(ours.decode_stream(iter(ids))) == text
        assert ours.encode_batch(['o', text], continued=[False, True])[1] == plain.encode(text)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_conversation_has_the_makers_ids(tmp_path, scheme):
    spec = folders.sentencepiece(scheme)
    ours, template = load(tmp_path / 'a', spec), ChatTemplate(LLAMA_2)
    messages = [{'role': role, 'content': content} for role, content in SAID]
    assert template.prompt(ours, messages) == theirs(spec, '<s>[I]Hi Hio</s>[I]oi')
    ids, trained = template.encode(ours, messages[:2])
    learned = [i for i, is_learned in zip(ids, trained, strict=True) if is_learned]
    assert ids == theirs(spec, '<s>[I]Hi Hio</s>') and ours.decode(learned, continued=True) == ' Hio'
    pieces = template.prompt_pieces(ours, messages)
    assert sum(ours.encode_pieces(pieces), []) == template.prompt(ours, messages)


def test_a_continuation_keeps_its_space(tmp_path):
    ours = load(tmp_path / 'a', folders.sentencepiece())
    ids = ours.encode('Hi')
    assert ours.decode(ids) == 'Hi' and ours.decode(ids, continued=True) == ' Hi'


def test_white_space_beside_a_symbol_is_left_out_where_the_makers_do(tmp_path):
    """As Phi 3's <|user|> has it."""
    spec = folders.byte_level()
    spec['added_tokens'][1] |= {'rstrip': True}
    spec['added_tokens'][2] |= {'lstrip': True}
    ours = load(tmp_path / 'a', spec, eos_token='<|im_end|>', bos_token=None)
    template = ChatTemplate('{% for m in messages %}<|im_start|>\n{{ m.content }} <|im_end|>\n{% endfor %}')
    text = '<|im_start|>\nthe <|im_end|>\n<|im_start|>\n \n<|im_end|>\n'
    ids = sum(
        ours.encode_pieces(template.prompt_pieces(ours, [{'role': 'user', 'content': c} for c in ('the', '')])), []
    )
    assert ids == theirs(spec, text.replace('\n \n', '\n '))


def test_bytes_are_counted_without_the_makers_space(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    spec = folders.begins_with(folders.sentencepiece(), '<s>')
    ours = load(tmp_path / 'tokenizer', spec)
    documents = [f'Hi {i} oi' for i in range(40)]
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents))
    found = prepare(
        mixture=str(tmp_path / 'a.jsonl'), vocab_size=ours.vocab_size, tokenizer=str(tmp_path / 'tokenizer'),
        heldout=0.2, progress=lambda line: None,
    )  # fmt: skip
    store = found.sources[0].heldout
    row = {'tokens_BT': store.tokens[:-1][None], 'targets_BT': store.tokens[1:][None].astype(np.int32)}
    row['weights_BT'] = (row['tokens_BT'] != 2).astype(np.float32)
    row |= {'segments_BT': np.ones_like(row['targets_BT']), 'positions_BT': np.zeros_like(row['targets_BT'])}
    monkeypatch.setattr(heldout, '_sums', lambda *args, **options: {'nll': 0.0, 'byte_nll': 1.0})
    monkeypatch.setattr(heldout.sharding, 'shard_batch', lambda batch: batch)
    totals = heldout.sums({}, None, [row], ours.bytes_of_ids, space_after=ours.bos_id)
    assert totals['bytes'] == found.sources[0].counts['heldout_bytes']


# ---- <bos> ----


@pytest.mark.parametrize(
    ('puts', 'settings', 'adds'),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {'add_bos_token': True}, True),
        (False, {'add_bos_token': False}, False),
        (False, {'add_bos_token': True}, True),
        (False, {'add_bos_token': True, 'bos_token': None}, False),  # Qwen has none, whatever it says
    ],
)
def test_bos_stands_before_a_text_where_the_makers_put_it(tmp_path, monkeypatch, puts, settings, adds):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    spec = folders.byte_level(symbols=('</s>', '<s>'))
    spec = folders.begins_with(spec, '<s>') if puts else spec
    ours = load(tmp_path / 'tokenizer', spec, **settings)
    first = [ours.bos_id] if adds else []
    assert ours.adds_bos is adds and ours.encode_prompt('the') == [*first, *ours.encode('the')]
    assert len(ours.encode_prompt('')) == 1
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': f'the {i}'}) + '\n' for i in range(40)))
    store = prepare(
        mixture=str(tmp_path / 'a.jsonl'), vocab_size=ours.vocab_size, tokenizer=str(tmp_path / 'tokenizer'),
        heldout=0.2, progress=lambda line: None,
    ).sources[0].train  # fmt: skip
    for i in range(store.documents):
        ids = store.document(i).tolist()
        assert ids == [*first, *ours.encode(ours.decode(ids)), ours.eos_id]


def test_a_text_to_continue_is_shown_as_the_makers_show_it(tmp_path, capsys, monkeypatch):
    """By the command, whose ids are looked at where they are generated from."""
    pytest.importorskip('safetensors')
    from lm import chat, convert
    from lm.sampling import conversation

    folders.make(tmp_path / 'hf', settings={'bos_token': '<|im_start|>'}, template=None)
    convert.convert(convert.parse([str(tmp_path / 'hf'), str(tmp_path / 'run')]))
    seen = []
    monkeypatch.setattr(
        conversation, 'stream', lambda params, cfg, prompts, **options: seen.extend(prompts) or (row for row in ())
    )
    monkeypatch.setattr(sys, 'argv', ['lm.chat', str(tmp_path / 'run'), '--raw', '--prompt=the'])
    assert chat.main() == 0 and seen == [Tokenizer.load(tmp_path / 'run' / 'tokenizer').encode('the')]


# ---- elsewhere ----


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_gguf_file_says_the_same(tmp_path, scheme):
    spec = folders.begins_with(folders.sentencepiece(scheme), '<s>')
    ours = load(tmp_path / 'a', spec)
    keys = to_gguf(ours.saved, vocab_size=300)
    assert keys['tokenizer.ggml.add_space_prefix'] is (scheme != 'never') and keys['tokenizer.ggml.add_bos_token']
    for name, content in from_gguf(keys).items():
        (tmp_path / name).write_bytes(content)
    back = Tokenizer.load(tmp_path)
    assert back.adds_bos and [back.encode_prompt(text) for text in texts()] == [ours.encode_prompt(t) for t in texts()]


def test_a_space_before_each_word_is_refused(tmp_path):
    spec = folders.byte_level()
    spec['pre_tokenizer'] = spec['pre_tokenizer'] | {'add_prefix_space': True}
    ours = load(tmp_path / 'a', spec, eos_token='<|im_end|>', bos_token=None)
    assert ours.encode('the') == theirs(spec, 'the') and ours.decode(ours.encode(' the')) == ' the'
    with pytest.raises(UsageError, match='puts a space before a text'):
        to_gguf(ours.saved, vocab_size=300)
    digits = {'type': 'Digits', 'individual_digits': True}
    spec['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [digits, spec['pre_tokenizer']]}
    with pytest.raises(UsageError, match='puts a space before each part of a text'):
        load(tmp_path / 'a', spec)


def test_an_older_file_does_not_say_what_its_model_is(tmp_path):
    """GPT-2's own is one."""
    spec = folders.byte_level()
    ours = load(tmp_path / 'a', spec, eos_token='<|im_end|>', bos_token=None)
    for key in ('type', 'byte_fallback'):
        del spec['model'][key]
    older = load(tmp_path / 'b', spec, eos_token='<|im_end|>', bos_token=None)
    assert older.encode('the theory') == ours.encode('the theory') == theirs(spec, 'the theory')
    assert to_gguf(older.saved, vocab_size=300)['tokenizer.ggml.merges'] == ['t h']
    del spec['model']['merges']
    with pytest.raises(UsageError, match='is a WordLevel, which loses text'):
        load(tmp_path / 'b', spec, eos_token='<|im_end|>', bos_token=None)
