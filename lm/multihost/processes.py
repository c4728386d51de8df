"""Several processes that train one run: how they find each other, agree, and notice that one is gone.

Arrays travel by JAX's collectives. Everything else goes over one TCP connection from each process to process 0, whose
hub passes it on: what each was started with (compared before anything is allocated), values that all must know, the
step after which to stop, and who has died. A connection ends when its process does, and the system's keep-alive finds
out about a machine that is gone, so nobody needs a heartbeat.

JAX's own service could carry most of it, but its clients answer any death, and first of all process 0's, by aborting
from C++ with a stack trace (jaxlib 0.10 to 0.12; the callback that would prevent it fails with std::bad_cast). So a
client here reaches the service through a relay in its own process, which keeps quiet when the service is gone: the
connection to the hub, gone at the same moment, says so in one line.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lm import interrupts
from lm.errors import UsageError
from lm.multihost.hub import LOOPBACK, address, relay
from lm.multihost.rank import Rank, Topology, grace

JAX_HEARTBEAT_SECONDS = 24 * 3600  # ours is the connection: a long compile under the interpreter's lock is no death


# ---- where this process stands ----


def place(coordinator: str | None, count: int | None, index: int | None, *, wait: int) -> Topology | None:
    """Returns what the command line says, or with 'auto' what the cluster does (Cloud TPU, Slurm, Open MPI,
    Kubernetes); None for a process that is alone. Raises UsageError if a part is missing."""
    if coordinator is None:
        if count is not None or index is not None:
            raise UsageError('--num_processes and --process_id need --coordinator=HOST:PORT, the same for all of them')
        return None
    if coordinator == 'auto':
        found = detect(wait)
    elif count is None or index is None:
        raise UsageError('--coordinator=HOST:PORT needs --num_processes=N and --process_id=I, I from 0 to N-1')
    else:
        found = Topology(coordinator, count, index)
    if found.count < 1:
        raise UsageError(f'--num_processes={found.count} must be at least 1')
    if not 0 <= found.index < found.count:
        raise UsageError(f'--process_id={found.index} must be from 0 to {found.count - 1}, --num_processes less one')
    _, colon, port = found.coordinator.rpartition(':')
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f'--coordinator={coordinator} must be HOST:PORT of process 0, or auto')
    return found if found.count > 1 else None


def detect(wait: int) -> Topology:
    """Returns what JAX finds out from the cluster it runs in. Raises UsageError if it knows none."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks; its answer has no public name

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, wait)
    if address is None or count is None or index is None:
        raise UsageError(
            '--coordinator=auto: this is no cluster that JAX knows (Cloud TPU, Slurm, Open MPI, Kubernetes): give '
            '--coordinator=HOST:PORT --num_processes=N --process_id=I'
        )
    return Topology(address, count, index, devices)


_rank: Rank | None = None


def first() -> bool:
    """Tells whether this process writes what one process writes for all; true for a process that is alone."""
    return _rank is None or _rank.topology.index == 0


def all_gather(value: Any) -> list[Any]:
    """Every process's value (JSON), by process; each waits for all of them, and all call it at the same places."""
    return [value] if _rank is None else _rank.all_gather(value)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 does what is inside before the others begin."""
    if not first():
        all_gather('turn')
    yield
    if first():
        all_gather('turn')


def assert_equal(what: str, value: Any) -> None:
    """Raises UsageError, in every process, unless all have the same value (JSON)."""
    for other, theirs in enumerate(values := all_gather(value)):
        if theirs != values[0]:
            raise UsageError(f'process {other} has {what} {theirs}, process 0 has {values[0]}: make them the same')


def agreed(error: Exception | None) -> str | None:
    """Returns what went wrong in any of the processes, or None, so that all take the same way after a failure of
    one."""
    told = all_gather(None if error is None else str(error))
    if _rank is None:
        return told[0]
    return next((f'process {i}: {text}' for i, text in enumerate(told) if text is not None), None)


def stops_after(step: int, signal: str | None) -> str | None:
    """Returns why to stop after `step`, the same step in every process, if one of them had a signal; None to go on."""
    return signal if _rank is None else _rank.stops_after(step, signal)


def settle(error: BaseException) -> None:
    """Waits, of several processes, before an error is told: see `rank.grace`."""
    if _rank is not None:
        grace(error)


def farewell(say: Callable[[str], None]) -> None:
    """From now on `say(line)` is called before this process is ended because of another."""
    if _rank is not None:
        _rank.farewell = say


@contextlib.contextmanager
def joined(topology: Topology | None, facts: Mapping[str, Any], *, wait: int) -> Iterator[None]:
    """Inside, this process is one of several, and JAX sees the devices of all.

    Args:
      facts: {name: JSON value} that must be the same in all processes.
      wait: seconds until all of them must have come.

    Raises:
      UsageError: one did not come, came twice, or differs in a fact.
    """
    global _rank
    if topology is None:
        yield
        return
    if wait < 1:
        raise UsageError(f'--wait={wait} must be at least 1 second')
    rank = Rank(topology, wait)
    try:
        port = rank.enter(facts)
        _rank = rank
        rank.watch()
        with interrupts.undoing(rank.leave):
            _initialize(topology, port, wait)
            yield
        rank.end()
    except BaseException as error:
        rank.leave(error)
        raise
    finally:
        _rank = None


def _initialize(topology: Topology, port: int, wait: int) -> None:
    """JAX's own service, on a port that process 0 chose, behind a relay in the others."""
    host, _ = address(topology.coordinator)
    own = f'[{host}]:{port}' if ':' in host else f'{host}:{port}'
    seen = own if topology.index == 0 else f'127.0.0.1:{relay(host, port)}'
    _keep_stdout()
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        seen, topology.count, topology.index, topology.local_devices, initialization_timeout=wait,
        heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS, cluster_detection_method='deactivate',
        coordinator_bind_address=own if host in LOOPBACK else None,
    )  # fmt: skip


def _keep_stdout() -> None:
    """Standard output is for a command's one object: what Gloo prints there when it connects goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # it is no file, e.g. under a test
        return
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    sys.stdout = os.fdopen(kept, 'w')
