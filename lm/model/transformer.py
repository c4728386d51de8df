"""The decoder: `init` makes the parameters, `forward` turns tokens into hidden states. Both are pure functions.

The default graph is the Llama family's: pre-norm blocks of grouped-query attention with rotary positions and a gated
feed-forward, with per-head RMS normalisation of queries and keys, and input and output embeddings tied. Switches of
`ModelConfig` make of it the graphs of Llama, Mistral, SmolLM, Qwen, OLMo 2, Gemma and Granite.

Parameters are nested dicts whose leaf names carry their dims; layers are stored stacked, those of all kinds together:

    embed_VD                              final_norm_D       [head_DV, if not tied]
    layers/ attn_norm_D wq_DNH wk_DKH wv_DKH [q_norm_H k_norm_H] wo_NHD mlp_norm_D w_gate_DF w_up_DF w_down_FD
            [attn_post_norm_D mlp_post_norm_D] [bias_q_NH bias_k_KH bias_v_KH] [q_norm_NH k_norm_KH]
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm import sharding
from lm.errors import UsageError
from lm.model import attention_kernels as kernels
from lm.model import head, seam
from lm.model import layers as parts
from lm.model.attention import BACKENDS, EMPTY, Places, attention, cached_attention
from lm.model.layers import RopeScaling, rope, rope_angles

Params = Mapping[str, Any]


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


NORMS = ('pre', 'post', 'both')  # of what a sub-layer reads, of what it adds (OLMo 2), or both (Gemma 2)
ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': partial(jax.nn.gelu, approximate=True)}
# Attention of the last `window` tokens, of all, and of all without positions (Yang et al., 2025, RNoPE).
KINDS_OF_LAYER = ('local', 'global', 'nope')


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
    norms: str = 'pre'  # of NORMS
    norm_plus_one: bool = False  # norms multiply by 1 + their weight
    qk_norm_joint: bool = False  # qk_norm over all heads at once
    qkv_bias: bool = False
    activation: str = 'silu'  # of ACTIVATIONS
    query_scale: float | None = None  # of q·k; None: head_dim**-0.5
    embed_scale: float | None = None
    residual_scale: float | None = None  # of what is added to the residual stream
    logit_scale: float | None = None  # before the soft-cap
    pattern: str | None = None  # of layers, repeated over the depth: words of KINDS_OF_LAYER
    rope_theta_local: float | None = None  # of local layers; None: rope_theta
    rope_scaling: str | None = None  # of global layers, see `layers.RopeScaling`
    context: int | None = None  # tokens that it was made to read at once
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
        for name, known in (('norms', NORMS), ('activation', ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise UsageError(f'model.{name}={getattr(self, name)} is not one of {", ".join(known)}')
        for word in self.kinds:
            if word not in KINDS_OF_LAYER:
                raise UsageError(f'model.pattern={self.pattern}: {word!r} is not one of {", ".join(KINDS_OF_LAYER)}')
        if 'local' in self.kinds and self.window is None:
            raise UsageError(f'model.pattern={self.pattern} has local layers: set model.window')
        RopeScaling.parse(self.rope_scaling)
        for name in ('vocab_size', 'dim', 'layers', 'heads', 'kv_heads', 'ffn_dim'):
            if getattr(self, name) < 1:
                raise UsageError(f'model.{name}={getattr(self, name)} must be at least 1')

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
        """How far each layer sees."""
        return tuple(self.window if self.kind(i) == 'local' else None for i in range(self.layers))

    def kind(self, layer: int) -> str:
        """The kind of a layer."""
        return self.kinds[layer % len(self.kinds)]


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


_BEFORE, _AFTER = ('attn_norm_D', 'mlp_norm_D'), ('attn_post_norm_D', 'mlp_post_norm_D')


def names(cfg: ModelConfig) -> dict[str, Any]:
    """The tree of parameter names (leaf -> its number of contracted letters, what `init` scales by)."""
    more = [*_BEFORE] * (cfg.norms != 'post') + [*_AFTER] * (cfg.norms != 'pre')
    more += ['q_norm_NH', 'k_norm_KH'] if cfg.qk_norm and cfg.qk_norm_joint else []
    more += ['q_norm_H', 'k_norm_H'] if cfg.qk_norm and not cfg.qk_norm_joint else []
    more += ['bias_q_NH', 'bias_k_KH', 'bias_v_KH'] if cfg.qkv_bias else []
    matrices = {'wq_DNH': 1, 'wk_DKH': 1, 'wv_DKH': 1, 'wo_NHD': 2, 'w_gate_DF': 1, 'w_up_DF': 1, 'w_down_FD': 1}
    layer = matrices | dict.fromkeys(more, 0)
    untied = {} if cfg.tied else {'head_DV': 1}
    return {'embed_VD': 0, 'layers': layer, 'final_norm_D': 0, **untied}


def init(key: jax.Array, cfg: ModelConfig) -> dict[str, Any]:
    """Float32 parameters. Norms start at a factor of 1, biases at 0, embeddings at N(0, 1/D), matrices at
    N(0, 1/fan-in), and the two that write to the residual stream a further 1/√(2L) smaller (GPT-2, section 2.3)."""

    def leaf(key: jax.Array, name: str, contracted: int, lead: tuple[int, ...]) -> jax.Array:
        dims = sharding.dims_of(name)
        shape = tuple(cfg.sizes[d] for d in dims)
        if 'norm' in name or name.startswith('bias'):
            one = 'norm' in name and not cfg.norm_plus_one
            return jnp.full(lead + shape, 1.0 if one else 0.0, jnp.float32)
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
    block = partial(_whole_rows, cfg, _angles(cfg, positions_BT), segments_BT)
    x_BTD, layers, whole = embed(params, cfg, tokens_BT), params['layers'], 0
    if cfg.scan:
        whole = cfg.layers - cfg.layers % len(cfg.kinds)
        scanned = layers if whole == cfg.layers else jax.tree.map(lambda w: w[:whole], layers)
        x_BTD = _scan(x_BTD, scanned, [block(kind, scanned=True) for kind in cfg.kinds])
    if whole < cfg.layers:
        rest = layers if not whole else jax.tree.map(lambda w: w[whole:], layers)
        for i, layer in enumerate(unstack(rest, cfg.layers - whole), whole):
            x_BTD = block(cfg.kind(i), scanned=False)(x_BTD, layer)
    return final_norm(params, cfg, x_BTD)


def _whole_rows(
    cfg: ModelConfig, angles: Mapping[str, Any], segments_BT: jax.Array | None, kind: str, *, scanned: bool
):
    """(x_BTD, parameters) -> x_BTD: a layer of a kind, over whole rows."""

    def attend(q, k, v):
        options = {'window': _window(cfg, kind), 'softcap': cfg.attn_softcap, 'backend': cfg.attention}
        return attention(q, k, v, segments_BT=segments_BT, **options)

    def block(x_BTD, layer):
        return _block(x_BTD, layer, cfg, angles[kind], attend)

    return block if cfg.remat == 'none' else jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=not scanned)


def _scan(x_BTD: jax.Array, layers: Any, blocks: Sequence[Any]) -> jax.Array:
    """Stacked layers, as many at a time as there are blocks: one for each in its turn."""
    n = len(blocks)
    if n > 1:
        layers = jax.tree.map(lambda w: w.reshape(w.shape[0] // n, n, *w.shape[1:]), layers)

    def step(x_BTD, layers):
        for block, layer in zip(blocks, unstack(layers, n) if n > 1 else [layers], strict=True):
            x_BTD = block(x_BTD, layer)
        return x_BTD, None

    return jax.lax.scan(step, x_BTD, layers)[0]


def layer(params: Any, cfg: ModelConfig, x_BTD: jax.Array, *, number: int) -> jax.Array:
    """One layer, by its own parameters, over whole rows that count from 0: what a model too large to hold is run by."""
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    return _whole_rows(cfg, _angles(cfg, positions_BT), None, cfg.kind(number), scanned=False)(x_BTD, params)


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
    angles = _angles(cfg, position_BT)
    count_B = jnp.full_like(cache.length_B, T) if count_B is None else count_B
    new_BT = jnp.where(jnp.arange(T) < count_B[:, None], position_BT, EMPTY)
    places = Places(position_BT, new_BT, cache.position_BS, cache.used)
    x_BTD, ks, vs = embed(params, cfg, tokens_BT), [], []
    for i, (layer, *kv) in enumerate(zip(_layers(params, cfg), cache.k_BKSH, cache.v_BKSH, strict=True)):
        kind = cfg.kind(i)
        x_BTD, k_BKSH, v_BKSH = _cached_block(x_BTD, layer, angles[kind], *kv, places, cfg=cfg, kind=kind)
        ks.append(k_BKSH)
        vs.append(v_BKSH)
    position_BS = jax.lax.dynamic_update_slice(cache.position_BS, new_BT, (0, cache.used))
    cache = Cache(tuple(ks), tuple(vs), position_BS, cache.length_B + count_B, cache.used + T)
    return final_norm(params, cfg, x_BTD), cache


@partial(jax.jit, static_argnames=('cfg', 'kind'))  # so that layers alike are traced once
def _cached_block(x_BTD, layer, angles, k_BKSH, v_BKSH, places, *, cfg, kind):
    """(x_BTD, k_BKSH, v_BKSH) after one layer over what its cache holds and the tokens after it."""
    written = []

    def attend(q_BTNH, k_BTKH, v_BTKH):
        options = {'window': _window(cfg, kind), 'softcap': cfg.attn_softcap}
        out_BTNH, *kv = cached_attention(q_BTNH, k_BTKH, v_BTKH, k_BKSH, v_BKSH, places, **options)
        written.extend(kv)
        return out_BTNH

    return _block(x_BTD, layer, cfg, angles, attend), *written


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


def head_inputs(params: Params, cfg: ModelConfig, h_BTD: jax.Array) -> tuple[jax.Array, Any, dict[str, Any]]:
    """(hidden states, weight, options) for the functions of lm/model/head.py: the model's own head."""
    w, dims = head_weight(params, cfg)
    if cfg.logit_scale is not None:
        h_BTD = _scaled(h_BTD, cfg.logit_scale)
    return h_BTD, w, {'dims': dims, 'vocab_size': cfg.vocab_size, 'softcap': cfg.logit_softcap}


def logits(params: Params, cfg: ModelConfig, h_BTD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, vocab_size] of final hidden states: for sampling, not for training."""
    h_BTD, w, options = head_inputs(params, cfg, h_BTD)
    return head.logits(h_BTD, w, **options)


def nll(
    params: Params, cfg: ModelConfig, h_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *, z_coef: float,
    sparse: bool = False,
):  # fmt: skip
    """`head.nll` with the model's own head."""
    h_BTD, w, options = head_inputs(params, cfg, h_BTD)
    return head.nll(h_BTD, w, targets_BT, weights_BT, z_coef=z_coef, sparse=sparse, **options)


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


def embed(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """What the first layer reads, [B, T, D]."""
    with jax.named_scope('embed'):
        x_BTD = seam.lookup(params['embed_VD'], tokens_BT, dtype=cfg.dtype)
        return x_BTD if cfg.embed_scale is None else _scaled(x_BTD, cfg.embed_scale)


def final_norm(params: Params, cfg: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """What the head reads of what the last layer gives."""
    return parts.block_norm(x_BTD, params['final_norm_D'], eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)


def _angles(cfg: ModelConfig, positions_BT: jax.Array) -> dict[str, Any]:
    """The rotary angles of each kind of layer that there is."""

    def of(kind: str) -> Any:
        if kind == 'nope':
            return None
        if kind == 'local' and cfg.pattern is not None:
            theta = cfg.rope_theta if cfg.rope_theta_local is None else cfg.rope_theta_local
            return rope_angles(positions_BT, cfg.head_dim, theta=theta)
        scaling = RopeScaling.parse(cfg.rope_scaling)
        return rope_angles(positions_BT, cfg.head_dim, theta=cfg.rope_theta, scaling=scaling)

    return {kind: of(kind) for kind in dict.fromkeys(cfg.kinds)}


def _window(cfg: ModelConfig, kind: str) -> int | None:
    return cfg.window if kind == 'local' else None


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    """x times a factor that x's dtype need not have."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _block(x_BTD, layer, cfg, angles, attend):
    """One layer: attention, then the gated feed-forward (SwiGLU; Shazeer, 2020), each added to the residual stream."""
    norm = partial(parts.block_norm, eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)

    def read(name):
        return x_BTD if cfg.norms == 'post' else norm(x_BTD, layer[name])

    def added(y_BTD, name):
        y_BTD = y_BTD if cfg.norms == 'pre' else norm(y_BTD, layer[name])
        return x_BTD + (y_BTD if cfg.residual_scale is None else _scaled(y_BTD, cfg.residual_scale))

    with jax.named_scope('attention'):
        y_BTD = _attention(read('attn_norm_D'), layer, cfg, angles, attend)
        x_BTD = added(y_BTD, 'attn_post_norm_D')
    with jax.named_scope('mlp'):
        y_BTD = _feed_forward(read('mlp_norm_D'), layer, cfg)
        return added(y_BTD, 'mlp_post_norm_D')


def _attention(y_BTD, layer, cfg, angles, attend):
    """What attention adds."""
    einsum = seam.einsum
    q_BTNH = einsum('BTD,DNH->BTNH', y_BTD, layer['wq_DNH'])
    k_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wk_DKH'])
    v_BTKH = einsum('BTD,DKH->BTKH', y_BTD, layer['wv_DKH'])
    if cfg.qkv_bias:
        q_BTNH, k_BTKH = _biased(q_BTNH, layer, 'bias_q_NH'), _biased(k_BTKH, layer, 'bias_k_KH')
        v_BTKH = _biased(v_BTKH, layer, 'bias_v_KH')
    if cfg.qk_norm:  # Henry et al., 2020; per head as in Qwen 3, or over all as in OLMo 2
        norm = partial(parts.head_norm, eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)
        q_name, k_name = ('q_norm_NH', 'k_norm_KH') if cfg.qk_norm_joint else ('q_norm_H', 'k_norm_H')
        q_BTNH, k_BTKH = norm(q_BTNH, layer[q_name], dims=q_name), norm(k_BTKH, layer[k_name], dims=k_name)
    if angles is not None:
        q_BTNH, k_BTKH = rope(q_BTNH, angles), rope(k_BTKH, angles)
    if cfg.query_scale is not None and cfg.query_scale != cfg.head_dim**-0.5:  # which attention scales by
        q_BTNH = _scaled(q_BTNH, cfg.query_scale * cfg.head_dim**0.5)
    return einsum('BTNH,NHD->BTD', attend(q_BTNH, k_BTKH, v_BTKH), layer['wo_NHD'])


def _biased(x: jax.Array, layer: Params, name: str) -> jax.Array:
    bias = seam.gather(seam.dense(layer[name]), sharding.dims_of(name))
    return x + bias.astype(x.dtype)


def _feed_forward(y_BTD, layer, cfg):
    """What the gated feed-forward adds."""
    gate_BTF = ACTIVATIONS[cfg.activation](seam.einsum('BTD,DF->BTF', y_BTD, layer['w_gate_DF']))
    gated_BTF = checkpoint_name(gate_BTF * seam.einsum('BTD,DF->BTF', y_BTD, layer['w_up_DF']), 'gated')
    return seam.einsum('BTF,FD->BTD', gated_BTF, layer['w_down_FD'])
