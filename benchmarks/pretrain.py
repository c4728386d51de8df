"""Training tokens per second: `python benchmarks/pretrain.py [--peer=transformers] [--config.KEY=VALUE …]`.

Method: the compiled training step (forward, backward, clipping, optimizer) on fixed random tokens, no data, no
evaluation, its microbatch settled as a run settles it; rounds of a few steps alternate with rounds of a 1024³ matrix
product, so that both see the same machine. Medians. Prints one JSON line: tokens_per_s, flops_per_s (6N plus the
causal half of attention), ceiling_flops_per_s (the product's), and their ratio.

With --peer the model is a Llama of 7.2M parameters (dim 256, 6 layers, 4 heads, ffn 768, vocabulary 8,192, tied) on
8 × 512 tokens, and rounds of Hugging Face's Llama on PyTorch take turns with ours: the same shapes and weights, fused
AdamW, clipping, as many threads as cores, in this process, so that the settings of the memory allocator that we train
with serve both. `ratio_to_peer` is the median of pairs. Ours computes the segment mask of packed rows, theirs has none.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
from common import fixed_batch, fresh_state, median_seconds

from lm import config as configs
from lm import runtime, sharding
from lm.errors import Parser, run_command
from lm.runs import execution, loading
from lm.stages import plan, pretrain, runner
from lm.training import flops

PEER_SETTINGS = [
    ('model.dim', '256'), ('model.layers', '6'), ('model.heads', '4'), ('model.kv_heads', '4'),
    ('model.head_dim', '64'), ('model.ffn_dim', '768'), ('model.vocab_size', '8192'), ('model.qk_norm', 'false'),
    ('seq_len', '512'), ('z_loss', '0'), ('optim.name', 'adamw'), ('optim.lr', '1e-3'),
]  # fmt: skip
PAUSE = 0.1  # seconds: the other's threads spin for a while


def peer_step(params, cfg, tokens) -> Callable[[], object]:
    """A training step of transformers' Llama."""
    import torch
    from peers import torch_llama

    model = torch_llama(params, cfg, length=tokens.shape[1], attention='sdpa').train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    ids = torch.tensor(tokens.astype('int64'))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()
    return step


def peer_ceiling() -> float:
    """FLOP/s of the same 1024³ product in PyTorch: what its matrix library makes of this machine."""
    import torch

    x = torch.ones(1024, 1024)
    best = min(_seconds(lambda: x @ x) for _ in range(30))
    return 2 * 1024**3 / best


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def parse() -> tuple:
    """(the flags, the config, where the peer's sizes come before what the command line sets)."""
    parser = Parser('python benchmarks/pretrain.py', __doc__)
    parser.add_argument('--config', default='configs/pretrain.py')
    parser.add_argument('--peer', choices=('transformers',))
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--steps', type=int, default=5, help='steps a round')
    words, settings = configs.split_settings(sys.argv[1:])
    flags = parser.parse_args(words)
    return flags, configs.load(flags.config, (PEER_SETTINGS if flags.peer else []) + settings)[0]


def main() -> None:
    flags, config = parse()
    runtime.setup()
    cpu, peer = jax.default_backend() == 'cpu', None
    cfg = execution.model_config(config)
    with sharding.use_mesh(config.mesh):
        batch = fixed_batch(cfg, config.batch_size, config.seq_len, segments=1)
        optimizer, rate = plan.make_optimizer(config)
        abstract = plan.abstract_state({'policy': loading.abstract_params(cfg)}, optimizer, config.seed)
        build = partial(runner.compile_step, pretrain.Pretrain(config, cfg), optimizer, rate, abstract)
        step, _ = plan.autotune_microbatch(config, cfg, abstract, build, lambda microbatch: batch)
        state = fresh_state(cfg, optimizer)
        if flags.peer:
            peer = peer_step(state.trainable['policy'], cfg, jax.device_get(batch['tokens_BT']))

        def ours():
            nonlocal state
            for _ in range(flags.steps):
                state, metrics = step(state, batch)
            return metrics

        jax.block_until_ready(ours())
        mine, theirs, ceilings = [], [], []
        for _ in range(flags.rounds):
            time.sleep(PAUSE)
            mine.append(median_seconds(ours, 1) / flags.steps)
            ceilings.append(flops.measure_product() if cpu else flops.peak(jax.devices()[0]))
            if peer:
                time.sleep(PAUSE)
                theirs.append(_seconds(lambda: [peer() for _ in range(flags.steps)]) / flags.steps)
    count = config.batch_size * config.seq_len
    speed = count / statistics.median(mine)
    per_token = flops.per_token(cfg, seq_len=config.seq_len)
    ceiling = statistics.median(ceilings) * (1 if cpu else jax.device_count())
    result = {
        'benchmark': 'pretrain', 'tokens_per_s': speed, 'flops_per_s': speed * per_token,
        'ceiling_flops_per_s': ceiling, 'ratio': speed * per_token / ceiling, 'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(), 'jax': jax.__version__, 'batch': [config.batch_size, config.seq_len],
        'microbatch': config.execution.microbatch, 'optimizer': config.optim.name, 'config': flags.config,
    }  # fmt: skip
    if peer:
        import torch
        import transformers

        result |= {
            'peer': f'transformers {transformers.__version__}, torch {torch.__version__}, sdpa',
            'peer_tokens_per_s': count / statistics.median(theirs), 'peer_ceiling_flops_per_s': peer_ceiling(),
            'ratio_to_peer': statistics.median(t / m for t, m in zip(theirs, mine, strict=True)),
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == '__main__':
    sys.exit(run_command(main))
