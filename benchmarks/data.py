"""Tokens per second from prepared data to the step: `python benchmarks/data.py [--config=…] [--config.KEY=VALUE …]`.

Method: the mixture of the config is prepared as by training (or found in the cache), so its token stores lie on disk
and are memory-mapped; then, for each batch shape, batches are asked of `pipeline.batches` and put onto the mesh by
`shard_batch`, as the loop does, without a step to compute. Rounds of --seconds each, the shapes in turn; a round starts
elsewhere in the data, and its first batch is not counted, since it waits for Grain's threads to start. Between them the
compiled training step runs on one batch of the config's shape, for the same time, on the same machine. Medians.

Prints one JSON line: tokens_per_s of the data in the config's own shape, the same by shape, the step's
step_tokens_per_s, and their ratio: how many times faster than the step the data is. The cores are those that the
process may use: `taskset -c 0,1` makes it two.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from lm import config as configs
from lm import runtime, sharding
from lm.data import pipeline
from lm.data.prepare import Prepared, prepare
from lm.errors import Parser, run_command
from lm.model import parameters
from lm.runs import execution, loading
from lm.stages import plan, pretrain, runner
from lm.training import step as training

SHAPES = ((8, 1024), (32, 1024))


def rate(next_thing: Callable[[], Any], *, seconds: float) -> float:
    """How often a second `next_thing` gives what is then ready; the first time is not counted."""
    jax.block_until_ready(next_thing())
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        jax.block_until_ready(next_thing())
        count += 1
    return count / (time.perf_counter() - began)


def batches(prepared: Prepared, shape: tuple[int, int], *, seed: int, start: int) -> Callable[[], Any]:
    """Gives one batch of a shape after the other, on the mesh, from batch `start` on."""
    mixture = pipeline.mix(prepared, seq_len=shape[1], seed=seed)
    found = pipeline.batches(mixture, batch_size=shape[0], start=start)
    return lambda: sharding.shard_batch(next(found))


def steps(config: configs.Config, batch: Any) -> Callable[[], Any]:
    """Takes one training step after the other on a batch."""
    cfg = execution.model_config(config)
    optimizer, schedule = plan.make_optimizer(config)
    abstract = plan.abstract_state({'policy': loading.abstract_params(cfg)}, optimizer, config.seed)
    rows = config.execution.microbatch or config.batch_size
    step = runner.compile_step(pretrain.Pretrain(config, cfg), optimizer, schedule, abstract, rows)
    params = parameters.init_sharded(jax.random.key(config.seed), cfg)
    state = jax.jit(lambda p: training.create({'policy': p}, {}, optimizer, config.seed))(params)

    def take() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return take


def main() -> None:
    parser = Parser('python benchmarks/data.py', __doc__)
    parser.add_argument('--config', default='configs/pretrain.py')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=1.0, help='of each round and shape')
    words, settings = configs.split_settings(sys.argv[1:])
    flags = parser.parse_args(words)
    config, _ = configs.load(flags.config, settings)
    runtime.setup()
    prepared = prepare(
        mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=config.data.tokenizer,
        heldout=config.data.heldout, progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    own = (config.batch_size, config.seq_len)
    shapes = list(dict.fromkeys([own, *SHAPES]))
    found: dict[Any, list[float]] = {shape: [] for shape in [*shapes, 'step']}
    with sharding.use_mesh(config.mesh):
        take = steps(config, batches(prepared, own, seed=config.seed, start=0)())
        for number in range(flags.rounds):
            for b, t in shapes:
                give = batches(prepared, (b, t), seed=config.seed, start=10**6 * number)
                found[b, t].append(b * t * rate(give, seconds=flags.seconds))
            found['step'].append(own[0] * own[1] * rate(take, seconds=flags.seconds))
    medians = {name: statistics.median(values) for name, values in found.items()}
    result = {
        'benchmark': 'data', 'tokens_per_s': medians[own], 'step_tokens_per_s': medians['step'],
        'ratio': medians[own] / medians['step'], 'by_shape': {f'{b}x{t}': medians[b, t] for b, t in shapes},
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'tokens': sum(len(source.train) for source in prepared.sources), 'config': flags.config, 'jax': jax.__version__,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == '__main__':
    sys.exit(run_command(main))
