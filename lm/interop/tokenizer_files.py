"""What the readers and writers of tokenizers share: JSON out, and whether lm can use what came out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm.data import tokenizer_json
from lm.data.chat_template import TEMPLATE_FILE
from lm.data.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer, from_model
from lm.errors import UsageError


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
