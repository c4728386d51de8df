"""Direct preference optimisation in tokens per second: `python benchmarks/dpo.py [--peer=trl] [--size=6M|laptop] …`.

The step of stage dpo (forward, backward, clipping, AdamW; no NLL term) on the first batches of 64 programmatic pairs,
the reference's log-probs known before: random weights, 6.2M parameters (dim 256, 6 layers, 4 heads, ffn 768,
vocabulary 4,096, tied) or the laptop's 1.4M. Batches lie on the device: collation, evaluation, logging and saving are
in neither side's time. A token is one of a pair's two sequences, prompt and response; padding is none.

With --peer rounds of TRL's DPOTrainer take turns with ours, in this process, as benchmarks/pretrain.py does it: the
same weights, `precompute_ref_log_probs` (given to it from our side, so that both losses begin at ln 2 only if both
compute the same), batches that it makes itself of the same pairs, as much in an update, its own `training_step` (loss
and backward), clipping, fused AdamW; no gradient checkpointing and no bfloat16, which it has by default. Tried, and
the fastest taken: several batch sizes with gradients accumulated, grouped by length (it has to be told the lengths)
and in its default order. `ratio` is the median of pairs, `ratio_per_place` the same for what is computed, padding and
all. Prints one JSON line.
"""

import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import posttraining
from posttraining import Batch, Example

from lm.config import Config
from lm.data import pairs
from lm.errors import run_command
from lm.model import sequences
from lm.stages import dpo


def responses(batch: Batch) -> list[Example]:
    """Both sides of each pair of a packed batch, read from its rows."""
    found = []
    for row, slots in enumerate(batch['weight_BP'].sum(1).astype(int)):
        number, tokens, weights = (batch[f'{k}_BT'][row] for k in ('sequence', 'tokens', 'weights'))
        places = [np.flatnonzero(number == i) for i in range(2 * slots)]
        read = [(tokens[at].tolist(), [False, *(weights[at][:-1] > 0).tolist()]) for at in places]
        found += zip(read[::2], read[1::2], strict=True)
    return found


def reference(batches: list[Batch]) -> np.ndarray:
    """[pairs, 2]: the reference's log-probs, in the order of `responses`."""
    filled = [batch['weight_BP'] > 0 for batch in batches]
    of_side = lambda name: [b[f'reference_{name}_BP'][here] for b, here in zip(batches, filled, strict=True)]
    return np.stack([np.concatenate(of_side(name)) for name in pairs.SIDES[:2]], axis=1)


def with_reference(params: Any, cfg: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with log-probs by the weights that it starts from."""
    known = jax.jit(partial(sequences.log_probs, cfg=cfg))(params, batch=batch)
    return batch | {f'reference_{name}_BP': x for name, x in zip(pairs.SIDES, known, strict=False)}


def measure(flags: Any, config: Config) -> None:
    task = posttraining.prepare(dpo.SPEC, config)
    sources = task.data.own.sources
    none = tuple(np.zeros((s.train.pairs, s.train.sides), np.float32) for s in sources)  # until it is known
    task.data = dataclasses.replace(task.data, reference=none)
    options = {'steps': flags.steps, 'read': responses, 'finish': with_reference}
    mine, theirs = posttraining.ours(task, **options), []
    if flags.peer:
        import trl_peer

        theirs = trl_peer.dpo(mine, reference(mine.batches), steps=flags.steps, longest=config.seq_len)
    posttraining.race('dpo', flags, config, mine, theirs)


def main() -> None:
    posttraining.run(measure, *posttraining.parse('dpo', __doc__, 'configs/dpo.py', [('nll', '0')]))


if __name__ == '__main__':
    sys.exit(run_command(main))
