"""Tokenizers: every text comes back as it was, and no text forges a control symbol, whichever library made them.

A `Tokenizer` knows the bytes of each of its ids. It is a SentencePiece BPE that we train, here, or a tokenizer.json of
Hugging Face's library (lm/data/tokenizer_json.py); nothing else in lm knows which.

In ours ids 0 to 7 are fixed: <pad> <bos> <eos> <unk> <|system|> <|user|> <|assistant|> <|end|>; the 256 bytes follow,
then the learned pieces. The markers are control symbols: they come out of no text, so a person who types `<|end|>` gets
its characters. <unk> never occurs, because what is in no piece becomes bytes.
"""

import codecs
import contextlib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, starmap
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from lm import files
from lm.errors import UsageError

MODEL_FILE = 'tokenizer.model'
JSON_FILE = 'tokenizer.json'
CHAT_MARKERS = ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>')
FIRST_PIECE = 8 + 256
# SentencePiece writes a space as U+2581, so that character itself would come back as a space, and NUL ends a C
# string in some of its paths: both go round it, as bytes.
SPACE = '\u2581'
_AROUND = re.compile(f'([{SPACE}\0]+)')
# The trainer drops longer lines in silence, and its default is 4192 bytes.
_LONGEST_SENTENCE = 1 << 24
_CHARACTERS_PER_PIECE = 20
_FEW = 16  # texts, the turns of a conversation: to start threads for them takes longer than to encode them


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, made by `load` or `train_tokenizer`.

    Attributes:
      pieces: the UTF-8 bytes that each id stands for, none for control symbols and for ids that are not used.
      controls: the id of each control symbol by its name, as '<|user|>'; the only way to one, for `encode` gives none.
      stop_ids: the ids that end an answer: the end of a document, and of a chat turn.
      saved: the files that `save` writes, by name.
      encode_plain: the ids of texts without a match of `around`, whose matches are encoded as `byte_ids`.
      adds_bos: whether <bos> is put before a text.
      prepend_scheme: where a space is put before a text, so that a word has the same piece there as elsewhere:
        'never'; 'first', at the beginning; 'always', at the beginning and after each control symbol.
      strips_right, strips_left: the control symbols at which a text loses its white space, after or before them.
    """

    pieces: tuple[bytes, ...] = field(repr=False)
    controls: Mapping[str, int] = field(repr=False)
    bos_id: int
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    fingerprint: str
    saved: Mapping[str, bytes] = field(repr=False)
    encode_plain: Callable[[list[str]], list[list[int]]] = field(repr=False)
    around: re.Pattern[str] | None = field(repr=False)
    byte_ids: Sequence[int] = field(repr=False)
    adds_bos: bool = True
    prepend_scheme: str = 'never'
    strips_right: frozenset[int] = frozenset()
    strips_left: frozenset[int] = frozenset()

    @staticmethod
    def load(directory: epath.PathLike) -> 'Tokenizer':
        """From a directory that holds tokenizer.json or tokenizer.model, or that file.

        Raises UsageError, with the file's path, if there is none, or it is damaged.
        """
        path = find_tokenizer(directory)
        if path is None:
            raise UsageError(f'no tokenizer at {directory}: name a directory that holds {MODEL_FILE} or {JSON_FILE}')
        from lm.data import tokenizer_json  # it stands on this file

        try:
            return tokenizer_json.load(path) if path.suffix == '.json' else from_model(path.read_bytes())
        except UsageError as error:
            raise UsageError(f'the tokenizer {path} {error}: restore it, or name another') from error.__cause__

    def save(self, directory: epath.PathLike) -> None:
        for name, content in self.saved.items():
            files.write_bytes(epath.Path(directory) / name, content)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @cached_property
    def bytes_of_ids(self) -> np.ndarray:
        """[V] int32, how many UTF-8 bytes each id stands for; 0 for control symbols."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def is_token(self) -> np.ndarray:
        """[ids] bool, whether an id stands for text or is a control symbol: the others are in no text, and a model is
        not to draw them. A model may have more rows than there are ids, and those are like them."""
        controls = set(self.controls.values())
        return np.array([bool(piece) or i in controls for i, piece in enumerate(self.pieces)])

    def encode(self, text: str) -> list[int]:
        """The ids of a text from its beginning, without <bos> and <eos>."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, continued: Sequence[bool] | None = None) -> list[list[int]]:
        """The ids of each text from its beginning, on all cores.

        Args:
          continued: whether there is text before each, so that it is no beginning; None: before none of them.
        """
        begun = continued or [False] * len(texts)
        return self._encode([t if after else self._with_space(t) for t, after in zip(texts, begun, strict=True)])

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue, at least one: after <bos> where the tokenizer puts it; of an
        empty text, that or what stands in for it."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self.adds_bos or not ids else ids

    def encode_pieces(self, pieces: Sequence[int | str], *, continued: bool = False) -> list[list[int]]:
        """The ids of each piece of a text: control symbols by their ids, and texts, each encoded as one.

        Args:
          continued: there is text before them.
        """
        texts, at_start, strip = [], not continued, False
        for piece, after in zip(pieces, [*pieces[1:], None], strict=True):
            if not isinstance(piece, str):
                at_start, strip = self.prepend_scheme == 'always', piece in self.strips_right
                continue
            piece = piece.lstrip() if strip else piece
            piece = piece.rstrip() if after in self.strips_left else piece
            texts.append(self._with_space(piece) if at_start else piece)
            at_start, strip = at_start and not piece, strip and not piece
        found = iter(self._encode(texts))
        return [next(found) if isinstance(piece, str) else [piece] for piece in pieces]

    def _with_space(self, text: str) -> str:
        return f' {text}' if text and self.prepend_scheme != 'never' else text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [self.around.split(text) if self.around else [text] for text in texts]  # every second one is a match
        plain = iter(self.encode_plain([part for found in parts for part in found[::2]]))

        def ids(at: int, part: str) -> list[int]:
            return [self.byte_ids[b] for b in part.encode()] if at % 2 else next(plain)

        return [list(chain.from_iterable(starmap(ids, enumerate(found)))) for found in parts]

    def decode(self, ids: Iterable[int], *, continued: bool = False) -> str:
        """The text of ids, without control symbols and ids beyond the vocabulary; bytes that are not UTF-8 become
        U+FFFD.

        Args:
          continued: there is text before it. Else the space that the tokenizer puts before a text is left out.
        """
        return ''.join(self.decode_stream(ids, continued=continued))

    def decode_stream(self, ids: Iterable[int], *, continued: bool = False) -> Iterator[str]:
        """Pieces of text as ids arrive, a character only when all its bytes have; together they are `decode(ids)`."""
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        strip = not continued and self.prepend_scheme != 'never'
        for i in ids:
            piece = self.pieces[i] if i < len(self.pieces) else b''
            if strip and piece:
                piece, strip = piece.removeprefix(b' '), False
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b'', final=True):
            yield text


def find_tokenizer(directory: epath.PathLike) -> epath.Path | None:
    """The file of the tokenizer in a directory, or that file itself; None if there is none.

    Where both are, as in folders of Hugging Face's, tokenizer.model is another's and not one of ours.
    """
    path = epath.Path(directory)
    found = [path / JSON_FILE, path / MODEL_FILE] if path.is_dir() else [path]
    return next((file for file in found if file.exists()), None)


def from_model(model: bytes) -> Tokenizer:
    """From the bytes of a SentencePiece model. Raises UsageError, as the rest of a sentence on it, if it is not one, or
    not one of ours."""
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)  # the constructor takes empty bytes for no model, and is silent
        size = processor.vocab_size()
        controls = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i)}
        pieces = tuple(_piece_bytes(processor, i) for i in range(size))
    except (RuntimeError, OSError, ValueError, IndexError) as e:  # of its bytes, of the text or the numbers in a piece
        raise UsageError('is not a SentencePiece model, or is damaged') from e
    if missing := [name for name in ('<pad>', '<bos>', '<eos>', *CHAT_MARKERS) if name not in controls]:
        raise UsageError(f'lacks the control symbols {" ".join(missing)}, so it is none of ours or is damaged')
    tokenizer = Tokenizer(
        pieces=pieces, controls=controls, bos_id=controls['<bos>'], eos_id=controls['<eos>'], pad_id=controls['<pad>'],
        stop_ids=(controls['<eos>'], controls['<|end|>']),
        fingerprint=hashlib.blake2b(model, digest_size=8).hexdigest(), saved={MODEL_FILE: model},
        encode_plain=partial(_encode_plain, processor), around=_AROUND,
        byte_ids=tuple(processor.piece_to_id(f'<0x{b:02X}>') for b in range(256)),
    )  # fmt: skip
    if not gives_back(tokenizer):
        raise UsageError('changes text (normalization, no byte fallback)')
    return tokenizer


def _encode_plain(processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[list[int]]:
    if len(texts) <= _FEW:
        return [processor.encode(text, out_type=int) for text in texts]
    return processor.encode(texts, out_type=int, num_threads=_cores())


def gives_back(tokenizer: Tokenizer) -> bool:
    """Tells whether a text comes back as it was: if not, losses per byte would be of another text."""
    probe = '  A\n\n\tb\0\u2581é\ufb01\U0001f600 '
    return tokenizer.decode(tokenizer.encode(probe)) == probe


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, or of fewer where the texts hold too little for so many; the same for the same
    texts in the same order.

    Raises UsageError if the vocabulary has no room for the bytes, or there is no text.
    """
    if vocab_size < FIRST_PIECE + 1:
        raise UsageError(f'a vocabulary of {vocab_size} is too small: markers and bytes alone take {FIRST_PIECE}')
    lines = [line for text in texts for line in _AROUND.sub(' ', text).splitlines(keepends=True)]
    if not any(line.strip() for line in lines):
        raise UsageError('there is no text to train a tokenizer on: name other data')
    # The plain way first, so that a text with enough in it has the tokenizer that it always had.
    attempts = (
        lambda: _trained(lines, vocab_size),
        lambda: _trained(lines, min(vocab_size, _enough(lines)), hard_vocab_limit=False),
        lambda: _trained(_frequent(lines, (vocab_size - FIRST_PIECE) // 2), vocab_size, hard_vocab_limit=False),
    )
    for attempt in attempts:
        with contextlib.suppress(RuntimeError):
            return from_model(attempt())
    raise UsageError('no tokenizer can be trained on this text: set data.tokenizer to one, or give more')


def _trained(lines: Iterable[str], vocab_size: int, **more: Any) -> bytes:
    """The bytes of a SentencePiece model. Raises RuntimeError if the trainer fails."""
    model = io.BytesIO()
    options = {'vocab_size': vocab_size, 'num_threads': _cores(), **_TRAINING, **more}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


def _enough(lines: Sequence[str]) -> int:
    """The vocabulary for a text that has too little in it for the one that was asked for: its characters, and as many
    longer pieces as are seen often enough to be learned."""
    return FIRST_PIECE + len(set().union(*lines)) + sum(map(len, lines)) // _CHARACTERS_PER_PIECE


def _frequent(lines: Sequence[str], room: int) -> Iterator[str]:
    """The lines with their `room` commonest characters alone, so that some pieces are longer; the others (of a Chinese
    text, for example) are then spelled in bytes."""
    counts = Counter(character for line in lines for character in line)
    rare = str.maketrans(dict.fromkeys(sorted(counts, key=lambda c: (-counts[c], c))[room:], ' '))
    return (line.translate(rare) for line in lines)


_TRAINING: dict[str, Any] = {
    'model_type': 'bpe', 'byte_fallback': True, 'split_digits': True, 'character_coverage': 0.9999, 'minloglevel': 2,
    # These four give every text back as it was.
    'normalization_rule_name': 'identity', 'add_dummy_prefix': False, 'remove_extra_whitespaces': False,
    'allow_whitespace_only_pieces': True,
    # A text without spaces would leave the space out of the pieces, and then spaces do not come back.
    'required_chars': SPACE, 'max_sentence_length': _LONGEST_SENTENCE,
    'pad_id': 0, 'bos_id': 1, 'eos_id': 2, 'unk_id': 3, 'pad_piece': '<pad>', 'bos_piece': '<bos>',
    'eos_piece': '<eos>', 'control_symbols': ','.join(CHAT_MARKERS),
}  # fmt: skip


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    if processor.is_control(i) or processor.is_unknown(i):
        return b''
    piece = processor.id_to_piece(i)
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, ' ').encode()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
