"""Supervised fine-tuning in tokens per second: `python benchmarks/sft.py [--peer=trl] [--size=7M|laptop] …`.

The step of stage sft (forward, backward, clipping, AdamW) on the first batches of the default conversations
(operations and small talk, no replay), random weights, 7.2M parameters (dim 256, 6 layers, 4 heads, ffn 768,
vocabulary 4,096, tied) or the laptop's 1.4M, rows of 256 places. Batches lie on the device: collation, evaluation,
logging and saving are in neither side's time. A token is one of a conversation, padding is none; the XX
With --peer rounds of TRL's SFTTrainer take turns with ours, in this process, as benchmarks/pretrain.py does it: the
same conversations in as many updates, the same weights, its own collated batches, its own `training_step` (loss,
backward), clipping, fused AdamW; no gradient checkpointing and no bfloat16, which are its defaults and slower here.
Tried, and the fastest taken: padding, with its sampler that groups by length, and its best-fit packing without padding
(transformers makes the mask of the packed row from its positions: no example sees another), at several batch sizes
with gradients accumulated. Prints one JSON line; `ratio_per_place` is the ratio without what padding costs.
"""

import sys
from typing import Any

import posttraining
from posttraining import Batch, Example

from lm.config import Config
from lm.errors import run_command
from lm.stages import sft


def conversations(batch: Batch) -> list[Example]:
    """The conversations of a packed batch, read from its rows."""
    found = []
    names = ('tokens_BT', 'targets_BT', 'weights_BT', 'segments_BT')
    for tokens, targets, weights, segments in zip(*(batch[name] for name in names), strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            ids = [*tokens[here].tolist(), int(targets[here][-1])]
            found.append(((ids, [False, *(weights[here] > 0).tolist()]),))
    return found


def measure(flags: Any, config: Config) -> None:
    stage = sft.stage()
    data = posttraining.prepare(stage, config)
    mine, theirs = posttraining.ours(stage, config, data, steps=flags.steps, read=conversations), []
    if flags.peer:
        import trl_peer

        theirs = trl_peer.sft(mine, steps=flags.steps, longest=config.seq_len + 1)
    posttraining.race('sft', flags, config, mine, theirs)


def main() -> None:
    posttraining.run(measure, *posttraining.parse('sft', __doc__, 'configs/sft.py'))


if __name__ == '__main__':
    sys.exit(run_command(main))
