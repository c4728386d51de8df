"""What the readers and writers of tokenizers share: JSON out, and whether lm can use what came out."""

import json
from collections.abc import Mapping
from typing import Any

from lm.data import tokenizer_json
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def checked(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files, if lm can use them. Raises UsageError otherwise."""
    loaded(files)
    return files


def loaded(files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a tokenizer.json and the files beside it. Raises UsageError if lm cannot use it."""
    try:
        return tokenizer_json.from_files(files)
    except UsageError as e:
        raise UsageError(f'the tokenizer {e}: name another') from e.__cause__
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UsageError(f'the tokenizer is damaged ({type(e).__name__}: {e}): name another') from e
