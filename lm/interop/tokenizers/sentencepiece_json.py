"""SentencePiece's BPE models as tokenizer.json of Hugging Face's library, with the same ids.

SentencePiece merges any two neighbours that make a piece together, the piece with the highest score first and, of the
same, the leftmost. The library merges listed pairs in the order of the list, so each way to split a piece in two pieces
is listed. Spaces stand in the vocabulary as they are, not as U+2581: then a U+2581 of a text is in no piece and becomes
its bytes, as NUL does, and nothing has to be replaced on the way in or out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from lm.data import tokenizer_json
from lm.data.tokenizer import SPACE
from lm.errors import UsageError
from lm.interop.tokenizers import pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # the types of pieces, GGUF's as well
ModelProto: Any = vars(sentencepiece_model_pb2)['ModelProto']  # made when it is imported, where no type checker sees it
_BPE = 2  # trainer_spec.model_type
_BYTE_NAME = re.compile(r'<0x[0-9A-Fa-f]{2}>')


class Piece(NamedTuple):
    """A piece by its text, with U+2581 for a space."""

    text: str
    score: float
    kind: int


class Pieces(NamedTuple):
    """A vocabulary of SentencePiece's.

    Attributes:
      space_first: whether a space is put before a text.
    """

    pieces: tuple[Piece, ...]
    space_first: bool


# ---- the file tokenizer.model ----


def read_model(content: bytes) -> Pieces:
    """The pieces of a tokenizer.model. Raises UsageError if it is damaged, no BPE, or changes text."""
    model = ModelProto()
    try:
        model.ParseFromString(content)
        pieces = tuple(Piece(piece.piece, piece.score, piece.type) for piece in model.pieces)
    except (DecodeError, UnicodeDecodeError):
        pieces = ()
    if not pieces:
        raise UsageError('tokenizer.model is not a SentencePiece model, or is damaged: name another')
    if model.trainer_spec.model_type != _BPE:
        raise UsageError('tokenizer.model is no BPE, and only those can be carried over: bring a tokenizer.json')
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UsageError('tokenizer.model changes text (its normalization), and losses would be of another text')
    return Pieces(pieces, space_first=normalizer.add_dummy_prefix)


# ---- tokenizer.json ----


def to_json(vocabulary: Pieces, *, bos: str | None = None) -> dict[str, Any]:
    """The description that the library reads; `bos` is put before a text."""
    named = {i: p._replace(text=_plain(p.text)) for i, p in enumerate(vocabulary.pieces) if p.kind != UNUSED}
    if doubled := len(named) - len({p.text for p in named.values()}):
        raise UsageError(f'{doubled} of the pieces of the tokenizer are there twice: name another')
    decoders: list[dict[str, Any]] = [{'type': 'ByteFallback'}, {'type': 'Fuse'}]
    if vocabulary.space_first:
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return described(
        named,
        bos,
        {'type': 'Sequence', 'decoders': decoders},
        normalizer={'type': 'Prepend', 'prepend': ' '} if vocabulary.space_first else None,
        unk_token=next((p.text for p in named.values() if p.kind == UNKNOWN), None),
        byte_fallback=True,
        merges=[list(pair) for pair in merges(vocabulary.pieces)],
    )


def described(
    pieces: Mapping[int, Piece], bos: str | None, decoder: Mapping[str, Any], *, merges: list[list[str]],
    normalizer: Any = None, pre_tokenizer: Any = None, unk_token: str | None = None, byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A tokenizer.json of BPE, by its parts; a pre-tokenizer is the one of a byte-level tokenizer."""
    vocab, affix = {p.text: i for i, p in pieces.items()}, '' if pre_tokenizer else None
    special = ((i, p) for i, p in pieces.items() if p.kind in (UNKNOWN, CONTROL, USER))
    return {
        'version': '1.0', 'truncation': None, 'padding': None,
        'added_tokens': [added_token(i, p.text, special=p.kind != USER) for i, p in special],
        'normalizer': normalizer, 'pre_tokenizer': pre_tokenizer,
        'post_processor': put_before(bos, vocab[bos]) if bos else decoder if pre_tokenizer else None,
        'decoder': decoder,
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': unk_token, 'continuing_subword_prefix': affix,
            'end_of_word_suffix': affix, 'fuse_unk': False, 'byte_fallback': byte_fallback,
            'ignore_merges': ignore_merges, 'vocab': vocab, 'merges': merges,
        },
    }  # fmt: skip


def added_token(i: int, content: str, *, special: bool) -> dict[str, Any]:
    """A token that is found in a text as it is, before all else."""
    plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': i, 'content': content, **plain, 'special': special}


def put_before(bos: str, i: int) -> dict[str, Any]:
    """The part of a tokenizer.json that puts a token before each text."""
    symbol = lambda kind: {'SpecialToken': {'id': bos, 'type_id': kind}}
    text = lambda name, kind: {'Sequence': {'id': name, 'type_id': kind}}
    return {
        'type': 'TemplateProcessing',
        'single': [symbol(0), text('A', 0)],
        'pair': [symbol(0), text('A', 0), symbol(1), text('B', 1)],
        'special_tokens': {bos: {'id': bos, 'ids': [i], 'tokens': [bos]}},
    }


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All splits of a piece in two, in the order in which SentencePiece would merge them.

    Which split of a piece comes first makes no difference: of two that overlap, merging from the left has left one.
    """
    scores = {_plain(p.text): p.score for p in pieces if p.kind == NORMAL}
    ordered = sorted(scores, key=lambda text: -scores[text])  # stable: of the same score in the order of ids
    splits = ((text[:k], text[k:]) for text in ordered for k in range(1, len(text)))
    return [(left, right) for left, right in splits if left in scores and right in scores]


def _plain(text: str) -> str:
    return text.replace(SPACE, ' ')


def with_added(spec: dict[str, Any], more: Mapping[int, tuple[str, bool]]) -> dict[str, Any]:
    """The description with tokens {id: (content, special)} that the model does not have, or has as plain pieces.

    They stand in the vocabulary, too: the library numbers those that do not as it likes.
    """
    vocab, names = dict(spec['model']['vocab']), {i: name for name, i in spec['model']['vocab'].items()}
    tokens = {token['id']: token for token in spec['added_tokens']}
    for i, (text, special) in more.items():
        content = _plain(text)
        if names.get(i, content) != content or vocab.get(content, i) != i:
            shown = repr(content[:40])
            raise UsageError(f'the added token {shown} is to have the id {i}, which is not free: mend the folder')
        vocab[content], tokens[i] = i, added_token(i, content, special=special)
    return {**spec, 'added_tokens': [tokens[i] for i in sorted(tokens)], 'model': {**spec['model'], 'vocab': vocab}}


# ---- and back ----


def from_json(spec: Mapping[str, Any]) -> Pieces:
    """The pieces of a tokenizer.json with byte fallback, scored by their merges.

    Raises UsageError if SentencePiece would merge otherwise, or it splits or changes texts in a way of its own.
    """
    _check_plain(spec)
    pairs = [pair.split(' ') if isinstance(pair, str) else pair for pair in spec['model']['merges']]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(_plain(left + right), rank)
    pieces, unknown = pieces_of(spec), spec['model'].get('unk_token')
    for i, piece in enumerate(pieces):
        text, kind = _plain(piece.text), UNKNOWN if piece.text == unknown else piece.kind
        score = piece.score if kind != NORMAL else -float(ranks.get(text, len(ranks) + i))
        if kind == NORMAL and _BYTE_NAME.fullmatch(text):
            score, kind = 0.0, BYTE
        pieces[i] = Piece(text.replace(' ', SPACE), score, kind)
    listed = {(_plain(left), _plain(right)) for left, right in pairs}
    if missing := [pair for pair in merges(pieces) if pair not in listed]:
        raise UsageError(
            f'the tokenizer does not merge {"".join(missing[0])!r} though it has that piece ({len(missing)} in all), '
            'and a GGUF file cannot say so'
        )
    return Pieces(tuple(pieces), space_first=tokenizer_json.prepend_scheme(spec) != 'never')


def pieces_of(spec: Mapping[str, Any]) -> list[Piece]:
    """A piece for each id of a tokenizer.json, by its name there: controls, the user's, and others."""
    added = {token['id']: token for token in spec.get('added_tokens') or ()}
    names = {i: name for name, i in spec['model']['vocab'].items()} | {i: t['content'] for i, t in added.items()}
    pieces = [Piece(f'[PAD{i}]', -1e9, UNUSED) for i in range(max(names) + 1)]
    for i, name in names.items():
        kind = NORMAL if i not in added else CONTROL if added[i]['special'] else USER
        pieces[i] = Piece(name, 0.0, kind)
    return pieces


def _check_plain(spec: Mapping[str, Any]) -> None:
    """Raises UsageError for a pre-tokenizer that keeps pieces from merging: a GGUF file has none."""
    for node in pre_tokenizers.nodes(spec.get('pre_tokenizer')):
        on_space = node['type'] == 'Split' and node['pattern'] in ({'String': ' '}, {'String': SPACE})
        if node['type'] not in ('Sequence', 'Metaspace') and not on_space:
            raise UsageError(f'a GGUF file cannot say how the tokenizer splits texts ({node["type"]})')
