"""The shape of a decoder and how it is run: `ModelConfig`, its checks, and what its words stand for."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax

from lm.errors import UsageError
from lm.model import attention_kernels as kernels
from lm.model.layers import RopeScaling
from lm.settings import Model


def _with_cudnn(policy: Any) -> Any:
    """The policy, which also keeps what cuDNN's attention gives: its backward pass reads more of that than has a name,
    and without this the kernel is run again."""

    def keeps(prim: Any, *avals: Any, **options: Any) -> bool:
        return prim.name.startswith('dot_product_attention_fwd') or policy(prim, *avals, **options)

    return keeps


REMAT = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': _with_cudnn(
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(kernels.NAME),
        )
    ),
    'names': _with_cudnn(jax.checkpoint_policies.save_only_these_names(kernels.NAME, 'gated')),
}


ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': partial(jax.nn.gelu, approximate=True)}
# Attention of the last `window` tokens, of all, and of all without positions (Yang et al., 2025, RNoPE).
KINDS_OF_LAYER = ('local', 'global', 'nope')
SIZES = ('vocab_size', 'dim', 'layers', 'heads', 'kv_heads', 'head_dim', 'ffn_dim')


@dataclasses.dataclass(frozen=True)
class ModelConfig(Model):
    """The shape of a decoder, as the settings `model.*` say, and how it is run. Raises UsageError if the sizes do not
    fit each other."""

    feed_forward: str = 'gated'  # of feed_forward.FEED_FORWARDS
    vocab_multiple: int = 128  # the table has as many rows as the next multiple
    scan: bool = False
    remat: str = 'none'  # of REMAT
    attention: str = 'blocks'  # of attention_kernels.NAMES
    dtype: str = 'float32'  # of activations and products; parameters are float32

    def __post_init__(self):
        for field in dataclasses.fields(Model):
            value, bound = getattr(self, field.name), field.metadata['bound']
            if value is not None and bound and (obstacle := bound.obstacle(value)):
                raise UsageError(f'model.{field.name}={value} {obstacle}')
        if self.heads % self.kv_heads:
            raise UsageError(f'model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}')
        if self.head_dim % 2:
            raise UsageError(f'model.head_dim={self.head_dim} is odd: rotary positions pair its halves')
        for word in self.kinds:
            if word not in KINDS_OF_LAYER:
                raise UsageError(f'model.pattern={self.pattern}: {word!r} is not one of {", ".join(KINDS_OF_LAYER)}')
        if 'local' in self.kinds and self.window is None:
            raise UsageError(f'model.pattern={self.pattern} has local layers: set model.window')
        RopeScaling.parse(self.rope_scaling)

    @property
    def key(self) -> dict[str, Any]:
        """The sizes, and of the rest what is not at its default, for caches: a field that is added later changes no
        key."""
        fields = dataclasses.fields(self)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default or f.name in SIZES}

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        padded = math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple
        return {'D': self.dim, 'N': self.heads, 'K': self.kv_heads, 'H': self.head_dim, 'F': self.ffn_dim, 'V': padded}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layer that repeat over the depth."""
        if self.pattern is None:
            return ('global' if self.window is None else 'local',)
        return tuple(word.strip() for word in self.pattern.split(','))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The attention window of each layer; None: all tokens."""
        return tuple(self.window_of(self.kind(i)) for i in range(self.layers))

    def window_of(self, kind: str) -> int | None:
        """The attention window of a kind of layer, in tokens, the token itself included; None: all."""
        return self.window if kind == 'local' else None

    def kind(self, layer: int) -> str:
        """The kind of a layer."""
        return self.kinds[layer % len(self.kinds)]
