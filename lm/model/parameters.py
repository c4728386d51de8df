"""The table of parameters, and what is made of it: `init`, abstract shapes, and the layout that generation reads.

Parameters are nested dicts whose leaf names carry their dims; those of layers are stored stacked under `layers`, of all
kinds of layer together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import seam
from lm.model.config import ModelConfig
from lm.model.feed_forward import FEED_FORWARDS
from lm.model.param import Param, bias, matrix, norm

Params = Mapping[str, Any]

TOP = (
    Param('embed_VD', 'embedding'),
    norm('final_norm_D'),
    Param('head_DV', 'fan_in', 'D', decays=True, when=lambda cfg: not cfg.tied),
)
# Of each layer, beside its feed-forward's.
LAYER = (
    norm('attn_norm_D', lambda cfg: cfg.norms != 'post'),
    matrix('wq_DNH', 'D'),
    matrix('wk_DKH', 'D'),
    matrix('wv_DKH', 'D'),
    bias('bias_q_NH', lambda cfg: cfg.qkv_bias),
    bias('bias_k_KH', lambda cfg: cfg.qkv_bias),
    bias('bias_v_KH', lambda cfg: cfg.qkv_bias),
    norm('q_norm_H', lambda cfg: cfg.qk_norm and not cfg.qk_norm_joint),
    norm('k_norm_H', lambda cfg: cfg.qk_norm and not cfg.qk_norm_joint),
    norm('q_norm_NH', lambda cfg: cfg.qk_norm and cfg.qk_norm_joint),
    norm('k_norm_KH', lambda cfg: cfg.qk_norm and cfg.qk_norm_joint),
    matrix('wo_NHD', 'NH', 'residual'),
    norm('attn_post_norm_D', lambda cfg: cfg.norms != 'pre'),
    norm('mlp_norm_D', lambda cfg: cfg.norms != 'post'),
    norm('mlp_post_norm_D', lambda cfg: cfg.norms != 'pre'),
)
REWARD_HEAD = (Param('score_D', 'score', 'D', decays=True), bias('bias_score'))

# The standard deviation that a parameter of a fan-in starts with, around 0; norms start at a factor of 1, biases at 0.
STARTS: dict[str, Callable[[int, ModelConfig], float]] = {
    'norm': lambda fan_in, cfg: 0.0,
    'zeros': lambda fan_in, cfg: 0.0,
    'embedding': lambda fan_in, cfg: cfg.dim**-0.5,
    'fan_in': lambda fan_in, cfg: fan_in**-0.5,
    'residual': lambda fan_in, cfg: fan_in**-0.5 * (2 * cfg.layers) ** -0.5,  # GPT-2, section 2.3
    'score': lambda fan_in, cfg: (fan_in + 1) ** -0.5,  # Stiennon et al., 2020, B.1
}


def rows(cfg: ModelConfig) -> tuple[list[Param], list[Param]]:
    """The rows that a model has: (its own, those of each layer)."""
    own = lambda table: [row for row in table if row.when(cfg)]
    return own(TOP), own((*LAYER, *FEED_FORWARDS[cfg.feed_forward].rows))


def of_layers() -> list[Param]:
    """The rows of the layers of all models, in their order."""
    return [*LAYER, *(row for kind in FEED_FORWARDS.values() for row in kind.rows)]


def row(name: str) -> Param:
    """The row of a parameter of any model, by its leaf's name or path. Raises KeyError for a name of none."""
    name = name.rpartition('/')[2]
    for found in (*TOP, *of_layers(), *REWARD_HEAD):
        if found.name == name:
            return found
    raise KeyError(f'{name} is in no row of lm/model/parameters.py')


def shapes(cfg: ModelConfig, *, scored: bool = False) -> dict[str, Any]:
    """The tree of a model's, or a reward model's, parameters as shapes and dtypes."""
    top, layer = rows(cfg)
    top += REWARD_HEAD if scored else ()
    tree = lambda rows, *lead: {
        row.name: jax.ShapeDtypeStruct((*lead, *row.shape(cfg.sizes)), jnp.float32) for row in rows
    }
    return {**tree(top), 'layers': tree(layer, cfg.layers)}


def init(key: jax.Array, cfg: ModelConfig) -> dict[str, Any]:
    """Float32 parameters that start as STARTS says."""
    top, layer = rows(cfg)
    keys = _split(key, ['layers', *(row.name for row in top)])
    layer_keys = _split(keys['layers'], [row.name for row in layer])
    layers = {row.name: _start(row, layer_keys[row.name], cfg, cfg.layers) for row in layer}
    return {**{row.name: _start(row, keys[row.name], cfg) for row in top}, 'layers': layers}


def init_sharded(key: jax.Array, cfg: ModelConfig) -> dict[str, Any]:
    """`init`, with every parameter born on the devices of the current mesh that keep it."""
    where = sharding.shardings(jax.sharding.get_mesh(), sharding.param_specs(shapes(cfg)))
    return jax.jit(partial(init, cfg=cfg), out_shardings=where)(key)


def shapes_of_scores(cfg: ModelConfig) -> dict[str, Any]:
    """The parameters of a reward model beside the decoder's, as shapes and dtypes."""
    return {row.name: jax.ShapeDtypeStruct(row.shape(cfg.sizes), jnp.float32) for row in REWARD_HEAD}


def init_scores(key: jax.Array, cfg: ModelConfig) -> dict[str, jax.Array]:
    """The parameters of a reward model beside the decoder's."""
    return {row.name: _start(row, key, cfg) for row in REWARD_HEAD}


def _split(key: jax.Array, names: Sequence[str]) -> dict[str, jax.Array]:
    """A key for each name, whatever their order."""
    return dict(zip(sorted(names), jax.random.split(key, len(names)), strict=True))


def _start(row: Param, key: jax.Array, cfg: ModelConfig, *lead: int) -> jax.Array:
    shape = (*lead, *row.shape(cfg.sizes))
    std = STARTS[row.init](math.prod(cfg.sizes[letter] for letter in row.contracted), cfg)
    if not std:
        return jnp.full(shape, 1.0 if row.is_norm and not cfg.norm_plus_one else 0.0, jnp.float32)
    return std * jax.random.normal(key, shape, jnp.float32)


# ---- as generation reads them ----


def unstacked(params: Params, cfg: ModelConfig, *, batch: int) -> dict[str, Any]:
    """The parameters as generation of `batch` rows reads them: layers in a list, matrices in the dtype of the products.

    A slice of a stack is a copy, made again for each token that is drawn; this makes it once. A CPU keeps the tied head
    of several rows as [D, V] too, for it multiplies them by the transpose of a matrix at up to half the speed. What is
    unstacked already comes back as it is.
    """
    if not isinstance(params['layers'], Mapping):
        return dict(params)

    def cast(path, w):
        return w.astype(cfg.dtype) if isinstance(w, jax.Array) and not row(path[-1].key).is_norm else w

    ready = jax.tree.map_with_path(cast, dict(params), is_leaf=lambda w: isinstance(w, seam.Weight))
    ready = {**ready, 'layers': unstack(ready['layers'], cfg.layers)}
    if cfg.tied and batch > 1 and sharding.platform() == 'cpu' and not sharding.axis_sizes():
        ready['head_DV'] = seam.dense(ready['embed_VD']).T
    return ready


def unstack(layers: Any, n: int) -> list[Any]:
    """The stacked layers as a list. One `split` for all: its transpose is one concatenation, where indexing layer by
    layer would add n gradients of the full stack."""
    leaves, tree = jax.tree.flatten(layers)
    parts = [jax.lax.split(x, (1,) * n) for x in leaves]
    return [tree.unflatten([jnp.squeeze(p[i], 0) for p in parts]) for i in range(n)]


def layer_list(params: Params, cfg: ModelConfig) -> list[Any]:
    """The layers one by one, however they are stored."""
    layers = params['layers']
    return unstack(layers, cfg.layers) if isinstance(layers, Mapping) else layers
