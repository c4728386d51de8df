"""What the benchmarks of training after pretraining share: our side of it, the race against a peer, its JSON line."""

import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from common import fresh_state

from lm import config as configs
from lm import runtime, sharding
from lm.config import Config
from lm.errors import Parser, UsageError
from lm.model.config import ModelConfig
from lm.runs import execution
from lm.stages import language, plan, runner
from lm.stages.spec import StageSpec, Task

SIZES = {
    '6M': {'dim': 256, 'layers': 6, 'heads': 4, 'kv_heads': 4, 'head_dim': 64, 'ffn_dim': 768},
    'laptop': {},
}
RATE = '1e-6'  # so small that each round finds the same weights: the losses of both sides can be compared
# No normalised queries and keys: Llama's graph, so that the peer's model is the same one.
SETTINGS = [('model.qk_norm', 'false'), ('optim.name', 'adamw'), ('optim.lr', RATE), ('data.replay', '0')]
PRETRAINING = 'configs/pretrain.py'  # whose tokenizer the conversations are written with
POOL = 16  # batches that the examples are from: the peer groups by length over all of them
PAUSE = 0.1  # seconds: the other's threads spin for a while
Encoded = tuple[list[int], list[bool]]  # ids, and which of them are to be learned
Example = tuple[Encoded, ...]  # a conversation, or both sides of a pair
Batch = Mapping[str, np.ndarray]


class Side(NamedTuple):
    """One that trains on the examples."""

    name: str
    round: Callable[[], float]  # trains on a few batches of them; returns the loss
    tokens: int  # of the examples in a round
    places: int  # for tokens, that a round computes, padding and all
    padding: float  # the part of them that is empty


Ledger = dict[str, float]  # of an iteration: seconds of its parts and their `total`, and the tokens drawn


class Iteration(NamedTuple):
    """One that draws, scores and learns."""

    name: str
    iterate: Callable[[], Ledger]


class Clock:
    """Seconds by what they went into, of parts that may lie in each other: each has what its inner ones leave."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, known = time.perf_counter(), sum(self.seconds.values())
        yield
        inner = sum(self.seconds.values()) - known
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start - inner

    def ledger(self, tokens: float) -> Ledger:
        """What passed since the last ledger."""
        found, self.seconds = dict(sorted(self.seconds.items())), {}
        return {**found, 'total': sum(found.values()), 'tokens': tokens}


class Ours(NamedTuple):
    """Our side, and what the other one needs to train on the same."""

    side: Side
    examples: list[Example]  # of all batches
    batches: list[Batch]
    params: Any  # on the host, before training
    cfg: ModelConfig


def parse(
    name: str,
    doc: str | None,
    config: str,
    extra: Sequence[tuple[str, str]] = (),
    tiny: Mapping[str, int] | None = None,
) -> tuple[Any, Config]:
    """(the flags, the config, where a size's settings come before what the command line sets).

    Args:
      tiny: the settings of a shape for any machine, if there is one.

    Raises UsageError if the peer is asked for and not installed.
    """
    parser = Parser(f'python benchmarks/{name}.py', doc)
    parser.add_argument('--config', default=config)
    parser.add_argument('--peer', choices=('trl',), help='compare with it; needs the extra `peers`')
    parser.add_argument('--size', choices=tuple(SIZES), default='6M')
    parser.add_argument('--rounds', type=int, default=10)
    if tiny is None:
        parser.add_argument('--steps', type=int, default=2, help='updates a round')
    else:
        parser.add_argument('--tiny', action='store_true', help='a shape for any machine')
    words, settings = configs.split_settings(sys.argv[1:])
    flags = parser.parse_args(words)
    if flags.peer and not importlib.util.find_spec(flags.peer):
        raise UsageError(f"--peer={flags.peer} is not installed: pip install -e '.[peers]'")
    size = [(f'model.{key}', str(value)) for key, value in SIZES[flags.size].items()]
    size += [(key, str(value)) for key, value in tiny.items()] if tiny and flags.tiny else []
    return flags, configs.load(flags.config, [*size, *SETTINGS, *extra, *settings])[0]


def to_stderr(line: str, **_: Any) -> None:
    """What a stage says goes to stderr: stdout is for the JSON line."""
    print(line, file=sys.stderr)


def prepare(spec: StageSpec, config: Config) -> Task:
    """The stage's task, its data in the words of the tokenizer that the default pretraining makes."""
    spec.settle(config)
    spec.check(config)
    text, _ = configs.load(PRETRAINING, [])
    with tempfile.TemporaryDirectory() as folder:
        language.prepare_text(text, None, to_stderr).tokenizer.save(folder)
        data = spec.prepare(config, folder, to_stderr)
    return spec.open(config, execution.model_config(config), data)


def compiled(task: Task) -> tuple[Any, Any]:
    """(the compiled step of a stage, its optimizer), its microbatch settled as a run settles it."""
    config = task.config
    plan.resolve(config, None, task.cfg.dtype, epoch=task.epoch())
    task.cfg = execution.model_config(config)
    optimizer, rate = plan.make_optimizer(config)
    abstract = runner.abstract_state(task, optimizer)
    return runner.tuned_step(task, optimizer, rate, abstract)[0], optimizer


def ours(
    task: Task, *, steps: int, read: Callable[[Batch], list[Example]],
    finish: Callable[[Any, ModelConfig, Any], Any] | None = None,
) -> Ours:  # fmt: skip
    """Our side: the compiled step of a stage on batches that lie on the device.

    Args:
      steps: a round's.
      read: the examples of a batch.
      finish: (params, cfg, batch) -> the batch, with what depends on the weights.
    """
    step, optimizer = compiled(task)
    config, cfg = task.config, task.cfg
    state, source = fresh_state(cfg, optimizer), task.source(0)
    params = jax.device_get(state.trainable['policy'])
    batches = [source(None, i) for i in range(max(POOL, steps))]
    batches = [finish(state.trainable['policy'], cfg, b) for b in batches] if finish else batches

    def train() -> float:
        nonlocal state
        losses = []
        for batch in batches[:steps]:
            state, metrics = step(state, batch)
            losses.append(metrics['loss'])
        return float(np.mean(jax.device_get(losses)))

    found = list(map(read, jax.device_get(batches)))
    places = sum(batch['tokens_BT'].size for batch in batches[:steps])
    padding = float(np.mean([np.mean(jax.device_get(batch['segments_BT']) == 0) for batch in batches[:steps]]))
    side = Side(f'microbatch {config.execution.microbatch}', train, tokens(sum(found[:steps], [])), places, padding)
    return Ours(side, sum(found, []), jax.device_get(batches), params, cfg)


def tokens(examples: Sequence[Example]) -> int:
    """How many there are, without padding."""
    return sum(len(ids) for example in examples for ids, _ in example)


def seconds(side: Side) -> float:
    """How long a round takes, for a token of it."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    side.round()
    return (time.perf_counter() - start) / side.tokens


def best(sides: Sequence[Side]) -> tuple[Side, float, dict[str, float]]:
    """(the fastest by the second of two rounds, its loss in the first, {name: tokens per second})."""
    speed, loss = {}, {}
    for side in sides:
        loss[side.name] = side.round()
        speed[side.name] = 1 / seconds(side)
    found = max(sides, key=lambda side: speed[side.name])
    return found, loss[found.name], speed


def race(name: str, flags: Any, config: Config, found: Ours, theirs: Sequence[Side]) -> None:
    """Prints the result of rounds that take turns."""
    mine, count = found.side, sum(x.size for x in jax.tree.leaves(found.params))
    result = {
        'benchmark': name, 'size': flags.size, 'parameters': count, 'batch': [config.batch_size, config.seq_len],
        'setting': mine.name, 'loss': mine.round(), 'padding': mine.padding, 'round_tokens': mine.tokens,
        'device': jax.devices()[0].device_kind, 'threads': os.cpu_count(), 'jax': jax.__version__,
    }  # fmt: skip
    peer, peer_loss, tried = best(theirs) if theirs else (None, 0.0, {})
    own, others = [], []
    for _ in range(flags.rounds):
        own.append(seconds(mine))
        others += [seconds(peer)] if peer else []
    result['tokens_per_s'] = 1 / statistics.median(own)
    if peer:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(others, own, strict=True))
        result |= {
            'peer': versions(), 'peer_setting': peer.name, 'peer_tried': {k: round(v) for k, v in tried.items()},
            'peer_loss': peer_loss, 'peer_padding': peer.padding, 'peer_round_tokens': peer.tokens,
            'peer_tokens_per_s': 1 / statistics.median(others), 'ratio': ratio,
            'ratio_per_place': ratio * (mine.places / mine.tokens) / (peer.places / peer.tokens),
        }  # fmt: skip
    print(json.dumps(rounded(result)))


def rounded(x: Any) -> Any:
    """What is to be printed, to four decimals."""
    if isinstance(x, Mapping):
        return {key: rounded(value) for key, value in x.items()}
    return round(x, 4) if isinstance(x, float) else x


def versions() -> str:
    """Those of the peer."""
    import torch
    import transformers
    import trl

    return f'trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}'


def run(main: Callable[[Any, Config], None], flags: Any, config: Config) -> None:
    """Calls main under the config's mesh."""
    runtime.setup()
    with sharding.use_mesh(config.mesh):
        main(flags, config)
