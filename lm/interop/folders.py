"""Names what lies at a path where a model was to be and is none, and what to do instead."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

CONFIG, ADAPTER = 'config.json', 'adapter_config.json'
_WEIGHTS = ('*.safetensors', '*.bin', '*.pt', '*.pth', '*.ckpt', '*.h5', '*.msgpack', '*.onnx')
_NAMED = 3  # of the models in a folder


def reason(path: epath.PathLike) -> str:
    """The rest of a sentence that begins with the path, as 'is empty: name another'."""
    folder = epath.Path(path)
    if not folder.exists():
        return 'does not exist: name a folder or a file that does'
    if not folder.is_dir():
        return 'is neither a folder nor a .gguf file: name one'
    if (folder / ADAPTER).exists():
        return f'is an adapter of peft: python -m lm.convert {folder} DST --base=RUN makes a run of it'
    if run := _run_around(folder):
        return f'is a part of the run {run}: name that'
    if inside := _models_in(folder):
        return f'is no model, and holds some: name one of them ({", ".join(inside)})'
    if any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
        return f'has weights, and no {CONFIG} that says of which model: get that, too'
    if not any(True for _ in folder.iterdir()):
        return 'is empty: name another'
    return f'has no {CONFIG}, and not one .gguf file: name a run, a Hugging Face folder or a GGUF file'


def _run_around(folder: epath.Path) -> epath.Path | None:
    """The run in whose directory a folder lies."""
    around = (folder.parent, folder.parent.parent)
    return next((parent for parent in around if 'config' in _object(parent / CONFIG)), None)


def _models_in(folder: epath.Path) -> list[str]:
    """The first models that lie in a folder, as a trainer's checkpoints or the snapshots of the hub's cache do."""
    places = [place for place in (folder, folder / 'snapshots') if place.is_dir()]
    children = (child for place in places for child in sorted(place.iterdir()))
    models = (str(child) for child in children if child.suffix == '.gguf' or _holds_model(child))
    return list(itertools.islice(models, _NAMED))


def _holds_model(path: epath.Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (CONFIG, ADAPTER))


def _object(file: epath.Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
