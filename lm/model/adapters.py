"""Adapters: a few trained weights over a model that stays as it is (Houlsby et al., 2019; Hu et al., 2021).

An adapter is a tree like a part of the model's. At each leaf is a `Part`, which holds what is trained, or an array that
takes the place of the base's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from lm.errors import UsageError
from lm.model import lora, seam
from lm.settings import Lora

Settings = Mapping[str, Any]


@runtime_checkable
class Part(seam.Weight, Protocol):
    """The protocol of an adapter's weights."""

    def over(self, base: Any) -> seam.Weight:
        """The weight that stands in the place of a base's."""
        ...


class Adapter(NamedTuple):
    """A kind of adapter, with the settings of the group that has its name.

    Attributes:
      init: (key, the base's parameters, settings) -> the adapter's tree.
      rates: (the tree, settings) -> the multiple of the learning rate for it, or for each of its parts.
    """

    init: Callable[[jax.Array, Any, Settings], Any]
    rates: Callable[[Any, Settings], Any] = lambda tree, settings: 1.0


# By the name that a run says it trains.
ADAPTERS = {'lora': Adapter(lora.init, lora.rates)}


def check(config: Mapping[str, Any]) -> None:
    """Raises UsageError for settings of an adapter where none is asked for."""
    if 'lora' not in config or config['lora']['rank'] is not None:
        return
    for field in dataclasses.fields(Lora):
        if (value := config['lora'][field.name]) != field.default:
            raise UsageError(f'lora.{field.name}={value} does nothing without lora.rank: set that, or leave it out')


def settings_of(config: Mapping[str, Any], name: str) -> Settings:
    """The settings of an adapter in those of a run."""
    return dict(config[name]) if name in config else {}


def over(base: Any, adapter: Any) -> Any:
    """The base's tree with the adapter's leaves over its own; what the adapter leaves out stays as it is."""
    if isinstance(adapter, Mapping):
        return {**base, **{name: over(base.get(name), leaf) for name, leaf in adapter.items()}}
    return adapter.over(base) if isinstance(adapter, Part) else adapter


def merged(params: Any) -> Any:
    """The parameters with an array in the place of each weight: those of layers are made one at a time."""

    def leaf(path: Any, w: Any) -> Any:
        if not isinstance(w, seam.Weight):
            return w
        return jax.lax.map(seam.dense, w) if 'layers' in [key.key for key in path] else seam.dense(w)

    return jax.tree.map_with_path(leaf, params, is_leaf=lambda w: isinstance(w, seam.Weight))
