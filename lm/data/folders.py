"""Files of a folder, at any depth: tables, text, and what is neither, which is counted by its kind."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from lm.data import record_files


def walk(folder: str) -> Iterator[str]:
    """The files below a folder, sorted; no hidden ones, and none in hidden folders (.git)."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        paths = (os.path.join(root, name) for name in sorted(names) if not name.startswith('.'))
        yield from (path for path in paths if os.path.isfile(path))


def is_binary(path: str) -> bool:
    """Whether a file, unpacked, is no text: NULs that are not UTF-16's, or bytes that are no UTF-8 in a file that is
    not called text."""
    begins = record_files.begin_of(path)
    if record_files.encoding_of(begins).name != 'utf-8':
        return False
    try:
        codecs.getincrementaldecoder('utf-8')().decode(begins)  # its last character may be cut
    except UnicodeDecodeError:
        return not record_files.is_named_text(path)
    return b'\0' in begins


def kind_of(path: str) -> str:
    """Of which kind a file is by its name, as it is counted where it is left out: '.png'."""
    return Path(path).suffix.lower() or 'without suffix'
