"""The one seam between activations and weights: every contraction with a weight is `einsum(eq, x, w)`.

The seam owns the layout. It gathers x (residuals are split along the sequence), gathers w just in time (FSDP), and sets
the output's sharding, all from the letters in the equation. An FSDP weight used without the seam would be gathered by
XLA silently, as often as it is used; so nothing goes around it.

A weight is an array, or a small `flax.struct.dataclass` (a LoRA adapter over a base, a quantized tensor) with the three
methods of `Weight`. Nothing else in the model knows which it has.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from lm import sharding


@runtime_checkable
class Weight(Protocol):
    """The protocol of a weight that is not an array."""

    def dims(self, parent: str) -> dict[str, str]:
        """The letters of each array field, given the letters of the weight it stands for."""
        ...

    def einsum(self, eq: str, x: jax.Array) -> jax.Array:
        """The product, made of `seam.einsum` on the fields."""
        ...

    def dense(self) -> jax.Array:
        """The plain array, for the embedding's rows and the head."""
        ...


def parse(eq: str) -> tuple[str, str, str]:
    """'BTD,DF->BTF' -> ('BTD', 'DF', 'BTF')."""
    operands, out = eq.split('->')
    x, w = operands.split(',')
    return x, w, out


def einsum(eq: str, x: jax.Array, w: Any, *, dtype: Any = None) -> jax.Array:
    """Contracts activations x with a weight w; `eq` names each dimension by its letter, e.g. 'BTD,DNH->BTNH'.

    The operands have x's dtype, and so has the result unless `dtype` says otherwise (float32: the sum as it was made).
    Raises ValueError from JAX if the shapes do not fit the letters.
    """
    if not isinstance(w, jax.Array):
        return w.einsum(eq, x).astype(dtype or x.dtype)
    xd, wd, out = parse(eq)
    w = w.astype(x.dtype)  # before the gather, so that bf16 travels and not f32
    if not sharding.axis_sizes():
        return _product(eq, x, w, dtype)
    sizes = dict(zip(xd, x.shape, strict=True)) | dict(zip(wd, w.shape, strict=True))
    joint = sharding.assign({d: n for d, n in sizes.items() if d != 'D'})
    x = jax.reshard(x, sharding.spec(xd, joint))
    w = gather(w, wd)
    to = sharding.spec(out, sharding.assign({d: sizes[d] for d in out if d != 'D'}))
    return jnp.einsum(eq, x, w, out_sharding=to, preferred_element_type=dtype)


def gather(w: jax.Array, dims: str) -> jax.Array:
    """A weight as it is used: split over the model's axes only, gathered over the ones that merely store it."""
    if not sharding.axis_sizes():
        return w
    return jax.reshard(w, sharding.array_spec(dims, w.shape, sharding.MODEL_AXES))


def dense(w: Any) -> jax.Array:
    """The weight as one array."""
    return w if isinstance(w, jax.Array) else w.dense()


def _product(eq: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """The einsum as one 2-D matrix product where the letters line up: a third faster than 3-D × 2-D on CPU."""
    xd, wd, out = parse(eq)
    shared = ''.join(d for d in wd if d in xd and d not in out)
    x_free, w_free = xd.removesuffix(shared), wd.removeprefix(shared)
    if out != x_free + w_free or xd != x_free + shared or wd != shared + w_free:
        return jnp.einsum(eq, x, w, preferred_element_type=dtype)
    inner = math.prod(x.shape[len(x_free) :])
    y = _matmul(x.reshape(-1, inner), w.reshape(inner, -1), dtype)
    return y.reshape(*x.shape[: len(x_free)], *w.shape[len(shared) :])


def _plain_matmul(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=dtype)


def _matmul_forward(x, w, dtype):
    return _plain_matmul(x, w, dtype), (x, w)  # not `_matmul`: a remat policy has to see that this is a product


def _matmul_backward(dtype, saved, dy):
    """dw is xᵀ·dy with the narrower of the two turned around."""
    x, w = saved
    dy = dy.astype(x.dtype)
    dx = jax.lax.dot_general(dy, w, (((1,), (1,)), ((), ())))
    if x.shape[1] <= dy.shape[1]:
        return dx, materialized_transpose(x) @ dy
    return dx, (materialized_transpose(dy) @ x).T


# [M, I] · [I, O] whose weight gradient is fast on CPU, too.
_matmul: Any = jax.custom_vjp(_plain_matmul, nondiff_argnums=(2,))
_matmul.defvjp(_matmul_forward, _matmul_backward)


def materialized_transpose(x: jax.Array) -> jax.Array:
    """The transpose of a matrix that is about to be multiplied; a CPU's is turned around in memory.

    XLA would fold it into the product, and on CPU it has a slow kernel for products over the leading dimension of both
    operands (0.6 of the speed of the others).
    """
    return jax.lax.optimization_barrier(x.T) if sharding.platform() == 'cpu' else x.T


def lookup(w: Any, tokens_BT: jax.Array, *, dtype: Any) -> jax.Array:
    """Rows of an embedding `VD`: [B, T] ids -> [B, T, D].

    The vocabulary may be split over `tensor`: each device looks up the rows that it has and the parts are added. (Left
    to XLA, a table with V on tensor and D on fsdp is rematerialised whole, forward and backward.) Rows are cast after
    they are taken: a frequent word's gradient is a sum of thousands, which bfloat16 would lose most of.
    """
    w_VD = dense(w)
    vocab_axes = sharding.assign({'V': w_VD.shape[0]}, sharding.MODEL_AXES)['V']

    def local(w_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if not vocab_axes:
            return w_VD.at[tokens_BT].get(mode='clip').astype(dtype)
        row_BT = tokens_BT - jax.lax.axis_index(vocab_axes) * w_VD.shape[0]
        here_BT = (row_BT >= 0) & (row_BT < w_VD.shape[0])
        rows_BTD = w_VD.at[jnp.where(here_BT, row_BT, 0)].get(mode='clip').astype(dtype)
        return jax.lax.psum(jnp.where(here_BT[..., None], rows_BTD, 0), vocab_axes)

    if not sharding.axis_sizes():
        return local(w_VD, tokens_BT)
    sizes = dict(zip('BTV', (*tokens_BT.shape, w_VD.shape[0]), strict=True))
    whole = sharding.spec('BTD', sharding.assign(sizes))  # V is before T, which takes what V leaves
    specs = (sharding.array_spec('VD', w_VD.shape, sharding.MODEL_AXES), jax.sharding.PartitionSpec(*whole[:2]))
    x_BTD = sharding.on_shards(local, (w_VD, tokens_BT), specs, whole)
    return jax.reshard(x_BTD, sharding.activation_spec('BTD', x_BTD.shape))
