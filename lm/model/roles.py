"""Weights by their role: which parameters are trained, which are only read, and the models that they make together.

A role is what a tree of parameters is for: `policy`, `critic`, `reward`, `reference`, `teacher`, or, where a policy is
made of two, `base` and the `adapter` over it.
"""

from collections.abc import Mapping
from typing import Any

from lm.model import adapters

Roles = Mapping[str, Any]  # {role: tree of parameters}
SCORED = ('reward', 'critic')  # roles of models that give a number a token in place of words


def assemble(trainable: Roles, frozen: Roles) -> dict[str, Any]:
    """{role: the parameters that a forward pass takes}. A base with its adapter is the policy, and alone the reference,
    unless there is another.

    Args:
      trainable: what gradients are of. frozen: the rest; a role is in one of them.
    """
    models = {**frozen, **trainable}
    if 'adapter' in models:
        base = models.pop('base')
        models = {'reference': base, **models, 'policy': adapters.over(base, models.pop('adapter'))}
    return models
