"""Supervised fine-tuning in tokens per second: `python benchmarks/sft.py [--peer=trl] [--size=6M|laptop] …`.

The step of stage sft (forward, backward, clipping, AdamW) on the first batches of the default conversations
(operations and small talk, no replay): rows of 256 places, random weights, 6.2M parameters (dim 256, 6 layers, 4
heads, ffn 768, vocabulary 4,096, tied) or the laptop's 1.4M. Batches lie on the device: collation, evaluation, logging
and saving are in neither side's time. A token is one of a conversation; padding is none.

With --peer rounds of TRL's SFTTrainer take turns with ours, in this process, as benchmarks/pretrain.py does it: the
same weights, batches that it makes itself of the same conversations, as much in an update, its own `training_step`
(loss and backward), clipping, fused AdamW; no gradient checkpointing and no bfloat16, which it has by default. Tried,
and the fastest taken: padding with its sampler that groups by length, and its best-fit packing, at several batch sizes
with gradients accumulated. (Packed rows need no flash attention to be right: without a padding mask transformers makes
the mask of the row from its positions.) `ratio` is the median of pairs, `ratio_per_place` the same for what is
computed, padding and all; the losses of both sides' first rounds are those of the same weights. Prints one JSON line.
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
    task = posttraining.prepare(sft.SPEC, config)
    mine, theirs = posttraining.ours(task, steps=flags.steps, read=conversations), []
    if flags.peer:
        import trl_peer

        theirs = trl_peer.sft(mine, steps=flags.steps, longest=config.seq_len + 1)
    posttraining.race('sft', flags, config, mine, theirs)


def main() -> None:
    posttraining.run(measure, *posttraining.parse('sft', __doc__, 'configs/sft.py'))


if __name__ == '__main__':
    sys.exit(run_command(main))
