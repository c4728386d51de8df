"""The head: from hidden states to log-probabilities, without ever holding the logits [B, T, V].

Four entries over one kernel that works through the tokens in chunks, never through the vocabulary:

  nll      for cross-entropy (pretraining, SFT): gradients are computed in the forward pass, so the logits of a chunk
           are made once; the backward pass only scales them.
  logp     for losses that need arbitrary functions of a token's log-probability (DPO, PPO): keeps lse and makes a
           chunk's logits again in the backward pass.
  kl       for the whole distribution beside another model's, whose logits are made chunk by chunk, too.
  distill  for cross-entropy and a divergence from a teacher's distribution; its gradients are made as those of `nll`.

The vocabulary may be split over `tensor`; its padding is masked out of the softmax. All of it is float32 but the
products, whose operands have the dtype of h.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import seam

NEGATIVE = -1e30
CHUNK_BYTES = {'cpu': 8 << 20}  # a chunk's logits stay in a CPU's cache; an accelerator wants large products
ACCELERATOR_CHUNK_BYTES = 1 << 30  # a quarter of it made GPT-2's step 2 % slower on an H200, four times it 1 % faster
MIN_CHUNK, CHUNK_MULTIPLE = 256, 128


def nll(
    h_BTD: jax.Array,
    w: Any,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    dims: str = 'VD',
    vocab_size: int,
    z_coef: float = 0.0,
    softcap: float | None = None,
    sparse: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ weight·(−log p(target) + z_coef·lse²), and its parts.

    Args:
      h_BTD: final hidden states.
      w: the head's weight, [V, D] (`dims='VD'`, the tied embedding) or [D, V] ('DV'); V may exceed vocab_size.
      targets_BT: ids below vocab_size. weights_BT: float32, 0 for what does not count.
      z_coef: strength of the z-loss (PaLM, section 5), lse² weighted like its token.
      softcap: logits become cap·tanh(logits/cap).
      sparse: leave out the chunks in which nothing weighs anything, with what does brought to the front: for batches
        in which much does not.

    Returns:
      The sum, differentiable in h and w; and {'nll', 'z', 'correct'}: sums of weight·nll, weight·lse² and
      weight·[argmax = target], without gradient.
    """
    local = partial(_nll_local, vocab_size=vocab_size, z_coef=z_coef, softcap=softcap, sparse=sparse)
    return _run(local, h_BTD, (w,), (targets_BT, weights_BT), dims, None)


def logp(
    h_BTD: jax.Array, w: Any, targets_BT: jax.Array, weights_BT: jax.Array | None = None, *, dims: str = 'VD',
    vocab_size: int, softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(log p(target), logsumexp of the logits, entropy), each [B, T] float32 and differentiable in h and w.

    Args:
      weights_BT: 0 where nobody asks: most of these places are left out, and what stands there means nothing and has no
        gradient. None: all are asked for.
    """
    local = partial(_logp_local, vocab_size=vocab_size, softcap=softcap)
    per_token = (targets_BT,) if weights_BT is None else (targets_BT, weights_BT)
    return _run(local, h_BTD, (w,), per_token, dims, 3)


def kl(
    h_BTD: jax.Array, w: Any, other_BTD: jax.Array, other_w: Any, weights_BT: jax.Array, *, dims: str = 'VD',
    vocab_size: int, softcap: float | None = None,
) -> jax.Array:  # fmt: skip
    """KL(p‖q) of the distributions p of h·w and q of other·other_w over the vocabulary, in nats: [B, T] float32,
    differentiable in h and w alone.

    Args:
      other_BTD, other_w: final hidden states and head of the model that gives q; of the same dims.
      weights_BT: as `logp`.
    """
    local = partial(_kl_local, vocab_size=vocab_size, softcap=softcap)
    return _run(local, h_BTD, (w, other_w), (other_BTD, weights_BT), dims, 1)[0]


def top_k(
    h_BTD: jax.Array, w: Any, k: int, *, temperature: float = 1.0, dims: str = 'VD', vocab_size: int,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(ids of the k most likely words [B, T, W], their log-probs [B, T, W], the log of the mass of all others [B, T]),
    without gradient.

    Args:
      k: at most vocab_size. temperature: of the logits, after the soft-cap.
    """
    local = partial(_top_k_local, k=k, temperature=temperature, vocab_size=vocab_size, softcap=softcap)
    return _run(local, h_BTD, (w,), (), dims, 3)


class Teacher(NamedTuple):
    """A teacher's distributions: by its final hidden states and its head, or by log-probs of its most likely words.

    Attributes:
      tokens: arrays [B, T, …]: the hidden states [B, T, D], or what `top_k` gives at the temperature of the loss.
      w: the head's weight, None of log-probs. dims, softcap: of that head.
    """

    tokens: tuple[jax.Array, ...]
    w: Any = None
    dims: str = 'VD'
    softcap: float | None = None


class Distillation(NamedTuple):
    """The loss of a token: alpha·T²·divergence + (1 − alpha)·(−log p(target)) + z_coef·lse², T the temperature of the
    divergence alone.

    Attributes:
      divergence: (the student's log-probs [C, V], the teacher's, …, total=) -> (the divergence [C], its gradient by the
        student's logits [C, V]), where `total` sums [C, V] over the vocabulary. Of a teacher by its most likely words
        the log-probs of the others are NEGATIVE, and the log of their mass [C] comes after them.
    """

    divergence: Callable[..., tuple[jax.Array, jax.Array]]
    alpha: float
    temperature: float = 1.0
    z_coef: float = 0.0


def distill(
    h_BTD: jax.Array,
    w: Any,
    teacher: Teacher,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    loss: Distillation,
    *,
    dims: str = 'VD',
    vocab_size: int,
    softcap: float | None = None,
    sparse: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(Σ weight·loss, differentiable in h and w alone; {'divergence', 'nll', 'z', 'correct'}: sums of the weighted
    parts, without gradient and coefficient). The arguments are those of `nll`."""
    live, softcaps = teacher.w is not None, (softcap, teacher.softcap)
    options = {'vocab_size': vocab_size, 'softcaps': softcaps, 'sparse': sparse}
    heads, every = ((w, teacher.w), (dims, teacher.dims)) if live else ((w,), (dims,))
    per_token = (targets_BT, weights_BT, *teacher.tokens)
    return _run(partial(_distill_local, loss=loss, live=live, **options), h_BTD, heads, per_token, every, None)


def logits(h_BTD: jax.Array, w: Any, *, dims: str = 'VD', vocab_size: int, softcap: float | None = None) -> jax.Array:
    """Float32 logits [B, T, vocab_size], for sampling: a few positions, never a training step's."""
    w = seam.dense(w)
    w_DV = w.T if dims == 'VD' else w
    x_BTV = seam.einsum('BTD,DV->BTV', h_BTD, w_DV, dtype=jnp.float32)
    if sharding.axis_sizes():  # sampling sorts a row's whole vocabulary
        x_BTV = jax.reshard(x_BTV, sharding.array_spec('BTV', x_BTV.shape, sharding.BATCH_AXES))
    x_BTV = x_BTV[..., :vocab_size]
    return x_BTV if softcap is None else softcap * jnp.tanh(x_BTV / softcap)


# ---- layout: each device has some tokens and some of the vocabulary ----


def _run(local, h_BTD, heads, per_token, dims, arrays) -> Any:
    """Calls `local(h_MD, w_VD…, per_token…, axis)` on each device's tokens M and its part of the vocabulary, which
    returns so many arrays [M], or (None) two trees of sums. `dims`: of all heads, or of each."""
    every = (dims,) * len(heads) if isinstance(dims, str) else dims
    heads = [seam.dense(w) for w in heads]
    heads = [(w if d == 'VD' else w.T).astype(h_BTD.dtype) for w, d in zip(heads, every, strict=True)]
    B, T, _ = h_BTD.shape
    taken = sharding.assign({'B': B, 'V': heads[0].shape[0], 'T': T})
    vocab_axes, token_axes = taken['V'], taken['B'] + taken['T']

    def shard(h_BTD, *rest):
        shape, heads_VD, per_token = h_BTD.shape[:2], rest[: len(heads)], rest[len(heads) :]
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        out = local(flat(h_BTD), *heads_VD, *map(flat, per_token), axes=vocab_axes or None)
        if arrays:
            return tuple(x.reshape(*shape, *x.shape[1:]) for x in out)
        return jax.tree.map(lambda x: jax.lax.psum(x, token_axes), out) if token_axes else out

    if not sharding.axis_sizes():
        return shard(h_BTD, *heads, *per_token)
    row, split = sharding.spec('BT', taken), sharding.spec('VD', {'V': vocab_axes})
    specs = (P(*row, None), *(split for _ in heads), *(P(*row, None) if x.ndim > 2 else row for x in per_token))
    out_specs = (row,) * arrays if arrays else (P(), P())
    out = sharding.on_shards(shard, (h_BTD, *heads, *per_token), specs, out_specs)
    return jax.reshard(out, sharding.activation_spec('BT', (B, T))) if arrays else out


# ---- the kernel, on one device ----


def _chunks(m: int, v: int) -> tuple[int, int]:
    """(number of chunks, tokens a chunk) for m tokens and v words."""
    budget = CHUNK_BYTES.get(sharding.platform(), ACCELERATOR_CHUNK_BYTES) // (4 * v)
    size = min(m, max(MIN_CHUNK, budget // CHUNK_MULTIPLE * CHUNK_MULTIPLE))
    n = math.ceil(m / size)
    return n, math.ceil(m / n)


def _split(n: int, size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[M, …] -> [n, size, …], padded with zeros (a padded token has weight 0)."""
    pad = lambda x: jnp.pad(x, [(0, n * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return tuple(pad(x).reshape(n, size, *x.shape[1:]) for x in arrays)


def _scan(body, carry, xs, n, live=None) -> Any:
    """`lax.scan`, but a plain call for one chunk; of the first `live` chunks alone, if that is given, with zeros for
    what the others would yield."""
    chunk = lambda i: jax.tree.map(lambda x: x[i], xs)
    if n == 1:
        carry, y = body(carry, chunk(0))
        return carry, jax.tree.map(lambda x: x[None], y)
    if live is None:
        return jax.lax.scan(body, carry, xs)

    def step(i, state):
        carry, ys = state
        carry, y = body(carry, chunk(i))
        return carry, jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), ys, y)

    shapes = jax.eval_shape(body, carry, chunk(0))[1]
    return jax.lax.fori_loop(0, live, step, (carry, jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), shapes)))


def _to_front(weight_M, v):
    """(order_M, which has what weighs something first; its inverse; how many chunks that takes)."""
    order_M = jnp.argsort(weight_M == 0, stable=True)
    _, size = _chunks(weight_M.shape[0], v)
    return order_M, jnp.argsort(order_M), -(-jnp.count_nonzero(weight_M) // size)


@jax.custom_vjp
def _taken(x, order_M, inverse_M):
    """x[order_M] of a permutation, whose gradient is a `take` as well and no scatter."""
    del inverse_M
    return x[order_M]


_taken.defvjp(lambda x, order_M, inverse_M: (x[order_M], inverse_M), lambda inverse_M, g: (g[inverse_M], None, None))


def _softmax_parts(h_CD, w_VD, y_C, vocab_size, softcap, axes):
    """A chunk's logits and what the losses need of them: (logits_CV, d_softcap_CV, lse_C, target_CV, best_C)."""
    x_CV = jnp.einsum('CD,VD->CV', h_CD, w_VD, preferred_element_type=jnp.float32)
    slope_CV = None
    if softcap is not None:
        t_CV = jnp.tanh(x_CV / softcap)
        x_CV, slope_CV = softcap * t_CV, 1 - jnp.square(t_CV)
    V = w_VD.shape[0]
    ids_V = jnp.arange(V) + (jax.lax.axis_index(axes) * V if axes else 0)
    if axes or vocab_size < V:
        x_CV = jnp.where(ids_V < vocab_size, x_CV, NEGATIVE)
    best_C = jnp.max(x_CV, axis=-1)
    best_C = jax.lax.pmax(best_C, axes) if axes else best_C
    lse_C = best_C + jnp.log(_sum(jnp.exp(x_CV - best_C[:, None]), axes))
    return x_CV, slope_CV, lse_C, ids_V == y_C[:, None], best_C


def _sum(x_CV, axes):
    """Sum over the vocabulary, all devices' parts."""
    x_C = jnp.sum(x_CV, axis=-1)
    return jax.lax.psum(x_C, axes) if axes else x_C


def _back(dx_CV, slope_CV, h_CD, w_VD):
    """From the gradient of a chunk's logits to (dh_CD without the sum over vocabulary shards, dw_DV).

    dw is made as [D, V], the layout in which a CPU adds up its chunks a quarter faster than as [V, D]."""
    dx_CV = (dx_CV if slope_CV is None else dx_CV * slope_CV).astype(h_CD.dtype)
    dh_CD = jnp.einsum('CV,VD->CD', dx_CV, w_VD, preferred_element_type=jnp.float32)
    return dh_CD, jnp.einsum('DC,CV->DV', seam.materialized_transpose(h_CD), dx_CV, preferred_element_type=jnp.float32)


def _nll_sums(h_MD, w_VD, y_M, weight_M, live, vocab_size, z_coef, softcap, axes):
    sums, _ = _nll_pass(h_MD, w_VD, y_M, weight_M, live, vocab_size, z_coef, softcap, axes, gradient=False)
    return sums


def _nll_pass(h_MD, w_VD, y_M, weight_M, live, vocab_size, z_coef, softcap, axes, *, gradient):
    """One pass over the (`live`) chunks: the sums and, if asked, the gradients of the first of them."""
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])

    def body(carry, chunk):
        dw_DV, total, parts = carry
        h_CD, y_C, weight_C = chunk
        x_CV, slope_CV, lse_C, target_CV, best_C = _softmax_parts(h_CD, w_VD, y_C, vocab_size, softcap, axes)
        at_target_C = _sum(jnp.where(target_CV, x_CV, 0), axes)
        nll_C, z_C = lse_C - at_target_C, jnp.square(lse_C)
        parts = {
            'nll': parts['nll'] + jnp.sum(weight_C * nll_C),
            'z': parts['z'] + jnp.sum(weight_C * z_C),
            'correct': parts['correct'] + jnp.sum(weight_C * (at_target_C >= best_C)),
        }
        total += jnp.sum(weight_C * (nll_C + z_coef * z_C))
        if not gradient:
            return (dw_DV, total, parts), None
        p_CV = jnp.exp(x_CV - lse_C[:, None])
        scale_C = weight_C * (1 + 2 * z_coef * lse_C)
        dx_CV = p_CV * scale_C[:, None] - jnp.where(target_CV, weight_C[:, None], 0)
        dh_CD, dw_chunk_DV = _back(dx_CV, slope_CV, h_CD, w_VD)
        return (dw_DV + dw_chunk_DV, total, parts), dh_CD.astype(h_CD.dtype)

    zero = jnp.zeros((), jnp.float32)
    dw_DV = jnp.zeros(w_VD.T.shape if gradient else (), jnp.float32)
    start = (dw_DV, zero, {'nll': zero, 'z': zero, 'correct': zero})
    (dw_DV, total, parts), dh = _scan(body, start, _split(n, size, h_MD, y_M, weight_M), n, live)
    if dh is None:
        return (total, parts), None
    gradients = dh.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]], dw_DV.T.astype(w_VD.dtype)
    return (total, parts), gradients


def _nll_forward(h_MD, w_VD, y_M, weight_M, live, *static):
    return _nll_pass(h_MD, w_VD, y_M, weight_M, live, *static, gradient=True)


def _nll_backward(vocab_size, z_coef, softcap, axes, gradients, cotangents):
    g = _whole(cotangents[0], axes)  # the parts carry no gradient
    return *(d * g.astype(d.dtype) for d in gradients), None, None, None


def _whole(cotangent, axes):
    """Each vocabulary shard computed the whole result, so the cotangents of all of them flow into this one's part.
    (`shard_map` hands each device its share, and sums what comes back over the axes an input is not split on.)"""
    return jax.lax.psum(cotangent, axes) if axes else cotangent


_nll: Any = jax.custom_vjp(_nll_sums, nondiff_argnums=(5, 6, 7, 8))
_nll.defvjp(_nll_forward, _nll_backward)


def _nll_local(h_MD, w_VD, y_M, weight_M, *, axes, vocab_size, z_coef, softcap, sparse):
    live = None
    if sparse:
        order_M, inverse_M, live = _to_front(weight_M, w_VD.shape[0])
        h_MD, y_M, weight_M = _taken(h_MD, order_M, inverse_M), y_M[order_M], weight_M[order_M]
    total, parts = _nll(h_MD, w_VD, y_M, weight_M, live, vocab_size, z_coef, softcap, axes)
    return total, jax.lax.stop_gradient(parts)


def _logp_tokens(h_MD, w_VD, y_M, live, vocab_size, softcap, axes):
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])

    def body(carry, chunk):
        h_CD, y_C = chunk
        x_CV, _, lse_C, target_CV, _ = _softmax_parts(h_CD, w_VD, y_C, vocab_size, softcap, axes)
        mean_C = _sum(jnp.exp(x_CV - lse_C[:, None]) * x_CV, axes)
        return carry, (_sum(jnp.where(target_CV, x_CV, 0), axes) - lse_C, lse_C, lse_C - mean_C)

    _, out = _scan(body, None, _split(n, size, h_MD, y_M), n, live)
    return tuple(x.reshape(-1)[: h_MD.shape[0]] for x in out)


def _logp_forward(h_MD, w_VD, y_M, live, *static):
    out = _logp_tokens(h_MD, w_VD, y_M, live, *static)
    return out, (h_MD, w_VD, y_M, live, out[1], out[2])


def _logp_backward(vocab_size, softcap, axes, saved, cotangents):
    h_MD, w_VD, y_M, live, lse_M, entropy_M = saved
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])

    def body(dw_DV, chunk):
        h_CD, y_C, lse_C, entropy_C, g_logp_C, g_lse_C, g_entropy_C = chunk
        x_CV, slope_CV, _, target_CV, _ = _softmax_parts(h_CD, w_VD, y_C, vocab_size, softcap, axes)
        p_CV = jnp.exp(x_CV - lse_C[:, None])
        surprise_CV = x_CV - (lse_C - entropy_C)[:, None]  # dH/dx = -p (x - E[x]), E[x] = lse - H
        dx_CV = p_CV * ((g_lse_C - g_logp_C)[:, None] - g_entropy_C[:, None] * surprise_CV)
        dx_CV += jnp.where(target_CV, g_logp_C[:, None], 0)
        dh_CD, dw_chunk_DV = _back(dx_CV, slope_CV, h_CD, w_VD)
        return dw_DV + dw_chunk_DV, dh_CD.astype(h_CD.dtype)

    per_token = (lse_M, entropy_M, *(_whole(g, axes) for g in cotangents))
    start = jnp.zeros(w_VD.T.shape, jnp.float32)
    dw_DV, dh = _scan(body, start, _split(n, size, h_MD, y_M, *per_token), n, live)
    return dh.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]], dw_DV.T.astype(w_VD.dtype), None, None


_logp: Any = jax.custom_vjp(_logp_tokens, nondiff_argnums=(4, 5, 6))
_logp.defvjp(_logp_forward, _logp_backward)


def _logp_local(h_MD, w_VD, y_M, weight_M=None, *, axes, vocab_size, softcap):
    if weight_M is None:
        return _logp(h_MD, w_VD, y_M, None, vocab_size, softcap, axes)
    order_M, inverse_M, live = _to_front(weight_M, w_VD.shape[0])
    out = _logp(_taken(h_MD, order_M, inverse_M), w_VD, y_M[order_M], live, vocab_size, softcap, axes)
    return tuple(_taken(x_M, inverse_M, order_M) for x_M in out)


def _kl_tokens(h_MD, w_VD, q_MD, other_VD, live, vocab_size, softcap, axes):
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])

    def body(carry, chunk):
        h_CD, q_CD = chunk
        p_CV, apart_CV, _ = _apart(h_CD, q_CD, w_VD, other_VD, vocab_size, softcap, axes)
        return carry, _sum(p_CV * apart_CV, axes)

    _, out = _scan(body, None, _split(n, size, h_MD, q_MD), n, live)
    return out.reshape(-1)[: h_MD.shape[0]]


def _apart(h_CD, q_CD, w_VD, other_VD, vocab_size, softcap, axes):
    """A chunk's (p, log p/q, the slope of the soft-cap)."""
    places_C = jnp.zeros(h_CD.shape[0], jnp.int32)
    x_CV, slope_CV, lse_C, _, _ = _softmax_parts(h_CD, w_VD, places_C, vocab_size, softcap, axes)
    y_CV, _, other_C, _, _ = _softmax_parts(q_CD, other_VD, places_C, vocab_size, softcap, axes)
    logp_CV = x_CV - lse_C[:, None]
    return jnp.exp(logp_CV), logp_CV - (y_CV - other_C[:, None]), slope_CV


def _kl_forward(h_MD, w_VD, q_MD, other_VD, live, *static):
    out = _kl_tokens(h_MD, w_VD, q_MD, other_VD, live, *static)
    return out, (h_MD, w_VD, q_MD, other_VD, live, out)


def _kl_backward(vocab_size, softcap, axes, saved, g_M):
    h_MD, w_VD, q_MD, other_VD, live, kl_M = saved
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])

    def body(dw_DV, chunk):
        h_CD, q_CD, kl_C, g_C = chunk
        p_CV, apart_CV, slope_CV = _apart(h_CD, q_CD, w_VD, other_VD, vocab_size, softcap, axes)
        dx_CV = g_C[:, None] * p_CV * (apart_CV - kl_C[:, None])  # d KL/dx = p (log p/q − KL)
        dh_CD, dw_chunk_DV = _back(dx_CV, slope_CV, h_CD, w_VD)
        return dw_DV + dw_chunk_DV, dh_CD.astype(h_CD.dtype)

    start = jnp.zeros(w_VD.T.shape, jnp.float32)
    dw_DV, dh = _scan(body, start, _split(n, size, h_MD, q_MD, kl_M, _whole(g_M, axes)), n, live)
    dh_MD = dh.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]]
    return dh_MD, dw_DV.T.astype(w_VD.dtype), jnp.zeros_like(q_MD), jnp.zeros_like(other_VD), None


_kl: Any = jax.custom_vjp(_kl_tokens, nondiff_argnums=(5, 6, 7))
_kl.defvjp(_kl_forward, _kl_backward)


def _kl_local(h_MD, w_VD, other_VD, q_MD, weight_M, *, axes, vocab_size, softcap):
    order_M, inverse_M, live = _to_front(weight_M, w_VD.shape[0])
    h_MD, q_MD = _taken(h_MD, order_M, inverse_M), _taken(q_MD, order_M, inverse_M)
    return (_taken(_kl(h_MD, w_VD, q_MD, other_VD, live, vocab_size, softcap, axes), inverse_M, order_M),)


def _log_softmax(parts, temperature, axes):
    """Log-probs [C, V] at a temperature, of `_softmax_parts`."""
    x_CV, _, lse_C, _, best_C = parts
    if temperature == 1:
        return x_CV - lse_C[:, None]
    x_CV = (x_CV - best_C[:, None]) / temperature
    return x_CV - jnp.log(_sum(jnp.exp(x_CV), axes))[:, None]


def _spread(ids_CW, logp_CW, v, axes):
    """Log-probs of some words, [C, V] of this device's part of the vocabulary, and NEGATIVE for the others."""
    ids_CW = ids_CW - (jax.lax.axis_index(axes) * v if axes else 0)
    ids_CW = jnp.where(ids_CW < 0, v, ids_CW)  # what is out of bounds is dropped, and a negative place is not
    rows = jnp.arange(ids_CW.shape[0])[:, None]
    return jnp.full((ids_CW.shape[0], v), NEGATIVE).at[rows, ids_CW].set(logp_CW.astype(jnp.float32), mode='drop')


def _top_k_local(h_MD, w_VD, *, axes, k, temperature, vocab_size, softcap):
    (m, _), v = h_MD.shape, w_VD.shape[0]
    n, size = _chunks(m, v)

    def body(carry, chunk):
        places_C = jnp.zeros(size, jnp.int32)
        parts = _softmax_parts(chunk[0], w_VD, places_C, vocab_size, softcap, axes)
        logp_CV = _log_softmax(parts, temperature, axes)
        logp_CW, ids_CW = jax.lax.top_k(logp_CV, min(k, v))
        if axes:
            ids_CW += jax.lax.axis_index(axes) * v
            every = lambda x_CW: jax.lax.all_gather(x_CW, axes, axis=1, tiled=True)
            (logp_CW, place_CW), ids_CW = jax.lax.top_k(every(logp_CW), k), every(ids_CW)
            ids_CW = jnp.take_along_axis(ids_CW, place_CW, axis=1)
        others_CV = jnp.where(_spread(ids_CW, logp_CW, v, axes) > NEGATIVE / 2, 0, jnp.exp(logp_CV))
        tail_C = jnp.log(jnp.maximum(_sum(others_CV, axes), jnp.finfo(jnp.float32).tiny))
        return carry, (ids_CW, logp_CW, tail_C)

    _, out = _scan(body, None, _split(n, size, h_MD), n)
    return tuple(x.reshape(-1, *x.shape[2:])[:m] for x in out)


def _distill_sums(h_MD, w_VD, other_VD, y_M, weight_M, teacher, live, loss, vocab_size, softcaps, axes):
    return _distill_pass(
        h_MD, w_VD, other_VD, y_M, weight_M, teacher, live, loss, vocab_size, softcaps, axes, gradient=False
    )[0]


def _distill_pass(h_MD, w_VD, other_VD, y_M, weight_M, teacher, live, loss, vocab_size, softcaps, axes, *, gradient):
    """As `_nll_pass`; `teacher` has hidden states if there is `other_VD`, else ids, log-probs and the log of a tail."""
    n, size = _chunks(h_MD.shape[0], w_VD.shape[0])
    t, coefs = loss.temperature, {'divergence': loss.alpha * loss.temperature**2, 'nll': 1 - loss.alpha}
    coefs['z'] = loss.z_coef

    def known(y_C, own):
        if other_VD is None:
            ids_CW, logp_CW, tail_C = own
            return _spread(ids_CW, logp_CW, w_VD.shape[0], axes), tail_C
        (other_CD,) = own
        return (_log_softmax(_softmax_parts(other_CD, other_VD, y_C, vocab_size, softcaps[1], axes), t, axes),)

    def body(carry, chunk):
        dw_DV, total, sums = carry
        h_CD, y_C, weight_C, *own = chunk
        parts = x_CV, slope_CV, lse_C, target_CV, best_C = _softmax_parts(
            h_CD, w_VD, y_C, vocab_size, softcaps[0], axes
        )
        log_q_CV = _log_softmax(parts, t, axes)
        apart_C, dx_CV = loss.divergence(log_q_CV, *known(y_C, own), total=partial(_sum, axes=axes))
        at_target_C = _sum(jnp.where(target_CV, x_CV, 0), axes)
        found = {'divergence': apart_C, 'nll': lse_C - at_target_C, 'z': jnp.square(lse_C)}
        total += sum(coef * jnp.sum(weight_C * found[name]) for name, coef in coefs.items())
        found['correct'] = at_target_C >= best_C
        sums = {name: sums[name] + jnp.sum(weight_C * x_C) for name, x_C in found.items()}
        if not gradient:
            return (dw_DV, total, sums), None
        scale_C = 1 - loss.alpha + 2 * loss.z_coef * lse_C
        dx_CV = loss.alpha * t * dx_CV + jnp.exp(x_CV - lse_C[:, None]) * scale_C[:, None]
        dx_CV = weight_C[:, None] * (dx_CV - jnp.where(target_CV, 1 - loss.alpha, 0))
        dh_CD, dw_chunk_DV = _back(dx_CV, slope_CV, h_CD, w_VD)
        return (dw_DV + dw_chunk_DV, total, sums), dh_CD.astype(h_CD.dtype)

    zero = jnp.zeros((), jnp.float32)
    dw_DV = jnp.zeros(w_VD.T.shape if gradient else (), jnp.float32)
    start = (dw_DV, zero, dict.fromkeys(('divergence', 'nll', 'z', 'correct'), zero))
    (dw_DV, total, sums), dh = _scan(body, start, _split(n, size, h_MD, y_M, weight_M, *teacher), n, live)
    if dh is None:
        return (total, sums), None
    return (total, sums), (dh.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]], dw_DV.T.astype(w_VD.dtype))


def _distill_forward(*args):
    return _distill_pass(*args, gradient=True)


def _distill_backward(loss, vocab_size, softcaps, axes, gradients, cotangents):
    del loss, vocab_size, softcaps
    g = _whole(cotangents[0], axes)  # the parts carry no gradient, nor does the teacher
    return *(d * g.astype(d.dtype) for d in gradients), None, None, None, None, None


_distill: Any = jax.custom_vjp(_distill_sums, nondiff_argnums=(7, 8, 9, 10))
_distill.defvjp(_distill_forward, _distill_backward)


def _distill_local(h_MD, w_VD, *rest, axes, loss, live, vocab_size, softcaps, sparse):
    other_VD, (y_M, weight_M, *teacher) = (rest[0], rest[1:]) if live else (None, rest)
    count = None
    if sparse:
        order_M, inverse_M, count = _to_front(weight_M, w_VD.shape[0])
        h_MD = _taken(h_MD, order_M, inverse_M)
        y_M, weight_M, *teacher = (x[order_M] for x in (y_M, weight_M, *teacher))
    statics = loss, vocab_size, softcaps, axes
    total, sums = _distill(h_MD, w_VD, other_VD, y_M, weight_M, tuple(teacher), count, *statics)
    return total, jax.lax.stop_gradient(sums)
