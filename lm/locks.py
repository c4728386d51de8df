"""The system's locks on files: one process holds one, and it is let go of however the process ends."""

import os
from pathlib import Path

import filelock

Lock = filelock.BaseFileLock
_PATIENCE, _POLL = 0.2, 0.02  # seconds; whoever lets go removes the file, and the next try makes another


def take(path: str | os.PathLike[str]) -> Lock:
    """The lock on a file, which is made for it; `is_locked` is False where the file system has no locks.

    Raises BlockingIOError if another process holds it, and OSError if the file cannot be made.
    """
    # Never a file that says who holds it, in place of a lock: that would outlive a process that is killed.
    lock = filelock.FileLock(path, _PATIENCE, poll_interval=_POLL, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f'another process holds {path}') from None
    except OSError as error:
        if error.filename is not None:  # of making the file; locking it is done by its number
            raise
    return lock


def drop(lock: Lock) -> None:
    """Removes the file and lets go, in this order: nobody else has come to hold what is removed."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
