"""A run's directory: what lies in it, opening it to train, loading it to use."""

import json
import subprocess
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from lm import files, runtime, sharding
from lm.config import Config, differences
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.model import transformer
from lm.model.transformer import ModelConfig
from lm.training import checkpoint

VERSIONED = ('lm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'sentencepiece')


class Model(NamedTuple):
    """A trained model, ready to be used."""

    params: Any
    cfg: ModelConfig
    tokenizer: Tokenizer
    config: Mapping[str, Any]
    step: int


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The frozen shape of the model that a config (a ConfigDict, or a saved one) describes."""
    dtype = runtime.compute_dtype(config['precision']['compute'])
    return ModelConfig(**dict(config['model']), remat=config['remat'], dtype=dtype)


def read_config(run: str) -> dict[str, Any]:
    """The saved config.json of 'DIR' or 'DIR@STEP'. Raises UsageError if it is not a run."""
    folder = epath.Path(run.partition('@')[0])
    file = folder / 'config.json'
    if not file.exists():
        raise UsageError(f'{folder} is not a run: it has no config.json')
    try:
        saved = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f'{file} is damaged ({error}): restore it, or train in another workdir') from None
    if not isinstance(saved, dict) or not isinstance(saved.get('config'), dict):
        raise UsageError(f'{folder} is not a run: its config.json is of something else')
    return saved


def open_workdir(config: Config, workdir: epath.Path) -> dict[str, Any] | None:
    """The saved config.json if `workdir` holds this run already, None if it is new.

    Raises UsageError if it holds another run, or files that are no run.
    """
    if not workdir.exists():
        return None
    if not workdir.is_dir():
        raise UsageError(f'{workdir} is a file: name another --workdir')
    if not (workdir / 'config.json').exists():
        if any(not files.is_temporary(path) for path in workdir.iterdir()):
            raise UsageError(f'{workdir} holds files that are not a run: name another --workdir')
        return None
    saved = read_config(str(workdir))
    different = differences(saved['config'], config.to_dict())
    if different:
        keys = ', '.join(f'{k} ({old} there, {new} now)' for k, (old, new) in sorted(different.items())[:4])
        more = f' and {len(different) - 4} more' if len(different) > 4 else ''
        raise UsageError(f'{workdir} holds another run: {keys}{more}; name another --workdir')
    checkpoint.check_layout(workdir / 'checkpoints')
    return saved


def inherit_model(config: Config, chosen: Collection[str], workdir: epath.Path) -> None:
    """With init_from or branch_from, takes the model and the tokenizer of that run.

    Once `workdir` holds the run, its own config.json says all that the parent did, and the parent may be gone.

    Args:
      chosen: the settings that the command line names or moves.

    Raises:
      UsageError: one of them is a model.* that differs, or there is no such run or checkpoint.
    """
    parent = config.init_from or config.branch_from
    if not parent:
        return
    resumed = (workdir / 'config.json').exists()
    if not resumed:
        checkpoint.locate(parent)
    model = read_config(str(workdir) if resumed else parent)['config']['model']
    for key in sorted(chosen):
        name = key.removeprefix('model.')
        if key.startswith('model.') and config.model[name] != model.get(name):
            raise UsageError(
                f'{key}={config.model[name]} differs from {parent}, which has {model.get(name)}: leave it out'
            )
    config.model.update(model)
    if config.data.tokenizer is None:
        config.data.tokenizer = str(epath.Path(parent.partition('@')[0]) / 'tokenizer')


def write_config(workdir: epath.Path, config: Config, **more: Any) -> None:
    """Writes config.json: the resolved settings, and where they ran."""
    parents = [p for p in (config.init_from, config.branch_from) if p]
    versions = {name: _version(name) for name in VERSIONED}
    value = {'config': config.to_dict(), 'parents': parents, 'versions': versions, 'commit': _commit(), **more}
    files.write_json(workdir / 'config.json', value)


def load(run: str, *, warn: Callable[[str], None]) -> Model:
    """Loads 'DIR' (its newest checkpoint that holds) or 'DIR@STEP' onto the current mesh, parameters alone.

    Raises UsageError if there is no such run or checkpoint, RunError if nothing in it can be read.
    """
    saved = read_config(run)
    cfg = model_config(saved['config'])
    step, tree, _ = checkpoint.find(run, {'trainable': abstract_params(cfg)}, warn=warn)
    try:
        tokenizer = Tokenizer.load(str(epath.Path(run.partition('@')[0]) / 'tokenizer'))
    except OSError as error:
        raise RunError(f'the tokenizer of {run} cannot be read: {error}') from error
    return Model(tree['trainable'], cfg, tokenizer, saved['config'], step)


def abstract_params(cfg: ModelConfig) -> Any:
    """The parameters as shapes, dtypes and shardings on the current mesh."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg))
    return with_shardings(shapes)


def with_shardings(shapes: Any) -> Any:
    """A parameter-like tree of shapes with the shardings that its names say."""
    mesh = jax.sharding.get_mesh()
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, shapes, sharding.shardings(mesh, sharding.param_specs(shapes)))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, if this is one."""
    root = Path(__file__).parents[2]
    try:
        command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
