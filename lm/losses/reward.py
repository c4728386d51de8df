"""The loss of a reward model: of pairs of scores, told which is to be the higher."""

import jax
import jax.numpy as jnp

from lm.losses.preference import agreement


def bradley_terry(
    chosen: jax.Array, rejected: jax.Array, *, margin: jax.Array | float = 0.0, label: jax.Array | float = 1.0
) -> jax.Array:
    """−log σ(r_c − r_r − margin) of each pair (Bradley and Terry, 1952; Ouyang et al., 2022, eq. 1; with a margin
    Touvron et al., 2023, eq. 2).

    Args:
      chosen, rejected: scores, float32 of one shape.
      margin: by how much the better response is to lead.
      label: the probability that `chosen` is better; the loss is the expectation over which of the two is.
    """
    lead = chosen - rejected
    return label * jax.nn.softplus(margin - lead) + (1 - label) * jax.nn.softplus(margin + lead)


def centring(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """(r_c + r_r)² of each pair, which pulls to 0 the mean that Bradley–Terry leaves free (Eisenstein et al., 2023,
    eq. 2). A term of its own, with a coefficient of about 1e-2."""
    return jnp.square(chosen + rejected)


def sums(
    chosen: jax.Array,
    rejected: jax.Array,
    weight: jax.Array,
    *,
    margin: jax.Array | float = 0.0,
    label: jax.Array | float = 1.0,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({term: Σ weight·…}, {metric: Σ weight·…}) of pairs of scores, to be divided by `weights` of the whole batch.

    What stands in a slot of weight 0 is not looked at. The accuracy counts a tie as half.
    """
    chosen, rejected, margin, label = (jnp.where(weight > 0, x, 0) for x in (chosen, rejected, margin, label))
    terms = {
        'bradley_terry': bradley_terry(chosen, rejected, margin=margin, label=label),
        'centring': centring(chosen, rejected),
    }
    lead = chosen - rejected
    metrics = {
        'accuracy': agreement(lead, label), 'margin': lead, 'reward_chosen': chosen, 'reward_rejected': rejected,
    }  # fmt: skip
    total = lambda x: jnp.sum(weight * x)
    return jax.tree.map(total, terms), jax.tree.map(total, jax.lax.stop_gradient(metrics))


def weights(weight: jax.Array) -> dict[str, jax.Array]:
    """{term or metric: W} of the whole batch for `sums`: pairs."""
    names = ('bradley_terry', 'centring', 'accuracy', 'margin', 'reward_chosen', 'reward_rejected')
    return dict.fromkeys(names, jnp.sum(weight))
