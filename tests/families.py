"""The switches of the decoder by the families that use them, small."""

import jax
import jax.numpy as jnp
import numpy as np

from lm.model import parameters
from lm.model.config import ModelConfig

BASE = ModelConfig(
    vocab_size=120, vocab_multiple=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, qk_norm=False
)
LLAMA3 = 'llama3,factor=8,low=1,high=4,original=64'
GEMMA = {'norm_plus_one': True, 'activation': 'gelu', 'embed_scale': 32**0.5}
FAMILIES = {
    'llama3': {'rope_scaling': LLAMA3, 'tied': False, 'rope_theta': 500.0},
    'smollm3': {'pattern': 'global,global,global,nope', 'layers': 5},
    'mistral': {'window': 3, 'tied': False},
    'qwen2': {'qkv_bias': True},
    'qwen3': {'qk_norm': True},
    'olmo2': {'norms': 'post', 'qk_norm': True, 'qk_norm_joint': True, 'tied': False},
    'gemma': GEMMA,
    'gemma2': GEMMA
    | {
        'norms': 'both', 'pattern': 'local,global', 'layers': 3, 'window': 4, 'attn_softcap': 5.0, 'logit_softcap': 3.0,
        'query_scale': 0.2,
    },
    'gemma3': GEMMA
    | {
        'norms': 'both', 'pattern': 'local,local,global', 'layers': 4, 'window': 4, 'qk_norm': True,
        'rope_theta_local': 50.0, 'rope_scaling': 'linear,factor=8', 'query_scale': 0.3,
    },
    'granite': {'embed_scale': 3.0, 'residual_scale': 0.3, 'logit_scale': 0.25, 'query_scale': 0.1},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 120, (8, 16))


def made(cfg: ModelConfig):
    """Random parameters, norms and biases among them."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        around = float('norm' in path[-1].key and not cfg.norm_plus_one)
        return jnp.asarray(around + 0.25 * rng.standard_normal(x.shape, np.float32))

    return jax.tree.map_with_path(leaf, jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg)))
