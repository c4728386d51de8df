"""What the readers and writers of tokenizers share: JSON out, and whether lm can use what came out."""

import json
from collections.abc import Mapping
from typing import Any

from lm.data import tokenizer_json
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, from_model
from lm.errors import UsageError


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def checked(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, if lm can use them. Raises UsageError otherwise."""
    loaded(files)
    return files


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
