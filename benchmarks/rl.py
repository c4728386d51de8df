"""An iteration of GRPO in seconds, end to end: `python benchmarks/rl.py [--peer=trl] [--size=6M|laptop] [--tiny] …`.

A rollout of 32 prompts × 8 responses of at most 64 tokens (the first questions of the default conversations), scored by
a trivial reward (the share of vowels), the trainer's own log-probs of it, and four updates of 64 responses (forward,
backward, clipping, AdamW): `lm.stages.grpo` as a run drives it, on random weights of 6.2M parameters (dim 256, 6
layers, 4 heads, ffn 768, vocabulary 4,096, tied) or the laptop's 1.4M. Two settings: `fixed`, in which every response
has all its tokens, and `ends`, in which every 40th id ends one, so that they have natural lengths of 26 on average.

With --peer iterations of TRL's GRPOTrainer take turns with ours, in this process: the same weights and prompts, groups,
lengths, temperature, clipping and advantages, no reference model on either side, text of the same tokenizer to the same
reward, its own generation (of transformers), `training_step` and loss, fused AdamW. Tried, and the fastest taken: sizes
of its microbatch, a dynamic and a static cache (with `fixed`; `ends` takes the same). `ratio` is the median of pairs;
the ledgers are medians, in seconds: drawing the responses, scoring them (rewards and log-probs), updating. Prints one
JSON line.
"""

import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import posttraining
from common import fresh_state
from posttraining import Clock, Iteration, Ledger

from lm.config import Config
from lm.data import chats
from lm.errors import run_command
from lm.stages import grpo

EVERY = 40  # of the ids, that one of which ends a response
EXTRA = [('reward_from', 'none'), ('reward.fn', 'rl:vowels'), ('optim.schedule', 'constant'), ('optim.warmup', '0')]
TINY = {'model.dim': 32, 'model.layers': 2, 'rl.prompts': 8, 'rl.group': 2, 'rl.max_new_tokens': 8, 'batch_size': 8}


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The reward."""
    del prompts
    return [sum(map(text.count, 'aeiou')) / max(1, len(text)) for text in responses]


@dataclasses.dataclass(frozen=True, eq=False)
class Ending(chats.WithReplay):
    """Data whose answers end with these ids."""

    stop_ids: tuple[int, ...] = ()


class Timed(grpo.Grpo):
    """The stage, with a clock."""

    clock: Clock

    def roll_out(self, *given: Any) -> dict[str, np.ndarray]:
        with self.clock('generation'):
            return super().roll_out(*given)

    def measured(self, *given: Any) -> dict[str, np.ndarray]:
        with self.clock('scoring'):
            return super().measured(*given)

    def scores(self, *given: Any) -> dict[str, np.ndarray]:
        with self.clock('scoring'):
            return super().scores(*given)


def ours(task: Timed) -> Iteration:
    """Iterations of our side, each on the next rollout."""
    step, optimizer = posttraining.compiled(task)
    state, source, steps = fresh_state(task.cfg, optimizer), task.source(0), itertools.count()
    task.clock = Clock()

    def iterate() -> Ledger:
        nonlocal state
        with task.clock('update'):
            for i in itertools.islice(steps, task.updates):
                state, metrics = step(state, source(state, i))
            jax.block_until_ready(metrics)
        return task.clock.ledger(tokens=task.told()['rl/length'] * task.responses)

    return Iteration(f'microbatch {task.config.execution.microbatch}', iterate)


def compare(mine: Iteration, theirs: Sequence[Iteration], rounds: int) -> dict[str, Any]:
    """The figures of iterations that take turns, after a first of each has told which of the others is the fastest."""
    mine.iterate()
    tried = {side.name: side.iterate()['total'] for side in theirs}
    peer = min(theirs, key=lambda side: tried[side.name]) if theirs else None
    own, others = [], []
    for _ in range(rounds):
        own.append(mine.iterate())
        others += [peer.iterate()] if peer else []
    medians = lambda found: {name: statistics.median(x[name] for x in found) for name in found[0]}
    result = {'setting': mine.name, 'ledger': medians(own)}
    if peer:
        ratio = statistics.median(b['total'] / a['total'] for a, b in zip(own, others, strict=True))
        result |= {'peer_setting': peer.name, 'peer_tried': tried, 'peer_ledger': medians(others), 'ratio': ratio}
    return result


def measure(flags: Any, config: Config) -> None:
    task = posttraining.prepare(grpo.SPEC._replace(open=Timed), config)
    task.data, versions = Ending(**vars(task.data)), {}
    ends = {'fixed': (config.model.vocab_size,), 'ends': tuple(range(0, config.model.vocab_size, EVERY))}
    result = {}
    for name, stop_ids in ends.items():
        task.data = dataclasses.replace(task.data, stop_ids=stop_ids)
        mine, theirs = ours(task), []
        if flags.peer:
            import trl_peer

            theirs = trl_peer.grpo(task, vowels, only=result['fixed']['peer_setting'] if result else None)
            versions = {'peer': posttraining.versions()}
        result[name] = compare(mine, theirs, flags.rounds)
    rl = config.rl
    print(json.dumps({
        'benchmark': 'rl', 'size': 'tiny' if flags.tiny else flags.size, **posttraining.rounded(result),
        'rollout': [rl.prompts, rl.group, rl.max_new_tokens], 'batch': [config.batch_size, task.width],
        'device': jax.devices()[0].device_kind, 'threads': os.cpu_count(), 'jax': jax.__version__, **versions,
    }))  # fmt: skip


def main() -> None:
    flags, config = posttraining.parse('rl', __doc__, 'configs/grpo.py', EXTRA, tiny=TINY)
    posttraining.run(measure, flags, config)


if __name__ == '__main__':
    sys.exit(run_command(main))
