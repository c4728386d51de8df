"""A tokenizer's files, as their readers and writers share them: whether lm can use what came out, and
generation_config.json, by which a model's makers end and draw its answers."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm.data import tokenizer_json
from lm.data.chat_template import TEMPLATE_FILE, ChatTemplate
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, from_model
from lm.data.tokenizer_json import GENERATION_FILE
from lm.errors import UsageError

IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Settings that change what is drawn and that lm has not, each with the values that change nothing.
_UNFOLLOWED: Mapping[str, tuple[Any, ...]] = {
    'num_beams': (1,), 'penalty_alpha': (0,), 'typical_p': (1,), 'epsilon_cutoff': (0,), 'eta_cutoff': (0,),
    'top_h': (1,), 'no_repeat_ngram_size': (0,), 'encoder_repetition_penalty': (1,), 'min_length': (0,),
    'min_new_tokens': (0,), 'bad_words_ids': ([],), 'suppress_tokens': ([],), 'begin_suppress_tokens': ([],),
    'forced_bos_token_id': (), 'forced_eos_token_id': (), 'sequence_bias': ({}, []), 'guidance_scale': (1,),
    'exponential_decay_length_penalty': (), 'stop_strings': ([],), 'dola_layers': (),
}  # fmt: skip


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def template_of(files: Mapping[str, bytes]) -> str | None:
    """The chat template that stands in a file of its own."""
    return files[TEMPLATE_FILE].decode(errors='replace') if TEMPLATE_FILE in files else None


def checked(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, if lm can use them. Raises UsageError otherwise."""
    loaded(files)
    return files


def fitted(files: Mapping[str, bytes], rows: int) -> tuple[dict[str, bytes], Sequence[str]]:
    """(the files without added tokens for which the model has no row, notes on these and on texts whose ids are not the
    makers'). A token for images is one in a model of text that was cut out of another.

    Raises UsageError if other tokens have no row, or lm cannot use what is left.
    """
    spec = json.loads(files[JSON_FILE])
    added, vocab = spec.get('added_tokens') or [], spec['model']['vocab']
    beyond = [token['content'] for token in added if token['id'] >= rows]
    vocab = {name: i for name, i in vocab.items() if name not in beyond} if isinstance(vocab, dict) else vocab
    size = 1 + max(vocab.values()) if isinstance(vocab, dict) else len(vocab)
    if size > rows:
        raise UsageError(f'the tokenizer has {size} ids, and the model {rows} rows for them: get the tokenizer again')
    notes = [f'its tokenizer: {note}' for note in tokenizer_json.differences(spec)]
    if not beyond:
        return dict(files), notes
    spec['added_tokens'] = [token for token in added if token['id'] < rows]
    spec['model']['vocab'] = vocab
    note = f'the model has no row for {", ".join(beyond)[:200]}: left out of the tokenizer'
    return checked({**files, JSON_FILE: dump(spec)}), [note, *notes]


def loaded(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a run's files. Raises UsageError if there is none, or lm cannot use it."""
    if JSON_FILE not in files and MODEL_FILE not in files:
        raise UsageError(f'the model has no tokenizer ({JSON_FILE} or {MODEL_FILE}), and is of no use without')
    try:
        return tokenizer_json.from_files(files) if JSON_FILE in files else from_model(files[MODEL_FILE])
    except UsageError as e:
        raise UsageError(f'the tokenizer {e}: name another') from e.__cause__
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UsageError(f'the tokenizer is damaged ({type(e).__name__}: {e}): name another') from e


# ---- generation_config.json ----


def unfollowed(files: Mapping[str, bytes]) -> list[str]:
    """Notes on what the makers set and lm does not do."""
    own = json.loads(files.get(GENERATION_FILE, b'{}'))
    set_ = [name for name, same in _UNFOLLOWED.items() if own.get(name) is not None and own[name] not in same]
    return [f'{GENERATION_FILE} has {", ".join(set_)}, which lm does not follow'] if set_ else []


def exported(files: Mapping[str, bytes], *, rows: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(the files with the ends of this model, the ids of its symbols for config.json).

    The other settings are those of the model that training began with. transformers stops at the ends that
    generation_config.json names, and at no others.
    """
    found, inside = loaded(files), range(rows)
    ends = [i for i in _ends(found, files) if i in inside]
    pad = found.pad_id if found.pad_id in inside else None
    ids: dict[str, Any] = dict(zip(IDS, (found.bos_id, ends[0] if len(ends) == 1 else ends, pad), strict=True))
    own = json.loads(files.get(GENERATION_FILE, b'{}'))
    settings = ids | own | {'eos_token_id': ids['eos_token_id']}
    return {**files, GENERATION_FILE: dump(settings)}, ids


def _ends(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> list[int]:
    """The ids that end a text, or an answer in the words of the template."""
    ends = list(tokenizer.stop_ids)
    if (template := template_of(files)) is not None:
        with contextlib.suppress(UsageError):  # a template that does not fit: it is the run's all the same
            ends += ChatTemplate(template).stop_ids(tokenizer)
    return list(dict.fromkeys(ends))
