"""Schedules, clipping, and the optimizers: AdamW, Muon for matrices with AdamW for the rest, Adafactor."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lm.config import nearest
from lm.errors import UsageError
from lm.settings import SCHEDULES
from lm.training import adafactor, muon
from lm.training.param_groups import ParamInfo, infos_of

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs
Moments: TypeAlias = dict[str, jax.Array]


def schedule(name: str, *, lr: float, steps: int, warmup: int, decay: float, final: float) -> optax.Schedule:
    """step -> learning rate: a linear warmup to `lr`, then one of SCHEDULES down to `final`·lr at `steps`.

    wsd (warmup-stable-decay; Hu et al., 2024, section 4) stays at lr and falls linearly over the last `decay` part.

    Raises UsageError for another name.
    """
    if name not in SCHEDULES:
        raise UsageError(f'optim.schedule={name}{nearest(name, SCHEDULES)}: must be one of {", ".join(SCHEDULES)}')
    warmup = min(warmup, steps // 2)
    rest = max(1, steps - warmup)
    fall = max(1, round(decay * steps))

    def rate(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        up = (step + 1) / max(1, warmup + 1)
        part = jnp.clip((step - warmup) / rest, 0, 1)
        down = {
            'cosine': final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * part)),
            'linear': 1 - (1 - final) * part,
            'wsd': 1 - (1 - final) * jnp.clip((step - (steps - fall)) / fall, 0, 1),
            'constant': jnp.ones(()),
        }[name]
        return lr * jnp.where(step < warmup, up, down)

    return rate


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scales the gradients so that their global norm is at most `limit`; `norm` is what it is before."""
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


# ---- the optimizers: one rule a leaf ----


class Rule(NamedTuple):
    """A rule by which a leaf's gradient becomes a direction, still to be multiplied by −rate.

    `init(param, info) -> moments`; `update(grad, moments, info, count) -> (direction, moments)`, count being the number
    of updates up to this one.
    """

    init: Callable[[jax.Array, ParamInfo], Moments]
    update: Callable[[jax.Array, Moments, ParamInfo, jax.Array], tuple[jax.Array, Moments]]


def adam(*, b1: float, b2: float, eps: float) -> Rule:
    """Adam (Kingma and Ba, 2015), its bias corrected."""

    def update(grad: jax.Array, moments: Moments, info: ParamInfo, count: jax.Array) -> tuple[jax.Array, Moments]:
        mu = b1 * moments['mu'] + (1 - b1) * grad
        nu = b2 * moments['nu'] + (1 - b2) * grad * grad
        mu_hat, nu_hat = mu / (1 - b1**count), nu / (1 - b2**count)
        return mu_hat / (jnp.sqrt(nu_hat) + eps), {'mu': mu, 'nu': nu}

    return Rule(lambda param, info: {'mu': jnp.zeros_like(param), 'nu': jnp.zeros_like(param)}, update)


def nesterov(*, momentum: float) -> Rule:
    """An average of the gradients that looks a step ahead: what Muon makes orthogonal."""

    def update(grad: jax.Array, moments: Moments, info: ParamInfo, count: jax.Array) -> tuple[jax.Array, Moments]:
        mu = momentum * moments['mu'] + (1 - momentum) * grad
        return momentum * mu + (1 - momentum) * grad, {'mu': mu}

    return Rule(lambda param, info: {'mu': jnp.zeros_like(param)}, update)


def adamw(rate: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019)."""
    rule = adam(b1=b1, b2=b2, eps=eps)
    return assemble(lambda info: rule, rate, weight_decay=weight_decay)


def muon_adamw(
    rate: optax.Schedule, *, b1: float, b2: float, eps: float, momentum: float, weight_decay: float, dtype: Any
) -> Optimizer:
    """Muon for the matrices and AdamW for the rest, at one rate and one decay (Liu et al., 2025).

    Args:
      dtype: of the products that make a matrix orthogonal.
    """
    matrices, rest = nesterov(momentum=momentum), adam(b1=b1, b2=b2, eps=eps)

    def finish(directions: list[jax.Array], infos: list[ParamInfo]) -> list[jax.Array]:
        own = [i for i, info in enumerate(infos) if info.matrix]
        made = muon.orthogonal([directions[i] for i in own], [infos[i] for i in own], dtype=dtype)
        made = dict(zip(own, made, strict=True))
        return [made.get(i, x) for i, x in enumerate(directions)]

    choose = lambda info: matrices if info.matrix else rest
    return assemble(choose, rate, weight_decay=weight_decay, finish=finish)


def adafactored(rate: optax.Schedule, *, weight_decay: float) -> Optimizer:
    """Adafactor for every leaf, with AdamW's decay."""
    rule = Rule(adafactor.init, adafactor.update)
    return assemble(lambda info: rule, rate, weight_decay=weight_decay)


def assemble(
    choose: Callable[[ParamInfo], Rule],
    rate: optax.Schedule,
    *,
    weight_decay: float,
    finish: Callable[[list[jax.Array], list[ParamInfo]], list[jax.Array]] = lambda directions, infos: directions,
) -> Optimizer:
    """The optimizer whose update of a leaf is −rate·(direction + weight_decay·parameter): decay is decoupled from the
    gradient and follows the rate.

    Its state is {'count': updates made, 'moments': the parameters' tree with a dict of moments at each leaf}. `update`
    takes the keyword `step`, which the rate is of: `count` falls behind with every skipped step.

    Args:
      finish: what is done to all directions together.
    """

    def init(params: Any) -> Any:
        values, tree = jax.tree.flatten(params)
        moments = [choose(info).init(x, info) for x, info in zip(values, infos_of(params), strict=True)]
        return {'count': jnp.zeros((), jnp.int32), 'moments': tree.unflatten(moments)}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        values, tree = jax.tree.flatten(params)
        infos, count = infos_of(params), state['count'] + 1
        given = zip(tree.flatten_up_to(updates), tree.flatten_up_to(state['moments']), infos, strict=True)
        made = [choose(info).update(g, m, info, count) for g, m, info in given]
        directions, factor = finish([d for d, _ in made], infos), -jnp.asarray(rate(extra['step']))
        decays = [weight_decay if info.decays else 0.0 for info in infos]
        moves = [factor * (d + w * x) for d, w, x in zip(directions, decays, values, strict=True)]
        return tree.unflatten(moves), {'count': count, 'moments': tree.unflatten([m for _, m in made])}

    return Optimizer(init, update)
