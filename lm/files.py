"""All writing goes through here: whole files appear at once or not at all, lines are appended and flushed.

Paths are epath paths, so a local directory and a bucket (gs://) are written by the same code. Tests inject faults by
replacing `_write`, the only function that puts bytes anywhere.
"""

import json
import os
import uuid
from typing import Any

from etils import epath


def _write(path: epath.Path, data: bytes, mode: str) -> None:
    with path.open(mode) as f:
        f.write(data)
        f.flush()
        if os.path.isfile(os.fspath(path)):
            os.fsync(f.fileno())


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Replaces the file at `path` atomically: a reader sees the old bytes or the new ones, whenever we are killed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex[:8]}.tmp'
    try:
        _write(temporary, data, 'wb')
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: epath.PathLike, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + '\n')


def append_line(path: epath.PathLike, line: str) -> None:
    """Appends one line. A kill can cut the last line short; `read_json_lines` leaves such a line out."""
    _write(epath.Path(path), line.encode() + b'\n', 'ab')


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The complete JSON lines of a file (none if there is no file); a last line that was cut short is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split('\n')
    whole, tail = lines[:-1], lines[-1]
    records = [json.loads(line) for line in whole if line]
    if tail:
        try:
            records.append(json.loads(tail))
        except json.JSONDecodeError:
            pass
    return records
