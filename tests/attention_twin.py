"""An attention and its gradients, to be compared with the dense twin's."""

import jax
import numpy as np


def both(fn, q, k, v, g, **options):
    """(the output, the gradients for cotangent g)."""
    out, back = jax.vjp(lambda q, k, v: fn(q, k, v, **options), q, k, v)
    return out, back(g)


def jitted(fn, *args, static, **arrays):
    return jax.device_get(jax.jit(lambda args, arrays: both(fn, *args, **arrays, **static))(args, arrays))


def assert_same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.max(np.abs(b)), rtol=0), got, expected)
