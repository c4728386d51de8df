"""Policy gradients on responses that the policy drew: PPO and the GRPO family, their leash, and the critic's loss.

What differs between the methods is four independent choices, each by its name:

    ratio         token | sequence: of the probabilities now and when the batch was drawn, a token's or the geometric
                  mean over the response
    clip          clip | cispo | dppo: what is done where that ratio has moved far
    kl            none | reward | k3 | full: the leash to a reference (in the reward it is no part of this file)
    aggregation   tokens | constant | response: what a token weighs

Every loss is an array [B, T] of tokens; `token_weights` and `denominator` make it what `lm.losses.objective` adds up.
Several responses may share a row: `segments_BT` numbers them from 1; None is one a row.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

RESPONSES = 16  # in a row at most


class Clip(NamedTuple):
    """The distance that the policy may move on one batch: the kind, and how far down and up.

    clip: the ratio within [1 − low, 1 + high]. cispo: the ratio at most `high`, low has no part in it. dppo: the
    probability of the token within ± `high` of what it was.
    """

    kind: str
    low: float
    high: float


def by_response(x_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Returns for each token the sum over its response, [B, T]."""
    if segments_BT is None:
        return jnp.broadcast_to(jnp.sum(x_BT, 1, keepdims=True), x_BT.shape)
    own_BTS = (segments_BT[..., None] == jnp.arange(1, RESPONSES + 1)).astype(x_BT.dtype)
    sum_BS = jnp.sum(x_BT[..., None] * own_BTS, axis=1)
    return jnp.sum(sum_BS[:, None] * own_BTS, axis=-1)


def log_ratio(
    logp_BT: jax.Array, old_BT: jax.Array, mask_BT: jax.Array, kind: str, segments_BT: jax.Array | None = None
) -> jax.Array:
    """log π/π_old of each token; `sequence` gives each token the mean over its response's, with the gradient of its own
    log-prob (GSPO, arXiv 2507.18071)."""
    own_BT = (logp_BT - old_BT) * mask_BT
    if kind == 'token':
        return own_BT
    mean_BT = by_response(own_BT, segments_BT) / jnp.maximum(by_response(mask_BT, segments_BT), 1)
    return (jax.lax.stop_gradient(mean_BT) + logp_BT - jax.lax.stop_gradient(logp_BT)) * mask_BT


def surrogate(
    logp_BT: jax.Array,
    old_BT: jax.Array,
    advantage_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    ratio: str,
    clip: Clip,
    segments_BT: jax.Array | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """(the loss of each token, {'ratio', 'clipped'} of each token, without gradient), 0 where mask_BT is.

    clip: −min(ρ·A, clip(ρ, 1 − low, 1 + high)·A) (PPO: Schulman et al., 2017, eq. 7; two bounds: DAPO,
        arXiv 2503.14476)
    cispo: −sg(min(ρ, high))·A·log π (CISPO, arXiv 2506.13585): every token keeps a gradient
    dppo: −ρ·A, and nothing of a token whose probability has moved by more than `high` in the direction of A (DPPO,
        arXiv 2602.04879)
    """
    r_BT = jnp.exp(log_ratio(logp_BT, old_BT, mask_BT, ratio, segments_BT))
    if clip.kind == 'clip':
        bounded_BT = jnp.clip(r_BT, 1 - clip.low, 1 + clip.high)
        loss_BT = jnp.maximum(-r_BT * advantage_BT, -bounded_BT * advantage_BT)
        clipped_BT = -bounded_BT * advantage_BT > -r_BT * advantage_BT
    elif clip.kind == 'cispo':
        clipped_BT = r_BT > clip.high
        loss_BT = -jax.lax.stop_gradient(jnp.minimum(r_BT, clip.high)) * advantage_BT * logp_BT
    else:
        moved_BT = jax.lax.stop_gradient(jnp.exp(logp_BT) - jnp.exp(old_BT))
        clipped_BT = moved_BT * jnp.sign(advantage_BT) > clip.high
        loss_BT = jnp.where(clipped_BT, 0, -r_BT * advantage_BT)
    told = {'ratio': r_BT * mask_BT, 'clipped': clipped_BT * mask_BT}
    return loss_BT * mask_BT, jax.lax.stop_gradient(told)


# ---- the leash ----


def k1(logp: jax.Array, reference: jax.Array) -> jax.Array:
    """log π/π_ref: unbiased for KL(π‖π_ref) where the token was drawn from π (Schulman, 2020). As a loss its expected
    gradient is 0; in the reward, detached, it gives the gradient of the reverse KL."""
    return logp - reference


def k3(logp: jax.Array, reference: jax.Array) -> jax.Array:
    """π_ref/π − 1 − log π_ref/π: unbiased and never negative (Schulman, 2020). As a loss its gradient is that of the
    forward KL, unless each token is multiplied by its importance ratio (arXiv 2512.02556)."""
    return jnp.exp(reference - logp) - 1 - (reference - logp)


def k3_loss(logp_BT: jax.Array, reference_BT: jax.Array, old_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """ρ·k3 of each token, ρ = π/π_old: its expected gradient is that of the reverse KL."""
    return jnp.exp((logp_BT - old_BT) * mask_BT) * k3(logp_BT, reference_BT) * mask_BT


# ---- what a token weighs ----


def token_weights(mask_BT: jax.Array, aggregation: str, segments_BT: jax.Array | None = None) -> jax.Array:
    """The factor of each token's loss before it is summed: 1, and for `response` 1/(the response's tokens)."""
    if aggregation == 'response':
        return mask_BT / jnp.maximum(by_response(mask_BT, segments_BT), 1)
    return mask_BT


def denominator(mask_BT: jax.Array, aggregation: str, *, most: int, segments_BT: jax.Array | None = None) -> jax.Array:
    """The divisor of that sum over the whole batch: its tokens (DAPO), the most that it may have (Dr. GRPO), or its
    responses (GRPO); of the first and the last only those that count."""
    responses = jnp.sum(token_weights(mask_BT, 'response', segments_BT))  # each token is its part of one
    return {'tokens': jnp.sum(mask_BT), 'constant': jnp.float32(most), 'response': responses}[aggregation]


def mismatch_weights(
    old_BT: jax.Array,
    sampler_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    how: str,
    cap: float,
    ratio: str = 'token',
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """The factor of a token's loss because the sampler is not quite the trainer, [B, T], without gradient: 1,
    min(π_trainer/π_sampler, cap) (truncated importance sampling), or that ratio where it is within [1/cap, cap] and
    else 0 (IcePop). `ratio`: of the token, or of the whole response (sequence)."""
    apart_BT = (old_BT - sampler_BT) * mask_BT
    w_BT = jnp.exp(apart_BT if ratio == 'token' else by_response(apart_BT, segments_BT) * mask_BT)
    if how == 'truncate':
        w_BT = jnp.minimum(w_BT, cap)
    elif how == 'mask':
        w_BT = jnp.where((w_BT <= cap) & (w_BT >= 1 / cap), w_BT, 0)
    else:
        w_BT = jnp.ones_like(w_BT)
    return jax.lax.stop_gradient(w_BT)


# ---- the critic ----


def value_loss(value_BT: jax.Array, old_BT: jax.Array, return_BT: jax.Array, *, clip: float) -> jax.Array:
    """½·max((V − R)², (V_clipped − R)²), the value kept within ± clip of what it was (Schulman et al., 2017; Huang et
    al., 2024)."""
    near_BT = old_BT + jnp.clip(value_BT - old_BT, -clip, clip)
    return jnp.maximum(jnp.square(value_BT - return_BT), jnp.square(near_BT - return_BT)) / 2
