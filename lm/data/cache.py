"""The cache of prepared things: `$LM_CACHE` (default `~/.cache/lm`), a directory a thing, safe to delete at any time.

A thing's directory is named by the fingerprint of its key, is built under a temporary name and renamed when whole. So a
kill leaves nothing half, and two processes that build the same thing at once end with one copy of it.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from lm import files, locks
from lm.errors import RunError, UsageError

_TEMPORARY = '.building-'
_LOCK = '.lock'  # in a temporary directory
_ABANDONED_SECONDS = 3600.0


def cache_dir() -> epath.Path:
    """The root of the cache. Raises UsageError for a bucket: prepared tokens are memory-mapped."""
    root = os.environ.get('LM_CACHE') or '~/.cache/lm'
    if '://' in root:
        raise UsageError(f'LM_CACHE={root} is no local directory, and prepared data is memory-mapped: name a local one')
    return epath.Path(root).expanduser()


def fingerprint(value: Any) -> str:
    """16 hex digits of a JSON-able value, the same in every process, version and machine."""
    text = json.dumps(value, sort_keys=True, separators=(',', ':'))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def find(kind: str, key: dict[str, Any]) -> epath.Path | None:
    """The directory that `build` made for this key, if it has."""
    path = cache_dir() / kind / fingerprint(key)
    return path if path.exists() else None


def build(kind: str, key: dict[str, Any], fn: Callable[[epath.Path], None]) -> epath.Path:
    """The directory `kind/fingerprint(key)`, filled by `fn(directory)` unless it is there already.

    `key` is saved in it as key.json, for the reader. Raises RunError if the disk is full, and what `fn` raises.
    """
    final = cache_dir() / kind / fingerprint(key)
    if final.exists():
        return final
    _make_root(final.parent)
    try:
        _sweep(final.parent)
        _build_at(final, key, fn)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f'the disk is full while preparing {kind} in {final.parent}: free space or set LM_CACHE') from e
    return final


def _make_root(root: epath.Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f'the cache {root} cannot be made ({e.strerror}): set LM_CACHE to another directory') from None
    if not os.access(root, os.W_OK):
        raise UsageError(f'the cache {root} cannot be written: set LM_CACHE to another directory')


def _build_at(final: epath.Path, key: dict[str, Any], fn: Callable[[epath.Path], None]) -> None:
    temporary = final.parent / f'{_TEMPORARY}{final.name}-{uuid.uuid4().hex[:8]}'
    temporary.mkdir()
    try:
        lock = locks.take(temporary / _LOCK)
        try:
            fn(temporary)
            files.write_json(temporary / 'key.json', key)
        finally:
            locks.drop(lock)
        os.rename(temporary, final)  # unlocked: it is too young to be swept
    except OSError:
        # Another process was quicker: both build the same thing from the same key, so theirs is ours, whatever failed
        # here.
        if not final.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(parent: epath.Path) -> None:
    """Removes what killed processes left: temporary directories an hour old that nobody holds."""
    for path in parent.glob(_TEMPORARY + '*'):
        try:
            # The age protects a directory between its creation and its lock.
            if time.time() - os.stat(path).st_mtime < _ABANDONED_SECONDS:
                continue
            lock = locks.take(path / _LOCK)
        except OSError:  # somebody holds it
            continue
        if lock.is_locked:  # else nobody knows
            shutil.rmtree(path, ignore_errors=True)
        locks.drop(lock)
