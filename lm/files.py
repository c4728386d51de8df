"""All writing goes through here: whole files appear at once or not at all, lines are appended and flushed.

Paths are epath paths, so a local directory and a bucket (gs://) are written by the same code. A bucket cannot append
(gcsfs 2026.10 opens with 'ab' and overwrites): what grows there is written anew, whole. Tests inject faults by
replacing `_write`, the only function that puts bytes anywhere.
"""

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from lm import interrupts
from lm.errors import RunError

# fsspec reads it at its import. A process that has listed a folder of a bucket would else not see what another, or
# TensorStore, has written there since.
os.environ.setdefault('FSSPEC_GCS_USE_LISTINGS_CACHE', 'false')
STREAM_CHUNK = 2**24  # bytes of a streamed file that are written, and flushed to the disk, at once
# Between two writes of what grows: a bucket takes one a second of an object, and it is written whole.
BUCKET_SECONDS = 30


def is_bucket(path: epath.PathLike) -> bool:
    """Tells whether a path is one of a store of objects and not of files."""
    return '://' in os.fspath(path)


def _write(path: epath.Path, data: bytes, mode: str) -> None:
    with path.open(mode) as f:
        f.write(data)
        f.flush()
        if not is_bucket(path) and path.is_file():
            os.fsync(f.fileno())


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it. A bucket's is one already, and etils 1.15 would put the working
    directory before it."""
    return epath.Path(path) if is_bucket(path) else epath.Path(path).expanduser().resolve()


@contextlib.contextmanager
def _told(path: epath.Path) -> Iterator[None]:
    """Inside, what the system refuses (a full disk, no permission) becomes a RunError that names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_bucket(path):  # gcsfs has errors of its own
            raise
        raise RunError(f'{path} cannot be written ({reason(error)}): what was there before is intact') from error


def reason(error: Exception) -> str:
    """The reason why something was not written; of a full disk, what to do as well."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f'the disk is full, {error.strerror}; free space, then run the same command again'
    said = error.strerror if isinstance(error, OSError) else None  # that of a bucket is no OSError
    return said or ' '.join(str(error).split())[:160] or type(error).__name__


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Replaces the file at `path` atomically: a reader sees the old bytes or the new ones, whenever we are killed.

    Raises RunError if it cannot be written.
    """
    path = epath.Path(path)
    with _replaced(path) as new, _told(path):
        _write(new, data, 'wb')


@contextlib.contextmanager
def _replaced(path: epath.Path) -> Iterator[epath.Path]:
    """The file to write, which becomes `path` when the block ends. A temporary one is removed, if the system lets us,
    where the block fails or is interrupted: why it was not written matters more."""
    if is_bucket(path):  # an object appears whole
        yield path
        return
    temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp'

    def discard(*_: Any) -> None:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

    with interrupts.undoing(discard):
        try:
            with _told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with _told(path):
                temporary.replace(path)
        except BaseException:
            discard()
            raise


@contextlib.contextmanager
def streamed(path: epath.PathLike) -> Iterator[Callable[[bytes], None]]:
    """A function that appends bytes to a local file too large for the memory, which appears at `path` when the block
    ends and not at all if it fails.

    Raises RunError if it cannot be written.
    """
    path, held = epath.Path(path), bytearray()
    with _replaced(path) as new:

        def flush() -> None:
            with _told(path):
                _write(new, bytes(held), 'ab')
            held.clear()

        def write(data: bytes) -> None:
            held.extend(data)
            if len(held) >= STREAM_CHUNK:
                flush()

        yield write
        flush()


@contextlib.contextmanager
def new_folder(path: epath.PathLike) -> Iterator[epath.Path]:
    """A temporary folder beside `path`, which becomes it when the block ends, and is removed if the block fails.

    Raises RunError if it cannot be written.
    """
    path = epath.Path(path)
    made = path.parent / f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp'

    def remove(*_: Any) -> None:
        for _try in range(50):  # who was interrupted may still have threads that write here
            if not made.exists():
                break
            shutil.rmtree(made, ignore_errors=True)
            time.sleep(0.1)

    with interrupts.undoing(remove):
        try:
            made.mkdir(parents=True)
            yield made
            made.rename(path)
        except OSError as error:
            raise RunError(f'{path} cannot be written ({reason(error)})') from error
        finally:
            remove()


def write_text(path: epath.PathLike, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + '\n')


class Growing:
    """A file that grows. A local one has what is added at once; a bucket's object has it when `flush` is called, and
    else at most BUCKET_SECONDS later, if more is added then.

    A kill can cut the last bytes short; `read_json_lines` leaves such a line out.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        self._whole: bytearray | None = None  # of a bucket: what the object is to hold
        self._new = False
        self._due = 0.0

    def add(self, data: bytes) -> None:
        """Raises RunError if it cannot be written."""
        with _told(self._path):
            if not is_bucket(self._path):
                return _write(self._path, data, 'ab')
            if self._whole is None:
                self._whole = bytearray(self._path.read_bytes() if self._path.exists() else b'')
        self._whole += data
        self._new = True
        if time.monotonic() >= self._due:
            self.flush()

    def add_line(self, line: str) -> None:
        self.add(line.encode() + b'\n')

    def flush(self) -> None:
        """Writes what is held. Raises RunError if it cannot be written."""
        if self._new and self._whole is not None:
            write_bytes(self._path, bytes(self._whole))
            self._new, self._due = False, time.monotonic() + BUCKET_SECONDS


def is_temporary(path: epath.Path) -> bool:
    """Tells whether `write_bytes` left this behind when it was killed."""
    return path.name.startswith('.') and path.name.endswith('.tmp')


def sweep(directory: epath.PathLike) -> None:
    """Removes what `write_bytes` left behind in a directory."""
    for path in filter(is_temporary, epath.Path(directory).iterdir()):
        path.unlink(missing_ok=True)


def read_json_lines(path: epath.PathLike, *, warn: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each (none if there is no file).

    A last line that was cut short is left out, and so is a damaged one before it, which `warn` is told of.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    *whole, tail = path.read_bytes().split(b'\n')
    records = []
    for number, line in enumerate([*whole, tail], start=1):
        try:
            record = json.loads(line)
        except ValueError:  # also where a character was cut
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line and number <= len(whole) and warn:
            warn(f'{path}:{number} is damaged and left out')
    return records
