"""A run's directory: what lies in it, the lock, and opening it to train."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from lm import config as configs
from lm import files, interrupts, locks
from lm.config import Config, differences, leaves, split_run
from lm.errors import UsageError
from lm.interop import folders
from lm.multihost import processes
from lm.runs import checkpoint, foreign, saved_config
from lm.runs.saved_config import Parent

LOCK = '.lock'
JOB = 'job'  # in config.json: the job that made what is there, which is no model
VERSIONED = (
    'lm-jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'sentencepiece', 'tokenizers', 'numpy',
)  # fmt: skip
NUMERIC = ('enable_x64', 'default_matmul_precision', 'default_prng_impl', 'threefry_partitionable')  # settings of JAX


def read_config(run: str) -> dict[str, Any]:
    """The saved config.json of 'DIR' or 'DIR@STEP', or what that of another form's model would say. Raises UsageError
    if it is neither."""
    model = foreign.find(run)
    return read_own(epath.Path(split_run(run)[0])) if model is None else foreign.saved(model)


def read_own(folder: epath.Path) -> dict[str, Any]:
    """The saved config.json of a run's directory. Raises UsageError if it is none."""
    file = folder / 'config.json'
    if not file.exists():
        raise UsageError(f'{folder} is not a run: it {folders.reason(folder)}')
    saved = read_json(file)
    if isinstance(saved, dict) and JOB in saved:
        raise UsageError(f'{folder} is no model: the job {saved[JOB]} made what is there, name the run that it asked')
    if not isinstance(saved, dict) or not isinstance(saved.get('config'), dict):
        raise UsageError(f'{folder} is not a run: its config.json is of another')
    if missing := sorted({'model', 'optim', 'stage', 'seq_len'} - set(saved['config'])):
        raise UsageError(f'{file} is damaged (config.{missing[0]} is missing): restore it, or train in another workdir')
    saved['config'] = configs.with_todays_names(saved['config'])
    try:
        saved_config.check(saved)
    except UsageError as error:
        raise UsageError(f'{file} {error}') from None
    return saved


def read_json(file: epath.Path) -> Any:
    """A config.json as it stands there. Raises UsageError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f'{file} is damaged ({error}): restore it, or train in another workdir') from None


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Inside, this process alone trains in `workdir`: two at once would spoil each other's files.

    The lock is the system's, which lets it go however the process ends. What was made for it is removed again unless
    the run has put something there. A bucket has no locks. Of several processes, the first holds it for all.

    Raises UsageError if another process trains there, or nothing can be written there.
    """
    if '://' in os.fspath(workdir) or not processes.first():
        yield
        return
    _check_folder(workdir)
    folder, made, lock = Path(workdir), [], None

    def release(*_: Any) -> None:
        if lock is not None:
            locks.drop(lock)
        for path in made:
            with contextlib.suppress(OSError):  # it was not made, or it is a run now
                path.rmdir()

    try:
        try:
            made = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = locks.take(folder / LOCK)
        except BlockingIOError:
            raise UsageError(f'another process trains in {folder}: wait for it or stop it') from None
        except OSError as error:
            raise UsageError(f'{workdir} cannot be written ({error.strerror}): name another --workdir') from error
        with interrupts.undoing(release):
            yield
    finally:
        release()


def _check_folder(workdir: epath.Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f'{workdir} is a file: name another --workdir')


def open_workdir(config: Config, workdir: epath.Path) -> dict[str, Any] | None:
    """The saved config.json if `workdir` holds this run already, None if it is new.

    A run that never had a checkpoint has nothing to lose: it begins again, under whatever settings.

    Raises UsageError if it holds another run, one that is beyond its last step or has lost its checkpoints, or files
    that are no run.
    """
    _check_folder(workdir)
    if not workdir.exists():
        return None
    if not (workdir / 'config.json').exists():
        check_new(workdir)
        return None
    saved = read_own(workdir)
    steps = checkpoint.listed(workdir / 'checkpoints')
    if not steps:
        _check_nothing_lost(workdir)
        return None
    if config.model.vocab_size == saved.get('asked_vocab_size'):  # its text was too little for so many
        config.model.vocab_size = saved['config']['model']['vocab_size']
    check_same(workdir, saved['config'], config)
    checkpoint.check_layout(workdir / 'checkpoints')
    at = checkpoint.newest_sealed(workdir / 'checkpoints')  # not what only looks like a later step
    if config.steps and at and config.steps < at:
        raise UsageError(f'{workdir} is at step {at} already, steps={config.steps}: set more')
    return saved


def check_new(workdir: epath.Path) -> None:
    """Raises UsageError if a directory without config.json holds anything."""
    _check_folder(workdir)
    if workdir.exists() and any(path.name != LOCK and not files.is_temporary(path) for path in workdir.iterdir()):
        raise UsageError(f'{workdir} holds files that are not a run: name another --workdir')


def check_same(workdir: epath.Path, saved: Mapping[str, Any], config: Config) -> None:
    """Raises UsageError for settings that differ from the saved ones and must not."""
    if different := differences(saved, config.to_dict()):
        keys = ', '.join(f'{k} ({old} there, {new} now)' for k, (old, new) in sorted(different.items())[:4])
        more = f' and {len(different) - 4} more' if len(different) > 4 else ''
        raise UsageError(f'{workdir} holds another run: {keys}{more}; name another --workdir')


def _check_nothing_lost(workdir: epath.Path) -> None:
    """Raises UsageError if a run without checkpoints had one: to begin again would cut its metrics and samples."""
    status = read_status(workdir)
    if status.get('state') == 'done':
        had = f'is done, with {status["step"]} steps'
    elif status.get('saved') is not None:
        had = f'was saved at step {status["saved"]}'
    elif not status and (workdir / 'metrics.jsonl').exists():
        had = 'has metrics.jsonl of steps that were taken, and no status.json'
    else:
        return
    raise UsageError(
        f'{workdir} {had}, and its checkpoints are gone: bring {workdir / "checkpoints"} back, name another --workdir, '
        f'or delete {workdir} to begin again'
    )


def read_status(workdir: epath.Path) -> dict[str, Any]:
    """status.json of a run, {} if it has none that can be read."""
    try:
        status = json.loads((workdir / 'status.json').read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def tokenizer_folder(run: str) -> str:
    """The folder of a run's tokenizer; of another form's model, where its files were unpacked."""
    if (model := foreign.find(run)) is not None:
        return foreign.tokenizer_folder(model)
    return str(epath.Path(split_run(run)[0]) / 'tokenizer')


def write_config(workdir: epath.Path, config: Config, parents: Mapping[str, Parent], **more: Any) -> None:
    """Writes config.json: the resolved settings, the runs that weights come from by their role, and where they ran.

    Raises UsageError if one of several processes does not see it: checkpoints are written together.
    """
    named = {role: parent._asdict() for role, parent in parents.items()}
    value = {'config': config.to_dict(), 'parents': named, 'versions': versions(), 'commit': commit(), **more}
    if processes.first():
        files.write_json(workdir / 'config.json', value)
    processes.all_gather('written')
    seen = processes.all_gather((workdir / 'config.json').exists())
    if not all(seen):
        raise UsageError(
            f'process {seen.index(False)} does not see {workdir} of process 0: name a folder that all share'
        )


def facts(config: Config) -> dict[str, Any]:
    """Returns what must be the same in all processes of a run: {setting or name of a package: value}."""
    found = {f'jax_{name}': jax.config.values[f'jax_{name}'] for name in NUMERIC}
    return {**dict(leaves(config)), **versions(), 'python': platform.python_version(), 'commit': commit(), **found}


def versions() -> dict[str, str | None]:
    """Versions of the installed packages that a run's numbers depend on."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, if this is one."""
    root = Path(__file__).parents[2]
    try:
        command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
