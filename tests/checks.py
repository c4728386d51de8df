"""Assertions that several modules of tests share."""

from typing import Any

import jax
import numpy as np


def assert_close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    """Compares trees leaf by leaf, relative to the leaf's largest value."""

    def leaf(path, a, b):
        atol = rtol * max(np.max(np.abs(b), initial=0), 1e-30)
        np.testing.assert_allclose(a, b, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(leaf, jax.device_get(got), jax.device_get(expected))


def refused(answer: tuple[int, str, str], wanted: str, progress: tuple[str, ...] | None = ()) -> None:
    """Status 2, nothing on stdout, and on stderr one line of an error after lines of progress: those that begin so;
    None: any."""
    status, out, err = answer
    *before, line = err.splitlines()
    assert status == 2 and not out, err
    assert line.startswith('lm: ') and wanted in line, line
    assert not any(b.startswith('lm: ') or 'Traceback' in b for b in before), err
    assert progress is None or all(b.startswith(progress) for b in before), before
