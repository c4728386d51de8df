"""The objective: losses are put together of sums and weights, never of means.

A loss returns {term: sum}; the weights are {term: W} over the *global* batch, known before it is cut into microbatches.
The objective Σ coef·sum/W is then the same for one batch, for any accumulation, and on any number of devices.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def objective(sums: Mapping[str, jax.Array], weights: Mapping[str, jax.Array], coefs: Mapping[str, float]) -> jax.Array:
    """Σ coef·sum/W over the terms; a term of weight 0 (everything masked) contributes 0."""
    return sum((coefs[t] * normalised(sums[t], weights[t]) for t in coefs), start=jnp.zeros((), jnp.float32))


def normalised(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total/weight, and 0 where the weight is 0."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def measured(total: jax.Array, weight: jax.Array) -> jax.Array:
    """total/weight, and NaN where the weight is 0: the batch has nothing to measure."""
    return jnp.where(weight > 0, normalised(total, weight), jnp.nan)
