"""Settings of the process, made before JAX starts: the compile cache and the platform's defaults. Imports nothing above
it."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from lm import interrupts, progress, xla
from lm.errors import Preempted, RunError, UsageError
from lm.interrupts import Ending, Interrupted
from lm.multihost import processes

# By default glibc hands each step's large buffers back to the system and takes them again, and the page faults cost a
# CPU a quarter of its time. M_MMAP_MAX: none, M_TRIM_THRESHOLD: never, M_ARENA_MAX: one, so that all threads share what
# is kept.
KEEP = {-4: 0, -1: -1, -8: 1}
# By default glibc comes to keep what is freed, up to 32 MiB each and for each thread: a quarter of a conversion's peak.
HAND_BACK = {-3: 4 << 20}  # M_MMAP_THRESHOLD, bytes, which no longer grows


def setup(*, keep_memory: bool = True) -> None:
    """Turns on the compile cache (12 s to the first step become 1 s), sets XLA's flags for the platform and asks XLA to
    keep its warnings to itself.

    JAX caches by default only what took a second to compile; the laptop's steps are quicker and still worth keeping.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt, and perhaps no such cost
        for option, value in (KEEP if keep_memory else HAND_BACK).items():
            ctypes.CDLL(None).mallopt(option, value)
    xla.setup()
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
    cache = Path(os.environ.get('LM_CACHE', '~/.cache/lm')).expanduser() / 'xla'
    if not jax.config.values['jax_compilation_cache_dir']:
        jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def start_jax() -> None:
    """Has JAX find its devices. Raises UsageError if this machine lacks the platform that JAX_PLATFORMS names.

    Several CPU devices compile anew each time: in a program that comes out of the cache (jaxlib 0.10.2) they no longer
    agree on the order of two collectives of which neither needs the other, and wait for each other forever.
    """
    try:
        with progress.task('looking for devices'):
            jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where no package knows the platform
        asked, reason = jax.config.values['jax_platforms'], str(error).partition(' (set JAX')[0] or 'not installed'
        raise UsageError(f'JAX_PLATFORMS={asked} cannot be had here ({reason}): correct or unset it') from error
    if jax.default_backend() == 'cpu' and jax.device_count() > 1:
        jax.config.update('jax_enable_compilation_cache', False)


class StopRequest:
    """True once SIGTERM or Ctrl-C has come. A second Ctrl-C interrupts at once.

    Until the loop sets `patient` there is nothing to save, and a signal ends the run where it finds it.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.patient = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def after(self, step: int) -> bool:
        """Tells whether to stop after this step: every process asks after every step, and all are told the same."""
        why = processes.stops_after(step, self.signal)
        self.signal = why or self.signal
        return why is not None

    def react(self, name: str) -> Ending | None:
        """Returns how a signal ends the run. Says what will be done if it goes on, to be saved."""
        again, self.signal = self.signal, name
        if again and name == 'SIGINT':
            return Interrupted('interrupted: what was done since the last checkpoint is lost', status=RunError.status)
        if not self.patient:
            return Preempted(f'stopped by {name} before the first step: run the same command again to go on')
        if not again:
            interrupts.say(
                f'{name}: saves after the steps under way and leaves; Ctrl-C now leaves at once, without saving'
            )
        return None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catches SIGTERM and Ctrl-C inside, so that the loop can save and leave between two steps."""
    request = StopRequest()
    with interrupts.heard(), interrupts.reacting(request.react, raises=True):
        yield request
