"""Decoding tokens per second: `python benchmarks/generate.py [--peer=transformers] [--batches=1,16] [--pairs=N]`.

The model: 7.2M float32 parameters (dim 256, 6 layers, 4 × 64 heads, ffn 768, vocabulary 8,192, tied); prompts of 16
tokens, 128 drawn greedily, no stop. A figure is a whole call of `generate`: prompts read, tokens drawn and brought to
the host; what is compiled and `prepare`d once is not in it.

Bandwidth. A drawn token reads every weight and the filled part of the cache, so at batch 1 memory is the floor.
`share_of_bandwidth` is the bytes of the decoding loop per second (weights once a token, cache as filled on average;
the time is that of the call less that of one that draws a single token) over what a plain reading kernel reaches. That
kernel reads a buffer of just the weights' size, over and over, so that it finds in the caches what the loop finds there
(29 MB may fit a last-level cache, and a larger buffer would make us look better than we are); it runs in this process
on the same threads; of three such kernels (row sums, row maxima, a matrix-vector product) the fastest counts.

The peer is Hugging Face's Llama of the same shapes and weights on PyTorch, its best of eager and SDPA attention ×
dynamic and static cache, plain and under torch.compile where there is a C++ compiler, tried first and named in the
result. Calls alternate, a pause before each (the other's threads spin a while), and the ratio is the median of pairs.
`same_tokens` is the share of tokens that both draw: rounding parts them only where two logits are nearly equal.

Prints one JSON line.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm import runtime, sharding
from lm.errors import Parser, run_command
from lm.model import parameters
from lm.model.config import ModelConfig
from lm.sampling.generate import generate, prepare

CFG = ModelConfig(
    vocab_size=8192, dim=256, layers=6, heads=4, kv_heads=4, head_dim=64, ffn_dim=768, qk_norm=False, norm_eps=1e-6
)
PROMPT, NEW = 16, 128
PAUSE = 0.05  # seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def readers(nbytes: int) -> list[Callable[[], object]]:
    """Kernels that read a buffer of about `nbytes` and do little else."""
    rows = 1024
    x = jnp.ones((rows, nbytes // 4 // rows), jnp.float32)
    v = jnp.ones(x.shape[1], jnp.float32)
    kernels = (lambda x, v: jnp.sum(x, 1)), (lambda x, v: jnp.max(x, 1)), (lambda x, v: x @ v)
    call = lambda f: lambda: jax.block_until_ready(f(x, v))
    return [call(jax.jit(kernel)) for kernel in kernels]


def bandwidth(kernels: list[Callable[[], object]], nbytes: int, calls: int = 30) -> float:
    """Bytes per second of the fastest kernel, by the median of its calls."""
    return nbytes / min(statistics.median(_seconds(kernel) for _ in range(calls)) for kernel in kernels)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peer_calls(params, prompts: list[list[int]]):
    """Each way of generating with transformers: (its name, a call that returns the drawn ids)."""
    import torch
    from peers import torch_llama

    ids = torch.tensor(prompts)
    options = {'do_sample': False, 'max_new_tokens': NEW, 'min_new_tokens': NEW, 'disable_compile': True}
    options |= {'attention_mask': torch.ones_like(ids)}
    compilers = (False, True) if shutil.which('g++') else (False,)
    for attention, cache, compiled in itertools.product(('eager', 'sdpa'), ('dynamic', 'static'), compilers):
        if compiled and cache == 'dynamic':
            continue  # its shapes change with each token
        model = torch_llama(params, CFG, length=PROMPT + NEW, attention=attention).eval()
        if compiled:
            model.forward = torch.compile(model.forward)

        def call(model=model, cache=cache):
            with torch.inference_mode():
                return model.generate(ids, cache_implementation=cache, **options)[:, PROMPT:].tolist()

        yield f'{attention}, {cache} cache' + (', torch.compile' if compiled else ''), call


def best_peer(params, prompts: list[list[int]]):
    """The fastest of `peer_calls`, by the best of three calls after a first."""
    found = []
    for name, call in peer_calls(params, prompts):
        call()
        found.append((min(timed(call) for _ in range(3)), name, call))
    return min(found, key=lambda x: x[0])[1:]


def measure(params, batch: int, *, pairs: int, peer: bool) -> dict[str, object]:
    """The figures of one batch size."""
    prompts = np.random.default_rng(0).integers(0, CFG.vocab_size, (batch, PROMPT)).tolist()
    prepared = prepare(params, CFG, batch=batch)
    options = {'stop_ids': [CFG.vocab_size]}  # an id that no row can draw
    ours = lambda n=NEW: [g.ids for g in generate(prepared, CFG, prompts, max_new_tokens=n, **options)]
    name, theirs = best_peer(params, prompts) if peer else ('', None)
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    position = 2 * CFG.layers * CFG.kv_heads * CFG.head_dim * 4  # bytes of the cache a token
    kernels = readers(weights)
    drawn = ours()
    ours(1), [kernel() for kernel in kernels]
    rows = []
    for _ in range(pairs):
        row = {'seconds': timed(ours), 'first': timed(lambda: ours(1)), 'bandwidth': bandwidth(kernels, weights)}
        rows.append(row | ({'peer': timed(theirs)} if theirs else {}))
    median = lambda f: statistics.median(map(f, rows))
    step_bytes = weights + batch * position * (PROMPT + NEW / 2)
    result = {
        'tokens_per_s': batch * NEW / median(lambda r: r['seconds']),
        'bytes_per_step': step_bytes, 'bandwidth': median(lambda r: r['bandwidth']),
        'share_of_bandwidth': median(lambda r: step_bytes * (NEW - 1) / (r['seconds'] - r['first']) / r['bandwidth']),
    }  # fmt: skip
    if not theirs:
        return result
    same = np.mean(np.asarray(drawn) == np.asarray(theirs()))
    return result | {
        'peer_tokens_per_s': batch * NEW / median(lambda r: r['peer']),
        'ratio': median(lambda r: r['peer'] / r['seconds']), 'peer_setting': name, 'same_tokens': float(same),
    }  # fmt: skip


def main() -> None:
    parser = Parser('python benchmarks/generate.py', __doc__)
    parser.add_argument('--peer', choices=['transformers'], help='compare with it; needs the extra `peers`')
    parser.add_argument('--batches', default='1,16', help='batch sizes, with commas')
    parser.add_argument('--pairs', type=int, default=9, help='alternations a batch size')
    flags = parser.parse_args(sys.argv[1:])
    runtime.setup()
    with sharding.use_mesh():
        params = parameters.init_sharded(jax.random.key(0), CFG)
        batches = {
            batch: measure(params, int(batch), pairs=flags.pairs, peer=bool(flags.peer))
            for batch in flags.batches.split(',')
        }
    versions = {'jax': jax.__version__}
    if flags.peer:
        import torch
        import transformers

        versions |= {'torch': torch.__version__, 'transformers': transformers.__version__}
    device = {'device': jax.devices()[0].device_kind, 'devices': jax.device_count(), 'threads': os.cpu_count()}
    count = sum(x.size for x in jax.tree.leaves(params))
    print(json.dumps({'benchmark': 'generate', 'batches': batches, 'parameters': count, **device, **versions}))


if __name__ == '__main__':
    sys.exit(run_command(main))
