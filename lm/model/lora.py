"""LoRA: a product of two narrow matrices beside a matrix that stays as it is (Hu et al., 2021, section 4.1), with its
relatives: DoRA (Liu et al., 2024), rsLoRA (Kalajdzievski, 2023), PiSSA's start (Meng et al., 2024).

`init` makes the factors of a model, `Lora` is the weight that they and the matrix under them are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lm import sharding
from lm.config import nearest
from lm.errors import UsageError
from lm.model import parameters, seam
from lm.model.param import Param

ROUNDS, MORE = 8, 16  # of the subspace iteration of `principal`, and its columns beyond those that are kept


@struct.dataclass
class Lora:
    """W + scale·(A·B − A₀·B₀), its columns of length `magnitude` where there is one (DoRA, eq. 5).

    Attributes:
      a: [inputs, R]. b: [R, outputs]. In a tree of parameters they are stacked, here they are one layer's.
      start_a, start_b: A₀ and B₀, constants, where training began with the principal components of W (PiSSA): the
        weight is then W at first. None: it began with a B of zeros.
      magnitude: [outputs] (DoRA); None: the columns are as long as they are.
      inputs: the letters of W that its product with activations sums over, its first ones.
      dropout: the part of what A reads that is left out, where there is a `key`: in training.
      base: W, an array or another weight; None: not over anything yet.
      key: data of a random key, a layer's own; None: nothing is left out.
    """

    a: Any
    b: Any
    inputs: str = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)
    start_a: Any = None
    start_b: Any = None
    magnitude: Any = None
    base: Any = None
    key: Any = None

    def over(self, base: Any) -> 'Lora':
        """These factors over a weight."""
        return dataclasses.replace(self, base=base)

    def dims(self, parent: str) -> dict[str, str]:
        """The letters of each array field."""
        outputs = parent.removeprefix(self.inputs)
        down, up = f'{self.inputs}R', f'R{outputs}'
        found = {
            'a': down, 'b': up, 'start_a': down, 'start_b': up, 'magnitude': outputs, 'base': parent
        }  # fmt: skip
        return {name: letters for name, letters in found.items() if vars(self)[name] is not None}

    def factors(self) -> tuple[Any, Any]:
        """(A, B) of all that is added to W, but for the scale: of PiSSA those of rank 2r, [A A₀] and [B; −B₀]."""
        if self.start_a is None:
            return self.a, self.b
        start_a, start_b = jax.lax.stop_gradient((self.start_a, self.start_b))
        return jnp.concatenate([self.a, start_a], -1), jnp.concatenate([self.b, -start_b], 0)

    def einsum(self, eq: str, x: jax.Array) -> jax.Array:
        """The product: W's, and beside it that of the two narrow matrices, one after the other."""
        xd, wd, out = seam.parse(eq)
        outputs, narrow = wd.removeprefix(self.inputs), f'{xd.removesuffix(self.inputs)}R'
        a, b = self.factors()
        low = seam.einsum(f'{xd},{self.inputs}R->{narrow}', self._dropped(x), a)
        y = seam.einsum(eq, x, self.base) + self.scale * seam.einsum(f'{narrow},R{outputs}->{out}', low, b)
        if self.magnitude is None:
            return y
        length = jax.lax.stop_gradient(lengths(self._sum(), len(self.inputs)))  # DoRA, section 4.3
        factor = seam.gather(self.magnitude, outputs) / seam.gather(length, outputs)
        return y * factor.astype(y.dtype)

    def dense(self) -> jax.Array:
        """The weight as one array, float32."""
        w = self._sum()
        return w if self.magnitude is None else w * (self.magnitude / lengths(w, len(self.inputs)))

    def _sum(self) -> jax.Array:
        a, b = self.factors()
        product = jnp.tensordot(a, b, 1, precision='highest')
        return seam.dense(self.base).astype(jnp.float32) + self.scale * product

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or not self.dropout:
            return x
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.dropout, x.shape)
        if sharding.axis_sizes():
            kept = jax.reshard(kept, jax.typeof(x).sharding.spec)
        return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)


def lengths(w: jax.Array, inputs: int) -> jax.Array:
    """[outputs]: the length of each column of a weight whose first `inputs` axes are the inputs."""
    return jnp.sqrt(jnp.sum(jnp.square(w), axis=tuple(range(inputs))))


# ---- the factors of a model ----


def matrices(layers: Mapping[str, Any]) -> dict[str, Param]:
    """{name in `lora.targets`: row} of what may have factors: the matrices of the layers."""
    rows = [row for row in parameters.of_layers() if row.matrix and row.name in layers]
    return {row.name.rpartition('_')[0]: row for row in rows}


def ranks(settings: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, int]:
    """{parameter: rank} of what gets factors, by `lora.rank` and `lora.targets`, 'wq,wv:8'.

    Raises UsageError for a name that no matrix has, and for a rank that is larger than a side of the matrix.
    """
    known, found = matrices(layers), {}
    for part in (settings['targets'] or ','.join(known)).split(','):
        name, colon, rank = part.strip().partition(':')
        if name not in known:
            raise UsageError(f'lora.targets: {name}{nearest(name, list(known))} is not one of {", ".join(known)}')
        if colon and not (rank.isdecimal() and int(rank)):
            raise UsageError(f'lora.targets: the rank in {part.strip()} must be a whole number, at least 1')
        row = known[name]
        found[row.name] = int(rank) if colon else settings['rank']
        most = min(_sides(row, _shape(layers[row.name])[1:]))
        if found[row.name] > most:
            raise UsageError(f'lora: a rank of {found[row.name]} is more than {name} has ({most}): set at most {most}')
    return found


def _shape(stack: Any) -> tuple[int, ...]:
    """The shape of a stack of arrays or of weights."""
    return jax.eval_shape(jax.vmap(seam.dense), stack).shape


def _sides(row: Param, shape: Sequence[int]) -> tuple[int, int]:
    """(inputs, outputs) of a matrix."""
    n = len(row.contracted)
    return math.prod(shape[:n]), math.prod(shape[n:])


def scale_of(settings: Mapping[str, Any], rank: int) -> float:
    """The factor of A·B: α/r, or α/√r (rsLoRA)."""
    return settings['alpha'] / (rank**0.5 if settings['scale'] == 'rs' else rank)


def init(key: jax.Array, base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The factors to begin with, under which the model is what it was: A drawn from ±1/√inputs (as peft does), B 0; or
    with `lora.start='pissa'` both from the principal components of each matrix.

    Args:
      base: the parameters. settings: those of the group `lora`.

    Raises:
      UsageError: as `ranks`.
    """
    layers, made = base['layers'], {}
    for i, (name, rank) in enumerate(ranks(settings, layers).items()):
        begin = partial(_begin, parameters.row(name), rank=rank, settings=settings)
        count, *shape = _shape(layers[name])
        keys = jax.random.split(jax.random.fold_in(key, i), count)
        if settings['start'] == 'zero' and not settings['dora']:
            made[name] = jax.vmap(lambda k, begin=begin, shape=shape: begin(k, shape, None))(keys)
        else:  # a layer at a time: each is looked at whole
            at = lambda x, begin=begin, shape=shape: begin(x[0], shape, seam.dense(x[1]))
            made[name] = jax.lax.map(at, (keys, layers[name]))
    return {'layers': made}


def _begin(
    row: Param, key: jax.Array, shape: Sequence[int], w: jax.Array | None, *, rank: int, settings: Mapping[str, Any]
) -> Lora:
    """The factors of one layer's matrix, `w` where they depend on it."""
    n = len(row.contracted)
    scale, (inputs, outputs) = scale_of(settings, rank), _sides(row, shape)
    own = {'inputs': row.contracted, 'scale': scale, 'dropout': settings['dropout']}
    w = None if w is None else sharding.replicated(w).astype(jnp.float32)
    if settings['dora']:
        assert w is not None
        own['magnitude'] = lengths(w, n)
    if settings['start'] == 'pissa':
        assert w is not None
        a, b = principal(key, w.reshape(inputs, outputs), rank)
        a, b = (a / scale**0.5).reshape(*shape[:n], rank), (b / scale**0.5).reshape(rank, *shape[n:])
        return Lora(a, b, start_a=a, start_b=b, **own)
    a = jax.random.uniform(key, (*shape[:n], rank), jnp.float32, -(inputs**-0.5), inputs**-0.5)
    return Lora(a, jnp.zeros((rank, *shape[n:]), jnp.float32), **own)


def principal(key: jax.Array, w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(A [I, R], B [R, O]), each with the roots of the singular values: A·B is the best approximation of w [I, O] of
    this rank, found by subspace iteration (Halko et al., 2011, algorithm 4.4)."""
    product = partial(jnp.matmul, precision='highest')
    width = min(rank + MORE, *w.shape)
    q = jnp.linalg.qr(product(w, jax.random.normal(key, (w.shape[1], width))))[0]
    for _ in range(ROUNDS):
        q = jnp.linalg.qr(product(w, jnp.linalg.qr(product(w.T, q))[0]))[0]
    u, s, vt = jnp.linalg.svd(product(q.T, w), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return product(q, u[:, :rank]) * root, root[:, None] * vt[:rank]


# ---- around training ----


def with_keys(adapter: Any, key: jax.Array) -> Any:
    """The adapter with a random key for each of its weights and layers, by which some of what A reads is left out;
    as it was where it leaves out nothing."""
    is_lora = lambda x: isinstance(x, Lora)
    leaves, tree = jax.tree.flatten(adapter, is_leaf=is_lora)

    def keyed(i: int, leaf: Any) -> Any:
        if not (is_lora(leaf) and leaf.dropout):
            return leaf
        return dataclasses.replace(
            leaf, key=jax.random.key_data(jax.random.split(jax.random.fold_in(key, i), leaf.a.shape[0]))
        )

    return tree.unflatten([keyed(i, leaf) for i, leaf in enumerate(leaves)])


def rates(adapter: Any, settings: Mapping[str, Any]) -> Any:
    """Returns the multiple of the learning rate for each array: `lora.plus` for B (LoRA+; Hayou et al., 2024, section
    4), 0 for the constants."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Lora):
            return 1.0
        found = jax.tree.map(lambda x: 1.0, leaf)
        constant = {} if leaf.start_a is None else {'start_a': 0.0, 'start_b': 0.0}
        return dataclasses.replace(found, b=settings['plus'], **constant)

    return jax.tree.map(of, adapter, is_leaf=lambda x: isinstance(x, Lora))
