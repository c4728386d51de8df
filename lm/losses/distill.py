"""Losses of distillation: how far a student's distribution over the vocabulary is from its teacher's.

P is the teacher, Q the student, at a token and a temperature:

    forward   KL(P‖Q)                          (Hinton et al., 2015, to a constant: the teacher's entropy)
    reverse   KL(Q‖P)                          (MiniLLM: Gu et al., 2024)
    jsd       β·KL(P‖M) + (1 − β)·KL(Q‖M),  M = β·P + (1 − β)·Q     (GKD: Agarwal et al., 2024, eq. 2)

The last is 0 at both ends of β; divided by β it goes to the forward KL as β goes to 0, divided by 1 − β to the reverse
one as β goes to 1.

A divergence gives its value and its gradient by the student's logits, so that whoever holds the logits of a few tokens
needs them once. `total` sums over the last axis, the vocabulary; a device that has a part of it sums over the others.
Where the logits are of a temperature T, the gradient is of the logits/T; multiplied by T² a loss keeps the size of its
gradient (Hinton et al., 2015, section 2.1).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KINDS = ('forward', 'reverse', 'jsd')
NOWHERE = -1e30  # the log-probability of what cannot be, finite: 0·NOWHERE is 0
Total = Callable[[jax.Array], jax.Array]


def _last(x_CV: jax.Array) -> jax.Array:
    return jnp.sum(x_CV, axis=-1)


def summand(log_p: jax.Array, log_q: jax.Array, *, kind: str, beta: float | None = None) -> jax.Array:
    """Returns what each word adds to the divergence, of one shape with the log-probs.

    Args:
      log_p: of the teacher. log_q: of the student. beta: the teacher's share of M, for `jsd` alone.
    """
    if kind == 'forward':
        return jnp.exp(log_p) * (log_p - log_q)
    if kind == 'reverse':
        return jnp.exp(log_q) * (log_q - log_p)
    if beta is None or not 0 < beta < 1:
        raise ValueError(f'jsd_beta={beta}: the jsd takes one between 0 and 1')
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    return beta * jnp.exp(log_p) * (log_p - log_m) + (1 - beta) * jnp.exp(log_q) * (log_q - log_m)


def divergence(
    log_q_CV: jax.Array, log_p_CV: jax.Array, *, kind: str, beta: float | None = None, total: Total = _last
) -> tuple[jax.Array, jax.Array]:
    """(the divergence of each token, in nats [C]; its gradient by the student's logits [C, V])."""
    term_CV, pull = jax.vjp(lambda log_q_CV: summand(log_p_CV, log_q_CV, kind=kind, beta=beta), log_q_CV)
    (g_CV,) = pull(jnp.ones_like(term_CV))
    return total(term_CV), g_CV - jnp.exp(log_q_CV) * total(g_CV)[..., None]


def top_k_divergence(
    log_q_CV: jax.Array, log_p_CV: jax.Array, log_tail_C: jax.Array, *, total: Total = _last
) -> tuple[jax.Array, jax.Array]:
    """As `divergence`, the forward KL of a teacher of whom the most likely words are known: all the others are one
    class more, for the teacher and for the student.

    Args:
      log_p_CV: NOWHERE for the other words. log_tail_C: the log of their mass.
    """
    known_CV, q_CV = log_p_CV > NOWHERE / 2, jnp.exp(log_q_CV)
    p_CV, p_tail_C = jnp.exp(log_p_CV), jnp.exp(log_tail_C)
    q_tail_C = jnp.maximum(total(jnp.where(known_CV, 0, q_CV)), jnp.finfo(jnp.float32).tiny)
    head_C = total(jnp.where(known_CV, p_CV * (log_p_CV - log_q_CV), 0))
    value_C = head_C + p_tail_C * (log_tail_C - jnp.log(q_tail_C))
    mass_C = total(p_CV) + p_tail_C
    wanted_CV = jnp.where(known_CV, p_CV, q_CV * (p_tail_C / q_tail_C)[..., None])
    return value_C, q_CV * mass_C[..., None] - wanted_CV
