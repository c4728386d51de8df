"""Advantages: how much better a response, or a token of it, was than what was to be expected.

Those of groups take the scores of several responses to one prompt, [P, G] (P prompts, G responses each). That of a
critic is `gae`. All are float32 and without gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

TINY = 1e-4  # beside a standard deviation that is divided by, as in the papers' code: in units of the score


def group(score_PG: jax.Array) -> jax.Array:
    """r − the group's mean (Dr. GRPO: Liu et al., 2025)."""
    return score_PG - jnp.mean(score_PG, axis=1, keepdims=True)


def group_std(score_PG: jax.Array) -> jax.Array:
    """(r − the group's mean)/the group's std (GRPO: Shao et al., 2024). It overweights the prompts that
    are nearly always right or nearly always wrong."""
    return group(score_PG) / (jnp.std(score_PG, axis=1, keepdims=True, ddof=1) + TINY)


def rloo(score_PG: jax.Array) -> jax.Array:
    """r − the mean of the others in the group (RLOO: Ahmadian et al., 2024): `group` times G/(G − 1)."""
    G = score_PG.shape[1]
    return group(score_PG) * (G / (G - 1))


def batch_std(score_PG: jax.Array) -> jax.Array:
    """(r − the group's mean)/the std of all scores of the batch (Lite PPO, arXiv 2508.08221)."""
    return group(score_PG) / (jnp.std(score_PG, ddof=1) + TINY)


def max_rl(score_PG: jax.Array) -> jax.Array:
    """(r − the group's mean)/the group's mean, of scores of at least 0 (MaxRL, arXiv 2602.02710); 0 where all are 0."""
    mean_P1 = jnp.mean(score_PG, axis=1, keepdims=True)
    return jnp.where(mean_P1 > 0, group(score_PG) / jnp.where(mean_P1 > 0, mean_P1, 1), 0)


def global_std(score_PG: jax.Array) -> jax.Array:
    """(r − the batch's mean)/the batch's std: no group (REINFORCE++: Hu, 2025)."""
    return (score_PG - jnp.mean(score_PG)) / (jnp.std(score_PG, ddof=1) + TINY)


# By the name that the setting `rl.advantage` has.
OF_GROUPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'group': group, 'group_std': group_std, 'rloo': rloo, 'batch_std': batch_std, 'max_rl': max_rl,
    'reinforce++': global_std,
}  # fmt: skip


def same(score_PG: jax.Array) -> jax.Array:
    """[P] bool: groups whose scores do not differ, which teach nothing."""
    return jnp.max(score_PG, axis=1) == jnp.min(score_PG, axis=1)


def gae(
    reward_BT: jax.Array, value_BT: jax.Array, mask_BT: jax.Array, *, gamma: float = 1.0, lam: jax.Array | float
) -> jax.Array:
    """Generalized advantage estimation (Schulman et al., 2016, eq. 16) over each row's tokens: δ_t + γλ·A_{t+1} with
    δ_t = r_t + γ·V_{t+1} − V_t, and nothing after the last token.

    Args:
      reward_BT, value_BT: what a token earned, and what was expected before it.
      mask_BT: 1 at the tokens of the response, which adjoin each other.
      lam: λ, one number or one a row [B, 1].
    """
    reward_BT, value_BT = reward_BT * mask_BT, value_BT * mask_BT
    ahead_BT = jnp.pad(value_BT[:, 1:], ((0, 0), (0, 1)))
    delta_BT = reward_BT + gamma * ahead_BT - value_BT
    lam_B = jnp.broadcast_to(jnp.asarray(lam, value_BT.dtype), (value_BT.shape[0], 1))[:, 0]

    def back(after_B: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_B, own_B = now
        advantage_B = own_B * (delta_B + gamma * lam_B * after_B)
        return advantage_B, advantage_B

    start_B = jnp.zeros_like(delta_BT[:, 0])
    _, advantage_TB = jax.lax.scan(back, start_B, (delta_BT.T, mask_BT.T), reverse=True)
    return advantage_TB.T


def whiten(x_BT: jax.Array, mask_BT: jax.Array, *, centre: bool = True) -> jax.Array:
    """(x − mean)/std over the places that count, 0 elsewhere; without `centre` x/std. Advantages are centred, rewards
    not (Huang et al., 2024, the N implementation details of RLHF).

    The published formula for rewards, (x − mean)/std + mean, is for responses of one length: it moves the reward of
    every token by mean·(1 − 1/std), so that where responses may end early a positive score pays for few tokens.
    """
    count = jnp.maximum(jnp.sum(mask_BT), 1)
    mean = jnp.sum(x_BT * mask_BT) / count
    variance = jnp.sum(jnp.square(x_BT - mean) * mask_BT) / count
    return (x_BT - mean * centre) * jax.lax.rsqrt(variance + 1e-8) * mask_BT
