"""Losses of preference optimisation: of pairs of responses, told which is better.

A loss takes `Pairs` (sums of log-probs, not models) and gives the loss of each pair, in arrays of any one shape. `sums`
and `weights` turn that into what `lm.losses.objective` adds up, with an NLL term on the chosen tokens and the metrics.

Most losses are −log σ of the difference of two implicit rewards; LOSSES says for each which reward that is, so that the
logged margin and accuracy are those of what is trained. A pair's label is the probability that its chosen response is
the better one. Each loss takes it as Mitchell (2023) does: the expectation over which of the two is better, so that
swapping the responses and turning the label to 1 − label changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Response(NamedTuple):
    """A response to its prompt, as the losses need it: float32 arrays of one shape."""

    logp: jax.Array  # the sum of the policy's log-probs over the response's tokens
    length: jax.Array  # number of these tokens
    reference: jax.Array | None = None  # the reference's sum, for the losses that have one


class Pairs(NamedTuple):
    """Two responses to each prompt, and the probability that `chosen` is the better of them."""

    chosen: Response
    rejected: Response
    label: jax.Array | float = 1.0


# ---- implicit rewards ----


def log_ratio(response: Response) -> jax.Array:
    """log π(y|x)/π_ref(y|x). Raises ValueError without reference log-probs."""
    if response.reference is None:
        raise ValueError('this loss compares with a reference: pass its log-probs')
    return response.logp - response.reference


def log_odds(response: Response) -> jax.Array:
    """log p/(1 − p), p the geometric mean of the tokens' probabilities (Hong et al., 2024, eqs. 3 and 4)."""
    mean = response.logp / tokens(response)
    # A probability that float32 cannot tell from 1 has odds without bound: here they stop at what it can tell, with no
    # gradient beyond. log(1 − exp(x)) by expm1 is right near 0, and elsewhere to the rounding of a number near 1.
    mean = jnp.minimum(mean, -jnp.finfo(jnp.float32).eps)
    return mean - jnp.log(-jnp.expm1(mean))


def ratio_reward(response: Response, beta: float) -> jax.Array:
    """β·log π/π_ref (Rafailov et al., 2023, eq. 5 without what cancels in a pair)."""
    return beta * log_ratio(response)


def mean_ratio_reward(response: Response, beta: float) -> jax.Array:
    """β·log π/π_ref per token."""
    return beta * log_ratio(response) / tokens(response)


def mean_reward(response: Response, beta: float) -> jax.Array:
    """β·log π per token (Meng et al., 2024, eq. 4)."""
    return beta * response.logp / tokens(response)


def odds_reward(response: Response, beta: float) -> jax.Array:
    """`log_odds`: in ORPO β weighs the loss and is not in the reward."""
    del beta
    return log_odds(response)


def tokens(response: Response) -> jax.Array:
    """The length to divide by: at least 1, for empty slots."""
    return jnp.maximum(response.length, 1)


# ---- losses of pairs ----


def dpo(pairs: Pairs, *, beta: float) -> jax.Array:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7): −log σ(h), h the difference of β·log π/π_ref."""
    return logistic(difference(ratio_reward, pairs, beta), pairs.label)


def cdpo(pairs: Pairs, *, beta: float, label_smoothing: float) -> jax.Array:
    """Conservative DPO (Mitchell, 2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3), labels
    wrong with probability ε: −(1 − ε)·log σ(h) − ε·log σ(−h). Its minimum is at a finite h."""
    label = (1 - label_smoothing) * pairs.label + label_smoothing * (1 - pairs.label)
    return logistic(difference(ratio_reward, pairs, beta), label)


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> jax.Array:
    """Robust DPO (Chowdhury, Kini and Natarajan, 2024, section 3, the unbiased loss), labels flipped with probability
    ε: (−(1 − ε)·log σ(h) + ε·log σ(−h)) / (1 − 2ε). Over the flips it is on average DPO's loss of the true labels."""
    h = difference(ratio_reward, pairs, beta)
    kept, flipped = logistic(h, pairs.label), logistic(-h, pairs.label)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(pairs: Pairs, *, beta: float) -> jax.Array:
    """Identity preference optimisation (Azar et al., 2023, eq. 17, whose τ is β): (h − 1/(2β))².

    The paper's h is the difference of log π/π_ref summed over tokens. Here it is that of the means over tokens, as
    practice has it, since the target 1/(2β) does not grow with the length.
    """
    h = difference(mean_ratio_reward, pairs, 1.0)
    target = 1 / (2 * beta)
    return pairs.label * (h - target) ** 2 + (1 - pairs.label) * (h + target) ** 2


def simpo(pairs: Pairs, *, beta: float, margin: float) -> jax.Array:
    """Simple preference optimisation (Meng et al., 2024, eq. 6): −log σ(h − γ), h the difference of β·log π per token,
    γ the margin by which the better one is to lead."""
    h = difference(mean_reward, pairs, beta)
    return pairs.label * jax.nn.softplus(margin - h) + (1 - pairs.label) * jax.nn.softplus(margin + h)


def orpo(pairs: Pairs, *, beta: float) -> jax.Array:
    """The odds-ratio part of ORPO (Hong et al., 2024, eqs. 6 and 7, whose λ is β): −λ·log σ(difference of log odds).

    The other part of eq. 6 is the NLL of the chosen response, `sums`'s term of that name at coefficient 1.
    """
    return beta * logistic(difference(odds_reward, pairs, beta), pairs.label)


def kto(pairs: Pairs, *, z0: jax.Array, beta: float, lambda_d: float = 1.0, lambda_u: float = 1.0) -> jax.Array:
    """Kahneman–Tversky optimisation on the two examples that a pair is, or the one: half the sum of their losses, see
    `kto_example`. A side without tokens is no example."""
    options = {'z0': z0, 'beta': beta, 'lambda_d': lambda_d, 'lambda_u': lambda_u}
    chosen = kto_example(pairs.chosen, pairs.label, **options)
    rejected = kto_example(pairs.rejected, 1 - pairs.label, **options)
    return (is_there(pairs.chosen) * chosen + is_there(pairs.rejected) * rejected) / 2


def is_there(response: Response) -> jax.Array:
    """1 for a response, 0 for the other side of a single answer."""
    return (jnp.asarray(response.length) > 0).astype(jnp.float32)


def kto_example(
    response: Response,
    label: jax.Array | float,
    *,
    z0: jax.Array,
    beta: float,
    lambda_d: float = 1.0,
    lambda_u: float = 1.0,
) -> jax.Array:
    """Kahneman–Tversky optimisation (Ethayarajh et al., 2024, eq. 8; 7 in its first version) of single examples:
    λ_D·(1 − σ(β(r − z0))) if desirable, λ_U·(1 − σ(β(z0 − r))) if not, r = log π/π_ref.

    Args:
      label: 1 where the response is desirable, 0 where it is not; between them, the probability.
      z0: the baseline, from `baseline_sums` over the global batch and `baseline`.
      lambda_d, lambda_u: what a desirable and an undesirable example weigh.
    """
    gain = beta * (log_ratio(response) - z0)
    return label * lambda_d * jax.nn.sigmoid(-gain) + (1 - label) * lambda_u * jax.nn.sigmoid(gain)


def baseline_sums(mismatched: Response, weight: jax.Array) -> dict[str, jax.Array]:
    """The sums that KTO's baseline is made of, to be added up over the global batch, without gradient, before the loss.

    Args:
      mismatched: to each prompt, a response that was given to another.
      weight: 0 for empty slots.
    """
    ratio = jnp.where(weight > 0, log_ratio(mismatched), 0)
    return {'kl': jnp.sum(weight * ratio), 'kl_weight': jnp.sum(weight)}


def baseline(sums: Mapping[str, jax.Array]) -> jax.Array:
    """z0 of `kto`: the mean log-ratio of mismatched responses, an estimate of KL(π‖π_ref), at least 0; no gradient."""
    mean = sums['kl'] / jnp.where(sums['kl_weight'] > 0, sums['kl_weight'], 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))


def difference(reward: Callable[[Response, float], jax.Array], pairs: Pairs, beta: float) -> jax.Array:
    """By how much the chosen response's reward is above the rejected one's."""
    return reward(pairs.chosen, beta) - reward(pairs.rejected, beta)


def logistic(h: jax.Array, label: jax.Array | float) -> jax.Array:
    """−label·log σ(h) − (1 − label)·log σ(−h)."""
    return label * jax.nn.softplus(-h) + (1 - label) * jax.nn.softplus(h)


# ---- what a stage needs ----


class Preference(NamedTuple):
    """A loss by name, with what it needs."""

    loss: Callable[..., jax.Array]  # (pairs, **settings) -> the loss of each pair; `z0` too where there is a baseline
    reward: Callable[[Response, float], jax.Array]  # (response, β) -> the implicit reward that it compares
    settings: Mapping[str, float]  # what it takes, and what its paper or, for cdpo and robust, practice takes for it
    reference: bool  # whether it needs the reference's log-probs
    baseline: bool = False  # whether it needs z0
    nll: float = 0.0  # the coefficient of the NLL of the chosen response in its own formula


LOSSES: Mapping[str, Preference] = {
    'dpo': Preference(dpo, ratio_reward, {'beta': 0.1}, reference=True),
    'cdpo': Preference(cdpo, ratio_reward, {'beta': 0.1, 'label_smoothing': 0.1}, reference=True),
    'robust': Preference(robust, ratio_reward, {'beta': 0.1, 'label_smoothing': 0.1}, reference=True),
    'ipo': Preference(ipo, mean_ratio_reward, {'beta': 0.1}, reference=True),
    'simpo': Preference(simpo, mean_reward, {'beta': 2.0, 'margin': 1.0}, reference=False),
    'orpo': Preference(orpo, odds_reward, {'beta': 0.1}, reference=False, nll=1.0),
    'kto': Preference(
        kto, ratio_reward, {'beta': 0.1, 'lambda_d': 1.0, 'lambda_u': 1.0}, reference=True, baseline=True
    ),
}


SETTINGS = tuple(dict.fromkeys(key for taken in LOSSES.values() for key in taken.settings))


def settle(name: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """The settings of a loss: its own, where `given` has None.

    Raises ValueError for an unknown loss, for a setting that the loss does not take, and for one out of its range.
    """
    if name not in LOSSES:
        raise ValueError(f'loss={name!r} is not one of {", ".join(LOSSES)}')
    known = LOSSES[name].settings
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, value in chosen.items():
        if key not in known:
            raise ValueError(f'{key}={value}: loss={name!r} takes {" and ".join(known)} alone; leave {key} at none')
    settled = {**known, **chosen}
    if settled['beta'] <= 0:
        raise ValueError(f'beta={settled["beta"]}: must be above 0')
    if not 0 <= settled.get('label_smoothing', 0) < 0.5:
        raise ValueError(f'label_smoothing={settled["label_smoothing"]}: the part of labels that are wrong, below 0.5')
    return settled


def coefficients(name: str, *, nll: float | None = None) -> dict[str, float]:
    """{term: coefficient} for `sums`: the loss itself at 1, and the NLL term at `nll`, or as the loss's formula has it
    where that is None."""
    return {'preference': 1.0, 'chosen_nll': LOSSES[name].nll if nll is None else nll}


def sums(
    name: str, pairs: Pairs, weight: jax.Array, *, settings: Mapping[str, float], z0: jax.Array | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """({term: Σ weight·…}, {metric: Σ weight·…}) of pairs, to be divided by `weights` of the whole batch.

    Args:
      pairs: what stands in a slot of weight 0 is not looked at.
      settings: all that the loss takes, from `settle`.
      z0: KTO's baseline.
    """
    pairs = jax.tree.map(lambda x: jnp.where(weight > 0, x, 0), pairs)
    given = {} if z0 is None else {'z0': z0}
    loss = LOSSES[name].loss(pairs, **settings, **given)
    terms = {'preference': loss, 'chosen_nll': -pairs.chosen.logp}
    measured = metrics(name, pairs, settings['beta'], z0) | given
    total = lambda x: jnp.sum(weight * x)
    return jax.tree.map(total, terms), jax.tree.map(total, jax.lax.stop_gradient(measured))


def metrics(name: str, pairs: Pairs, beta: float, z0: jax.Array | None = None) -> dict[str, jax.Array]:
    """Metrics of each pair: rewards, margin and accuracy of what the loss compares; whether the better response has the
    higher log-prob per token; and the log-probs themselves, which both can fall while the margin grows.

    With a baseline z0 single answers are what is compared, each with it: the accuracy is that of the sign of its gain.
    """
    chosen, rejected = (LOSSES[name].reward(r, beta) for r in (pairs.chosen, pairs.rejected))
    shown = {'logp_chosen': pairs.chosen.logp, 'logp_rejected': pairs.rejected.logp}
    shown |= {'reward_chosen': chosen, 'reward_rejected': rejected}
    if z0 is not None:
        right = is_there(pairs.chosen) * agreement(chosen - beta * z0, pairs.label)
        right += is_there(pairs.rejected) * agreement(beta * z0 - rejected, pairs.label)
        return shown | {'accuracy': right / 2}
    per_token = [r.logp / tokens(r) for r in (pairs.chosen, pairs.rejected)]
    return shown | {
        'margin': chosen - rejected,
        'accuracy': agreement(chosen - rejected, pairs.label),
        'accuracy_per_token': agreement(per_token[0] - per_token[1], pairs.label),
    }


def agreement(margin: jax.Array, label: jax.Array | float) -> jax.Array:
    """1 where the sign of the margin agrees with the label, 0 where it does not, ½ where either is undecided."""
    return (1 + jnp.sign(margin) * jnp.sign(jnp.asarray(label) - 0.5)) / 2


def weights(name: str, weight: jax.Array, chosen_length: jax.Array, rejected_length: jax.Array) -> dict[str, jax.Array]:
    """{term or metric: W} of the whole batch for `sums`: pairs, of which a single answer is half a one; and tokens for
    what is per token."""
    good, bad = (jnp.sum(weight * (length > 0)) for length in (chosen_length, rejected_length))
    own = ['z0'] if LOSSES[name].baseline else ['margin', 'accuracy_per_token']
    halves = dict.fromkeys(['preference', 'accuracy'], (good + bad) / 2)
    chosen, rejected = jnp.sum(weight * chosen_length), jnp.sum(weight * rejected_length)
    per_token = {'chosen_nll': chosen, 'logp_chosen': chosen, 'logp_rejected': rejected}
    return dict.fromkeys(own, jnp.sum(weight)) | halves | {'reward_chosen': good, 'reward_rejected': bad} | per_token
