"""Sizes by name, and the dial: what stands after the colon in `--config=configs/pretrain.py:ARG`."""

from collections.abc import Mapping
from typing import Any

from lm.config import Config, leaves, nearest, override
from lm.errors import UsageError

GPT2_VOCAB = 50_304  # 50,257 ids padded to a multiple of 128
LLAMA3_VOCAB = 128_256


def _size(
    dim: int, layers: int, heads: int, kv_heads: int, ffn_dim: int, vocab_size: int, **more: Any
) -> dict[str, Any]:
    """A model's shape; `more` of its settings are as they are named."""
    shape = {
        'dim': dim, 'layers': layers, 'heads': heads, 'kv_heads': kv_heads, 'head_dim': dim // heads,
        'ffn_dim': ffn_dim, 'vocab_size': vocab_size,
    }  # fmt: skip
    return {f'model.{name}': value for name, value in (shape | more).items()}


def _cluster(lr: float, batch_size: int, seq_len: int, steps: int) -> dict[str, Any]:
    return {
        'batch_size': batch_size, 'seq_len': seq_len, 'steps': steps, 'optim.name': 'adamw', 'optim.lr': lr,
        'optim.warmup': min(2000, steps // 10), 'optim.schedule': 'cosine', 'optim.final': 0.1,
    }  # fmt: skip


_UNTIED = {'tied': False}
_8B, _70B = _cluster(3e-4, 1024, 8192, 19_000), _cluster(1.5e-4, 2048, 8192, 84_000)
# Widths and depths of the GPT-2 family (Radford et al., 2019) with a gated feed-forward of 8/3 the width, and of
# Llama 3 (Grattafiori et al., 2024, table 3); AdamW and its rates from the same papers; steps for 20 tokens a parameter
# (Hoffmann et al., 2022).
PRESETS: dict[str, dict[str, Any]] = {
    '124m': _size(768, 12, 12, 12, 2048, GPT2_VOCAB) | _cluster(6e-4, 480, 1024, 5_000),
    '350m': _size(1024, 24, 16, 16, 2816, GPT2_VOCAB) | _cluster(3e-4, 480, 1024, 14_000),
    '1b': _size(2048, 16, 32, 8, 8192, LLAMA3_VOCAB) | _cluster(3e-4, 512, 4096, 12_000),
    '8b': _size(4096, 32, 32, 8, 14336, LLAMA3_VOCAB, rope_theta=5e5, **_UNTIED) | _8B,
    '70b': _size(8192, 80, 64, 8, 28672, LLAMA3_VOCAB, rope_theta=5e5, **_UNTIED) | _70B,
}


SIZES = tuple(PRESETS)  # ours, from small to large


def _like(
    dim: int, layers: int, heads: str, ffn_dim: int, vocab_size: int, context: int, theta: float, **more: Any
) -> dict[str, Any]:
    """A published model's shape; `heads` is 'queries/keys·head_dim'. What is not said is as in the Llama family."""
    counts, _, head_dim = heads.partition('·')
    queries, _, keys = counts.partition('/')
    plain = {'head_dim': int(head_dim), 'context': context, 'rope_theta': theta, 'norm_eps': 1e-5, 'qk_norm': False}
    return _size(dim, layers, int(queries), int(keys), ffn_dim, vocab_size, **(plain | more))


_QWEN2 = {'norm_eps': 1e-6, 'qkv_bias': True}
_QWEN3 = {'norm_eps': 1e-6, 'qk_norm': True}
_GEMMA = {'norm_eps': 1e-6, 'norm_plus_one': True, 'activation': 'gelu'}
_GEMMA2 = _GEMMA | {'norms': 'both', 'query_scale': 256**-0.5}
_LLAMA32 = {'rope_scaling': 'llama3,factor=32,low=1,high=4,original=8192'}
_SMALL = _cluster(1e-3, 512, 2048, 10_000)  # below a billion parameters
_MIDDLE = _cluster(3e-4, 512, 4096, 30_000)
_LARGE = _cluster(3e-4, 1024, 4096, 40_000)

# Known models by name, to train one of that shape: the numbers of the config.json of each one's repository (Mistral's
# v0.1, Qwen 2's without -Instruct, OLMo 2's of November 2024, Granite's 3.1). Rates and batches are not of their papers
# but as above, at about 20 tokens a parameter for the larger ones of a group.
PRESETS |= {
    'llama2-7b': _like(4096, 32, '32/32·128', 11008, 32_000, 4096, 1e4, **_UNTIED) | _LARGE,
    'llama3-8b': _like(4096, 32, '32/8·128', 14336, LLAMA3_VOCAB, 8192, 5e5, **_UNTIED) | _8B,
    'llama3-70b': _like(8192, 80, '64/8·128', 28672, LLAMA3_VOCAB, 8192, 5e5, **_UNTIED) | _70B,
    'llama3.2-1b': _like(2048, 16, '32/8·64', 8192, LLAMA3_VOCAB, 131_072, 5e5, **_LLAMA32) | _MIDDLE,
    'llama3.2-3b': _like(3072, 28, '24/8·128', 8192, LLAMA3_VOCAB, 131_072, 5e5, **_LLAMA32) | _MIDDLE,
    'smollm2-135m': _like(576, 30, '9/3·64', 1536, 49_152, 8192, 1e5) | _SMALL,
    'smollm2-360m': _like(960, 32, '15/5·64', 2560, 49_152, 8192, 1e5) | _SMALL,
    'smollm2-1.7b': _like(2048, 24, '32/32·64', 8192, 49_152, 8192, 1.3e5) | _MIDDLE,
    'smollm3-3b': _like(
        2048, 36, '16/4·128', 11008, LLAMA3_VOCAB, 65_536, 5e6, norm_eps=1e-6, pattern='global,global,global,nope'
    ) | _MIDDLE,
    'mistral-7b': _like(4096, 32, '32/8·128', 14336, 32_000, 32_768, 1e4, window=4096, **_UNTIED) | _LARGE,
    'qwen2-0.5b': _like(896, 24, '14/2·64', 4864, 151_936, 131_072, 1e6, **_QWEN2) | _SMALL,
    'qwen2-1.5b': _like(1536, 28, '12/2·128', 8960, 151_936, 131_072, 1e6, **_QWEN2) | _MIDDLE,
    'qwen2-7b': _like(3584, 28, '28/4·128', 18944, 152_064, 131_072, 1e6, **_QWEN2, **_UNTIED) | _LARGE,
    'qwen3-0.6b': _like(1024, 28, '16/8·128', 3072, 151_936, 40_960, 1e6, **_QWEN3) | _SMALL,
    'qwen3-1.7b': _like(2048, 28, '16/8·128', 6144, 151_936, 40_960, 1e6, **_QWEN3) | _MIDDLE,
    'qwen3-4b': _like(2560, 36, '32/8·128', 9728, 151_936, 40_960, 1e6, **_QWEN3) | _MIDDLE,
    'qwen3-8b': _like(4096, 36, '32/8·128', 12288, 151_936, 40_960, 1e6, **_QWEN3, **_UNTIED) | _LARGE,
    'olmo2-7b': _like(
        4096, 32, '32/32·128', 11008, 100_352, 4096, 5e5, norm_eps=1e-6, norms='post', qk_norm=True, qk_norm_joint=True,
        **_UNTIED,
    ) | _LARGE,
    'gemma-2b': _like(2048, 18, '8/1·256', 16384, 256_000, 8192, 1e4, embed_scale=2048**0.5, **_GEMMA) | _MIDDLE,
    'gemma2-2b': _like(
        2304, 26, '8/4·256', 9216, 256_000, 8192, 1e4, embed_scale=2304**0.5, pattern='local,global', window=4096,
        attn_softcap=50.0, logit_softcap=30.0, **_GEMMA2,
    ) | _MIDDLE,
    'gemma3-1b': _like(
        1152, 26, '4/1·256', 6912, 262_144, 32_768, 1e6, embed_scale=1152**0.5, qk_norm=True, window=512,
        pattern='local,local,local,local,local,global', rope_theta_local=1e4, **_GEMMA2,
    ) | _MIDDLE,
    'granite3-2b': _like(
        2048, 40, '32/8·64', 8192, 49_155, 131_072, 5e6, embed_scale=12.0, residual_scale=0.22, logit_scale=1 / 8,
        query_scale=1 / 64,
    ) | _MIDDLE,
}  # fmt: skip

# Models that come from elsewhere: `python -m lm.convert NAME runs/NAME` makes a run of one, and these settings have a
# stage train it further on a laptop: few steps, and rates that spare what it knows. One answer of the reference costs
# as much as a step of training, so that to compute all of them beforehand would take longer than the few steps do.
_GENTLY = {
    'optim.name': 'adamw', 'optim.schedule': 'linear', 'optim.warmup': 4, 'optim.weight_decay': 0.0, 'eval.rows': 16,
    'execution.remat': 'names',  # thirty layers' activations of a batch are most of 14 GB
}  # fmt: skip
CONVERTED: dict[str, dict[str, dict[str, Any]]] = {
    'smollm2': {
        'sft': _GENTLY | {'steps': 40, 'batch_size': 8, 'optim.lr': 2e-4, 'data.replay': 0.0},
        'reward': _GENTLY | {'steps': 40, 'batch_size': 16, 'optim.lr': 1e-4},
        'dpo': _GENTLY | {'steps': 40, 'batch_size': 16, 'optim.lr': 2e-5, 'reference': 'live'},
    }
}

LORA = 'lora'  # trains an adapter of the stage's model
# Its rates, about ten times AdamW's for the whole model; only that of sft was measured (LOG.md).
ADAPTED = {'sft': 1e-2, 'reward': 5e-3, 'dpo': 2e-3, 'grpo': 1e-3, 'ppo': 2e-3}

HEAD_DIM, DIM_PER_LAYER, FFN_PER_DIM = 32, 32, 3
LAPTOP_DEPTH = 4  # what the files in configs/ are tuned at
BATCH_STEP = 8  # batches stay multiples of it, for meshes to divide


def _parameters(n: int, vocab_size: int) -> int:
    """Counts those of a model of depth n: the tied embedding; four square matrices and three of the feed-forward a
    layer."""
    dim = DIM_PER_LAYER * n
    return vocab_size * dim + n * (4 + 3 * FFN_PER_DIM) * dim**2


def depth(n: int, config: Config) -> dict[str, Any]:
    """One dial: a model of depth n is 32·n wide, and the rest follows from what `config` has at depth 4.

    tokens        as the parameters: as many tokens a parameter at each size (Hoffmann et al., 2022)
    batch         as the root of the tokens, near the critical batch size (Zhang et al., 2024); never below config's
    rate          as 1/√width: a change of a matrix then changes what it gives by as much at each width (Yang et al.,
                  2023: spectral norms; an update whose elements have a fixed RMS has one of √width)
    weight decay  so that rate × decay × steps stays: the average that the weights are over past updates reaches back
                  over the same part of the run (Wang and Aitchison, 2024; Bergsma et al., 2025)
    warmup        the same part of the run
    """
    dim, vocab_size = DIM_PER_LAYER * n, config.model.vocab_size
    tokens = _parameters(n, vocab_size) / _parameters(LAPTOP_DEPTH, vocab_size)
    batch_size = max(config.batch_size, BATCH_STEP * round(config.batch_size * tokens**0.5 / BATCH_STEP))
    steps = tokens * config.batch_size / batch_size
    rate = (LAPTOP_DEPTH / n) ** 0.5
    return {
        'model.dim': dim, 'model.layers': n, 'model.heads': dim // HEAD_DIM, 'model.kv_heads': dim // HEAD_DIM,
        'model.head_dim': HEAD_DIM, 'model.ffn_dim': FFN_PER_DIM * dim, 'batch_size': batch_size,
        'steps': ('×', steps), 'optim.warmup': ('×', steps), 'optim.lr': ('×', rate),
        'optim.weight_decay': ('×', 1 / (rate * steps)),
    }  # fmt: skip


def own(arg: str, names: tuple[str, ...]) -> tuple[str | None, str]:
    """(which of a stage's own names ARG begins with, or None; the rest of ARG, which the stage before has too)."""
    first, _, rest = arg.partition(',')
    return (first, rest) if first in names else (None, arg)


def parent(stage: str, arg: str) -> str:
    """The default folder of the run of an earlier stage with the same ARG, but for `lora`: an adapter lies over a whole
    model. A converted model is its own pretraining."""
    arg = ','.join(part for part in arg.split(',') if part != LORA)
    first = arg.partition(',')[0]
    if first in CONVERTED and stage not in CONVERTED[first]:
        return f'runs/{first}'
    return f'runs/{run_name(stage, arg)}'


def run_name(stage: str, arg: str) -> str:
    """'pretrain' and 'depth=6' are 'pretrain-depth6'."""
    return f'{stage}-{arg.replace("=", "").replace(",", "-").replace("/", "_")}' if arg else stage


def apply(config: Config, arg: str) -> Config:
    """Applies ARG to a config: a preset's name, `depth=N`, or `KEY=VALUE` pairs, joined by commas.

    Raises UsageError for what is none of these.
    """
    for part in filter(None, arg.split(',')):
        key, equals, text = part.partition('=')
        if not equals:
            _set(config, _preset(part, config.stage))
        elif key == 'depth':
            if not text.isdigit() or int(text) < 1:
                raise UsageError(f'depth={text}: must be a whole number of layers, at least 1')
            _set(config, depth(int(text), config))
        else:
            override(config, key, text)
    return config


def _preset(name: str, stage: str) -> dict[str, Any]:
    """The settings of a preset's name. Raises UsageError if there is none, or none for this stage."""
    if name == LORA and stage in ADAPTED:
        return {'lora.rank': 16, 'optim.name': 'adamw', 'optim.weight_decay': 0.0, 'optim.lr': ADAPTED[stage]}
    if name in PRESETS:
        return PRESETS[name]
    if name not in CONVERTED:
        known = [*PRESETS, *CONVERTED]
        raise UsageError(f'unknown preset :{name}{nearest(name, known)}: it is one of {", ".join(known)}, depth=N')
    if stage not in CONVERTED[name]:
        raise UsageError(
            f':{name} has been pretrained: make a run of it with python -m lm.convert {name} runs/{name}, '
            f'and go on with {", ".join(f"configs/{s}.py:{name}" for s in CONVERTED[name])}'
        )
    return CONVERTED[name][stage]


def _set(config: Config, values: Mapping[str, Any]) -> None:
    now, changed = dict(leaves(config)), {}
    for key, value in values.items():
        if not isinstance(value, tuple):
            changed[key] = value
        elif now[key] is not None:  # ('×', factor): relative to the config's own value; an epoch stays an epoch
            product = now[key] * value[1]
            changed[key] = round(product) if isinstance(now[key], int) else float(f'{product:.3g}')
    config.update_from_flattened_dict(changed)
