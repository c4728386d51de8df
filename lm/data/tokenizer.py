"""SentencePiece BPE that gives back every text as it was, and markers that no text can forge.

Ids 0 to 7 are fixed: <pad> <bos> <eos> <unk> <|system|> <|user|> <|assistant|> <|end|>; the 256 bytes follow, then the
learned pieces. The markers are control symbols: they come out of no text, so a person who types `<|end|>` gets its
characters. <unk> never occurs, because what is in no piece becomes bytes.
"""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from lm import files
from lm.errors import UsageError

MODEL_FILE = 'tokenizer.model'
CHAT_MARKERS = ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>')
FIRST_PIECE = 8 + 256
# SentencePiece writes a space as U+2581, so that character itself would come back as a space, and NUL ends a C
# string in some of its paths: both go round it, as bytes.
_SPACE = '\u2581'
_AROUND = re.compile(f'([{_SPACE}\0]+)')
# The trainer drops longer lines in silence, and its default is 4192 bytes.
_LONGEST_SENTENCE = 1 << 24


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A trained tokenizer. `bytes_of_ids` is [V] int32: the UTF-8 bytes that each id stands for, 0 for control."""

    model: bytes = field(repr=False)
    bytes_of_ids: np.ndarray = field(repr=False)
    fingerprint: str
    _processor: sentencepiece.SentencePieceProcessor = field(repr=False)
    _pieces: tuple[bytes, ...] = field(repr=False)
    _byte_ids: tuple[int, ...] = field(repr=False)

    @classmethod
    def from_model(cls, model: bytes) -> 'Tokenizer':
        """From the bytes of a SentencePiece model. Raises UsageError if it is not one, or not one of ours."""
        try:
            processor = sentencepiece.SentencePieceProcessor()
            processor.LoadFromSerializedProto(model)  # the constructor takes empty bytes for no model, and is silent
        except (RuntimeError, OSError) as e:
            raise UsageError('the tokenizer is not a SentencePiece model, or is damaged: name another') from e
        pieces = tuple(_piece_bytes(processor, i) for i in range(processor.vocab_size()))
        tokenizer = cls(
            model=model,
            bytes_of_ids=np.array([len(p) for p in pieces], np.int32),
            fingerprint=hashlib.blake2b(model, digest_size=8).hexdigest(),
            _processor=processor,
            _pieces=pieces,
            _byte_ids=tuple(processor.piece_to_id(f'<0x{b:02X}>') for b in range(256)),
        )
        _check(tokenizer)
        return tokenizer

    @classmethod
    def load(cls, directory: epath.PathLike) -> 'Tokenizer':
        """From a directory that holds tokenizer.model, or that file. Raises UsageError if there is none."""
        path = epath.Path(directory)
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.exists():
            raise UsageError(f'no tokenizer at {directory}: name a directory that holds {MODEL_FILE}')
        return cls.from_model(path.read_bytes())

    def save(self, directory: epath.PathLike) -> None:
        files.write_bytes(epath.Path(directory) / MODEL_FILE, self.model)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    @property
    def pad_id(self) -> int:
        return self._processor.pad_id()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: <eos>, and <|end|> of a chat turn."""
        return self.eos_id, self.marker_id('<|end|>')

    def marker_id(self, marker: str) -> int:
        """The id of a control symbol, as '<|user|>'. This is the only way to one: `encode` never gives it."""
        return self._processor.piece_to_id(marker)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without <bos> and <eos>."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        plain = [text for text in texts if not _AROUND.search(text)]
        ids = iter(self._processor.encode(plain, out_type=int, num_threads=_cores()) if plain else [])
        return [self._encode_around(text) if _AROUND.search(text) else next(ids) for text in texts]

    def _encode_around(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _AROUND.split(text):
            if _AROUND.match(part):
                ids.extend(self._byte_ids[b] for b in part.encode())
            elif part:
                ids.extend(self._processor.encode(part, out_type=int))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, control symbols left out; bytes that are not UTF-8 become U+FFFD."""
        return b''.join(self._pieces[i] for i in ids).decode('utf-8', errors='replace')

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as ids arrive, a character only when all its bytes have; together they are `decode(ids)`."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for i in ids:
            if text := decoder.decode(self._pieces[i]):
                yield text
        if text := decoder.decode(b'', final=True):
            yield text


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids, the same for the same texts in the same order.

    Raises UsageError if the vocabulary has no room for the bytes, or the texts hold too little for it.
    """
    if vocab_size < FIRST_PIECE + 1:
        raise UsageError(f'a vocabulary of {vocab_size} is too small: markers and bytes alone take {FIRST_PIECE}')
    model = io.BytesIO()
    lines = (line for text in texts for line in _AROUND.sub(' ', text).splitlines(keepends=True))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, **_TRAINING, num_threads=_cores()
        )
    except RuntimeError as e:
        # The message is '… [what was checked] what to do'.
        advice = str(e).rpartition(']')[2].strip() or 'give more text'
        raise UsageError(f'the text is too little or too uniform for a vocabulary of {vocab_size}: {advice}') from e
    return Tokenizer.from_model(model.getvalue())


_TRAINING: dict[str, Any] = dict(
    model_type='bpe',
    byte_fallback=True,
    # These four give every text back as it was.
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    character_coverage=0.9999,
    # A text without spaces would leave the space out of the pieces, and then spaces do not come back.
    required_chars=_SPACE,
    max_sentence_length=_LONGEST_SENTENCE,
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    bos_piece='<bos>',
    eos_piece='<eos>',
    control_symbols=','.join(CHAT_MARKERS),
    minloglevel=2,
)


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i):
        return b''
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, ' ').encode()


def _check(tokenizer: Tokenizer) -> None:
    """Refuses a model without our markers or one that changes text: losses per byte would be of another text."""
    processor = tokenizer._processor
    names = {'<pad>': tokenizer.pad_id, '<bos>': tokenizer.bos_id, '<eos>': tokenizer.eos_id}
    names |= {m: tokenizer.marker_id(m) for m in CHAT_MARKERS}
    missing = [name for name, i in names.items() if i < 0 or not processor.is_control(i)]
    if missing:
        raise UsageError(f'the tokenizer lacks the control symbols {" ".join(missing)}: train one, or name another')
    probe = '  a\n\n\tb\0\u2581é\U0001f600 '
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        raise UsageError('the tokenizer changes text (normalization, no byte fallback): train one, or name another')


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
