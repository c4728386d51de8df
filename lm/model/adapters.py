"""Adapters: a few trained weights over a model that stays as it is (Houlsby et al., 2019; Hu et al., 2021).

An adapter is a tree like a part of the model's, with a weight (`seam.Weight`) at each leaf that holds what is trained;
`over(base)` gives the weight that stands in the base's place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

# {name: init(key, the base's parameters or their shapes) -> the adapter's tree}; a run names the one that it trains.
ADAPTERS: dict[str, Callable[[jax.Array, Any], Any]] = {}


def over(base: Any, adapter: Any) -> Any:
    """The base's tree with the adapter's leaves over its own; what the adapter leaves out stays as it is."""
    if isinstance(adapter, Mapping):
        return {**base, **{name: over(base[name], leaf) for name, leaf in adapter.items()}}
    return adapter.over(base)
