"""Quantized weights: the matrices of the layers in 8 or 4 bits, multiplied as they lie.

A matrix is cut into groups along what its product with activations sums over. Of a group each number is a small code
times the group's scale. `KINDS` lists the codes: whole numbers (int8, int4), or the quantiles of a normal distribution
(NF4; Dettmers et al., 2023), whose scales are quantized once more. Nothing is ever trained in a quantized weight:
gradients pass through it to what stands before it, and no product keeps a dense copy for them.
"""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lm import sharding
from lm.errors import UsageError
from lm.model import parameters, seam
from lm.model.config import ModelConfig
from lm.model.param import Param

# QLoRA, appendix E: the code book of NF4.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALES = 256  # of NF4's groups that share a scale of their own (QLoRA, section 3: double quantization)


def dynamic_map() -> np.ndarray:
    """The 256 numbers of the signed dynamic 8-bit type (Dettmers et al., 2022, section 1.2), ascending: in each of
    seven decades below 1 the middles of 2ⁱ steps from a tenth of it, with both signs, and 0 and 1."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*middles, *-middles]
    return np.sort(np.asarray(found, np.float32))


class Kind(NamedTuple):
    """A way to quantize.

    Attributes:
      bits: of a code. group: how many numbers share a scale unless GROUPS are asked for; None: all of an output.
    """

    bits: int
    group: int | None


KINDS = {'int8': Kind(8, None), 'int4': Kind(4, 64), 'nf4': Kind(4, 64)}
GROUPS = (32, 64, 128)


@struct.dataclass
class Quantized:
    """A matrix [inputs…, outputs…] as codes and scales.

    I are its inputs, all of them as one axis, and G the groups along it.

    Attributes:
      codes: int8 [I, outputs…]; of 4 bits uint8 [I/2, outputs…], the first of two in the upper half.
      scale: [G, outputs…]; of NF4 uint8, codes of the dynamic 8-bit type.
      kind: of KINDS. shape: of the matrix, of one layer. inputs, outputs: its letters.
      steps: of NF4 [⌈numbers of scale / 256⌉]: what its scales are multiples of. offset: [], what is added to them.
    """

    codes: Any
    scale: Any
    kind: str = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    inputs: str = struct.field(pytree_node=False)
    outputs: str = struct.field(pytree_node=False)
    steps: Any = None
    offset: Any = None

    def dims(self, parent: str) -> dict[str, str]:
        """The letters of each array field."""
        one = parent[0] + self.outputs
        found = {'codes': one, 'scale': 'G' + self.outputs, 'steps': 'G', 'offset': ''}
        return {name: letters for name, letters in found.items() if vars(self)[name] is not None}

    def einsum(self, eq: str, x: jax.Array) -> jax.Array:
        """The product, of x's dtype."""
        return _product(eq, x, self)

    def dense(self) -> jax.Array:
        """The matrix, float32."""
        scales = self._scales()
        groups = self._reshaped(self._values(), scales.shape[0], -1) * scales[:, None]
        return self._reshaped(groups, *self.shape[: len(self.inputs)])

    def _values(self) -> jax.Array:
        """What the codes stand for, float32 [I, outputs…], all inputs on every device: they travel as codes."""
        codes = seam.gather(self.codes, 'I' + self.outputs)
        if KINDS[self.kind].bits == 4:
            codes = self._reshaped(jnp.stack([codes >> 4, codes & 15], 1), -1)
        if self.kind == 'nf4':
            return _looked_up(NF4, codes)
        return codes.astype(jnp.float32) - (8 if self.kind == 'int4' else 0)

    def _scales(self) -> jax.Array:
        """The scale of each group, float32 [G, outputs…]."""
        if self.kind != 'nf4':
            return seam.gather(self.scale, 'G' + self.outputs).astype(jnp.float32)
        scale, groups = sharding.replicated(self.scale), self.scale.shape[0]
        steps = jnp.repeat(self.steps, SCALES)[: scale.size].reshape(-1, groups).T  # the groups of an output adjoin
        scales = _looked_up(dynamic_map(), scale) * steps.reshape(scale.shape) + self.offset
        return seam.gather(scales, 'G' + self.outputs)

    def _reshaped(self, x: jax.Array, *lead: int) -> jax.Array:
        """The same numbers with other axes before those of the outputs."""
        n = len(self.outputs)
        outputs = x.shape[x.ndim - n :]
        if -1 in lead:
            lead = (*lead[:-1], math.prod(x.shape[: x.ndim - n]) // math.prod(lead[:-1]))
        if not sharding.axis_sizes():
            return x.reshape(*lead, *outputs)
        spec = jax.typeof(x).sharding.spec
        to = jax.sharding.PartitionSpec(*(None,) * len(lead), *spec[x.ndim - n :])
        return jax.lax.reshape(x, (*lead, *outputs), out_sharding=to)


def _looked_up(book: Any, codes: jax.Array) -> jax.Array:
    """The numbers of a code book, float32."""
    table = jnp.asarray(book, jnp.float32)
    return table.at[codes].get(mode='promise_in_bounds', out_sharding=jax.typeof(codes).sharding)


def _plain_product(eq: str, x: jax.Array, w: Quantized) -> jax.Array:
    if w.kind != 'int8' or w.scale.shape[0] > 1:
        return seam.einsum(eq, x, w.dense())
    # one scale an output: it can wait until after the sum
    codes = w._reshaped(seam.gather(w.codes, 'I' + w.outputs), *w.shape[: len(w.inputs)])
    y = seam.einsum(eq, x, codes.astype(x.dtype), dtype=jnp.float32)
    return (y * w._scales()[0]).astype(x.dtype)


def _product_forward(eq: str, x: jax.Array, w: Quantized) -> tuple[jax.Array, Any]:
    return _plain_product(eq, x, w), (x, w)


def _product_backward(eq: str, saved: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    """The gradient of x by the matrix made anew: kept, the dense matrices of all layers would be the whole model."""
    x, w = saved
    return jax.vjp(lambda x: _plain_product(eq, x, w), x)[1](dy)[0], None


_product: Any = jax.custom_vjp(_plain_product, nondiff_argnums=(0,))
_product.defvjp(_product_forward, _product_backward)


# ---- quantizing ----


def is_kind(text: str) -> bool:
    """Tells whether it begins as a kind of KINDS does."""
    return text.lower().partition(':')[0] in KINDS


def parse(text: str) -> tuple[str, int | None]:
    """('int4', 32) of 'int4:32', and ('int4', 64) of 'int4'. Raises UsageError for what is no kind or has no such
    groups."""
    name, colon, size = text.lower().partition(':')
    if name not in KINDS:
        raise UsageError(f'{text} is no way to quantize a run: one of {", ".join(KINDS)}, or with groups int4:32')
    if not colon:
        return name, KINDS[name].group
    if size not in map(str, GROUPS):
        raise UsageError(f'{text}: groups are of {", ".join(map(str, GROUPS))}: write {name}:{KINDS[name].group or 64}')
    return name, int(size)


def quantize(w: jax.Array, letters: str, inputs: str, text: str) -> Quantized:
    """A matrix quantized, deterministic. Raises UsageError if a group does not divide its inputs.

    int4's scale is its group's largest number by −8, which gets the code that reaches farthest. A group of zeros has
    the scale 0, and in NF4 the code of 0.
    """
    name, size = parse(text)
    n = len(inputs)
    count, outputs = math.prod(w.shape[:n]), w.shape[n:]
    size = count if size is None else size
    if count % size:
        fits = [f'{name}:{g}' for g in GROUPS if count % g == 0]
        other = f'take {" or ".join(fits)}' if fits else 'take int8'
        raise UsageError(f'{text}: groups of {size} do not divide the {count} inputs of a matrix: {other}')
    own = {'kind': name, 'shape': tuple(w.shape), 'inputs': inputs, 'outputs': letters.removeprefix(inputs)}
    groups = w.astype(jnp.float32).reshape(count // size, size, *outputs)
    largest = jnp.max(jnp.abs(groups), 1)
    if name == 'nf4':
        unit = groups / jnp.where(largest > 0, largest, 1)[:, None]
        codes = _nearest(unit, jnp.asarray(NF4, jnp.float32))
        return Quantized(_packed(codes.reshape(count, *outputs)), **_double(largest), **own)
    if name == 'int8':
        scale, low = largest / 127, -127
    else:
        first = jnp.take_along_axis(groups, jnp.argmax(jnp.abs(groups), 1)[:, None], 1)[:, 0]
        scale, low = (first / -8).astype(jnp.bfloat16).astype(jnp.float32), -8
    by = jnp.where(scale != 0, scale, 1)[:, None]
    codes = jnp.clip(jnp.round(groups / by), low, -low - (name == 'int4')).reshape(count, *outputs)
    if name == 'int8':
        return Quantized(codes.astype(jnp.int8), scale, **own)
    return Quantized(_packed((codes + 8).astype(jnp.uint8)), scale.astype(jnp.bfloat16), **own)


def _nearest(x: jax.Array, book: jax.Array) -> jax.Array:
    """uint8 codes of the numbers of an ascending code book nearest to x; of two as near, the lower."""
    return jnp.searchsorted((book[1:] + book[:-1]) / 2, x, side='left').astype(jnp.uint8)


def _packed(codes: jax.Array) -> jax.Array:
    """[I, …] of 4 bits as [I/2, …]."""
    pairs = codes.reshape(-1, 2, *codes.shape[1:])
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _double(largest: jax.Array) -> dict[str, jax.Array]:
    """NF4's scales [G, outputs…], quantized: their distance from their mean, by blocks of an output's groups and then
    the next output's."""
    flat = largest.reshape(largest.shape[0], -1).T.reshape(-1)
    offset = jnp.mean(flat)
    blocks = jnp.pad(flat - offset, (0, -flat.size % SCALES)).reshape(-1, SCALES)
    steps = jnp.max(jnp.abs(blocks), 1)
    codes = _nearest(blocks / jnp.where(steps > 0, steps, 1)[:, None], jnp.asarray(dynamic_map()))
    codes = codes.reshape(-1)[: flat.size].reshape(-1, largest.shape[0]).T.reshape(largest.shape)
    return {'scale': codes, 'steps': steps, 'offset': offset}


# ---- of a model ----


def matrices(params: Mapping[str, Any]) -> dict[str, Param]:
    """{leaf of the layers: row} of what is quantized: the matrices of the layers."""
    return {row.name: row for row in parameters.of_layers() if row.matrix and row.name in params['layers']}


def told(model: Mapping[str, Any], text: str) -> str:
    """Megabytes of a model's weights, in 16 bits and as each kind has them. Raises UsageError as `quantize`."""
    plain = parameters.shapes(ModelConfig(**model))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), plain)
    found = {'bfloat16': half, text: jax.eval_shape(lambda p: quantized(p, text), half)}
    for other in KINDS:
        with contextlib.suppress(UsageError):  # its groups may not divide
            found.setdefault(other, jax.eval_shape(lambda p, other=other: quantized(p, other), half))
    megabytes = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6
    sizes = ', '.join(f'{name} {megabytes(tree):,.1f} MB' for name, tree in found.items())
    return f'weights take, embedding and norms in 16 bits: {sizes}'


def quantized(params: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A model's parameters with the matrices of its layers quantized, under jit or as shapes, too."""
    layers = dict(params['layers'])
    for name, row in matrices(params).items():
        layers[name] = jax.vmap(partial(quantize, letters=row.dims, inputs=row.contracted, text=text))(layers[name])
    return {**params, 'layers': layers}
