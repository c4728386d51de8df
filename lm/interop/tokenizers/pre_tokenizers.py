"""Ways to split a text before its pieces are merged: GGUF names them, a tokenizer.json writes them out."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lm.errors import UsageError

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# The same to all that matters, as others write it.
_ENDINGS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_DIGIT, _DIGITS = r'\p{N}', r'\p{N}+'
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_GPT4 = _ENDINGS + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}' + _REST
_QWEN = _ENDINGS + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}' + _REST
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASES = (rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+', rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*')
_REST_OF_CASES = r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_TEKKEN = '|'.join(_CASES) + r'|\p{N}' + _REST_OF_CASES
_GPT4O = '|'.join(f'{case}{_ENDINGS}?' for case in _CASES) + r'|\p{N}{1,3}' + _REST_OF_CASES
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
# (behavior, invert) of a Split: what matches is a word, and with these patterns nothing is left over.
_ISOLATE = (('Isolated', False), ('Removed', True))


class Way(NamedTuple):
    """A way to split.

    Attributes:
      splits: regular expressions, each of which isolates its matches in what those before have left whole.
      whole_words: a word that is a piece is taken as it is, whatever the merges would make of it.
      begins: whether <bos> is put before a text where the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False


# By the name of the first of each line it is written.
_WAYS: Mapping[tuple[str, ...], Way] = {
    ('gpt-2', 'phi-2', 'olmo', 'mpt', 'jina-es', 'jina-de', 'roberta-bpe', 'trillion'): Way((_GPT2,)),
    ('smollm', 'starcoder', 'refact', 'command-r', 'codeshell', 'exaone', 'minerva-7b'): Way((_DIGIT, _GPT2)),
    ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'falcon-h1', 'pixtral', 'midm-2.0', 'lfm2'): Way(
        (_GPT4,), whole_words=True, begins=True
    ),
    ('dbrx', 'smaug-bpe', 'chatglm-bpe'): Way((_GPT4,)),
    ('qwen2', 'stablelm2', 'deepseek-r1-qwen', 'hunyuan', 'megrez'): Way((_QWEN,)),
    ('tekken',): Way((_TEKKEN,), whole_words=True, begins=True),
    ('gpt-4o', 'llama4'): Way((_GPT4O,)),
    ('default',): Way((r'[\p{P}\$\+<=>\^~\|]+', _GPT2, _DIGITS, '[0-9][0-9][0-9]')),
}


def way(name: str) -> Way:
    """Raises UsageError if there is no such way."""
    for names, found in _WAYS.items():
        if name in names:
            return found
    known = ', '.join(names[0] for names in _WAYS)
    raise UsageError(f'the tokenizer splits words in a way that lm does not know ({name[:40]!r}; known are {known})')


def name_of(spec: Mapping[str, Any]) -> str:
    """The name of the way in which a tokenizer.json splits. Raises UsageError if it has none."""
    splits, whole_words = tuple(_splits(spec)), bool(spec['model'].get('ignore_merges'))
    for names, found in _WAYS.items():
        if (found.splits, found.whole_words) == (splits, whole_words):
            return names[0]
    shown = ' then '.join(splits)[:200] or 'nothing'
    raise UsageError(f'a GGUF file has no name for the way in which the tokenizer splits words ({shown})')


def to_json(found: Way) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json."""
    whole = {'behavior': 'Isolated', 'invert': False}
    parts = [{'type': 'Split', 'pattern': {'Regex': split}, **whole} for split in found.splits]
    return {'type': 'Sequence', 'pretokenizers': [*parts, BYTE_LEVEL]}


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer of a tokenizer.json and all that it is made of."""
    if node:
        yield node
        for part in node.get('pretokenizers', ()):
            yield from nodes(part)


def _splits(spec: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions of `Way.splits`. Raises UsageError for a part that is none of them."""
    for node in nodes(spec.get('pre_tokenizer')):
        kind, way = node['type'], (node.get('behavior'), node.get('invert', False))
        if kind == 'ByteLevel' and node.get('use_regex', True):
            yield _GPT2
        elif kind == 'Digits':
            yield _DIGIT if node.get('individual_digits') else _DIGITS
        elif kind in ('Sequence', 'ByteLevel'):
            continue
        elif way in _ISOLATE and 'Regex' in node['pattern']:
            yield node['pattern']['Regex'].replace(_ENDINGS_SPELLED, _ENDINGS)
        else:
            raise UsageError(f'a GGUF file has no name for the way in which the tokenizer splits words ({kind})')
