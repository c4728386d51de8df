"""Shared by the stages that learn from pairs: their data and batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.config import Config
from lm.data import pairs, pipeline
from lm.data.chats import WithReplay
from lm.data.pairs import PairBatches
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.evals import preferences
from lm.stages import language, plan
from lm.stages.spec import Say, Source, Task

Reference = Sequence[np.ndarray]  # of each source, [pairs, sides]
PLACES = 16_384  # for tokens, that a device measures at once: more are no quicker


@dataclass(frozen=True, eq=False)
class PairData(WithReplay):
    """Pairs, and the text of pretraining to be measured on; `reference` has the reference's log-probs of the training
    pairs, `before` what it makes of each source's held-out ones."""

    reference: Reference | None = field(default=None, repr=False)
    before: Sequence[Any] = field(default=(), repr=False)


def prepare(config: Config, tokenizer: str | None, say: Say, *, unpaired: bool = False) -> PairData:
    """Pairs in the words of the tokenizer's chat template; with `unpaired` single answers too, and beside each two an
    answer to another prompt.

    Raises UsageError without a run to start from, and for settings that pairs have no use for.
    """
    if config.optim.batch_warmup:
        raise UsageError(f'optim.batch_warmup={config.optim.batch_warmup}: a batch of pairs does not grow, set it to 0')
    form = lambda template: pairs.form(template, sides=3 if unpaired else 2)
    data = language.prepare_dialogue(config, tokenizer, say, form, unpaired=unpaired)
    for s in data.own.sources:
        pairs.check(s, seq_len=config.seq_len)
    return PairData(data.own, data.text, data.template)


class PairTask(Task):
    """Its data are `PairData`."""

    sides = 2  # of a pair: the responses, and for a loss with a baseline an answer to another prompt
    cached = False  # whether batches have the reference's log-probs

    def batches(self) -> PairBatches:
        """The batches of a run."""
        c = self.config
        return _batches(self.data, c.seq_len, c.batch_size, c.seed, c.data.replay)

    def epoch(self) -> int:
        return self.batches().epoch

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Without data the most that it may need, a row of the longest for each pair."""
        if self.data is None:
            needed, a_row, width = self.config.batch_size, 1, self.sides * self.config.seq_len
        else:
            found = self.batches()
            needed, a_row, width = found.rows, found.slots, found.width
        rows = _rows_of_run(self.config, needed)
        return plan.abstract_batch(pairs.abstract(rows, width, a_row, sides=self.sides, reference=self.cached))

    def source(self, start: int) -> Source:
        found = self.batches()
        rows = _rows_of_run(self.config, found.rows)
        local = sharding.local_rows(rows, found.width)
        batch = partial(found.batch, places=range(rows) if local is None else local.rows)
        return language.sharded(pipeline.prefetched(batch, start), local)

    def heldout_prompts(self) -> list[Prompt]:
        return language.heldout_questions(self, pairs.questions)

    def describe(self) -> list[str]:
        sizes = lambda s, seq_len: pairs.sizes(s.train, seq_len)
        return language.describe_dialogue(self.config, self.data, 'pairs', 'pairs', sizes)


@lru_cache(maxsize=2)  # asked for by several parts of a run, and each time the plan would be verified
def _batches(data: PairData, seq_len: int, batch_size: int, seed: int, replay: float) -> PairBatches:
    mixture = pairs.mix(data, seq_len=seq_len, seed=seed, replay=replay, reference=data.reference)
    return PairBatches(mixture, batch_size)


def _rows_of_run(config: Config, needed: int) -> int:
    return preferences.rows_shared(needed, config.batch_size // config.execution.microbatch)


def in_order(config: Config, store: pairs.PairStore, most: int | None = None) -> preferences.Batches:
    """`preferences.in_order` of the first pairs of a store, as many rows at once as are quick."""
    at_once = preferences.rows_shared(1) * max(1, PLACES // (store.sides * config.seq_len))
    return preferences.in_order(store, seq_len=config.seq_len, batch_size=at_once, most=most)
