"""Sizes by name, and the dial: what stands after the colon in `--config=configs/pretrain.py:ARG`."""

from typing import Any

from lm.config import Config, nearest, override
from lm.errors import UsageError

GPT2_VOCAB = 50_304  # 50,257 ids padded to a multiple of 128
LLAMA3_VOCAB = 128_256


def _size(
    dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab_size: int, **more: Any
) -> dict[str, Any]:
    shape = {
        'dim': dim, 'layers': layers, 'heads': heads, 'kv_heads': kv_heads, 'head_dim': dim // heads,
        'ffn_dim': ffn_dim, 'vocab_size': vocab_size, 'scan': True,
    }  # fmt: skip
    return {f'model.{k}': v for k, v in shape.items()} | more


def _cluster(lr: float, batch_size: int, seq_len: int, steps: int, **more: Any) -> dict[str, Any]:
    schedule = {'optim.lr': lr, 'optim.warmup': min(2000, steps // 10), 'optim.schedule': 'cosine', 'optim.final': 0.1}
    return {'batch_size': batch_size, 'seq_len': seq_len, 'steps': steps} | schedule | more


# Widths and depths of the GPT-2 family (Radford et al., 2019) with a gated feed-forward of 8/3 the width, and of
# Llama 3 (Grattafiori et al., 2024, table 3); rates from the same papers; steps for 20 tokens a parameter (Hoffmann et
# al., 2022).
PRESETS: dict[str, dict[str, Any]] = {
    '124m': _size(768, 12, 12, 12, 2048, GPT2_VOCAB) | _cluster(6e-4, 480, 1024, 5_000),
    '350m': _size(1024, 24, 16, 16, 2816, GPT2_VOCAB) | _cluster(3e-4, 480, 1024, 14_000),
    '1b': _size(2048, 16, 32, 8, 8192, LLAMA3_VOCAB) | _cluster(3e-4, 512, 4096, 12_000, **{'remat': 'names'}),
    '8b': _size(4096, 32, 32, 8, 14336, LLAMA3_VOCAB)
    | _cluster(3e-4, 1024, 8192, 19_000, **{'remat': 'full', 'model.rope_theta': 5e5, 'model.tied': False}),
    '70b': _size(8192, 80, 64, 8, 28672, LLAMA3_VOCAB)
    | _cluster(1.5e-4, 2048, 8192, 84_000, **{'remat': 'full', 'model.rope_theta': 5e5, 'model.tied': False}),
}  # fmt: skip

HEAD_DIM, LAPTOP_DEPTH, LAPTOP_DIM = 32, 4, 128


def depth(n: int) -> dict[str, Any]:
    """One dial: a model of depth n is 32·n wide, and takes the rate and the horizon that go with its size.

    The rate falls as 1/√width from the laptop run's, and the steps grow with the parameters per token of batch, so
    that each size sees about as many tokens per parameter as the laptop run does.
    """
    dim = LAPTOP_DIM // LAPTOP_DEPTH * n
    growth = (n / LAPTOP_DEPTH) ** 3  # parameters of the layers: depth × width²
    return {
        'model.dim': dim, 'model.layers': n, 'model.heads': dim // HEAD_DIM, 'model.kv_heads': dim // HEAD_DIM,
        'model.head_dim': HEAD_DIM, 'model.ffn_dim': 3 * dim, 'model.scan': n > 8,
        'optim.lr': ('×', (LAPTOP_DIM / dim) ** 0.5), 'steps': ('×', max(1.0, growth)),
    }  # fmt: skip


def apply(config: Config, arg: str) -> Config:
    """Applies ARG to a config: a preset's name, `depth=N`, or `KEY=VALUE` pairs, joined by commas.

    Raises UsageError for what is none of these.
    """
    for part in filter(None, arg.split(',')):
        key, equals, text = part.partition('=')
        if not equals:
            if part not in PRESETS:
                names = ', '.join(PRESETS)
                raise UsageError(f'unknown preset :{part}{nearest(part, list(PRESETS))}: it is one of {names}, depth=N')
            _set(config, PRESETS[part])
        elif key == 'depth':
            if not text.isdigit() or int(text) < 1:
                raise UsageError(f'depth={text}: must be a whole number of layers, at least 1')
            _set(config, depth(int(text)))
        else:
            override(config, key, text)
    return config


def _set(config: Config, values: dict[str, Any]) -> None:
    for key, value in values.items():
        *parents, last = key.split('.')
        node = config
        for parent in parents:
            node = node[parent]
        if isinstance(value, tuple):  # ('×', factor): relative to the config's own value; an epoch stays an epoch
            if node[last] is None:
                continue
            product = node[last] * value[1]
            value = round(product) if isinstance(node[last], int) else float(f'{product:.3g}')
        node[last] = value
