"""The tiny Llamas of tests/golden, whose numbers `transformers` and `trl` gave."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lm.model import parameters
from lm.model.config import ModelConfig

FOLDER = Path(__file__).parent / 'golden'
GOLDEN = json.loads((FOLDER / 'preference.json').read_text())


@functools.cache
def arrays():
    with np.load(FOLDER / 'preference.npz') as file:
        return dict(file)


@functools.cache
def model(name):
    """(config, parameters) of 'policy' or 'reference', the vocabulary padded with rows that must not count."""
    shape = GOLDEN['model']
    cfg = ModelConfig(
        vocab_size=shape['vocab_size'], vocab_multiple=64, dim=shape['hidden_size'], layers=shape['num_hidden_layers'],
        heads=shape['num_attention_heads'], kv_heads=shape['num_key_value_heads'], head_dim=shape['head_dim'],
        ffn_dim=shape['intermediate_size'], norm_eps=shape['rms_norm_eps'], qk_norm=False, tied=name == 'reference',
        rope_theta=shape['rope_parameters']['rope_theta'],
    )  # fmt: skip
    params = {'layers': {}}
    for key, x in arrays().items():
        owner, _, leaf = key.partition('/')
        if owner == name:
            dims = leaf.rpartition('_')[2]
            widths = [
                (0, cfg.sizes['V'] - n if d == 'V' else 0) for d, n in zip(dims, x.shape[-len(dims) :], strict=True)
            ]
            x = x if 'layers' in leaf else np.pad(x, widths, constant_values=0.5)
            node = params['layers'] if 'layers' in leaf else params
            node[leaf.rpartition('/')[2]] = jnp.asarray(x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parameters.init(jax.random.key(0), cfg))
    return cfg, params
