"""A tokenizer's files, between a run's tokenizer/ and the metadata of a GGUF file (its keys tokenizer.*)."""

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
from lm.interop.sentencepiece_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Piece, Pieces
from lm.interop.tokenizer_files import checked, dump, loaded

_KEY = 'tokenizer.ggml.'
_TEMPLATE = 'tokenizer.chat_template'
_MOST_TOKENS = 1 << 22
_LONGEST_TOKEN = 1 << 10  # characters; to list the splits of a piece takes time with the square of it
_FILLER = re.compile(r'\[PAD\d+\]')
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
    begins = _get(metadata, 'add_bos_token', bool, _begins(model, metadata)) and 'bos_token' in symbols
    bos = names[symbols['bos_token']] if begins else None
    build = _byte_level if model == 'gpt2' else _sentencepiece
    files = {
        JSON_FILE: dump(build(metadata, pieces, bos)),
        CONFIG_FILE: dump(_config({key: names[i] for key, i in symbols.items()}, begins)),
        GENERATION_FILE: dump({'eos_token_id': list(dict.fromkeys(ends))}),
    }
    template = metadata.get(_TEMPLATE)
    if template:
        if not isinstance(template, str):
            raise UsageError(f'the file is damaged ({_TEMPLATE} is no text): get it again')
        files[TEMPLATE_FILE] = template.encode(errors='replace')
    return checked(files)


def _config(symbols: Mapping[str, str], begins: bool) -> dict[str, Any]:
    fixed = {'add_eos_token': False, 'clean_up_tokenization_spaces': False}
    return {'tokenizer_class': 'PreTrainedTokenizerFast', **symbols, 'add_bos_token': begins, **fixed}


def _begins(model: str, metadata: Mapping[str, Any]) -> bool:
    return model == 'llama' or pre_tokenizers.way(_get(metadata, 'pre', str, 'default')).begins


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
    _check_text(tokens)
    needs_scores = metadata[_KEY + 'model'] == 'llama'
    scores = _list(metadata, 'scores', size, (float, int)) if needs_scores else [0.0] * size
    kinds = _list(metadata, 'token_type', size, (int,)) if _KEY + 'token_type' in metadata else [NORMAL] * size
    if wrong := [kind for kind in kinds if not 0 <= kind <= BYTE]:
        raise UsageError(f'the file is damaged (a token of type {wrong[0]}): get it again')
    if any(math.isnan(score) for score in scores):
        raise UsageError(f'the file is damaged ({_KEY}scores holds what is no number): get it again')
    return [Piece(t, float(s), k or NORMAL) for t, s, k in zip(tokens, scores, kinds, strict=True)]


def _check_text(tokens: Sequence[str]) -> None:
    try:
        ''.join(tokens).encode()
    except UnicodeEncodeError:
        raise UsageError('the file is damaged (a token is no UTF-8): get it again') from None


def _as_controls(pieces: Sequence[Piece], ids: Sequence[int]) -> list[Piece]:
    """The pieces, where those by which texts begin and end are control symbols, whatever the file has them as."""
    found = list(pieces)
    for i in ids:
        found[i] = found[i]._replace(kind=CONTROL if found[i].kind != UNKNOWN else UNKNOWN)
    return found


def _byte_level(metadata: Mapping[str, Any], pieces: Sequence[Piece], bos: str | None) -> dict[str, Any]:
    way = pre_tokenizers.way(_get(metadata, 'pre', str, 'default'))
    kept = {i: p for i, p in enumerate(pieces) if not (p.kind == UNUSED and _FILLER.fullmatch(p.text))}
    vocab = {p.text: i for i, p in kept.items()}
    if len(vocab) < len(kept):
        raise UsageError(f'the file is damaged ({len(kept) - len(vocab)} tokens are there twice): get it again')
    added = [
        sentencepiece_json.added_token(i, p.text, special=p.kind != USER)
        for i, p in kept.items()
        if p.kind in (UNKNOWN, CONTROL, USER)
    ]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added,
        'normalizer': None,
        'pre_tokenizer': pre_tokenizers.to_json(way),
        'post_processor': sentencepiece_json.put_before(bos, vocab[bos]) if bos else byte_level,
        'decoder': byte_level,
        'model': {
            'type': 'BPE',
            'dropout': None,
            'unk_token': None,
            'continuing_subword_prefix': '',
            'end_of_word_suffix': '',
            'fuse_unk': False,
            'byte_fallback': False,
            'ignore_merges': way.whole_words,
            'vocab': vocab,
            'merges': _merges(_list(metadata, 'merges', None, (str,)), vocab),
        },
    }


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


def _sentencepiece(metadata: Mapping[str, Any], pieces: Sequence[Piece], bos: str | None) -> dict[str, Any]:
    space_first = _get(metadata, 'add_space_prefix', bool, True)
    return sentencepiece_json.to_json(Pieces(tuple(pieces), space_first), bos=bos)


# ---- out ----


def to_gguf(files: Mapping[str, bytes], *, vocab_size: int) -> dict[str, Any]:
    """The keys tokenizer.* of a file, with as many tokens as the model's tables have rows.

    Raises UsageError if a GGUF file cannot say what the tokenizer does.
    """
    ours = loaded(files)
    if JSON_FILE in files:
        found = _from_json(files)
    else:
        found = _keys_of_pieces(sentencepiece_json.read_model(files[MODEL_FILE]))
    found |= _symbol_ids(files, ours)
    if UNKNOWN in found['token_type']:
        found['unknown_token_id'] = found['token_type'].index(UNKNOWN)
    return {key if key == _TEMPLATE else _KEY + key: value for key, value in _filled(found, vocab_size).items()}


def unlike_llama_cpp(files: Mapping[str, bytes]) -> list[str]:
    """Notes on what a GGUF file cannot say of a tokenizer, so that llama.cpp gives other ids."""
    ours = loaded(files)
    notes = []
    if ours.prepend_scheme == 'first':
        notes.append('puts a space before the text after each control symbol, and this tokenizer only at the beginning')
    if ours.strips_left or ours.strips_right:
        notes.append('keeps white space beside control symbols that this tokenizer leaves out')
    return [f'llama.cpp {note}: prompts with them have other ids there' for note in notes]


def _filled(found: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """With a token for each row of the model's tables."""
    size = len(found['tokens'])
    if size > vocab_size:
        raise UsageError(f'the tokenizer has {size} ids, and the model {vocab_size} rows for them: name its own')
    more = range(size, vocab_size)
    filled = found | {'tokens': [*found['tokens'], *(f'[PAD{i}]' for i in more)]}
    filled['token_type'] = [*found['token_type'], *[UNUSED] * len(more)]
    if 'scores' in found:
        filled['scores'] = [*found['scores'], *[min(found['scores']) - 1] * len(more)]
    return filled


def _symbol_ids(files: Mapping[str, bytes], ours: Tokenizer) -> dict[str, Any]:
    config = _read(files, CONFIG_FILE) | {k: v for k, v in _read(files, MAP_FILE).items() if v}
    text = files[TEMPLATE_FILE].decode(errors='replace') if TEMPLATE_FILE in files else None
    template = None if text is None else chat_template.ChatTemplate(text)
    end = _turn_end(template, ours)
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


def _turn_end(template: chat_template.ChatTemplate | None, ours: Tokenizer) -> int:
    """What ends an answer; <eos> where the template does not show it."""
    try:
        return template.stop_ids(ours)[0] if template else ours.eos_id
    except UsageError:
        return ours.eos_id


def _read(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return json.loads(files.get(name, b'{}'))


def _keys_of_pieces(vocabulary: Pieces) -> dict[str, Any]:
    return {
        'model': 'llama',
        'pre': 'default',
        'tokens': [p.text.replace(SPACE, ' ') if p.kind == USER else p.text for p in vocabulary.pieces],
        'scores': [p.score for p in vocabulary.pieces],
        'token_type': [p.kind for p in vocabulary.pieces],
        'add_space_prefix': vocabulary.space_first,
    }


def _from_json(files: Mapping[str, bytes]) -> dict[str, Any]:
    spec = tokenizer_json.parse(files[JSON_FILE])
    if spec['model']['type'] != 'BPE':
        raise UsageError(f'a GGUF file holds no tokenizer of the kind {spec["model"]["type"]} that lm could write')
    if tokenizer_json.is_byte_level(spec):
        if tokenizer_json.prepend_scheme(spec) != 'never':
            raise UsageError('a GGUF file cannot say that a byte-level tokenizer puts a space before a text')
        return _keys_of_bytes(spec)
    return _keys_of_pieces(sentencepiece_json.from_json(spec))


def _keys_of_bytes(spec: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {i: NORMAL for i in spec['model']['vocab'].values()}
    names = {i: name for name, i in spec['model']['vocab'].items()}
    for token in spec.get('added_tokens') or ():
        names[token['id']] = token['content']
        kinds[token['id']] = CONTROL if token['special'] else USER
    size = max(names) + 1
    return {
        'model': 'gpt2',
        'pre': pre_tokenizers.name_of(spec),
        'tokens': [names.get(i, f'[PAD{i}]') for i in range(size)],
        'token_type': [kinds.get(i, UNUSED) for i in range(size)],
        'merges': [pair if isinstance(pair, str) else ' '.join(pair) for pair in spec['model']['merges']],
    }
