"""tokenizer.json: the same promises as our own tokenizer, for each kind that the library can train."""

import json
import random
import sys

import numpy as np
import pytest

from lm.data.prepare import prepare
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError

library = pytest.importorskip('tokenizers', reason="pip install -e '.[hub]'")
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

WORDS = [''.join(random.Random(i).choices('aeioubdklmnrst', k=2 + i % 6)) for i in range(300)]
TEXTS = [
    f'Fox {i} says {" ".join(random.Random(i).choices(WORDS, k=20))}\nin the naïve café, {i * 7}.' for i in range(120)
]
BYTES = [f'<0x{b:02X}>' for b in range(256)]


def _byte_level():
    """As GPT-2, Llama 3 and Qwen have it."""
    built = library.Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(TEXTS, trainer)
    return built


def _fallback(model):
    """As Llama 2 and Gemma have it: U+2581 for a space, and bytes for what is in no piece."""
    special = ['<unk>', '<s>', '</s>', *BYTES]
    if model == 'bpe':
        built = library.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    else:
        built = library.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=special, unk_token='<unk>', show_progress=False
        )
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.train_from_iterator(TEXTS, trainer)

    def bytes_are_pieces(spec):
        spec['model']['byte_fallback'] = True
        spec['added_tokens'] = [t for t in spec['added_tokens'] if t['content'] not in ('<unk>', *BYTES)]

    return _edited(built, bytes_are_pieces)


def _llama_2():
    """Its normalizer in place of a pre-tokenizer."""

    def normalized(spec):
        parts = [
            {'type': 'Prepend', 'prepend': '▁'},
            {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
        ]
        spec.update(normalizer={'type': 'Sequence', 'normalizers': parts}, pre_tokenizer=None)

    return _edited(_fallback('bpe'), normalized)


def _dressed():
    """All that is to be turned off: NFC, a space in front, a template, cutting and filling up, dropout."""
    built = _byte_level()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    built.normalizer = normalizers.Sequence([normalizers.NFC()])
    built.post_processor = processors.TemplateProcessing(
        single='<|im_start|> $A <|im_end|>', special_tokens=[('<|im_start|>', 1), ('<|im_end|>', 2)]
    )
    built.enable_truncation(4)
    built.enable_padding(length=64)
    return _edited(built, lambda spec: spec['model'].update(dropout=0.5))


def _edited(built, change):
    spec = json.loads(built.to_str())
    change(spec)
    return library.Tokenizer.from_str(json.dumps(spec))


KINDS = {
    'byte-level': _byte_level,
    'bpe-fallback': lambda: _fallback('bpe'),
    'unigram-fallback': lambda: _fallback('unigram'),
    'llama-2': _llama_2,
    'dressed': _dressed,
}


@pytest.fixture(scope='module')
def built():
    return {name: make() for name, make in KINDS.items()}


def _load(folder, made, **beside):
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(made if isinstance(made, str) else made.to_str())
    for name, content in beside.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return Tokenizer.load(folder)


@pytest.fixture(params=list(KINDS))
def tokenizer(request, tmp_path, built):
    return _load(tmp_path / 'tokenizer', built[request.param])


def _random_text(rng):
    ranges = [(0, 32), (32, 127), (127, 0xD800), (0xE000, 0x110000), (0x1F300, 0x1F700), (0x2581, 0x2582), (32, 33)]
    return ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_every_text_comes_back_and_its_bytes_are_counted(tokenizer):
    rng = random.Random(0)
    texts = TEXTS[:5] + ['', ' ', '\0', '\n\n  \t\r\n', '▁ ▁', 'e\u0301 \ufeff ﬁ Å', '<0x41>', '\u2028\x85', ' a', 'a ']
    texts += [_random_text(rng) for _ in range(500)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        space = tokenizer.prepend_scheme != 'never' and bool(text)
        assert int(tokenizer.bytes_of_ids[ids].sum()) == len(text.encode()) + space
        assert ''.join(tokenizer.decode_stream(ids)) == text
    assert tokenizer.bytes_of_ids.dtype == np.int32 and len(tokenizer.bytes_of_ids) == tokenizer.vocab_size


def test_typed_markers_stay_text(tokenizer):
    names = [*tokenizer.controls, '<unk>', '<0x0A>', '<0xE2>', '<|endoftext|>', '</s>', '<s>']
    for text in (*names, ' '.join(names), ''.join(names), f'a{names[0]}b'):
        ids = tokenizer.encode(text)
        assert not set(ids) & {*tokenizer.controls.values()} and tokenizer.decode(ids) == text
        assert int(tokenizer.bytes_of_ids[ids].sum()) == len(text) + (tokenizer.prepend_scheme != 'never')
    for name, i in tokenizer.controls.items():
        assert name and tokenizer.bytes_of_ids[i] == 0 and tokenizer.decode([i]) == ''
    assert '<|user|>' not in tokenizer.controls


@pytest.mark.parametrize('kind', ['byte-level', 'bpe-fallback', 'unigram-fallback', 'llama-2'])
def test_ids_are_those_of_the_library(tmp_path, built, kind):
    tokenizer, theirs = _load(tmp_path / 'a', built[kind]), built[kind]
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        if kind == 'byte-level':
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_typed_markers_are_cut_into_pieces_as_other_text(tmp_path, built):
    ours, parts = _load(tmp_path / 'a', built['byte-level']), ['<|', 'im', '_', 'start', '|>']
    ids = [found.ids for found in built['byte-level'].encode_batch(parts)]
    assert ours.encode('<|im_start|>') == sum(ids, [])
    assert ours.around is None, 'nothing has to go round the model'


def test_nothing_but_a_space_stands_around_a_text(tmp_path, built):
    dressed, plain = _load(tmp_path / 'a', built['dressed']), _load(tmp_path / 'b', built['byte-level'])
    assert dressed.encode_batch(TEXTS) == plain.encode_batch([f' {text}' for text in TEXTS])
    assert dressed.fingerprint != plain.fingerprint


def test_a_stream_holds_back_half_a_character(tokenizer):
    ids = [tokenizer.byte_ids[b] for b in 'é🎉'.encode()]
    assert list(tokenizer.decode_stream(iter(ids))) == ['é', '🎉']
    assert list(tokenizer.decode_stream(ids[:-1])) == ['é', '\ufffd']


def test_symbols_are_named_beside_or_usual(tmp_path, built):
    usual = _load(tmp_path / 'a', built['byte-level'])
    assert (usual.bos_id, usual.eos_id, usual.pad_id, usual.stop_ids) == (0, 0, 0, (0, 2))
    llama = _load(tmp_path / 'b', built['llama-2'])
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.stop_ids) == (1, 2, 2, (2,))
    for kind in ('llama-2', 'unigram-fallback'):
        assert _load(tmp_path / 'b', built[kind]).controls == {'<unk>': 0, '<s>': 1, '</s>': 2}
    config = {'bos_token': None, 'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<|endoftext|>'}
    named = _load(
        tmp_path / 'c', built['byte-level'], tokenizer_config=config, generation_config={'eos_token_id': [2, 0, 399]}
    )
    assert (named.bos_id, named.eos_id, named.pad_id, named.stop_ids) == (2, 2, 0, (2, 0, 399))
    assert named.fingerprint != usual.fingerprint, 'documents begin and end with other ids'
    absent = {'pad_token': '[PAD]', 'eos_token': '<|im_end|>', 'unk_token': '[UNK]'}
    assert _load(tmp_path / 'e', built['byte-level'], tokenizer_config=absent).pad_id == 2
    with pytest.raises(UsageError, match=r'has no token \[EOS\], which is to end a text'):
        _load(tmp_path / 'f', built['byte-level'], tokenizer_config={'eos_token': '[EOS]'})
    mapped = _load(tmp_path / 'd', built['byte-level'], special_tokens_map={'bos_token': '<|im_start|>'})
    assert (mapped.bos_id, mapped.eos_id) == (1, 0)


def test_what_is_named_is_never_typed(tmp_path, built):
    """A symbol that the file itself takes for plain text, and one that is a piece of the model."""

    def plain(spec):
        for token in spec['added_tokens']:
            token['special'] = False

    made = _edited(built['byte-level'], plain)
    tokenizer = _load(tmp_path / 'a', made, tokenizer_config={'eos_token': '<|im_end|>', 'bos_token': 'Fox'})
    assert made.encode('<|im_end|>').ids == [2] and built['byte-level'].token_to_id('Fox') == tokenizer.bos_id
    for text in ('a<|im_end|>b', 'Fox Fox'):
        ids = tokenizer.encode(text)
        assert not {2, tokenizer.bos_id} & set(ids) and tokenizer.decode(ids) == text


def test_ids_may_have_holes_and_lie_beyond(tmp_path, built):
    def scattered(spec):
        extra = {'single_word': False, 'lstrip': True, 'rstrip': True, 'normalized': False}
        spec['added_tokens'] += [
            {'id': 450, 'content': '<|user|>', 'special': True, **extra},
            {'id': 470, 'content': ' <b>', 'special': False, **extra},
        ]

    # The library moves ids of such a list together, so that holes are made in the vocabulary.
    def holes(spec):
        scattered(spec)
        vocab = spec['model']['vocab']
        moved = max(vocab, key=vocab.__getitem__)
        vocab |= {moved: 440, '<|user|>': 450, ' <b>': 470}

    tokenizer = _load(tmp_path / 'a', _edited(built['byte-level'], holes))
    assert tokenizer.vocab_size == 471 and tokenizer.controls['<|user|>'] == 450
    assert [tokenizer.pieces[i] for i in (420, 450, 470)] == [b'', b'', b' <b>']
    assert 470 in tokenizer.encode('a  <b>  c') and tokenizer.decode(tokenizer.encode('a  <b>  c')) == 'a  <b>  c'
    assert tokenizer.decode([420, *tokenizer.encode('x'), 450]) == 'x'


def test_added_tokens_lie_beyond_the_vocabulary(tmp_path):
    made = _byte_level()
    made.add_special_tokens(['<|user|>'])
    made.add_tokens([AddedToken('   ', normalized=False), AddedToken('é!', normalized=False)])
    tokenizer = _load(tmp_path / 'a', made)
    assert tokenizer.vocab_size == 403 and tokenizer.controls['<|user|>'] == 400
    assert tokenizer.encode('   é!') == [401, 402] and tokenizer.bytes_of_ids[400:].tolist() == [0, 3, 3]
    assert tokenizer.decode([402]) == 'é!', 'an added token is not written in the alphabet of the bytes'


def test_saved_is_loaded(tmp_path, built):
    config = {'eos_token': '<|im_end|>', 'chat_template': '{{ messages }}'}
    first = _load(tmp_path / 'a', built['byte-level'], tokenizer_config=config)
    (tmp_path / 'a' / 'tokenizer.model').write_bytes(b"another library's")
    first.save(tmp_path / 'run' / 'tokenizer')
    again = Tokenizer.load(tmp_path / 'run' / 'tokenizer')
    assert Tokenizer.load(tmp_path / 'a').fingerprint == first.fingerprint, 'the other file is not one of ours'
    assert again.fingerprint == first.fingerprint == Tokenizer.load(tmp_path / 'a' / 'tokenizer.json').fingerprint
    assert (again.eos_id, again.encode(TEXTS[3])) == (2, first.encode(TEXTS[3]))
    assert sorted(p.name for p in (tmp_path / 'run' / 'tokenizer').iterdir()) == [
        'tokenizer.json',
        'tokenizer_config.json',
    ]
    assert again.saved['tokenizer.json'] == (tmp_path / 'a' / 'tokenizer.json').read_bytes()


_REMOVING = {'type': 'Split', 'pattern': {'String': 'qx'}, 'behavior': 'Removed', 'invert': False}


def _with(**changes):
    return lambda spec: spec.update(changes)


def _lower(spec):
    parts = [{'type': 'NFC'}, {'type': 'Lowercase'}]
    spec['normalizer'] = {'type': 'Sequence', 'normalizers': parts}


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (_with(normalizer={'type': 'NFKC'}), r'changes text \(normalizer NFKC\)'),
        (_lower, r'changes text \(normalizer Lowercase\)'),
        (
            _with(normalizer={'type': 'Replace', 'pattern': {'String': '“'}, 'content': '"'}),
            r'changes text \(normalizer Replace\)',
        ),
        (_with(pre_tokenizer={'type': 'Whitespace'}), 'is neither a byte-level one nor one with byte fallback'),
        (
            lambda s: s.update(
                pre_tokenizer={'type': 'Sequence', 'pretokenizers': [{'type': 'WhitespaceSplit'}, s['pre_tokenizer']]}
            ),
            r'loses text \(pre-tokenizer WhitespaceSplit\)',
        ),
        (lambda s: s['model'].update(end_of_word_suffix='</w>'), 'marks the parts of words'),
        (lambda s: s['model'].update(type='WordLevel'), 'is a WordLevel, which loses text'),
        (_with(model=None), 'is damaged'),
        (
            lambda s: s.update(pre_tokenizer={'type': 'Sequence', 'pretokenizers': [_REMOVING, s['pre_tokenizer']]}),
            r'loses text \(pre-tokenizer Split\)',
        ),
        (_with(added_tokens=[]), 'names no token that ends a text'),
        (lambda s: s['model']['merges'].append('zzz qqq'), 'is damaged'),
        (lambda s: s['model']['vocab'].update(zzz=2**24), r'is damaged \(it has the id 16777216, '),
    ],
)
def test_what_changes_or_loses_text_is_one_line(tmp_path, built, change, says):
    spec = json.loads(built['byte-level'].to_str())
    change(spec)
    with pytest.raises(
        UsageError, match=f'^the tokenizer {tmp_path}/a/tokenizer.json {says}.*: restore it, or name another$'
    ) as e:
        _load(tmp_path / 'a', json.dumps(spec))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{}', '{"model": 5}', '{"added_tokens": [5]}'])
def test_a_damaged_file_is_one_line(tmp_path, text):
    with pytest.raises(UsageError, match='is damaged'):
        _load(tmp_path / 'a', text)


@pytest.mark.parametrize('wrong', [10**12, [0, -1], 'x', [[1]]])
def test_an_end_that_is_no_id_is_one_line(tmp_path, built, wrong):
    with pytest.raises(UsageError, match=r'is damaged \(generation_config.json: .* is none of its \d+ ids'):
        _load(tmp_path / 'a', built['byte-level'], generation_config={'eos_token_id': wrong})


def test_bytes_that_are_lacking_are_counted(tmp_path):
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=['</s>'], show_progress=False)
    made.train_from_iterator(['ascii only'], trainer)
    with pytest.raises(UsageError, match=r'lacks 2\d\d of the bytes'):
        _load(tmp_path / 'a', made)


def test_control_characters_that_a_vocabulary_lacks_are_left_out(tmp_path, built):
    """As SmolLM2's does: no text holds them."""

    def without(*bytes_):
        spec = json.loads(built['byte-level'].to_str())
        for byte in bytes_:
            del spec['model']['vocab'][chr(0x100 + byte)]
        return _load(tmp_path / 'a', json.dumps(spec))

    tokenizer = without(0x04, 0x1D)
    ids = tokenizer.encode('a\x04b\x1d\x05')
    assert tokenizer.decode(ids) == 'ab\x05'
    assert int(tokenizer.bytes_of_ids[ids].sum()) == 3
    with pytest.raises(UsageError, match='lacks 1 of the bytes'):
        without(0x04, ord('\n'))


def test_a_split_that_removes_what_is_between_its_matches_keeps_the_text(tmp_path, built):
    """As OLMo 2 writes it: its pattern matches everything, and if it did not, text would be lost."""
    for pattern in (r'\s+|\S+', r'[a-z]+'):
        spec = json.loads(built['byte-level'].to_str())
        bytes_ = spec['pre_tokenizer'] | {'use_regex': False}
        split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Removed', 'invert': True}
        spec['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, bytes_]}
        tokenizer = _load(tmp_path / 'a', json.dumps(spec))
        assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    split['invert'] = False
    with pytest.raises(UsageError, match='loses text'):
        _load(tmp_path / 'a', json.dumps(spec))


def test_a_missing_library_is_named(tmp_path, built, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(
        UsageError, match=r"needs the package tokenizers \(pip install -e '\.\[hub\]' in the checkout of lm\)"
    ):
        _load(tmp_path / 'a', built['byte-level'])


def test_data_is_prepared_with_it_and_found_again(tmp_path, built, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS))
    tokenizer = _load(tmp_path / 'tokenizer', built['llama-2'])
    options = {'mixture': str(tmp_path / 'a.jsonl'), 'heldout': 0.2, 'progress': lambda line: None}
    folder = str(tmp_path / 'tokenizer')
    prepared = prepare(**options, vocab_size=tokenizer.vocab_size, tokenizer=folder)
    train = prepared.sources[0].train
    documents = [train.document(i) for i in range(train.documents)]
    assert all(d[-1] == 2 and 1 not in d for d in documents)  # its file puts nothing before a text
    assert {prepared.tokenizer.decode(d.tolist()) for d in documents} < set(TEXTS)
    written = prepared.sources[0].counts['train_bytes']
    assert written == sum(int(tokenizer.bytes_of_ids[d].sum()) - 1 for d in documents)  # less the space in front
    again = prepare(**options, vocab_size=tokenizer.vocab_size, tokenizer=f'{folder}/tokenizer.json')
    assert again.fingerprint == prepared.fingerprint and again.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(UsageError, match=f'has {tokenizer.vocab_size} ids and the model 300'):
        prepare(**options, vocab_size=300, tokenizer=folder)
