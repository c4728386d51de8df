"""Weights by their role: which parameters are trained, which are only read, and the models that they make together.

A role is what a tree of parameters is for: `policy`, `critic`, `reward`, `reference`, `teacher`, or, where a model is
made of two, `base` and an `adapter` over it.
"""

from collections.abc import Mapping
from typing import Any

from lm.model import adapters

Roles = Mapping[str, Any]  # {role: tree of parameters}
SCORED = ('reward', 'critic')  # roles of models that give a number a token in place of words
ADAPTER_OF = {
    'policy': 'adapter',
    'reward': 'reward_adapter',
    'critic': 'critic_adapter',
}  # {model: its adapter's role}


def assemble(trainable: Roles, frozen: Roles) -> dict[str, Any]:
    """{role: the parameters that a forward pass takes}. A base with the adapter is the policy, and alone the reference,
    unless there is another. The adapter of a critic is over the reward model, where there is one.

    Args:
      trainable: what gradients are of. frozen: the rest; a role is in one of them.
    """
    models = {**frozen, **trainable}
    if 'base' not in models:
        return models
    base = models.pop('base')
    for role, adapter in ADAPTER_OF.items():
        if adapter in models:
            under = models.get('reward', base) if role == 'critic' else base
            models[role] = adapters.over(under, models.pop(adapter))
    return {'reference': base, **models}
