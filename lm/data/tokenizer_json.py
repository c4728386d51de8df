"""tokenizer.json files: byte-level BPE (GPT-2, Llama 3, Qwen) and pieces with byte fallback (Llama 2, Gemma).

They are read by Hugging Face's library `tokenizers` (of the extra [hub]) and changed where text would not come back or
a control symbol could be typed: NFC and dropout are off, nothing is cut off or filled up. What changes text in another
way is refused, but for control characters as U+0004 and unassigned ones that a vocabulary may lack: the library leaves
those out. The ids of a text that is in NFC, as nearly all is, are those that the library gives, with <bos> and a space
before it where the file says so; a text that begins with a space gets another one, as SentencePiece and llama.cpp have
it, for else that space would not come back.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lm.data.tokenizer import JSON_FILE, SPACE, Tokenizer, gives_back
from lm.errors import UsageError, install

# Which of its symbols is which stands beside a tokenizer.json, and so does the chat template.
CONFIG_FILE, MAP_FILE, GENERATION_FILE = 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json'
_BESIDE = (CONFIG_FILE, MAP_FILE, GENERATION_FILE, 'chat_template.jinja')
# The usual names, where it does not.
_USUAL = {
    'bos': ('<bos>', '<s>', '<|begin_of_text|>', '<|startoftext|>'),
    'eos': ('<eos>', '</s>', '<|end_of_text|>', '<|endoftext|>'),
    'pad': ('<pad>', '<|pad|>', '<|finetune_right_pad_id|>', '[PAD]'),
}
_TURN_ENDS = ('<|end|>', '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<end_of_turn>')
_KEEP_TEXT = ('ByteLevel', 'Metaspace', 'Split', 'Digits', 'Punctuation', 'UnicodeScripts', 'Sequence')
_MOST_IDS = 1 << 24  # there is a place for each id up to the largest: a damaged one must not take all memory
# C0, C1 and F5 to FF are in no UTF-8; F1 and F2 begin characters of planes that Unicode has not assigned.
_IN_NO_TEXT = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
# Some vocabularies (SmolLM2's) lack control characters that their texts did not hold, and leave them out of a text.
_HARDLY_IN_TEXT = {*range(0x01, 0x09), 0x0B, *range(0x0E, 0x20), 0x7F}


def load(path: epath.Path) -> Tokenizer:
    """From a tokenizer.json and the files beside it. Raises UsageError, as the rest of a sentence on it, if it is
    damaged, or loses or changes text."""
    beside = {name: path.parent / name for name in _BESIDE}
    saved = {JSON_FILE: path.read_bytes()} | {n: file.read_bytes() for n, file in beside.items() if file.exists()}
    try:
        return from_files(saved)
    except (KeyError, TypeError, AttributeError) as e:
        raise UsageError(f'is damaged ({type(e).__name__}: {e})') from e


def from_files(saved: Mapping[str, bytes]) -> Tokenizer:
    """From the contents of the files. Raises UsageError with what is wrong with them, KeyError and the like if they are
    no description of a tokenizer.
    """
    spec = parse(saved[JSON_FILE])
    names = _names(spec, saved)
    edges = _edges(spec, saved, names)
    _make_plain(spec)
    _check_lossless(spec)
    library = _build(spec)
    vocab, added = library.get_vocab(with_added_tokens=False), library.get_added_tokens_decoder()
    ids = vocab | {token.content: i for i, token in added.items()}
    if names['eos'] not in ids:
        raise UsageError(f'has no token {names["eos"]}, which is to end a text')
    bos, eos, pad = (ids.get(names[key], ids[names['eos']]) for key in ('bos', 'eos', 'pad'))
    controls = {token.content: i for i, token in sorted(added.items()) if token.special}
    controls |= {name: ids[name] for name in (*names.values(), *_unknown(spec['model'])) if name in ids}
    spell, byte_names = _spelling(spec, vocab)
    pieces = _pieces(vocab, added, spell, set(controls.values()))
    encode: Callable[[list[str]], list[list[int]]] = lambda texts: [
        found.ids for found in library.encode_batch_fast(texts, add_special_tokens=False)
    ]
    told = [] if edges == _PLAIN_EDGES else [repr(edges)]
    identity = hashlib.blake2b(saved[JSON_FILE] + json.dumps([bos, eos, pad, *told]).encode(), digest_size=8)
    left, right = (frozenset(controls[name] for name in side if name in controls) for side in edges[2:])
    tokenizer = Tokenizer(
        pieces=pieces, controls=controls, bos_id=bos, eos_id=eos, pad_id=pad,
        stop_ids=_stop_ids(eos, controls, saved, len(pieces)), fingerprint=identity.hexdigest(), saved=saved,
        encode_plain=encode, around=_around(encode, pieces, [*controls, *byte_names], spec),
        byte_ids=tuple(vocab.get(name, -1) for name in byte_names), adds_bos=edges.adds_bos,
        prepend_scheme=edges.scheme, strips_left=left, strips_right=right,
    )  # fmt: skip
    if not gives_back(tokenizer):
        raise UsageError('changes text, and losses per byte would be of another text')
    return tokenizer


# ---- which symbol is which ----


def _names(spec: dict[str, Any], saved: Mapping[str, bytes]) -> dict[str, str]:
    """The names of the symbols 'bos', 'eos' and 'pad'; without one of its own, bos and pad are eos.

    A padded place is known by its weight and segment, never by its id.
    """
    mapped = {key: name for key, name in _parse(saved.get(MAP_FILE, b'{}'), MAP_FILE).items() if name}
    config = _parse(saved.get(CONFIG_FILE, b'{}'), CONFIG_FILE) | mapped
    added = {token['content'] for token in spec.get('added_tokens') or ()}
    found = {}
    for key, usual in _USUAL.items():
        named = config.get(f'{key}_token', next((name for name in usual if name in added), None))
        found[key] = named.get('content') if isinstance(named, dict) else named
    if not found['eos']:
        raise UsageError(f'names no token that ends a text (eos_token in {CONFIG_FILE} beside it)')
    return {key: name or found['eos'] for key, name in found.items()}


class _Edges(NamedTuple):
    """Begin and stripping of a text, as a `Tokenizer` says it; `left` and `right` name the symbols that strip."""

    adds_bos: bool
    scheme: str
    left: tuple[str, ...]
    right: tuple[str, ...]


_PLAIN_EDGES = _Edges(True, 'never', (), ())


def _edges(spec: dict[str, Any], saved: Mapping[str, bytes], names: Mapping[str, str]) -> _Edges:
    added = spec.get('added_tokens') or ()
    strips = (tuple(token['content'] for token in added if token.get(side)) for side in ('lstrip', 'rstrip'))
    return _Edges(_adds_bos(spec, saved, names), prepend_scheme(spec), *strips)


def _adds_bos(spec: dict[str, Any], saved: Mapping[str, bytes], names: Mapping[str, str]) -> bool:
    """Tells whether a text begins with <bos>: as the configuration says, else as the part of a tokenizer.json that puts
    symbols around a text does. Never with what only stands in for a <bos> that there is none of."""
    config = _parse(saved.get(CONFIG_FILE, b'{}'), CONFIG_FILE)
    puts = names['bos'] in first_symbols(spec)
    if names['bos'] == names['eos'] and not config.get('bos_token') and not puts:
        return False
    told = config.get('add_bos_token')
    return told if isinstance(told, bool) else puts


def first_symbols(spec: Mapping[str, Any]) -> list[str]:
    """The names of the symbols that a tokenizer.json puts before a text."""
    processor = spec.get('post_processor') or {}
    templates = [part.get('single') or [] for part in (processor, *processor.get('processors', ()))]
    return [single[0]['SpecialToken']['id'] for single in templates if single and 'SpecialToken' in single[0]]


def _stop_ids(eos: int, controls: Mapping[str, int], saved: Mapping[str, bytes], size: int) -> tuple[int, ...]:
    more = _parse(saved.get(GENERATION_FILE, b'{}'), GENERATION_FILE).get('eos_token_id') or []
    more = more if isinstance(more, list) else [more]
    if wrong := [i for i in more if type(i) is not int or not 0 <= i < size]:
        raise UsageError(f'is damaged ({GENERATION_FILE}: {wrong[0]!r} is none of its {size} ids)')
    ends = [controls[name] for name in (*_USUAL['eos'], *_TURN_ENDS) if name in controls]
    return tuple(dict.fromkeys([eos, *more, *ends]))


def _unknown(model: dict[str, Any]) -> list[str]:
    """The name of the token for what is in no piece, if there is one."""
    number = model.get('unk_id')
    name = model.get('unk_token') if number is None else model['vocab'][number][0]
    return [name] if name else []


# ---- the description, and what is changed in it ----


def _parse(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise UsageError(f'is damaged ({name}: {e})') from e
    if not isinstance(value, dict):
        raise UsageError(f'is damaged ({name} is no object)')
    return value


def parse(content: bytes) -> dict[str, Any]:
    """A tokenizer.json, its model with the type that older ones leave out. Raises UsageError if it is damaged."""
    spec = _parse(content, JSON_FILE)
    model = spec.get('model')
    if not isinstance(model, dict):
        raise UsageError('is damaged (it has no model)')
    plain = 'WordPiece' if 'max_input_chars_per_word' in model else 'WordLevel'
    kind = 'BPE' if 'merges' in model else 'Unigram' if isinstance(model.get('vocab'), list) else plain
    model.setdefault('type', kind)
    return spec


def _build(spec: dict[str, Any]) -> Any:
    """The library's tokenizer, for which the characters of a special token are characters."""
    try:
        import tokenizers
    except ImportError:
        raise UsageError(f'needs the package tokenizers ({install("hub")})') from None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as e:  # the library raises nothing more exact
        raise UsageError(f'is damaged ({" ".join(str(e).split())[:200]})') from e
    library.encode_special_tokens = True
    return library


def _make_plain(spec: dict[str, Any]) -> None:
    """Turns off, in place, what puts something around a text, which is for us to do, or changes it for no gain."""
    spec.update(truncation=None, padding=None, post_processor=None)
    spec['normalizer'] = _without(spec.get('normalizer'), lambda node: node['type'] == 'NFC' or _prepends(node))
    if 'dropout' in spec['model']:
        spec['model']['dropout'] = None
    for node in _nodes(spec.get('pre_tokenizer')):
        if node['type'] == 'Metaspace':
            node.pop('add_prefix_space', None)
            node['prepend_scheme'] = 'never'
        elif node['type'] == 'ByteLevel':
            node['add_prefix_space'] = False
        elif node['type'] == 'Split' and node['behavior'] == 'Removed' and node.get('invert'):
            node.update(behavior='Isolated', invert=False)  # the same, but for what the pattern does not match
    for token in spec.get('added_tokens') or ():
        token.update(lstrip=False, rstrip=False)


def _prepends(node: Mapping[str, Any]) -> bool:
    """Tells whether a part of a normalizer puts a space before a text."""
    return node['type'] == 'Prepend' and node['prepend'] in (' ', SPACE)


def prepend_scheme(spec: Mapping[str, Any]) -> str:
    """The scheme by which a tokenizer.json puts a space before a text: 'never', 'first' or 'always', as in its library.

    Raises UsageError if it puts one before each word.
    """
    if any(map(_prepends, _nodes(spec.get('normalizer')))):
        return 'always'
    nodes = list(_nodes(spec.get('pre_tokenizer')))
    for at, node in enumerate(nodes):
        puts = node.get('add_prefix_space', node['type'] == 'Metaspace')
        if node['type'] == 'Metaspace' and (scheme := node.get('prepend_scheme', 'always' if puts else 'never')):
            return scheme
        if node['type'] == 'ByteLevel' and puts:
            if any(before['type'] != 'Sequence' for before in nodes[:at]):
                raise UsageError('puts a space before each part of a text, so text does not come back')
            return 'always'
    return 'never'


def differences(spec: Mapping[str, Any]) -> list[str]:
    """Notes on the texts that get other ids than the makers', since they would not come back from those."""
    found = []
    if any(node['type'] == 'NFC' for node in _nodes(spec.get('normalizer'))):
        found.append('text that is not in NFC is kept as it is')
    if prepend_scheme(spec) != 'never' and not any(map(_prepends, _nodes(spec.get('normalizer')))):
        found.append('a text that begins with a space keeps it, beside the one that is put before it')
    if any(not t.get('special') and (t.get('lstrip') or t.get('rstrip')) for t in spec.get('added_tokens') or ()):
        found.append('white space beside added tokens is kept')
    return found


def _without(node: Any, drop: Callable[[Mapping[str, Any]], bool]) -> Any:
    """A normalizer without some of its parts."""
    if not node or drop(node):
        return None
    if node['type'] != 'Sequence':
        return node
    parts = [part for part in (_without(part, drop) for part in node['normalizers']) if part]
    return {**node, 'normalizers': parts} if parts else None


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that it is made of."""
    if node:
        yield node
        for part in (*node.get('normalizers', ()), *node.get('pretokenizers', ())):
            yield from _nodes(part)


def is_byte_level(spec: dict[str, Any]) -> bool:
    parts = [*_nodes(spec.get('normalizer')), *_nodes(spec.get('pre_tokenizer'))]
    return any(part['type'] == 'ByteLevel' for part in parts)


def _check_lossless(spec: dict[str, Any]) -> None:
    """Raises UsageError for parts that change or lose text, which a probe alone might not show."""
    model = spec['model']
    if model['type'] not in ('BPE', 'Unigram'):
        raise UsageError(f'is a {model["type"]}, which loses text: lm reads BPE and Unigram')
    if not (is_byte_level(spec) or model.get('byte_fallback')):
        raise UsageError('is neither a byte-level one nor one with byte fallback, so text is lost')
    if model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'):
        raise UsageError('marks the parts of words with a prefix or suffix, so text does not come back')
    for node in _nodes(spec.get('normalizer')):
        is_space = node['type'] == 'Replace' and node['pattern'] == {'String': ' '} and node['content'] == SPACE
        if node['type'] not in ('Sequence', 'ByteLevel') and not is_space:
            raise UsageError(f'changes text (normalizer {node["type"]}), and losses per byte would be of another text')
    for node in _nodes(spec.get('pre_tokenizer')):
        if node['type'] not in _KEEP_TEXT or 'Removed' in (node.get('behavior'), node.get('type')):
            raise UsageError(f'loses text (pre-tokenizer {node["type"]}), and losses per byte would be of another text')


# ---- the bytes of pieces ----

Spelling = tuple[Callable[[str], bytes], list[str]]


def _spelling(spec: dict[str, Any], vocab: Mapping[str, int]) -> Spelling:
    """(bytes of a piece, the piece of each byte). Raises UsageError unless all bytes of text have pieces."""
    spell, names = _byte_level() if is_byte_level(spec) else _byte_fallback()
    spared = _IN_NO_TEXT | _HARDLY_IN_TEXT
    if lacking := [b for b in range(256) if b not in spared and names[b] not in vocab]:
        raise UsageError(f'lacks {len(lacking)} of the bytes that text is made of, so text is lost')
    return spell, names


def _byte_level() -> Spelling:
    """(bytes of a piece, the piece of each byte) where a byte is written as one character.

    GPT-2's way: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on in turn.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    names = [chr(b) if b in plain else chr(next(others)) for b in range(256)]
    values = {name: b for b, name in enumerate(names)}

    def spell(piece: str) -> bytes:
        return bytes(values[c] for c in piece) if all(c in values for c in piece) else piece.encode()

    return spell, names


def _byte_fallback() -> Spelling:
    """(bytes of a piece, the piece of each byte) where pieces are text, U+2581 is a space and <0x0A> a byte."""
    names = [f'<0x{b:02X}>' for b in range(256)]
    values = {name: bytes([b]) for b, name in enumerate(names)}
    return lambda piece: values.get(piece) or piece.replace(SPACE, ' ').encode(), names


def _pieces(
    vocab: Mapping[str, int], added: Mapping[int, Any], spell: Callable[[str], bytes], silent: set[int]
) -> tuple[bytes, ...]:
    """The bytes of each id up to the largest, whatever ids there are between. Raises UsageError if that is absurd."""
    largest = max([*vocab.values(), *added])
    if largest >= _MOST_IDS:
        raise UsageError(f'is damaged (it has the id {largest}, and {_MOST_IDS:,} are the most)')
    pieces = [b''] * (largest + 1)
    for piece, i in vocab.items():
        pieces[i] = spell(piece)
    for i, token in added.items():  # not written in the alphabet of the bytes
        pieces[i] = token.content.replace(SPACE, ' ').encode()
    for i in silent:
        pieces[i] = b''
    return tuple(pieces)


def _around(
    encode: Callable[[list[str]], list[list[int]]], pieces: Sequence[bytes], names: list[str], spec: dict[str, Any]
) -> re.Pattern[str] | None:
    """Finds all that is encoded byte by byte: the names of symbols and bytes of which the model makes a symbol or a
    byte when they stand in a text, and a U+2581 that would come back as a space."""
    spelled = [b''.join(pieces[i] for i in ids) for ids in encode(names)]
    taken = [name for name, found in zip(names, spelled, strict=True) if found != name.encode()]
    parts = [re.escape(name) for name in sorted(taken, key=len, reverse=True)]
    if not is_byte_level(spec):
        parts.append(f'{SPACE}+')
    return re.compile(f'({"|".join(parts)})') if parts else None
