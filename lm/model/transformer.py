"""The decoder: `init` makes the parameters, `forward` turns tokens into hidden states. Both are pure functions.

The default graph is the Llama family's: pre-norm blocks of grouped-query attention with rotary positions and a gated
feed-forward, with per-head RMS normalisation of queries and keys, and input and output embeddings tied.

Parameters are nested dicts whose leaf names carry their dims; layers are stored stacked:

    embed_VD                              final_norm_D       [head_DV, if not tied]
    layers/ attn_norm_D wq_DNH wk_DKH wv_DKH [q_norm_H k_norm_H] wo_NHD mlp_norm_D w_gate_DF w_up_DF w_down_FD
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm import sharding
from lm.errors import UsageError
from lm.model import head, seam
from lm.model.attention import BACKENDS, EMPTY, Places, attention, cached_attention
from lm.model.layers import block_norm, rms_norm, rope, rope_angles

Params = Mapping[str, Any]

REMAT = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'names': jax.checkpoint_policies.save_only_these_names('attention', 'gated'),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Raises UsageError if the sizes do not fit each other."""

    vocab_size: int  # real ids; the table is padded to a multiple of `vocab_multiple`
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    tied: bool = True
    window: int | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    vocab_multiple: int = 128
    scan: bool = False
    remat: str = 'none'
    attention: str = 'blocks'  # one of attention_kernels.NAMES
    dtype: str = 'float32'  # of activations and products; parameters are float32

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UsageError(f'model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}')
        if self.head_dim % 2:
            raise UsageError(f'model.head_dim={self.head_dim} is odd: rotary positions pair its halves')
        if self.remat not in REMAT:
            raise UsageError(f'remat={self.remat!r} is not one of {", ".join(REMAT)}')
        if self.attention not in BACKENDS:
            raise UsageError(f'attention={self.attention!r} is not one of {", ".join(BACKENDS)}')
        for name in ('vocab_size', 'dim', 'layers', 'heads', 'kv_heads', 'ffn_dim'):
            if getattr(self, name) < 1:
                raise UsageError(f'model.{name}={getattr(self, name)} must be at least 1')

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        padded = math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple
        return {'D': self.dim, 'N': self.heads, 'K': self.kv_heads, 'H': self.head_dim, 'F': self.ffn_dim, 'V': padded}


class Cache(NamedTuple):
    """Keys and values of what has been read, one array [B, K, S, H] a layer: one that a product reads as it lies.

    All rows write to the same slots S, and each slot knows its token's position in each row, so ragged rows need no
    scatter, and padding is a slot that no query sees.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]
    position_BS: jax.Array  # EMPTY where nothing was written, or padding
    length_B: jax.Array  # tokens read of each row: the next one's position
    used: jax.Array  # slots written


def names(cfg: ModelConfig) -> dict[str, Any]:
    """The tree of parameter names (leaf -> its number of contracted letters, what `init` scales by)."""
    norms = {'q_norm_H': 0, 'k_norm_H': 0} if cfg.qk_norm else {}
    layer = {
        'attn_norm_D': 0, 'wq_DNH': 1, 'wk_DKH': 1, 'wv_DKH': 1, **norms, 'wo_NHD': 2,
        'mlp_norm_D': 0, 'w_gate_DF': 1, 'w_up_DF': 1, 'w_down_FD': 1,
    }  # fmt: skip
    untied = {} if cfg.tied else {'head_DV': 1}
    return {'embed_VD': 0, 'layers': layer, 'final_norm_D': 0, **untied}


def init(key: jax.Array, cfg: ModelConfig) -> dict[str, Any]:
    """Float32 parameters. Norms start at 1, embeddings at N(0, 1/D), matrices at N(0, 1/fan-in), and the two that write
    to the residual stream a further 1/√(2L) smaller (GPT-2, section 2.3)."""

    def leaf(key: jax.Array, name: str, contracted: int, lead: tuple[int, ...]) -> jax.Array:
        dims = sharding.dims_of(name)
        shape = tuple(cfg.sizes[d] for d in dims)
        if 'norm' in name:
            return jnp.ones(lead + shape, jnp.float32)
        fan_in = cfg.dim if name == 'embed_VD' else math.prod(shape[:contracted])
        std = fan_in**-0.5 * ((2 * cfg.layers) ** -0.5 if name in ('wo_NHD', 'w_down_FD') else 1.0)
        return std * jax.random.normal(key, lead + shape, jnp.float32)

    def tree(key: jax.Array, node: Mapping[str, Any], lead: tuple[int, ...]) -> dict[str, Any]:
        keys = dict(zip(sorted(node), jax.random.split(key, len(node)), strict=True))
        return {
            name: tree(keys[name], value, (cfg.layers,))
            if isinstance(value, Mapping)
            else leaf(keys[name], name, value, lead)
            for name, value in node.items()
        }

    return tree(key, names(cfg), ())


def init_sharded(key: jax.Array, cfg: ModelConfig) -> dict[str, Any]:
    """`init`, with every parameter born on the devices of the current mesh that keep it."""
    specs = sharding.param_specs(jax.eval_shape(partial(init, cfg=cfg), key))
    return jax.jit(partial(init, cfg=cfg), out_shardings=sharding.shardings(jax.sharding.get_mesh(), specs))(key)


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [B, T, D] of whole rows.

    Args:
      tokens_BT: ids. segments_BT: int32, tokens attend within their segment alone; None is one segment a row.
      positions_BT: rotary positions, restarting with each segment; None counts from 0.
    """
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    angles = rope_angles(positions_BT, cfg.head_dim, theta=cfg.rope_theta)

    def attend(q, k, v):
        options = {'window': cfg.window, 'softcap': cfg.attn_softcap, 'backend': cfg.attention}
        return attention(q, k, v, segments_BT=segments_BT, **options)

    def block(x_BTD, layer):
        return _block(x_BTD, layer, cfg, angles, attend)

    if cfg.remat != 'none':
        block = jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=not cfg.scan)
    x_BTD = _embed(params, cfg, tokens_BT)
    if cfg.scan:
        x_BTD, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x_BTD, params['layers'])
    else:
        for layer in unstack(params['layers'], cfg.layers):
            x_BTD = block(x_BTD, layer)
    return block_norm(x_BTD, params['final_norm_D'], eps=cfg.norm_eps)


def forward_cached(
    params: Params, cfg: ModelConfig, tokens_BT: jax.Array, cache: Cache, *, count_B: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Reads T more tokens of each row after what the cache holds: ([B, T, D], the cache with them).

    Args:
      params: best from `unstacked`; else the layers are taken apart here, each time.
      count_B: the first so many of a row's tokens are real, the others padding; None: all are.
    """
    B, T = tokens_BT.shape
    position_BT = cache.length_B[:, None] + jnp.arange(T)
    angles = rope_angles(position_BT, cfg.head_dim, theta=cfg.rope_theta)
    count_B = jnp.full_like(cache.length_B, T) if count_B is None else count_B
    new_BT = jnp.where(jnp.arange(T) < count_B[:, None], position_BT, EMPTY)
    places = Places(position_BT, new_BT, cache.position_BS, cache.used)
    x_BTD, ks, vs = _embed(params, cfg, tokens_BT), [], []
    for layer, *kv in zip(_layers(params, cfg), cache.k_BKSH, cache.v_BKSH, strict=True):

        def attend(q_BTNH, k_BTKH, v_BTKH, *, kv=kv):
            options = {'window': cfg.window, 'softcap': cfg.attn_softcap}
            out_BTNH, k_BKSH, v_BKSH = cached_attention(q_BTNH, k_BTKH, v_BTKH, kv[0], kv[1], places, **options)
            ks.append(k_BKSH)
            vs.append(v_BKSH)
            return out_BTNH

        x_BTD = _block(x_BTD, layer, cfg, angles, attend)
    position_BS = jax.lax.dynamic_update_slice(cache.position_BS, new_BT, (0, cache.used))
    cache = Cache(tuple(ks), tuple(vs), position_BS, cache.length_B + count_B, cache.used + T)
    return block_norm(x_BTD, params['final_norm_D'], eps=cfg.norm_eps), cache


def empty_cache(cfg: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache for `batch` rows with room for `slots` tokens, split over the mesh as attention wants it."""
    shape = (batch, cfg.kv_heads, slots, cfg.head_dim)
    zeros = lambda: jnp.zeros(shape, cfg.dtype)
    if sharding.axis_sizes():
        zeros = lambda: jax.reshard(jnp.zeros(shape, cfg.dtype), sharding.array_spec('BKSH', shape))
    k_BKSH, v_BKSH = (tuple(zeros() for _ in range(cfg.layers)) for _ in range(2))
    position_BS = jnp.full((batch, slots), EMPTY, jnp.int32)
    return Cache(k_BKSH, v_BKSH, position_BS, jnp.zeros(batch, jnp.int32), jnp.zeros((), jnp.int32))


def grow_cache(cache: Cache, slots: int) -> Cache:
    """The cache with room for `slots` tokens."""

    def grow(x: jax.Array, axis: int, value: int) -> jax.Array:
        widths = [(0, slots - x.shape[axis] if i == axis else 0, 0) for i in range(x.ndim)]
        return jax.lax.pad(x, jnp.array(value, x.dtype), widths)

    k_BKSH, v_BKSH = (tuple(grow(x, 2, 0) for x in xs) for xs in (cache.k_BKSH, cache.v_BKSH))
    return cache._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH, position_BS=grow(cache.position_BS, 1, EMPTY))


def unstacked(params: Params, cfg: ModelConfig, *, batch: int) -> dict[str, Any]:
    """The parameters as generation of `batch` rows reads them: layers in a list, matrices in the dtype of the products.

    A slice of a stack is a copy, made again for each token that is drawn; this makes it once. A CPU keeps the tied head
    of several rows as [D, V] too, for it multiplies them by the transpose of a matrix at up to half the speed. What is
    unstacked already comes back as it is.
    """
    if not isinstance(params['layers'], Mapping):
        return dict(params)

    def cast(path, w):
        return w.astype(cfg.dtype) if isinstance(w, jax.Array) and 'norm' not in path[-1].key else w

    ready = jax.tree.map_with_path(cast, dict(params), is_leaf=lambda w: isinstance(w, seam.Weight))
    ready = {**ready, 'layers': unstack(ready['layers'], cfg.layers)}
    if cfg.tied and batch > 1 and jax.default_backend() == 'cpu' and not sharding.axis_sizes():
        ready['head_DV'] = seam.dense(ready['embed_VD']).T
    return ready


def head_weight(params: Params, cfg: ModelConfig) -> tuple[Any, str]:
    """The head's weight and its dims: the head's own, or the tied embedding."""
    return (params['embed_VD'], 'VD') if cfg.tied and 'head_DV' not in params else (params['head_DV'], 'DV')


def logits(params: Params, cfg: ModelConfig, h_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, vocab_size] of final hidden states: for sampling, not for training."""
    w, dims = head_weight(params, cfg)
    return head.logits(h_BTD, w, dims=dims, vocab_size=cfg.vocab_size, softcap=cfg.logit_softcap)


def nll(
    params: Params, cfg: ModelConfig, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, z_coef: float,
    sparse: bool = False,
):  # fmt: skip
    """`head.nll` with the model's own head."""
    w, dims = head_weight(params, cfg)
    options = {'vocab_size': cfg.vocab_size, 'softcap': cfg.logit_softcap, 'z_coef': z_coef, 'sparse': sparse}
    return head.nll(h_BTD, w, targets_BT, weights_BT, dims=dims, **options)


def unstack(layers: Any, n: int) -> list[Any]:
    """The stacked layers as a list. One `split` for all: its transpose is one concatenation, where indexing layer by
    layer would add n gradients of the full stack."""
    leaves, tree = jax.tree.flatten(layers)
    parts = [jax.lax.split(x, (1,) * n) for x in leaves]
    return [tree.unflatten([jnp.squeeze(p[i], 0) for p in parts]) for i in range(n)]


def _layers(params: Params, cfg: ModelConfig) -> list[Any]:
    """The layers one by one, however they are kept."""
    layers = params['layers']
    return unstack(layers, cfg.layers) if isinstance(layers, Mapping) else layers


def _embed(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    with jax.named_scope('embed'):
        return seam.lookup(params['embed_VD'], tokens_BT, dtype=cfg.dtype)


def _block(x_BTD, layer, cfg, angles, attend):
    """One layer: attention, then the gated feed-forward (SwiGLU; Shazeer, 2020), each added to the residual stream."""
    einsum, norm = seam.einsum, partial(block_norm, eps=cfg.norm_eps)
    with jax.named_scope('attention'):
        y_BTD = norm(x_BTD, layer['attn_norm_D'])
        q_BTNH = einsum('BTD,DNH->BTNH', y_BTD, layer['wq_DNH'])
        k_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wk_DKH'])
        v_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wv_DKH'])
        if cfg.qk_norm:  # Henry et al., 2020; per head as in Qwen 3
            q_BTNH = rms_norm(q_BTNH, seam.dense(layer['q_norm_H']), eps=cfg.norm_eps)
            k_BTKH = rms_norm(k_BTKH, seam.dense(layer['k_norm_H']), eps=cfg.norm_eps)
        out_BTNH = attend(rope(q_BTNH, angles), rope(k_BTKH, angles), v_BTKH)
        out_BTNH = checkpoint_name(out_BTNH, 'attention')
        x_BTD += einsum('BTNH,NHD->BTD', out_BTNH, layer['wo_NHD'])
    with jax.named_scope('mlp'):
        y_BTD = norm(x_BTD, layer['mlp_norm_D'])
        gate_BTF = jax.nn.silu(einsum('BTD,DF->BTF', y_BTD, layer['w_gate_DF']))
        gated_BTF = checkpoint_name(gate_BTF * einsum('BTD,DF->BTF', y_BTD, layer['w_up_DF']), 'gated')
        return x_BTD + einsum('BTF,FD->BTD', gated_BTF, layer['w_down_FD'])
