"""Files of a folder, at any depth: tables, text, and what is neither, which is counted by its kind."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from lm.data import record_files


def walk(folder: str) -> Iterator[str]:
    """Yields the files below a folder, sorted, and, as one path each, folders that are not entered: those that are
    hidden (.git), links, or closed to us."""
    closed: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=closed.append):
        apart = {name for name in folders if name.startswith('.') or os.path.islink(os.path.join(root, name))}
        folders[:] = sorted(set(folders) - apart)
        yield from (os.path.join(root, name) for name in sorted([*names, *apart]))
    yield from (error.filename for error in closed)


def is_file(path: str) -> bool:
    """Tells whether a path of a folder is a file to be read: it exists, and is not hidden."""
    return not os.path.basename(path).startswith('.') and os.path.isfile(path)


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
    """The kind of a path, under which it is counted where it is left out: '.png', 'hidden'."""
    if os.path.basename(path).startswith('.'):
        return 'hidden'
    if os.path.isdir(path):
        return 'linked folder' if os.path.islink(path) else 'closed folder'
    if not os.path.isfile(path):
        return 'dangling link' if os.path.islink(path) else 'no file'
    return Path(path).suffix.lower() or 'without suffix'
