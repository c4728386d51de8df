"""Schedules, weight-decay masks, AdamW."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.config import SCHEDULES, nearest
from lm.errors import UsageError


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


def decayed(params: Any) -> Any:
    """The tree of booleans: which leaves decay. Not norms, not biases, not embeddings, told by their names."""

    def leaf(path: tuple[Any, ...], _: Any) -> bool:
        name = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)][-1]
        return not ('norm' in name or name.startswith(('embed', 'bias')))

    return jax.tree_util.tree_map_with_path(leaf, params)


def adamw(
    rate: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov and Hutter, 2019): decay is decoupled and multiplied by the rate.

    Its update takes the keyword `step`. Optax's own counts updates, and would fall behind with every skipped one.
    """

    def scale(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        factor = -jnp.asarray(rate(extra['step']))
        return jax.tree.map(lambda u: factor * u, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale)
    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    return optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), decay, scaled)


def clip(grads: Any, norm: jax.Array, limit: float) -> Any:
    """Scales the gradients so that their global norm is at most `limit`; `norm` is what it is before."""
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
