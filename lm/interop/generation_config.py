"""generation_config.json: how a model's makers end and draw its answers, on the way in and out."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizer_json import GENERATION_FILE
from lm.errors import UsageError
from lm.interop import tokenizer_files

IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Settings that change what is drawn and that lm has not, each with the values that change nothing.
_UNFOLLOWED: Mapping[str, tuple[Any, ...]] = {
    'num_beams': (1,), 'penalty_alpha': (0,), 'typical_p': (1,), 'epsilon_cutoff': (0,), 'eta_cutoff': (0,),
    'top_h': (1,), 'no_repeat_ngram_size': (0,), 'encoder_repetition_penalty': (1,), 'min_length': (0,),
    'min_new_tokens': (0,), 'bad_words_ids': ([],), 'suppress_tokens': ([],), 'begin_suppress_tokens': ([],),
    'forced_bos_token_id': (), 'forced_eos_token_id': (), 'sequence_bias': ({}, []), 'guidance_scale': (1,),
    'exponential_decay_length_penalty': (), 'stop_strings': ([],), 'dola_layers': (),
}  # fmt: skip


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
    found, inside = tokenizer_files.loaded(files), range(rows)
    ends = [i for i in _ends(found, files) if i in inside]
    pad = found.pad_id if found.pad_id in inside else None
    ids: dict[str, Any] = dict(zip(IDS, (found.bos_id, ends[0] if len(ends) == 1 else ends, pad), strict=True))
    own = json.loads(files.get(GENERATION_FILE, b'{}'))
    settings = ids | own | {'eos_token_id': ids['eos_token_id']}
    return {**files, GENERATION_FILE: tokenizer_files.dump(settings)}, ids


def _ends(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> list[int]:
    """The ids that end a text, or an answer in the words of the template."""
    ends = list(tokenizer.stop_ids)
    if (template := tokenizer_files.template_of(files)) is not None:
        with contextlib.suppress(UsageError):  # a template that does not fit: it is the run's all the same
            ends += ChatTemplate(template).stop_ids(tokenizer)
    return list(dict.fromkeys(ends))
