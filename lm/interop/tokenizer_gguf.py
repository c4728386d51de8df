"""A tokenizer's files, between a run's tokenizer/ and the metadata of a GGUF file (its keys tokenizer.*)."""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import chat_template, tokenizer_json
from lm.data.chat_template import TEMPLATE_FILE
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, SPACE, Tokenizer
from lm.data.tokenizer_json import CONFIG_FILE, GENERATION_FILE, MAP_FILE
from lm.errors import UsageError
from lm.interop import pre_tokenizers, sentencepiece_json
from lm.interop.pre_tokenizers import Way
from lm.interop.sentencepiece_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Piece, Pieces
from lm.interop.tokenizer_files import checked, dump, loaded, template_of

_KEY = 'tokenizer.ggml.'
_TEMPLATE = 'tokenizer.chat_template'
_MOST_TOKENS = 1 << 22
_LONGEST_TOKEN = 1 << 10  # characters; to list the splits of a piece takes time with the square of it
_FILLER = re.compile(r'\[PAD\d+\]')
_SURROGATE = re.compile('[\ud800-\udfff]')
_SYMBOLS = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
_ENDS = ('eos', 'eot', 'eom')


# ---- in ----


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """A run's tokenizer/ from the metadata of a file, of which nothing is taken for true.

    Raises UsageError if its tokenizer is damaged, or of a kind that lm does not read.
    """
    model = _get(metadata, 'model', str, None)
    if model not in ('gpt2', 'llama'):
        raise UsageError(f'the tokenizer of the file is of the kind {str(model)[:40]!r}, and lm reads gpt2 and llama')
    pieces = _pieces_of(metadata)
    names = [p.text for p in pieces]
    symbols = {key: i for key, name in _SYMBOLS.items() if (i := _id(metadata, name, len(pieces))) is not None}
    ends = [i for name in _ENDS if (i := _id(metadata, name, len(pieces))) is not None]
    if 'eos_token' not in symbols:
        raise UsageError(f'the tokenizer of the file names no token that ends a text ({_KEY}eos_token_id)')
    ordinary = [key for key, i in symbols.items() if key in ('pad_token', 'unk_token') and pieces[i].kind == NORMAL]
    symbols = {key: i for key, i in symbols.items() if key not in ordinary}  # a word that is used for it stays a word
    pieces = _as_controls(pieces, [*symbols.values(), *ends])
    way = None if model == 'llama' else pre_tokenizers.way(_get(metadata, 'pre', str, 'default'))
    begins = _get(metadata, 'add_bos_token', bool, way is None or way.begins) and 'bos_token' in symbols
    bos = names[symbols['bos_token']] if begins else None
    if way is None:
        vocabulary = Pieces(tuple(pieces), _get(metadata, 'add_space_prefix', bool, True))
        spec = sentencepiece_json.to_json(vocabulary, bos=bos)
    else:
        spec = _byte_level(metadata, pieces, way, bos)
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **{key: names[i] for key, i in symbols.items()}}
    config |= {'add_bos_token': begins, 'add_eos_token': False, 'clean_up_tokenization_spaces': False}
    ends = {'eos_token_id': list(dict.fromkeys(ends))}
    files = {JSON_FILE: dump(spec), CONFIG_FILE: dump(config), GENERATION_FILE: dump(ends)}
    template = metadata.get(_TEMPLATE)
    if template:
        if not isinstance(template, str):
            raise UsageError(f'the file is damaged ({_TEMPLATE} is no text): get it again')
        files[TEMPLATE_FILE] = template.encode(errors='replace')
    return checked(files)


def _get(metadata: Mapping[str, Any], name: str, kind: type, otherwise: Any) -> Any:
    value = metadata.get(_KEY + name, otherwise)
    if value is not otherwise and not isinstance(value, kind):
        raise UsageError(f'the file is damaged ({_KEY}{name} is a {type(value).__name__}): get it again')
    return value


def _id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    """A token's id that the file names. Some write -1 or 2³² - 1 for none."""
    i = metadata.get(f'{_KEY}{name}_token_id')
    if i is None or i in (-1, 0xFFFFFFFF):
        return None
    if type(i) is not int or not 0 <= i < size:
        raise UsageError(f'the file is damaged ({_KEY}{name}_token_id is {i!r}, of {size} tokens): get it again')
    return i


def _list(metadata: Mapping[str, Any], name: str, size: int | None, kinds: tuple[type, ...]) -> Sequence[Any]:
    values = metadata.get(_KEY + name)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise UsageError(f'the tokenizer of the file has no {_KEY}{name}: get it again')
    if size is not None and len(values) != size:
        raise UsageError(f'the file is damaged ({_KEY}{name} has {len(values)} values for {size} tokens): get it again')
    if not all(type(value) in kinds for value in values):
        raise UsageError(f'the file is damaged ({_KEY}{name} holds what is no {kinds[0].__name__}): get it again')
    return values


def _pieces_of(metadata: Mapping[str, Any]) -> list[Piece]:
    tokens = _list(metadata, 'tokens', None, (str,))
    size = len(tokens)
    if not 0 < size <= _MOST_TOKENS:
        raise UsageError(f'the file is damaged ({size:,} tokens, and {_MOST_TOKENS:,} are the most): get it again')
    if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
        raise UsageError(f'the file is damaged (a token of {longest:,} characters): get it again')
    if any(map(_SURROGATE.search, tokens)):
        raise UsageError('the file is damaged (a token is no UTF-8): get it again')
    needs_scores = metadata[_KEY + 'model'] == 'llama'
    scores = _list(metadata, 'scores', size, (float, int)) if needs_scores else [0.0] * size
    kinds = _list(metadata, 'token_type', size, (int,)) if _KEY + 'token_type' in metadata else [NORMAL] * size
    if wrong := [kind for kind in kinds if not 0 <= kind <= BYTE]:
        raise UsageError(f'the file is damaged (a token of type {wrong[0]}): get it again')
    if any(math.isnan(score) for score in scores):
        raise UsageError(f'the file is damaged ({_KEY}scores holds what is no number): get it again')
    return [Piece(t, float(s), k or NORMAL) for t, s, k in zip(tokens, scores, kinds, strict=True)]


def _as_controls(pieces: Sequence[Piece], ids: Sequence[int]) -> list[Piece]:
    """The pieces, where those by which texts begin and end are control symbols, whatever the file has them as."""
    found = list(pieces)
    for i in ids:
        found[i] = found[i]._replace(kind=CONTROL if found[i].kind != UNKNOWN else UNKNOWN)
    return found


def _byte_level(metadata: Mapping[str, Any], pieces: Sequence[Piece], way: Way, bos: str | None) -> dict[str, Any]:
    kept = {i: p for i, p in enumerate(pieces) if not (p.kind == UNUSED and _FILLER.fullmatch(p.text))}
    vocab = {p.text: i for i, p in kept.items()}
    if len(vocab) < len(kept):
        raise UsageError(f'the file is damaged ({len(kept) - len(vocab)} tokens are there twice): get it again')
    pairs = _merges(_list(metadata, 'merges', None, (str,)), vocab)
    splits = pre_tokenizers.to_json(way)
    return sentencepiece_json.described(
        kept, bos, pre_tokenizers.BYTE_LEVEL, pre_tokenizer=splits, ignore_merges=way.whole_words, merges=pairs
    )


def _merges(lines: Sequence[str], vocab: Mapping[str, int]) -> list[list[str]]:
    """Pairs of pieces. Raises UsageError unless both and what they make are in the vocabulary."""
    pairs = []
    for line in lines:
        at = line.find(' ', 1)
        left, right = line[:at], line[at + 1 :]
        if at < 1 or left not in vocab or right not in vocab or left + right not in vocab:
            raise UsageError(f'the file is damaged (it merges {line[:60]!r}, which are no tokens): get it again')
        pairs.append([left, right])
    return pairs


# ---- out ----


def to_gguf(files: Mapping[str, bytes], *, vocab_size: int) -> dict[str, Any]:
    """The keys tokenizer.* of a file, with as many tokens as the model's tables have rows.

    Raises UsageError if a GGUF file cannot say what the tokenizer does.
    """
    ours = loaded(files)
    pieces, first, last = _described(files)
    ids = _symbol_ids(files, ours)
    if len(pieces) > vocab_size:
        raise UsageError(f'the tokenizer has {len(pieces)} ids, and the model {vocab_size} rows for them: name its own')
    kinds, lowest = [p.kind for p in pieces], min(p.score for p in pieces) - 1
    if UNKNOWN in kinds:
        ids['unknown_token_id'] = kinds.index(UNKNOWN)
    pieces += [Piece(f'[PAD{i}]', lowest, UNUSED) for i in range(len(pieces), vocab_size)]  # one for each row
    listed = {'tokens': [p.text for p in pieces]}
    listed |= {'scores': [p.score for p in pieces]} if first['model'] == 'llama' else {}
    found = first | listed | {'token_type': [p.kind for p in pieces]} | last | ids
    return {key if key == _TEMPLATE else _KEY + key: value for key, value in found.items()}


def unlike_llama_cpp(files: Mapping[str, bytes]) -> list[str]:
    """Notes on what a GGUF file cannot say of a tokenizer, so that llama.cpp gives other ids."""
    ours = loaded(files)
    notes = []
    if ours.prepend_scheme == 'first':
        notes.append('puts a space before the text after each control symbol, and this tokenizer only at the beginning')
    if ours.strips_left or ours.strips_right:
        notes.append('keeps white space beside control symbols that this tokenizer leaves out')
    return [f'llama.cpp {note}: prompts with them have other ids there' for note in notes]


def _symbol_ids(files: Mapping[str, bytes], ours: Tokenizer) -> dict[str, Any]:
    config, mapped = (json.loads(files.get(name, b'{}')) for name in (CONFIG_FILE, MAP_FILE))
    config |= {k: v for k, v in mapped.items() if v}
    text = template_of(files)
    template = None if text is None else chat_template.ChatTemplate(text)
    end = ours.eos_id
    with contextlib.suppress(UsageError):  # the template does not show what ends an answer
        end = template.stop_ids(ours)[0] if template else end
    ids: dict[str, Any] = {'eos_token_id': ours.eos_id}
    if ours.bos_id != ours.eos_id or config.get('bos_token'):
        ids['bos_token_id'] = ours.bos_id
    if ours.pad_id != ours.eos_id or config.get('pad_token'):
        ids['padding_token_id'] = ours.pad_id
    if end != ours.eos_id:
        ids['eot_token_id'] = end
    unknown = config.get('unk_token')
    unknown = unknown.get('content') if isinstance(unknown, dict) else unknown
    if isinstance(unknown, str) and unknown in ours.controls:
        ids['unknown_token_id'] = ours.controls[unknown]
    ids['add_bos_token'] = 'bos_token_id' in ids and ours.adds_bos
    ids['add_eos_token'] = False
    return ids | ({_TEMPLATE: template.text} if template else {})


def _described(files: Mapping[str, bytes]) -> tuple[list[Piece], dict[str, Any], dict[str, Any]]:
    """(a tokenizer's pieces, the keys that stand before them, those after)."""
    if JSON_FILE not in files:
        vocabulary = sentencepiece_json.read_model(files[MODEL_FILE])
    else:
        spec = tokenizer_json.parse(files[JSON_FILE])
        if spec['model']['type'] != 'BPE':
            raise UsageError(f'a GGUF file holds no tokenizer of the kind {spec["model"]["type"]} that lm could write')
        if tokenizer_json.is_byte_level(spec):
            if tokenizer_json.prepend_scheme(spec) != 'never':
                raise UsageError('a GGUF file cannot say that a byte-level tokenizer puts a space before a text')
            pairs = [pair if isinstance(pair, str) else ' '.join(pair) for pair in spec['model']['merges']]
            first = {'model': 'gpt2', 'pre': pre_tokenizers.name_of(spec)}
            return sentencepiece_json.pieces_of(spec), first, {'merges': pairs}
        vocabulary = sentencepiece_json.from_json(spec)
    shown = [p._replace(text=p.text.replace(SPACE, ' ')) if p.kind == USER else p for p in vocabulary.pieces]
    return shown, {'model': 'llama', 'pre': 'default'}, {'add_space_prefix': vocabulary.space_first}
