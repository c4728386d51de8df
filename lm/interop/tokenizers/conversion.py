"""A tokenizer's files, between a run's tokenizer/ and a folder of Hugging Face's, or a GGUF file's keys tokenizer.*.

A run holds tokenizer.json as it came, or the tokenizer.model that lm has trained; `transformers` loads that as a
tokenizer.json with the same ids. There, unlike in lm, the name of a control symbol in a text is that symbol, unless the
text is encoded with split_special_tokens=True.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import tokenizer, tokenizer_json
from lm.data.chat_template import TEMPLATE_FILE, ChatTemplate, chosen
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, SPACE, Tokenizer
from lm.data.tokenizer_json import CONFIG_FILE, GENERATION_FILE, MAP_FILE
from lm.errors import UsageError
from lm.interop.tokenizers import pre_tokenizers, sentencepiece_json
from lm.interop.tokenizers.files import checked, dump, loaded, template_of
from lm.interop.tokenizers.pre_tokenizers import Way
from lm.interop.tokenizers.sentencepiece_json import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, Piece, Pieces

_TEMPLATE_JSON = 'chat_template.json'
_ADDED_FILE = 'added_tokens.json'
_FAMILY_CONFIG = 'config.json'
_USUAL_BOS = ('<s>', '<bos>')  # of a tokenizer.model without the file that names it
_KEY = 'tokenizer.ggml.'
_TEMPLATE = 'tokenizer.chat_template'
_MOST_TOKENS = 1 << 22
_LONGEST_TOKEN = 1 << 10  # characters; to list the splits of a piece takes time with the square of it
_FILLER = re.compile(r'\[PAD\d+\]')
_SURROGATE = re.compile('[\ud800-\udfff]')
_SYMBOLS = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
_ENDS = ('eos', 'eot', 'eom')


# ---- Hugging Face ----


def to_huggingface(files: Mapping[str, bytes], *, context: int | None) -> dict[str, bytes]:
    """A run's files as `transformers` loads them. `context` is the most tokens that the model reads at once.

    Raises UsageError if there is no tokenizer, or it is damaged.
    """
    ours = loaded(files)
    if JSON_FILE in files:
        return _as_read(files, ours)
    spec = sentencepiece_json.to_json(sentencepiece_json.read_model(files[MODEL_FILE]), bos='<bos>')
    symbols = {f'{name}_token': f'<{name}>' for name in ('bos', 'eos', 'unk', 'pad')}
    template = template_of(files)  # what only continues text has none
    config = {
        **symbols, 'additional_special_tokens': list(tokenizer.CHAT_MARKERS),
        'added_tokens_decoder': {t['id']: {k: v for k, v in t.items() if k != 'id'} for t in spec['added_tokens']},
        'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': True, 'add_eos_token': False,
        'clean_up_tokenization_spaces': False,
        'chat_template': template,  # where releases before 4.53 look for it
        'model_max_length': context,
    }  # fmt: skip
    found = {
        JSON_FILE: spec, CONFIG_FILE: {key: value for key, value in config.items() if value is not None},
        MAP_FILE: symbols,
        GENERATION_FILE: {'bos_token_id': ours.bos_id, 'eos_token_id': ours.stop_ids, 'pad_token_id': ours.pad_id},
    }  # fmt: skip
    beside = {} if template is None else {TEMPLATE_FILE: template.encode()}
    return {name: dump(value) for name, value in found.items()} | beside


def _as_read(files: Mapping[str, bytes], ours: Tokenizer) -> dict[str, bytes]:
    """A run's files such that `transformers` gives the run's ids: it reads a tokenizer.json as it is only where no
    class of its own is named, puts a <bos> before a text only if that file says so, and takes a template from the
    configuration, too.
    """
    spec, config = tokenizer_json.parse(files[JSON_FILE]), _parse(files, CONFIG_FILE)
    bos = next((name for name, i in ours.controls.items() if i == ours.bos_id), None)
    changed = {}
    if ours.adds_bos != (bos in tokenizer_json.first_symbols(spec)):
        spec['post_processor'] = sentencepiece_json.put_before(bos, ours.bos_id) if ours.adds_bos and bos else None
        changed[JSON_FILE] = dump(spec)
    dropped = ('auto_map', 'chat_template')  # there is no code in the folder
    wanted = {key: value for key, value in config.items() if key not in dropped}
    wanted |= {'tokenizer_class': 'PreTrainedTokenizerFast', 'add_bos_token': ours.adds_bos}
    wanted |= {'chat_template': template_of(files)} if TEMPLATE_FILE in files else {}
    if wanted != config:
        changed[CONFIG_FILE] = dump(wanted)
    return {**files, **changed}


def replaced_in(model_type: str, files: Mapping[str, bytes]) -> bool:
    """Tells whether `transformers` (5.24) reads these files with other ids than they give, since it has its own way to
    split a text for an architecture, whatever a folder says."""
    if model_type != 'qwen2':
        return False
    if JSON_FILE not in files:
        return True
    spec = tokenizer_json.parse(files[JSON_FILE])
    try:
        return tokenizer_json.prepend_scheme(spec) != 'never' or pre_tokenizers.name_of(spec) != 'qwen2'
    except UsageError:
        return True


def from_huggingface(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files that a run's tokenizer/ is to hold, from the small files of a folder of Hugging Face's.

    Raises UsageError if there is no tokenizer, or lm cannot use it.
    """
    kept = {name: files[name] for name in (JSON_FILE, CONFIG_FILE, MAP_FILE, GENERATION_FILE) if name in files}
    if JSON_FILE not in files:
        kept[JSON_FILE] = dump(_from_model(files))
    if GENERATION_FILE not in files and (ends := _parse(files, _FAMILY_CONFIG).get('eos_token_id')) is not None:
        kept[GENERATION_FILE] = dump({'eos_token_id': ends})
    template = _template(files)
    if template is not None:
        kept[TEMPLATE_FILE] = template.encode()
    return checked(kept)


def _parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b'{}'))
    except (ValueError, RecursionError) as e:
        raise UsageError(f'{name} is damaged ({e}): get the folder again') from e
    if not isinstance(value, dict):
        raise UsageError(f'{name} is damaged (it is no object): get the folder again')
    return value


def _template(files: Mapping[str, bytes]) -> str | None:
    """The chat template, which newer folders hold in a file of its own and older ones in one of two others."""
    if TEMPLATE_FILE in files:
        return template_of(files) or None
    found = _parse(files, _TEMPLATE_JSON).get('chat_template') or _parse(files, CONFIG_FILE).get('chat_template')
    return chosen(found, CONFIG_FILE) or None


def _from_model(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The tokenizer.json of a folder that has a tokenizer.model alone."""
    if MODEL_FILE not in files:
        raise UsageError(f'the folder has no {JSON_FILE} and no {MODEL_FILE}: get its tokenizer, too')
    vocabulary = sentencepiece_json.read_model(files[MODEL_FILE])
    config = _parse(files, CONFIG_FILE)
    named = config.get('bos_token')
    named = named.get('content') if isinstance(named, dict) else named
    texts = {p.text for p in vocabulary.pieces}
    usual = (named, *_USUAL_BOS) if config.get('add_bos_token', True) else ()
    bos = next((name for name in usual if isinstance(name, str) and name in texts), None)
    spec = sentencepiece_json.to_json(vocabulary, bos=bos)
    return sentencepiece_json.with_added(spec, _more(files, config))


def _more(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """{id: (content, special)} of the tokens that stand beside a tokenizer.model."""
    try:
        found = {int(i): (str(name), True) for name, i in _parse(files, _ADDED_FILE).items()}
        decoder = config.get('added_tokens_decoder') or {}
        return found | {int(i): (str(t['content']), bool(t.get('special', False))) for i, t in decoder.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UsageError(f'the added tokens of the folder are damaged ({e}): mend {CONFIG_FILE}') from e


# ---- GGUF, in ----


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """A run's tokenizer/ from the metadata of a file, of which nothing is taken for true.

    Raises UsageError if its tokenizer is damaged, or of a kind that lm does not read.
    """
    model = _get(metadata, 'model', str, None)
    if model not in ('gpt2', 'llama'):
        raise UsageError(f'the tokenizer of the file is of the kind {str(model)[:40]!r}, and lm reads gpt2 and llama')
    pieces = _pieces_of(metadata)
    symbols = {key: i for key, name in _SYMBOLS.items() if (i := _id(metadata, name, len(pieces))) is not None}
    ends = [i for name in _ENDS if (i := _id(metadata, name, len(pieces))) is not None]
    if 'eos_token' not in symbols:
        raise UsageError(f'the tokenizer of the file names no token that ends a text ({_KEY}eos_token_id)')
    for key in {'pad_token', 'unk_token'} & set(symbols):
        if pieces[symbols[key]].kind == NORMAL:  # a word that is used for it stays a word
            del symbols[key]
    for i in (*symbols.values(), *ends):  # control symbols, whatever the file has them as
        pieces[i] = pieces[i]._replace(kind=UNKNOWN if pieces[i].kind == UNKNOWN else CONTROL)
    way = None if model == 'llama' else pre_tokenizers.way(_get(metadata, 'pre', str, 'default'))
    begins = _get(metadata, 'add_bos_token', bool, way is None or way.begins) and 'bos_token' in symbols
    bos = pieces[symbols['bos_token']].text if begins else None
    if way is None:
        vocabulary = Pieces(tuple(pieces), _get(metadata, 'add_space_prefix', bool, True))
        spec = sentencepiece_json.to_json(vocabulary, bos=bos)
    else:
        spec = _byte_level(metadata, pieces, way, bos)
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **{key: pieces[i].text for key, i in symbols.items()}}
    config |= {'add_bos_token': begins, 'add_eos_token': False, 'clean_up_tokenization_spaces': False}
    ends = {'eos_token_id': list(dict.fromkeys(ends))}
    files = {JSON_FILE: dump(spec), CONFIG_FILE: dump(config), GENERATION_FILE: dump(ends)}
    if template := metadata.get(_TEMPLATE):
        _check(isinstance(template, str), f'{_TEMPLATE} is no text')
        files[TEMPLATE_FILE] = template.encode(errors='replace')
    return checked(files)


def _check(good: bool, why: str) -> None:
    """Raises UsageError, with the reason, for a file that is not good."""
    if not good:
        raise UsageError(f'the file is damaged ({why}): get it again')


def _get(metadata: Mapping[str, Any], name: str, kind: type, otherwise: Any) -> Any:
    value = metadata.get(_KEY + name, otherwise)
    _check(value is otherwise or isinstance(value, kind), f'{_KEY}{name} is a {type(value).__name__}')
    return value


def _id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    """A token's id that the file names. Some write -1 or 2³² - 1 for none."""
    i = metadata.get(f'{_KEY}{name}_token_id')
    if i is None or i in (-1, 0xFFFFFFFF):
        return None
    _check(type(i) is int and 0 <= i < size, f'{_KEY}{name}_token_id is {i!r}, of {size} tokens')
    return i


def _list(metadata: Mapping[str, Any], name: str, size: int | None, kinds: tuple[type, ...]) -> Sequence[Any]:
    values = metadata.get(_KEY + name)
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise UsageError(f'the tokenizer of the file has no {_KEY}{name}: get it again')
    _check(size in (None, len(values)), f'{_KEY}{name} has {len(values)} values for {size} tokens')
    _check(all(type(value) in kinds for value in values), f'{_KEY}{name} holds what is no {kinds[0].__name__}')
    return values


def _pieces_of(metadata: Mapping[str, Any]) -> list[Piece]:
    tokens = _list(metadata, 'tokens', None, (str,))
    size, longest = len(tokens), max(map(len, tokens), default=0)
    _check(0 < size <= _MOST_TOKENS, f'{size:,} tokens, and {_MOST_TOKENS:,} are the most')
    _check(longest <= _LONGEST_TOKEN, f'a token of {longest:,} characters')
    _check(not any(map(_SURROGATE.search, tokens)), 'a token is no UTF-8')
    needs_scores = metadata[_KEY + 'model'] == 'llama'
    scores = _list(metadata, 'scores', size, (float, int)) if needs_scores else [0.0] * size
    kinds = _list(metadata, 'token_type', size, (int,)) if _KEY + 'token_type' in metadata else [NORMAL] * size
    wrong = next((kind for kind in kinds if not 0 <= kind <= BYTE), None)
    _check(wrong is None, f'a token of type {wrong}')
    _check(not any(map(math.isnan, scores)), f'{_KEY}scores holds what is no number')
    return [Piece(t, float(s), k or NORMAL) for t, s, k in zip(tokens, scores, kinds, strict=True)]


def _byte_level(metadata: Mapping[str, Any], pieces: Sequence[Piece], way: Way, bos: str | None) -> dict[str, Any]:
    kept = {i: p for i, p in enumerate(pieces) if not (p.kind == UNUSED and _FILLER.fullmatch(p.text))}
    vocab = {p.text: i for i, p in kept.items()}
    _check(len(vocab) == len(kept), f'{len(kept) - len(vocab)} tokens are there twice')
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
        known = at > 0 and left in vocab and right in vocab and left + right in vocab
        _check(known, f'it merges {line[:60]!r}, which are no tokens')
        pairs.append([left, right])
    return pairs


# ---- GGUF, out ----


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
    more = range(len(pieces), vocab_size)  # rows of the model's tables without a token
    listed: dict[str, Any] = {'tokens': [*(p.text for p in pieces), *(f'[PAD{i}]' for i in more)]}
    listed |= {'scores': [*(p.score for p in pieces), *[lowest] * len(more)]} if first['model'] == 'llama' else {}
    found = first | listed | {'token_type': kinds + [UNUSED] * len(more)} | last | ids
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
    config = _parse(files, CONFIG_FILE) | {k: v for k, v in _parse(files, MAP_FILE).items() if v}
    text = template_of(files)
    template = None if text is None else ChatTemplate(text)
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
