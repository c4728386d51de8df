"""Weights by their role: which parameters are trained, which are only read, and the models that they make together.

A role is what a tree of parameters is for: `policy`, `critic`, `reward`, `reference`, `teacher`, or, where a policy is
made of two, `base` and the `adapter` over it.
"""

from collections.abc import Mapping
from typing import Any, Protocol

Roles = Mapping[str, Any]  # {role: tree of parameters}
SCORED = ('reward', 'critic')  # roles of models that give a number a token in place of words


class Adapter(Protocol):
    """A leaf of an adapter's tree."""

    def over(self, base: Any) -> Any:
        """Returns the weight (`seam.Weight`) that stands in the base's place."""
        ...


def assemble(trainable: Roles, frozen: Roles) -> dict[str, Any]:
    """{role: the parameters that a forward pass takes}. A base with its adapter is the policy.

    Args:
      trainable: what gradients are of. frozen: the rest; a role is in one of them.
    """
    models = {**frozen, **trainable}
    if 'adapter' in models:
        models['policy'] = _over(models.pop('base'), models.pop('adapter'))
    return models


def _over(base: Any, adapter: Any) -> Any:
    """The base's tree with the adapter's leaves over its own; what the adapter leaves out stays as it is."""
    if isinstance(adapter, Mapping):
        return {**base, **{name: _over(base[name], leaf) for name, leaf in adapter.items()}}
    return adapter.over(base)
