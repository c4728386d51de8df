"""One row of the table of parameters: all that is told of a parameter, so that nothing else asks for its name's text.

The rows are in lm/model/parameters.py, those of a feed-forward beside its code. A new parameter is a new row: its init,
shape, layout, optimizer group, weight decay, FLOPs and form in other formats' files follow from that.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lm import sharding
from lm.model.config import ModelConfig

When = Callable[[ModelConfig], bool]
always: When = lambda cfg: True


class Param(NamedTuple):
    """A parameter.

    Attributes:
      name: of its leaf; it ends with the letters of its dims, those of one layer.
      init: of `parameters.STARTS`. 'norm' also says that it is a norm's scale.
      contracted: the letters that its product with activations sums over, which are its fan-in; '': it has no product.
      decays: weight decay shrinks it.
      matrix: it maps activations to activations, so that its spectrum means something: Muon takes it. Embedding and
        head map words, one at a time, and are no matrices (Jordan et al., 2024).
      when: tells whether a model has it.
    """

    name: str
    init: str
    contracted: str = ''
    decays: bool = False
    matrix: bool = False
    when: When = always

    @property
    def dims(self) -> str:
        """Its letters."""
        return sharding.dims_of(self.name)

    @property
    def is_norm(self) -> bool:
        """True for the scale of a norm."""
        return self.init == 'norm'

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one layer's, given the size of each letter."""
        return tuple(sizes[letter] for letter in self.dims)


def norm(name: str, when: When = always) -> Param:
    """The scale of a norm."""
    return Param(name, 'norm', when=when)


def bias(name: str, when: When = always) -> Param:
    """An added vector, or number."""
    return Param(name, 'zeros', when=when)


def matrix(name: str, contracted: str, init: str = 'fan_in', when: When = always) -> Param:
    """A matrix of a layer; one a layer adds to the residual stream with begins as 'residual' says."""
    return Param(name, init, contracted, decays=True, matrix=True, when=when)
