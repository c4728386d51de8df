"""What the benchmarks of training after pretraining share: our side of it, the race against a peer, its JSON line."""

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from common import fresh_state

from lm import config as configs
from lm import runtime, sharding
from lm.config import Config
from lm.errors import Parser, UsageError
from lm.model.transformer import ModelConfig
from lm.stages import pretrain, setup, wiring
from lm.training import runs

# Llama's graph, so that the peer's model is the same one.
SIZES = {
    '7M': {'dim': 256, 'layers': 6, 'heads': 4, 'kv_heads': 4, 'head_dim': 64, 'ffn_dim': 768},
    'laptop': {},
}
SETTINGS = [('model.qk_norm', 'false'), ('optim.name', 'adamw'), ('optim.lr', '1e-4'), ('data.replay', '0')]
PRETRAINING = 'configs/pretrain.py'  # whose tokenizer the conversations are written with
PAUSE = 0.1  # seconds: the other's threads spin for a while
Sequence_ = tuple[list[int], list[bool]]  # ids, and which of them are to be learned


class Side(NamedTuple):
    """One that trains on the examples."""

    name: str
    round: Callable[[], Any]  # trains on all of them once; returns the loss
    places: int  # for tokens, that a round computes, padding and all


class Ours(NamedTuple):
    """Our side, and what the other one needs to train on the same."""

    side: Side
    batches: list[Mapping[str, np.ndarray]]
    params: Any  # on the host, before training
    cfg: ModelConfig


def parse(name: str, doc: str | None, config: str, extra: Sequence[tuple[str, str]] = ()) -> tuple[Any, Config]:
    """(the flags, the config, where a size's settings come before what the command line sets).

    Raises UsageError if the peer is asked for and not installed.
    """
    parser = Parser(f'python benchmarks/{name}.py', doc)
    parser.add_argument('--config', default=config)
    parser.add_argument('--peer', choices=('trl',), help='compare with it; needs the extra `peers`')
    parser.add_argument('--size', choices=tuple(SIZES), default='7M')
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--steps', type=int, default=4, help='updates a round')
    words, settings = configs.split_settings(sys.argv[1:])
    flags = parser.parse_args(words)
    if flags.peer and not importlib.util.find_spec(flags.peer):
        raise UsageError(f"--peer={flags.peer} is not installed: pip install -e '.[peers]'")
    size = [(f'model.{key}', str(value)) for key, value in SIZES[flags.size].items()]
    return flags, configs.load(flags.config, [*size, *SETTINGS, *extra, *settings])[0]


def quiet(line: str, **_: Any) -> None:
    """What a stage says goes to stderr: stdout is for the JSON line."""
    print(line, file=sys.stderr)


def prepare(stage: wiring.Stage, config: Config) -> Any:
    """The stage's data, in the words of the tokenizer that the default pretraining makes."""
    text, _ = configs.load(PRETRAINING, [])
    with tempfile.TemporaryDirectory() as folder:
        pretrain.prepare_text(text, None, quiet).tokenizer.save(folder)
        return stage.prepare(config, folder, quiet)


def ours(
    stage: wiring.Stage, config: Config, data: Any, *, steps: int,
    finish: Callable[[Any, ModelConfig, dict[str, jax.Array]], dict[str, jax.Array]] | None = None,
) -> Ours:  # fmt: skip
    """Our side: the compiled step of a stage, its microbatch settled as a run settles it, on its first batches, which
    lie on the device. `finish(params, cfg, batch)` adds to a batch what depends on the weights."""
    setup.resolve(config, None, epoch=stage.epoch(config, data))
    cfg = runs.model_config(config)
    optimizer, rate = setup.make_optimizer(config)
    abstract = wiring.abstract_state(stage, config, cfg, optimizer)
    build = partial(wiring.compile_step, stage, config, cfg, data, optimizer, rate, abstract)
    first = lambda m: stage.source(setup.with_microbatch(config, m), data, 0)(None, 0)
    step, _ = setup.settle_microbatch(config, cfg, abstract, build, first)
    state, source = fresh_state(cfg, optimizer), stage.source(config, data, 0)
    params = jax.device_get(state.trainable)
    batches = [source(None, i) for i in range(steps)]
    batches = [finish(state.trainable, cfg, b) for b in batches] if finish else batches

    def train() -> float:
        nonlocal state
        losses = []
        for batch in batches:
            state, metrics = step(state, batch)
            losses.append(metrics['loss'])
        return float(np.mean(jax.device_get(losses)))

    side = Side(f'microbatch {config.microbatch}', train, sum(b['tokens_BT'].size for b in batches))
    return Ours(side, jax.device_get(batches), params, cfg)


def seconds(side: Side) -> float:
    """How long a round takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    side.round()
    return time.perf_counter() - start


def best(sides: Sequence[Side]) -> tuple[Side, dict[str, float]]:
    """(the fastest, {name: seconds}) by the second of two rounds."""
    found = {}
    for side in sides:
        side.round()
        found[side.name] = seconds(side)
    return min(sides, key=lambda side: found[side.name]), found


def race(
    name: str, flags: Any, config: Config, mine: Ours, theirs: Sequence[Side], *, tokens: int, examples: int
) -> None:
    """Prints the result of rounds that take turns. `tokens` are those of the examples, without padding."""
    side, count = mine.side, sum(x.size for x in jax.tree.leaves(mine.params))
    loss = side.round()
    result = {
        'benchmark': name, 'size': flags.size, 'parameters': count, 'batch': [config.batch_size, config.seq_len],
        'examples': examples, 'tokens': tokens, 'setting': side.name, 'loss': loss,
        'padding': 1 - tokens / side.places, 'device': jax.devices()[0].device_kind, 'threads': os.cpu_count(),
        'jax': jax.__version__,
    }  # fmt: skip
    peer = None
    if theirs:
        peer_loss = theirs[0].round()
        peer, tried = best(theirs)
        result |= _versions() | {'peer_setting': peer.name, 'peer_tried': tried, 'peer_loss': peer_loss}
        result |= {'peer_padding': 1 - tokens / peer.places}
    pairs = [(seconds(side), seconds(peer) if peer else None) for _ in range(flags.rounds)]
    result['tokens_per_s'] = tokens / statistics.median(own for own, _ in pairs)
    if peer:
        result['peer_tokens_per_s'] = tokens / statistics.median(other for _, other in pairs)
        result['ratio'] = statistics.median(other / own for own, other in pairs)
        result['ratio_per_place'] = result['ratio'] * side.places / peer.places
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import trl

    return {'peer': f'trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}'}


def run(main: Callable[[Any, Config], None], flags: Any, config: Config) -> None:
    """Calls main under the config's mesh."""
    runtime.setup()
    with sharding.use_mesh(config.mesh):
        main(flags, config)
