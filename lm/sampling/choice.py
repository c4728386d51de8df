"""How a token is chosen: the settings of a draw, its filters, and the draw itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import sharding

WAYS = ('greedy', 'drawn', 'filtered')  # of choosing a token


class Sampling(NamedTuple):
    """The settings by which a token is drawn. Each is one number, or one per row."""

    temperature: float | Sequence[float] = 0.0  # 0 is greedy
    top_k: int | Sequence[int] = 0  # the k likeliest; 0 is all
    top_p: float | Sequence[float] = 1.0  # the fewest that hold this much probability (Holtzman et al., 2020)
    min_p: float | Sequence[float] = 0.0  # those at least this part of the likeliest (Nguyen et al., 2024)
    # What logits of tokens that the prompt or the answer has are divided by, or multiplied where negative (Keskar et
    # al., 2019; transformers' meaning): before all the others, greedy or not.
    repetition_penalty: float | Sequence[float] = 1.0


GREEDY = Sampling()
KNOBS = (np.float32, np.int32, np.float32, np.float32, np.float32)  # of a sampling's fields


def how(knobs: Sequence[np.ndarray]) -> str:
    """Names the part of `sample` that is needed: it is compiled without the rest."""
    return WAYS[int(way(knobs, np))]


def way(knobs: Sequence[Any], xp: Any) -> Any:
    """The index of `how`, by numpy or under jit."""
    temperature, top_k, top_p, min_p, _ = knobs
    filters = xp.any(top_k > 0) | xp.any(top_p < 1) | xp.any(min_p > 0)
    return xp.where(xp.any(temperature > 0), 1 + filters, 0)


def sample(
    logits_BV: jax.Array, key_B: jax.Array, sampling: Sequence[Any], *, filtered: bool
) -> tuple[jax.Array, jax.Array]:
    """(an id, its log-prob) of each row, from float32 logits. Filters apply to the tempered distribution in the order
    top-k, top-p, min-p, and the log-prob is of what they leave.

    Each device draws for its own rows, and every one then knows all that was drawn.

    Args:
      sampling: the fields of `Sampling` up to min_p.
    """
    knobs = [jnp.broadcast_to(jnp.asarray(x), logits_BV.shape[:1]) for x in sampling]
    if sharding.axis_sizes():
        key_B, *knobs = jax.reshard([key_B, *knobs], P(jax.typeof(logits_BV).sharding.spec[0]))
    temperature, top_k, top_p, min_p = knobs
    x_BV = logits_BV / jnp.where(temperature > 0, temperature, 1)[:, None]
    if filtered:
        x_BV = _filter(x_BV, top_k, top_p, min_p)
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_B)
    # The limit of no temperature: all but the likeliest have no mass, and of equals the first is taken.
    cold = temperature <= 0
    sharpness = jnp.where(cold, jnp.finfo(jnp.float32).max, 1)
    return sharding.replicated(_by_mass(x_BV, sharpness, jnp.where(cold[:, None], 0, u_B2)))


def _by_mass(x_BV: jax.Array, sharpness_B: jax.Array, u_B2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(an id, its log-prob) of each row of softmax(sharpness·x), by the inverse of its distribution function: a block
    of the vocabulary, then an id of it. One uniform number decides each; a Gumbel for every id costs a CPU more than
    the model does."""
    V = x_BV.shape[1]
    C = 1 << ((V - 1).bit_length() + 1) // 2  # a block, about √V
    top_B1 = jnp.max(x_BV, axis=1, keepdims=True)
    mass = lambda x, top, sharpness: jnp.exp((x - top) * sharpness)
    x_BNC = jnp.pad(x_BV, ((0, 0), (0, -V % C)), constant_values=-jnp.inf).reshape(x_BV.shape[0], -1, C)
    mass_BN = jnp.sum(mass(x_BNC, top_B1[..., None], sharpness_B[:, None, None]), axis=2)
    block_B = _at_share(mass_BN, u_B2[:, 0])
    x_BC = jnp.take_along_axis(x_BNC, block_B[:, None, None], axis=1)[:, 0]
    place_B = _at_share(mass(x_BC, top_B1, sharpness_B[:, None]), u_B2[:, 1])
    x_B = jnp.take_along_axis(x_BC, place_B[:, None], axis=1)[:, 0]
    logp_B = (x_B - top_B1[:, 0]) * sharpness_B - jnp.log(jnp.sum(mass_BN, axis=1))
    return block_B * C + place_B, logp_B


def _at_share(mass_BC: jax.Array, u_B: jax.Array) -> jax.Array:
    """The first place at which the running sum of a row's masses exceeds the part u of all, u in [0, 1); never one that
    has no mass, however the sums round."""
    C = mass_BC.shape[1]
    sum_BC = jnp.cumsum(mass_BC, axis=1)
    found_BC = (sum_BC > u_B[:, None] * sum_BC[:, -1:]) & (mass_BC > 0)
    first_B = jnp.min(jnp.where(found_BC, jnp.arange(C), C), axis=1)
    return jnp.where(first_B < C, first_B, likeliest(mass_BC)).astype(jnp.int32)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the highest logits of each row: argmax as two plain reductions, which a CPU vectorizes."""
    V = logits_BV.shape[-1]
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(best_BV, jnp.arange(V), V), axis=-1), V - 1).astype(jnp.int32)


def _filter(x_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf for what the filters leave out; the likeliest always stays, and of equals the lowest ids."""
    V = x_BV.shape[-1]
    sorted_BV = -jnp.sort(-x_BV, axis=-1)
    rank_V = jnp.arange(V)
    keep_BV = rank_V < jnp.where(top_k > 0, top_k, V)[:, None]
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    keep_BV &= (before_BV < top_p[:, None]) | (top_p[:, None] >= 1)  # rounding may bring the sum to 1 before the end
    keep_BV &= p_BV >= min_p[:, None] * p_BV[:, :1]
    keep_BV |= rank_V == 0
    kept_B1 = jnp.sum(keep_BV, axis=-1, keepdims=True)
    limit_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    above_BV, equal_BV = x_BV > limit_B1, x_BV == limit_B1
    room_B1 = kept_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    return jnp.where(above_BV | equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1), x_BV, -jnp.inf)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """The logits with those of what was seen lowered as `Sampling` says."""
    penalty_B = jnp.broadcast_to(jnp.asarray(penalty, logits_BV.dtype), logits_BV.shape[:1])
    if sharding.axis_sizes():
        rows = jax.typeof(logits_BV).sharding.spec[0]
        seen_BV, penalty_B = jax.reshard(seen_BV, P(rows)), jax.reshard(penalty_B, P(rows))
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)
