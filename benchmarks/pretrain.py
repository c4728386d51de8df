"""Training tokens per second: `python benchmarks/pretrain.py [--config=…] [--config.KEY=VALUE …] [--rounds=N]`.

Method: the compiled training step (forward, backward, optimizer) on fixed random tokens, no data, no evaluation;
rounds of a few steps alternate with rounds of a 1024³ matrix product, so that both see the same machine. Medians.
Prints one JSON line: tokens_per_s, flops_per_s (6N plus the causal half of attention), ceiling_flops_per_s (the
product's), and their ratio.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from lm import config as configs
from lm import runtime, sharding
from lm.errors import Parser
from lm.model import transformer
from lm.stages import pretrain, setup
from lm.training import flops, runs
from lm.training import step as training


def main() -> None:
    parser = Parser('python benchmarks/pretrain.py', __doc__)
    parser.add_argument('--config', default='configs/pretrain.py')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--steps', type=int, default=5, help='steps a round')
    words, settings = configs.split_settings(sys.argv[1:])
    flags = parser.parse_args(words)
    config, _ = configs.load(flags.config, settings)
    runtime.setup()
    cfg = runs.model_config(config)
    with sharding.use_mesh(config.mesh):
        optimizer, rate = setup.make_optimizer(config)
        abstract = setup.abstract_state(
            runs.abstract_params(cfg), optimizer, config.seed, ema=config.optim.ema is not None
        )
        step = pretrain.compile_step(config, cfg, optimizer, rate, abstract)
        params = transformer.init_sharded(jax.random.key(0), cfg)
        state = jax.jit(lambda p: training.create(p, None, optimizer, 0, ema=config.optim.ema is not None))(params)
        shape = (config.batch_size, config.seq_len)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)
        ones = jnp.ones(shape, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        batch = {'tokens_BT': tokens, 'targets_BT': jnp.roll(tokens, -1, 1), 'weights_BT': ones.astype(jnp.float32)}
        batch = sharding.shard_batch(jax.device_get(batch | {'segments_BT': ones, 'positions_BT': positions}))
        state, _ = step(state, batch)
        seconds, ceilings = [], []
        for _ in range(flags.rounds):
            start = time.perf_counter()
            for _ in range(flags.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append((time.perf_counter() - start) / flags.steps)
            ceilings.append(flops.measure_product() if jax.default_backend() == 'cpu' else flops.peak(jax.devices()[0]))
    count = config.batch_size * config.seq_len
    rate = count / statistics.median(seconds)
    per_token = flops.per_token(cfg.sizes, layers=cfg.layers, seq_len=config.seq_len, window=cfg.window)
    ceiling = statistics.median(ceilings) * (1 if jax.default_backend() == 'cpu' else jax.device_count())
    result = {
        'benchmark': 'pretrain', 'tokens_per_s': rate, 'flops_per_s': rate * per_token,
        'ceiling_flops_per_s': ceiling, 'ratio': rate * per_token / ceiling, 'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(), 'jax': jax.__version__, 'batch': shape, 'config': flags.config,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == '__main__':
    main()
