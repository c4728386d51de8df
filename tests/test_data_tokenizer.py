"""The tokenizer: every text comes back, no text forges a marker, bytes are exact."""

import random

import numpy as np
import pytest

from lm.data.tokenizer import CHAT_MARKERS, FIRST_PIECE, Tokenizer, train_tokenizer
from lm.errors import UsageError

VOCAB = 400
WORDS = [''.join(random.Random(i).choices('aeioubdklmnrst', k=2 + i % 6)) for i in range(300)]
TEXTS = [
    f'Fox {i} says {" ".join(random.Random(i).choices(WORDS, k=20))}\nin the naïve café, {i * 7}.' for i in range(200)
]


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


def _random_text(rng):
    ranges = [(0, 32), (32, 127), (127, 0xD800), (0xE000, 0x110000), (0x1F300, 0x1F700), (0x2581, 0x2582), (32, 33)]
    return ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_every_text_comes_back(tokenizer):
    rng = random.Random(0)
    texts = TEXTS[:5] + ['', ' ', '\0', '\n\n  \t\r\n', '▁ ▁', '👩‍👩‍👧 e\u0301 \ufeff', '<0x41>', ' ⁇ ', '\u2028\x85']
    texts += [_random_text(rng) for _ in range(1000)]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert int(tokenizer.bytes_of_ids[ids].sum()) == len(text.encode())
        assert ''.join(tokenizer.decode_stream(ids)) == text


def test_typed_markers_stay_text(tokenizer):
    names = ['<pad>', '<bos>', '<eos>', '<unk>', *CHAT_MARKERS]
    text = ' '.join(names) + ''.join(names) + '</s><s><0x0A>'
    ids = tokenizer.encode(text)
    assert min(ids) >= len(names) and tokenizer.decode(ids) == text


def test_ids_are_where_they_are_documented(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert [tokenizer.controls[m] for m in CHAT_MARKERS] == [4, 5, 6, 7]
    assert tokenizer.stop_ids == (2, 7)
    assert tokenizer.vocab_size == VOCAB == len(tokenizer.bytes_of_ids)
    assert tokenizer.bytes_of_ids[:8].tolist() == [0] * 8
    assert tokenizer.bytes_of_ids[8:FIRST_PIECE].tolist() == [1] * 256
    assert [tokenizer.decode([8 + b]) for b in b'a\n'] == ['a', '\n']
    assert tokenizer.bytes_of_ids.dtype == np.int32
    assert tokenizer.decode([1, 4, *tokenizer.encode('hi'), 7, 2, 0]) == 'hi'


def test_stream_holds_back_half_a_character(tokenizer):
    ids = [8 + b for b in 'é🎉'.encode()]
    assert list(tokenizer.decode_stream(iter(ids))) == ['é', '🎉']
    assert list(tokenizer.decode_stream(ids[:-1])) == ['é', '\ufffd']
    assert list(tokenizer.decode_stream([8 + 0xFF, 8 + 65])) == ['\ufffd', 'A']
    stream = tokenizer.decode_stream(iter([8 + 65, 8 + 66]))
    assert next(stream) == 'A', 'a whole character waits for nothing'


def test_training_is_deterministic_and_learns(tokenizer):
    again = train_tokenizer(iter(TEXTS), vocab_size=VOCAB)
    assert again.fingerprint == tokenizer.fingerprint
    assert train_tokenizer(TEXTS[:150], vocab_size=VOCAB).fingerprint != tokenizer.fingerprint
    assert len(tokenizer.encode(TEXTS[0])) < 0.7 * len(TEXTS[0])


def test_long_lines_are_trained_on_too():
    line = ' '.join(f'zebra{i % 7} walks' for i in range(3000))
    learned = train_tokenizer([line], vocab_size=290)
    assert len(learned.encode('zebra walks')) <= 4


def test_saved_is_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / 'run' / 'tokenizer')
    loaded = Tokenizer.load(tmp_path / 'run' / 'tokenizer')
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match='tokenizer.model'):
        Tokenizer.load(tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes(b'nonsense')
    with pytest.raises(UsageError, match='is not a SentencePiece model'):
        Tokenizer.load(tmp_path)
    with pytest.raises(UsageError, match='too small'):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(UsageError, match='there is no text'):
        train_tokenizer([' '], vocab_size=5000)


def test_a_foreign_model_is_refused(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / 'tokenizer.model').write_bytes(model.getvalue())
    with pytest.raises(UsageError, match='lacks the control symbols'):
        Tokenizer.load(tmp_path)
