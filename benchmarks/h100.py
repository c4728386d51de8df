"""Training and decoding on one accelerator: `python benchmarks/h100.py [--sizes=124M,350M,1.5B] [flags]`.

Training: the compiled step (forward, backward, clipping, AdamW) on fixed random tokens, rows of 1024 with nothing
masked but the future, 524,288 tokens a step in microbatches; the microbatch is the fastest of those that fit. Median of
the rounds. The bars are what llm.c reports for one H100 with GPT-2's shapes; ours have the same widths and depths and a
gated feed-forward of 8/3 the width (rounded up to a multiple of 128), which multiplies as much.

Decoding: greedy, weights cast to the computing dtype, seconds between two yields of the same compiled loop; against the
bound of reading all weights and the filled cache once a token, at the bandwidth that a copy reaches; at 1 row and at
256. compile_seconds is what the first answer takes longer than a later one, nothing in the compile cache: bar 15.

One JSON line a size: tokens_per_s, bar (and their ratio), mfu (6N plus the causal half of attention, over the data
sheet's dense peak), memory_bytes (the program's: state, batch and temporaries), what was tried, and decode. XLA takes
its flags from XLA_FLAGS; the line repeats them. `--tiny` is a shape for any machine: it shows that the script works.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')  # JAX takes three quarters of a GPU by itself

import jax  # noqa: E402
from common import copy_bandwidth, fixed_batch, fresh_state, median_seconds, seconds  # noqa: E402

from lm import config as configs  # noqa: E402
from lm import runtime, sharding  # noqa: E402
from lm.errors import Parser, RunError, run_command  # noqa: E402
from lm.model import parameters  # noqa: E402
from lm.model.config import ModelConfig  # noqa: E402
from lm.runs import execution, loading  # noqa: E402
from lm.sampling.generate import stream  # noqa: E402
from lm.stages import plan, pretrain  # noqa: E402
from lm.training import flops  # noqa: E402
from lm.training import step as training  # noqa: E402

# The preset, what differs from it, and llm.c's tokens per second on one H100.
SIZES: dict[str, tuple[str, dict[str, Any], float]] = {
    '124M': ('124m', {}, 460_000),
    '350M': ('350m', {}, 188_000),
    '1.5B': ('124m', {'dim': 1600, 'layers': 48, 'heads': 25, 'kv_heads': 25, 'ffn_dim': 4352}, 47_000),
}
TINY = {'dim': 32, 'layers': 2, 'heads': 2, 'kv_heads': 2, 'head_dim': 16, 'ffn_dim': 128, 'vocab_size': 250}
SEQ_LEN = 1024
STEP_TOKENS = 524_288
MICROBATCHES = (2, 4, 8, 16, 32, 64, 128)
TRIAL_ROUNDS = 2


def parse(argv: Sequence[str]) -> Any:
    parser = Parser('python benchmarks/h100.py', __doc__)
    parser.add_argument('--sizes', default=','.join(SIZES))
    parser.add_argument('--rounds', type=configs.whole('--rounds'), default=10, help='timed steps')
    parser.add_argument('--microbatch', type=configs.whole('--microbatch'), help='sequences; default: try')
    parser.add_argument('--attention', help='blocks, dense, cudnn or splash; default: the platform decides')
    parser.add_argument('--remat', help='none, names, dots or full; default: the memory decides')
    parser.add_argument('--unroll', action='store_true', help='layers one after the other at every size')
    parser.add_argument('--segments', type=configs.whole('--segments'), help='documents a row, masked from each other')
    parser.add_argument('--decode_rows', default='1,256', help='how many are decoded at once, with commas')
    parser.add_argument('--decode_tokens', type=configs.whole('--decode_tokens'), default=512)
    parser.add_argument('--profile', metavar='DIR', help='trace three steps of each size into DIR/SIZE')
    parser.add_argument('--tiny', action='store_true', help='a shape for any machine')
    return parser.parse_args(argv)


def settings(size: str, flags: Any) -> configs.Config:
    """The run's settings of a size."""
    preset, differs, _ = SIZES[size]
    shape = TINY if flags.tiny else differs
    given = {f'model.{key}': value for key, value in shape.items()}
    given |= {'execution.scan': 'false' if flags.unroll else 'none', 'execution.remat': flags.remat or 'auto'}
    given |= {'seq_len': 64 if flags.tiny else SEQ_LEN, 'execution.attention': flags.attention or 'none'}
    given |= {'batch_size': 8 if flags.tiny else STEP_TOKENS // SEQ_LEN}
    return configs.load(f'configs/pretrain.py:{preset}', [(key, str(value)) for key, value in given.items()])[0]


# ---- training ----


def compile_step(config: configs.Config, cfg: ModelConfig, batch: Any, microbatch: int) -> tuple[Any, Any]:
    """(the compiled step, its optimizer)."""
    optimizer, rate = plan.make_optimizer(config)
    state = plan.abstract_state({'policy': loading.abstract_params(cfg)}, optimizer, config.seed)
    fn = training.make_step(
        pretrain.Pretrain(config, cfg).loss(), optimizer, clip=config.optim.clip, rate=rate,
        microbatches=config.batch_size // microbatch,
    )  # fmt: skip
    return jax.jit(fn, donate_argnums=0).lower(state, batch).compile(), optimizer


def train(
    config: configs.Config, cfg: ModelConfig, batch: Any, microbatch: int, *, rounds: int,
    profile: str | None = None,
) -> tuple[float, int]:  # fmt: skip
    """(tokens a second, bytes that the step needs). Raises RunError if they are more than the device has."""
    try:
        step, optimizer = compile_step(config, cfg, batch, microbatch)
        state = fresh_state(cfg, optimizer)

        def one() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        jax.block_until_ready(one())
        median = median_seconds(one, rounds)
        if profile:
            with jax.profiler.trace(profile):
                list(seconds(one, 3))
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise RunError('out of memory') from None
    m = step.memory_analysis()
    size = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return config.batch_size * config.seq_len / median, size


def fastest(config: configs.Config, cfg: ModelConfig, batch: Any) -> tuple[int, dict[int, float | None]]:
    """(the fastest microbatch, {microbatch: tokens a second, None where it does not fit})."""
    tried: dict[int, float | None] = {}
    for microbatch in MICROBATCHES:
        if config.batch_size % microbatch:
            continue
        try:
            tried[microbatch], _ = train(config, cfg, batch, microbatch, rounds=TRIAL_ROUNDS)
        except RunError:
            tried[microbatch] = None
            break
    fits = {m: rate for m, rate in tried.items() if rate is not None}
    if not fits:
        raise RunError(f'not even a microbatch of {min(tried)} fits: try --remat=full')
    return max(fits, key=fits.__getitem__), tried


# ---- decoding ----


def decode(cfg: ModelConfig, *, rows: int, tokens: int, rounds: int, bandwidth: float) -> dict[str, Any]:
    """Tokens a second of `rows` rows, what the bandwidth allows, and how long the programs take to compile."""
    init = lambda key: jax.tree.map(lambda x: x.astype(cfg.dtype), parameters.init(key, cfg))
    params = jax.jit(init)(jax.random.key(0))
    never = cfg.vocab_size  # no id: nothing ends before its time

    def half() -> float:
        """Seconds that the second half of the tokens took."""
        parts = stream(params, cfg, [[1]] * rows, max_new_tokens=tokens, every=tokens // 2, stop_ids=[never])
        next(parts)
        start = time.perf_counter()
        next(parts)
        return time.perf_counter() - start

    def whole() -> float:
        start = time.perf_counter()
        half()
        return time.perf_counter() - start

    kept = jax.config.values['jax_enable_compilation_cache']
    jax.config.update('jax_enable_compilation_cache', False)
    first = whole()
    jax.config.update('jax_enable_compilation_cache', kept)
    compiling = first - whole()
    rate = rows * (tokens - tokens // 2) / statistics.median(half() for _ in range(rounds))
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    cell = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * params['embed_VD'].dtype.itemsize
    bound = rows * bandwidth / (weights + rows * cell * tokens * 3 / 4)  # filled on average in the second half
    return {
        'rows': rows, 'tokens_per_s': rate, 'bound_tokens_per_s': bound, 'ratio': rate / bound,
        'weight_bytes': weights, 'copy_bytes_per_s': bandwidth, 'compile_seconds': compiling,
    }  # fmt: skip


# ---- a size ----


def measure(size: str, flags: Any) -> dict[str, Any]:
    """The figures of one size."""
    config = settings(size, flags)
    cfg, choice, device = execution.model_config(config), execution.resolve(config).attention, jax.devices()[0]
    with sharding.use_mesh({}, [device]):
        batch = fixed_batch(cfg, config.batch_size, config.seq_len, segments=flags.segments)
        microbatch, tried = (flags.microbatch, {}) if flags.microbatch else fastest(config, cfg, batch)
        folder = os.path.join(flags.profile, size) if flags.profile else None
        rate, memory = train(config, cfg, batch, microbatch, rounds=flags.rounds, profile=folder)
        tokens = 64 if flags.tiny else flags.decode_tokens
        bandwidth = copy_bandwidth(1 / 128 if flags.tiny else 1)
        how = {'tokens': tokens, 'rounds': flags.rounds, 'bandwidth': bandwidth}
        decoded = {rows: decode(cfg, rows=int(rows), **how) for rows in flags.decode_rows.split(',')}
        per_token = flops.per_token(cfg, seq_len=config.seq_len)
        ceiling = flops.ceiling()
    bar = None if flags.tiny else SIZES[size][2]
    shapes = jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg))
    return {
        'benchmark': 'h100', 'size': 'tiny' if flags.tiny else size,
        'parameters': sum(x.size for x in jax.tree.leaves(shapes)),
        'tokens_per_s': rate, 'bar_tokens_per_s': bar, 'ratio': rate / bar if bar else None,
        'mfu': ceiling.mfu(rate * per_token), 'memory_bytes': memory, 'microbatch': microbatch, 'tried': tried,
        'batch': [config.batch_size, config.seq_len], 'segments': flags.segments, 'decode': decoded,
        'attention': choice.name, 'attention_why': choice.why, 'remat': cfg.remat, 'scan': cfg.scan, 'dtype': cfg.dtype,
        'device': device.device_kind, 'jax': jax.__version__, 'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    flags = parse(argv)
    sizes = flags.sizes.split(',')
    if unknown := set(sizes) - set(SIZES):
        raise configs.UsageError(f'--sizes={flags.sizes}: {", ".join(unknown)} is not one of {", ".join(SIZES)}')
    runtime.setup()
    for size in sizes[:1] if flags.tiny else sizes:
        print(json.dumps(measure(size, flags)), flush=True)


if __name__ == '__main__':
    sys.exit(run_command(lambda: main(sys.argv[1:])))
