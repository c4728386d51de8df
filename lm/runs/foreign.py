"""Models of other forms where a run is asked for: a Hugging Face folder or a GGUF file is a run that was never trained.

Nothing is written beside it. Its settings are made of what the file says of its graph; its tokenizer is unpacked into
the cache; its weights are read when a run's checkpoint would be, tensor by tensor.
"""

import functools
import hashlib
from typing import Any

from etils import epath

from lm import config as configs
from lm import files
from lm.config import Config, split_run
from lm.data import cache
from lm.data.chat_template import TEMPLATE_FILE
from lm.errors import UsageError
from lm.interop import opening
from lm.interop.opened import Opened
from lm.runs.saved_config import About

MOST_SEQ_LEN = 2048  # of such a model's own setting; what it can read is model.context


def find(run: str) -> Opened | None:
    """The model that lies at a path and is no run; None: a run, or none at all.

    Raises UsageError for what we cannot express, and for 'MODEL@STEP'.
    """
    folder, step = split_run(run)
    form = opening.form_of(folder)
    if form not in ('huggingface', 'gguf'):
        return None
    if step is not None:
        raise UsageError(f'{folder} is no run and has no checkpoints: leave out @{step}')
    return _open(folder, form)


_open = functools.cache(opening.open_model)  # a process reads a header once, however often it asks


def saved(opened: Opened) -> dict[str, Any]:
    """What the config.json of a run of it would say."""
    about, config = about_of(opened)._asdict(), config_of(opened).to_dict()
    return {'config': config, 'about': about, 'parents': {}, 'data': None, 'converted_from': opened.where}


def tokenizer_folder(opened: Opened) -> str:
    """A folder with the files of its tokenizer. Raises UsageError if it has none."""
    if not opened.tokenizer:
        raise UsageError(f'{opened.where}: has no tokenizer: put its tokenizer.json or tokenizer.model there')
    hashes = {name: hashlib.blake2b(content, digest_size=8).hexdigest() for name, content in opened.tokenizer.items()}
    return str(cache.build('tokenizers-of-models', hashes, lambda folder: write_tokenizer(opened, folder)))


def write_tokenizer(opened: Opened, folder: epath.Path) -> None:
    """Writes the files of its tokenizer."""
    for name, content in opened.tokenizer.items():
        files.write_bytes(folder / name, content)


def about_of(opened: Opened) -> About:
    """What it is good for."""
    if opened.scored:
        return About('pairs', 'scores')
    return About('chat', 'answers') if TEMPLATE_FILE in opened.tokenizer else About('text', 'text')


def config_of(opened: Opened) -> Config:
    """The settings of a run that has this model and was never trained. Raises UsageError for settings that we do not
    know."""
    config = configs.base()
    with config.unlocked():
        unknown = sorted(set(opened.model) - set(config.model))
        if unknown:
            raise UsageError(f'{opened.where} has model.{unknown[0]}, which this version does not know: use a newer lm')
        config.model.update(dict(opened.model))
    config.seq_len = min(config.model.context or config.seq_len, MOST_SEQ_LEN)
    configs.check(config)
    config.steps = 0
    config.stage = 'reward' if opened.scored else 'sft' if TEMPLATE_FILE in opened.tokenizer else 'pretrain'
    return config
