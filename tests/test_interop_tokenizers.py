"""A tokenizer keeps its ids on every way between a run, Hugging Face and GGUF, and no file of a stranger does harm."""

import io
import json
import random

import numpy as np
import pytest
import sentencepiece

from lm.data.chat_template import DEFAULT, ChatTemplate
from lm.data.tokenizer import SPACE, train_tokenizer
from lm.errors import UsageError
from lm.interop.tokenizers import pre_tokenizers

library = pytest.importorskip('tokenizers', reason="pip install -e '.[convert]'")
from lm.data.tokenizer_json import from_files  # noqa: E402
from lm.interop.tokenizers.conversion import from_gguf, from_huggingface, to_gguf, to_huggingface  # noqa: E402

WORDS = [''.join(random.Random(i).choices('aeioubdklmnrst', k=2 + i % 6)) for i in range(300)]
LINES = [
    f'Fox {i} says {" ".join(random.Random(i).choices(WORDS, k=20))}\nin the naïve café,  {i * 7}.\n'
    for i in range(200)
]
PARTS = [
    'abab aaaa aab', 'Hello World 12345', '  \n\t\r\n ', '\u2581\u2581 \0', 'éßñ漢字かな한글',
    '😀\u200d👧🇩🇪', "don't I'LL we'Ve", '<|im_end|><s></s>', '<|user|><|end|><bos><0x0A><unk>',
    '{}[]();:=+-*/', '٣٤½Ⅷ', '\u00a0\u3000\u200b\u0301', LINES[3], '        ', 'fooBar HTTPServer',
]  # fmt: skip
TALK = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': ' Hi\r\n\u2581 2+22 = ?'},
    {'role': 'assistant', 'content': '4'},
    {'role': 'user', 'content': 'é'},
]


def _texts(n, seed=0):
    """Of words, of what tokenizers stumble over, and of any characters."""
    rng = random.Random(seed)

    def part():
        if rng.random() < 0.2:
            return chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x40000))))
        text = rng.choice(PARTS)
        at = rng.randrange(len(text))
        return text[at : at + rng.randint(1, 20)]

    return ['', *(''.join(part() for _ in range(rng.randint(1, 12))) for _ in range(n - 1))]


TEXTS = _texts(600)
PLAIN = [text.replace('\u2581', '').replace('\0', '') for text in TEXTS]


@pytest.fixture(scope='module')
def ours():
    return train_tokenizer(LINES, vocab_size=600)


def _parsed(files, name):
    return json.loads(files[name])


# ---- ours, to Hugging Face ----


def test_the_library_gives_our_ids_and_text_for_every_text(ours):
    files = to_huggingface(ours.saved, context=512)
    theirs = library.Tokenizer.from_str(files['tokenizer.json'].decode())
    theirs.encode_special_tokens = True
    ids = ours.encode_batch(TEXTS)
    assert [found.ids for found in theirs.encode_batch(TEXTS, add_special_tokens=False)] == ids
    assert theirs.decode_batch(ids) == TEXTS
    assert theirs.encode('a').ids == [ours.bos_id, *ours.encode('a')]
    assert _parsed(files, 'tokenizer_config.json')['model_max_length'] == 512


def test_what_is_exported_comes_back_as_the_same_tokenizer(ours):
    back = from_files(from_huggingface(to_huggingface(ours.saved, context=None)))
    assert back.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert (back.pieces, back.stop_ids) == (ours.pieces, ours.stop_ids)
    assert (back.bos_id, back.eos_id, back.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert ChatTemplate().prompt(back, TALK) == ChatTemplate().prompt(ours, TALK)


def test_a_template_of_the_run_is_exported_in_place_of_ours(ours):
    files = to_huggingface({**ours.saved, 'chat_template.jinja': b'{{ bos_token }}<|end|>'}, context=None)
    assert files['chat_template.jinja'] == b'{{ bos_token }}<|end|>'
    assert _parsed(files, 'tokenizer_config.json')['chat_template'] == '{{ bos_token }}<|end|>'


def test_a_tokenizer_json_is_exported_as_it_is(ours):
    files = to_huggingface(ours.saved, context=None)
    assert to_huggingface(files, context=512) == files


def test_transformers_gives_our_ids_and_prompts(ours, tmp_path):
    transformers = pytest.importorskip('transformers')
    saved = {**ours.saved, 'chat_template.jinja': DEFAULT.encode()}
    for name, content in to_huggingface(saved, context=512).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encode = lambda text: theirs(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert [encode(text) for text in TEXTS] == ours.encode_batch(TEXTS)
    prompt = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert prompt == ChatTemplate().prompt(ours, TALK)


# ---- a tokenizer.model of others ----


def _their_model(**changed):
    """As Llama 2 and Mistral have it: <unk> <s> </s>, a space in front; Gemma adds pieces of the user's."""
    model = io.BytesIO()
    options = dict(
        model_type='bpe', byte_fallback=True, normalization_rule_name='identity', remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, vocab_size=700, minloglevel=2,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **(options | changed))
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return model.getvalue(), processor


@pytest.mark.parametrize('changed', [{}, {'add_dummy_prefix': False, 'user_defined_symbols': '<b>,\u2581\u2581,aab'}])
def test_a_tokenizer_model_of_others_keeps_its_ids(changed):
    model, processor = _their_model(**changed)
    config = b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}'
    files = from_huggingface({'tokenizer.model': model, 'tokenizer_config.json': config})
    theirs = library.Tokenizer.from_str(files['tokenizer.json'].decode())
    theirs.encode_special_tokens = True
    assert [found.ids for found in theirs.encode_batch(PLAIN, add_special_tokens=False)] == processor.encode(PLAIN)
    assert theirs.decode_batch(processor.encode(PLAIN)) == processor.decode(processor.encode(PLAIN))
    ours = from_files(files)
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert (ours.bos_id, ours.stop_ids) == (1, (2,))
    keys = to_gguf(files, vocab_size=ours.vocab_size)
    assert keys['tokenizer.ggml.add_space_prefix'] is not bool(changed)
    assert from_files(from_gguf(keys)).encode_batch(TEXTS) == ours.encode_batch(TEXTS)


def test_tokens_beside_a_tokenizer_model_are_added():
    model, _ = _their_model()
    config = {'eos_token': '<|im_end|>', 'added_tokens_decoder': {'700': {'content': '<|im_end|>', 'special': True}}}
    files = {'tokenizer.model': model, 'tokenizer_config.json': json.dumps(config).encode()}
    found = from_files(from_huggingface(files | {'added_tokens.json': b'{"<|im_start|>": 709}'}))
    assert (found.controls['<|im_start|>'], found.stop_ids) == (709, (700, 2))  # 701 to 708 are free
    assert found.encode('<|im_start|>') == from_files(from_huggingface({'tokenizer.model': model})).encode(
        '<|im_start|>'
    )


@pytest.mark.parametrize(
    ('added', 'said'),
    [
        ({'added_tokens.json': b'{"<x>": 5}'}, "'<x>' is to have the id 5"),
        ({'added_tokens.json': b'{"<x>": "y"}'}, 'added tokens of the folder are damaged'),
        ({'tokenizer_config.json': b'{"added_tokens_decoder": {"700": {}}}'}, 'added tokens of the folder are damaged'),
        ({'added_tokens.json': b'{"<x>": 99999999999}'}, 'is damaged'),
    ],
)
def test_damaged_added_tokens_are_refused(added, said):
    model, _ = _their_model()
    with pytest.raises(UsageError, match=said):
        from_huggingface({'tokenizer.model': model, **added})


@pytest.mark.parametrize(
    ('model', 'said'),
    [
        (b'', 'is not a SentencePiece model'),
        (b'\x0a\xff\xff\xff\xff\x0f', 'is not a SentencePiece model'),
        (b'\xff' * 40, 'is not a SentencePiece model'),
        ('unigram', 'is no BPE'),
        ('nfkc', 'changes text'),
    ],
)
def test_a_tokenizer_model_that_cannot_be_carried_over_is_refused(model, said):
    if model == 'unigram':
        model, _ = _their_model(model_type='unigram', vocab_size=400)
    elif model == 'nfkc':
        model, _ = _their_model(normalization_rule_name='nfkc')
    with pytest.raises(UsageError, match=said):
        from_huggingface({'tokenizer.model': model})


def test_a_cut_tokenizer_model_is_one_line(ours):
    model = ours.saved['tokenizer.model']
    for size in range(0, len(model), 997):
        try:
            from_huggingface({'tokenizer.model': model[:size]})
        except UsageError as e:
            assert '\n' not in str(e)


# ---- folders of Hugging Face's ----


def _byte_level(name='gpt-2', special=('<|endoftext|>', '<|im_start|>', '<|im_end|>')):
    """The files of a small byte-level tokenizer that splits in a way of this name."""
    built = library.Tokenizer(library.models.BPE())
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(LINES, trainer)
    spec = json.loads(built.to_str())
    spec['pre_tokenizer'] = pre_tokenizers.to_json(pre_tokenizers.way(name))
    spec['model']['ignore_merges'] = pre_tokenizers.way(name).whole_words
    config = {'eos_token': special[0], 'add_bos_token': False}
    return {'tokenizer.json': json.dumps(spec).encode(), 'tokenizer_config.json': json.dumps(config).encode()}


@pytest.mark.parametrize('form', ['file', 'json', 'text', 'list'])
def test_the_chat_template_is_found_in_each_place_that_holds_one(form):
    text = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    files = _byte_level()
    config = _parsed(files, 'tokenizer_config.json')
    if form == 'file':
        files['chat_template.jinja'] = text.encode()
    elif form == 'json':
        files['chat_template.json'] = json.dumps({'chat_template': text}).encode()
    else:
        named = [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': text}]
        config['chat_template'] = text if form == 'text' else named
    kept = from_huggingface(files | {'tokenizer_config.json': json.dumps(config).encode(), 'model.safetensors': b'x'})
    assert kept['chat_template.jinja'].decode() == text
    assert set(kept) == {'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'}


def test_what_ends_an_answer_is_known_from_names_and_from_the_models_configuration():
    chatml = from_files(from_huggingface(_byte_level()))
    assert chatml.stop_ids == (0, 2)
    gemma = _byte_level(special=('<eos>', '<end_of_turn>', '<stop>'))
    assert from_files(from_huggingface(gemma)).stop_ids == (0, 1)
    gemma['config.json'] = b'{"eos_token_id": [0, 2]}'
    assert from_files(from_huggingface(gemma)).stop_ids == (0, 2, 1)


@pytest.mark.parametrize(
    ('files', 'said'),
    [
        ({}, 'no tokenizer.json and no tokenizer.model'),
        ({'tokenizer.json': b'{'}, 'is damaged'),
        ({'tokenizer.json': b'{"model": {"type": "BPE"}}'}, 'tokenizer'),
        ({**_byte_level(), 'tokenizer_config.json': b'[]'}, 'tokenizer_config.json is damaged'),
        ({**_byte_level(), 'tokenizer_config.json': b'{"chat_template": 3}'}, 'neither a text nor a list'),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(files, said):
    with pytest.raises(UsageError, match=said):
        from_huggingface(files)


# ---- GGUF ----


def test_our_tokenizer_goes_through_a_gguf_file(ours):
    saved = {**ours.saved, 'chat_template.jinja': DEFAULT.encode()}
    keys = to_gguf(saved, vocab_size=640)
    assert keys['tokenizer.ggml.tokens'][600:602] == ['[PAD600]', '[PAD601]']
    assert all(len(keys[f'tokenizer.ggml.{name}']) == 640 for name in ('tokens', 'scores', 'token_type'))
    assert keys['tokenizer.ggml.eot_token_id'] == ours.controls['<|end|>']
    files = from_gguf(keys)
    back = from_files(files)
    assert back.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
    assert (back.pieces, back.stop_ids, back.pad_id) == (ours.pieces, ours.stop_ids, ours.pad_id)
    template = ChatTemplate(files['chat_template.jinja'].decode())
    assert template.prompt(back, TALK) == ChatTemplate().prompt(ours, TALK)
    assert 'tokenizer.chat_template' not in to_gguf(ours.saved, vocab_size=640)  # of what only continues text
    assert (
        to_gguf(to_huggingface(saved, context=None), vocab_size=640)['tokenizer.ggml.tokens']
        == keys['tokenizer.ggml.tokens']
    )


@pytest.mark.parametrize('name', ['gpt-2', 'smollm', 'llama-bpe', 'dbrx', 'qwen2', 'tekken', 'gpt-4o', 'default'])
def test_a_byte_level_tokenizer_goes_through_a_gguf_file(name):
    files = from_huggingface(_byte_level(name))
    before = from_files(files)
    keys = to_gguf(files, vocab_size=512)
    assert keys['tokenizer.ggml.pre'] == name
    after = from_files(from_gguf(keys | {'tokenizer.ggml.token_type': np.array(keys['tokenizer.ggml.token_type'])}))
    assert after.encode_batch(TEXTS) == before.encode_batch(TEXTS)
    assert (after.pieces, after.controls, after.stop_ids) == (before.pieces, before.controls, before.stop_ids)


GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


@pytest.mark.parametrize(
    ('node', 'name'),
    [
        (GPT2, 'gpt-2'),
        ([{'type': 'Digits', 'individual_digits': True}, GPT2], 'smollm'),
        ('Removed', 'dbrx'),
    ],
)
def test_ways_to_split_are_known_however_they_are_written(node, name):
    if node == 'Removed':
        node = pre_tokenizers.to_json(pre_tokenizers.way(name))
        node['pretokenizers'][0] |= {'behavior': 'Removed', 'invert': True}
    elif isinstance(node, list):
        node = {'type': 'Sequence', 'pretokenizers': node}
    files = _byte_level(name)
    spec = _parsed(files, 'tokenizer.json') | {'pre_tokenizer': node}
    written = from_huggingface(files | {'tokenizer.json': json.dumps(spec).encode()})
    assert to_gguf(written, vocab_size=500)['tokenizer.ggml.pre'] == name
    plain = from_files(from_huggingface(files))
    assert from_files(written).encode_batch(TEXTS) == plain.encode_batch(TEXTS)


def test_what_a_gguf_file_cannot_say_is_refused(ours):
    files = _byte_level()
    spec = _parsed(files, 'tokenizer.json')
    spec['pre_tokenizer']['pretokenizers'][0]['pattern'] = {'Regex': 'own'}
    with pytest.raises(UsageError, match='no name for the way'):
        to_gguf(files | {'tokenizer.json': json.dumps(spec).encode()}, vocab_size=500)
    with pytest.raises(UsageError, match='600 ids, and the model 599 rows'):
        to_gguf(ours.saved, vocab_size=599)
    exported = to_huggingface(ours.saved, context=None)
    spec = _parsed(exported, 'tokenizer.json')
    spec['model']['merges'].pop(3)
    with pytest.raises(UsageError, match='does not merge'):
        to_gguf(exported | {'tokenizer.json': json.dumps(spec).encode()}, vocab_size=600)
    with pytest.raises(UsageError, match='no tokenizer'):
        to_gguf({}, vocab_size=600)


@pytest.mark.parametrize('content', [b'{', b'[]'])
@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json'])
def test_a_damaged_file_beside_a_tokenizer_model_is_one_line(ours, name, content):
    with pytest.raises(UsageError, match=f'{name} is damaged'):
        to_gguf({**ours.saved, name: content}, vocab_size=600)


def test_llama_cpp_gives_our_ids(ours, tmp_path):
    llama_cpp = pytest.importorskip('llama_cpp')
    pytest.importorskip('gguf')
    smol = from_huggingface(_byte_level('smollm'))
    # In llama.cpp a U+2581 of a text is a space.
    cases = [(to_gguf(ours.saved, vocab_size=640), ours, [text.replace('\u2581', '') for text in TEXTS])]
    cases += [(to_gguf(smol, vocab_size=512), from_files(smol), TEXTS)]
    for i, (keys, before, texts) in enumerate(cases):
        path = tmp_path / f'{i}.gguf'
        _write(path, keys)
        theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        found = [theirs.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
        assert found == before.encode_batch(texts)


def _write(path, keys):
    import gguf

    writer = gguf.GGUFWriter(path, 'llama')
    for add in ('context_length', 'embedding_length', 'block_count', 'feed_forward_length', 'head_count'):
        getattr(writer, f'add_{add}')(64)
    writer.add_layer_norm_rms_eps(1e-5)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in keys.items():
        kinds[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


# ---- files of strangers ----

BYTES = to_gguf(from_huggingface(_byte_level()), vocab_size=500)


def _changed(kind, ours, name, change):
    keys = dict(BYTES if kind == 'gpt2' else to_gguf(ours.saved, vocab_size=600))
    keys[f'tokenizer.ggml.{name}'] = change(keys.get(f'tokenizer.ggml.{name}'))
    return keys


def test_the_symbols_that_a_file_names_are_control_symbols_whatever_their_type():
    """And a text ends with each of them; tokens of the user's stay tokens."""
    keys = BYTES | {'tokenizer.ggml.eot_token_id': 490, 'tokenizer.ggml.token_type': [1] * 489 + [4] + [1] * 10}
    name, added = (keys['tokenizer.ggml.tokens'][i] for i in (490, 489))
    files = from_gguf(keys)
    found = from_files(files)
    assert found.stop_ids == (0, 490)
    assert (found.controls[name], found.pieces[490], found.pieces[0]) == (490, b'', b'')
    assert found.encode(added) == [489] and added not in found.controls
    assert to_gguf(files, vocab_size=500)['tokenizer.ggml.token_type'][489:491] == [4, 3]


@pytest.mark.parametrize('name', ['llama-bpe', 'dbrx'])
def test_whole_words_are_taken_only_where_the_way_says_so(name):
    files = from_gguf(BYTES | {'tokenizer.ggml.pre': name})
    assert _parsed(files, 'tokenizer.json')['model']['ignore_merges'] is (name == 'llama-bpe')


@pytest.mark.parametrize(
    ('kind', 'name', 'change', 'said'),
    [
        ('gpt2', 'model', lambda _: 'bert', "'bert', and lm reads"),
        ('gpt2', 'model', lambda _: ['gpt2'], 'is a list'),
        ('gpt2', 'pre', lambda _: 'x' * 10_000, 'does not know'),
        ('gpt2', 'tokens', lambda _: None, 'has no tokenizer.ggml.tokens'),
        ('gpt2', 'tokens', lambda _: [], '0 tokens'),
        ('gpt2', 'tokens', lambda old: [*old[:-1], 7], 'no str'),
        ('gpt2', 'tokens', lambda old: [*old[:-1], old[5]], 'there twice'),
        ('gpt2', 'tokens', lambda old: [*old[:-1], 'a' * 2000], '2,000 characters'),
        ('gpt2', 'tokens', lambda old: [*old[:-1], '\ud800'], 'no UTF-8'),
        ('gpt2', 'token_type', lambda old: old[:-1], '499 values for 500 tokens'),
        ('gpt2', 'token_type', lambda old: [*old[:-1], 99], 'type 99'),
        ('gpt2', 'merges', lambda _: None, 'has no tokenizer.ggml.merges'),
        ('gpt2', 'merges', lambda old: [*old, 'a qqq'], "merges 'a qqq'"),
        ('gpt2', 'merges', lambda old: [*old, 'qqq a'], "merges 'qqq a'"),
        ('gpt2', 'merges', lambda old: [*old, 'a'], "merges 'a'"),
        ('gpt2', 'merges', lambda old: [*old, ''], "merges ''"),
        ('gpt2', 'eos_token_id', lambda _: 500, 'is 500, of 500 tokens'),
        ('gpt2', 'eos_token_id', lambda _: -7, 'is -7'),
        ('gpt2', 'eos_token_id', lambda _: 'a', "is 'a'"),
        ('gpt2', 'eos_token_id', lambda _: 0xFFFFFFFF, 'names no token that ends'),
        ('gpt2', 'add_bos_token', lambda _: 'yes', 'is a str'),
        ('llama', 'scores', lambda old: old[:-1], '599 values for 600 tokens'),
        ('llama', 'scores', lambda _: None, 'has no tokenizer.ggml.scores'),
        ('llama', 'scores', lambda old: [*old[:-1], float('nan')], 'no number'),
        ('llama', 'token_type', lambda old: [1] * len(old), ''),
        ('llama', 'tokens', lambda old: [f't{i}' for i in range(len(old))], 'bytes'),
    ],
)
def test_damaged_metadata_is_refused_in_one_line(ours, kind, name, change, said):
    keys = _changed(kind, ours, name, change)
    if not said:  # bytes and symbols as plain pieces: odd, and harmless
        assert from_files(from_gguf(keys)).vocab_size == 600
        return
    with pytest.raises(UsageError, match=said) as caught:
        from_gguf(keys)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    'text',
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch harm') }}",
        '{% for i in range(999999999) %}{% for j in range(999999999) %}x{% endfor %}{% endfor %}',
        "{{ 'x' * 99999999999 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_with_code_in_it_runs_in_the_sandbox_or_not_at_all(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = from_gguf(BYTES | {'tokenizer.chat_template': text})
    assert files['chat_template.jinja'].decode() == text
    with pytest.raises(UsageError, match='the chat template'):
        ChatTemplate(text).prompt(from_files(files), TALK)
    assert to_gguf(files, vocab_size=500)['tokenizer.chat_template'] == text  # what it is to end with is not known
    assert not list(tmp_path.iterdir())


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(UsageError, match='is no text'):
        from_gguf(BYTES | {'tokenizer.chat_template': ['x']})


def test_the_space_of_our_vocabulary_is_a_space(ours):
    """The exported vocabulary holds no U+2581, by which alone that character becomes bytes."""
    spec = _parsed(to_huggingface(ours.saved, context=None), 'tokenizer.json')
    assert not any(SPACE in piece for piece in spec['model']['vocab'])


def test_a_word_that_is_used_for_padding_stays_a_word():
    """As in llama.cpp, which goes by the type."""
    keys = BYTES | {'tokenizer.ggml.token_type': [1] * 499 + [3]}
    word = next(
        i
        for i, piece in enumerate(keys['tokenizer.ggml.tokens'])
        if len(piece) > 2 and piece.isascii() and piece.isalpha()
    )
    keys['tokenizer.ggml.eos_token_id'] = 499
    text = keys['tokenizer.ggml.tokens'][word]
    for name in ('padding_token_id', 'unknown_token_id'):
        found = from_files(from_gguf(keys | {f'tokenizer.ggml.{name}': word}))
        assert found.pieces[word] == text.encode() and text not in found.controls
        assert word in found.encode(text)
