"""A tokenizer's files, between a run's tokenizer/ and a folder of Hugging Face's. Those of GGUF: tokenizer_gguf.py.

A run holds tokenizer.json as it came, or the tokenizer.model that lm has trained; `transformers` loads that as a
tokenizer.json with the same ids. There, unlike in lm, the name of a control symbol in a text is that symbol, unless the
text is encoded with split_special_tokens=True.
"""

import json
from collections.abc import Mapping
from typing import Any

from lm.data import tokenizer, tokenizer_json
from lm.data.chat_template import TEMPLATE_FILE, chosen
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer
from lm.data.tokenizer_json import CONFIG_FILE, GENERATION_FILE, MAP_FILE
from lm.errors import UsageError
from lm.interop import pre_tokenizers, sentencepiece_json
from lm.interop.tokenizer_files import checked, dump, loaded, template_of
from lm.interop.tokenizer_gguf import from_gguf, to_gguf, unlike_llama_cpp

__all__ = ['from_gguf', 'from_huggingface', 'replaced_in', 'to_gguf', 'to_huggingface', 'unlike_llama_cpp']

_TEMPLATE_JSON = 'chat_template.json'
_ADDED_FILE = 'added_tokens.json'
_FAMILY_CONFIG = 'config.json'
_USUAL_BOS = ('<s>', '<bos>')  # of a tokenizer.model without the file that names it


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
    wanted = {
        k: v for k, v in config.items() if k not in ('auto_map', 'chat_template')
    }  # there is no code in the folder
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
