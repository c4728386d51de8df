"""A job as the registry lists it, and the directory in which it is begun or gone on with."""

from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from lm.config import Config
from lm.errors import UsageError
from lm.runs import rundir
from lm.runtime import StopRequest

Say = Callable[[str], None]


class JobSpec(NamedTuple):
    """A job: its name, and what it does."""

    name: str  # configs/NAME.py, --config.stage
    # config -> None. Raises UsageError for settings that make no sense, before anything is read
    check: Callable[[Config], None]
    # (config, workdir, stop) -> its last metrics, begun or gone on with
    run: Callable[[Config, epath.Path, StopRequest], dict[str, Any]]
    # (config, how many, say) -> what it would work on: a title and a text each
    show: Callable[[Config, int, Say], list[tuple[str, str]]]


def open_workdir(config: Config, workdir: epath.Path, progress: str) -> dict[str, Any] | None:
    """The saved config.json if `workdir` holds this job already, None if it is new, or has done nothing: there is no
    file `progress`, and it begins again under whatever settings.

    Raises UsageError if it holds something else.
    """
    if not (workdir / 'config.json').exists():
        rundir.check_new(workdir)
        return None
    saved = rundir.read_json(workdir / 'config.json')
    if (
        not isinstance(saved, dict)
        or saved.get(rundir.JOB) != config.stage
        or not isinstance(saved.get('config'), dict)
    ):
        raise UsageError(f'{workdir} holds another run: name another --workdir')
    if not (workdir / progress).exists():
        return None
    rundir.check_same(workdir, saved['config'], config)
    return saved
