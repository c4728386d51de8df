"""Supervised fine-tuning: imitate the assistant's part of conversations, with some of pretraining's text beside it."""

from collections.abc import Mapping

from lm.config import Config
from lm.data import chats, pipeline
from lm.data.chats import WithReplay
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.evals import heldout
from lm.stages import language, plan
from lm.stages.spec import Say, Source, StageSpec, Task
from lm.training import step as training


def check(config: Config) -> None:
    """Raises UsageError without a run to start from: conversations alone make no language model."""
    if not (config.init_from or config.branch_from):
        raise UsageError(f'stage={config.stage} trains a model further: set --config.init_from=DIR')


def prepare(config: Config, tokenizer: str | None, say: Say) -> WithReplay:
    """Conversations in the words of the tokenizer's chat template, and the text to replay."""
    data = language.prepare_dialogue(config, tokenizer, say, chats.form)
    for s in data.own.sources:
        chats.check(s, seq_len=config.seq_len)
    return data


class Sft(Task):
    """Its data are conversations `WithReplay`; the loss is pretraining's, over the tokens that weigh something."""

    def _mixture(self) -> pipeline.Mixture:
        c = self.config
        return chats.mix(self.data, seq_len=c.seq_len, seed=c.seed, replay=c.data.replay)

    def epoch(self) -> int:
        return plan.growth(self.config).steps_in(self._mixture().rows_in_epoch())

    def describe(self) -> list[str]:
        sizes = lambda s, seq_len: chats.chat_rows(s, 'train', seq_len=seq_len).sizes
        return language.describe_dialogue(self.config, self.data, "conversations' rows", 'conversations', sizes)

    def heldout_prompts(self) -> list[Prompt]:
        return language.heldout_questions(self)

    def loss(self) -> training.Loss:
        return language.next_token_loss(self.cfg, z_loss=self.config.z_loss, sparse=True)

    def source(self, start: int) -> Source:
        return language.batches_of(self._mixture(), self.config, start)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Answers to held-out questions, the text that may have been forgotten, and the fixed prompts."""
        config, cfg, data, policy, metrics = self.config, self.cfg, self.data, state.models['policy'], {}
        for s in data.own.sources:
            rows = chats.chat_rows(s, 'heldout', seq_len=config.seq_len, shuffle=False)
            batches = pipeline.in_order(rows, batch_size=config.execution.microbatch, max_rows=config.eval.rows)
            totals = heldout.sums(policy, cfg, batches, data.tokenizer.bytes_of_ids, s.name)
            metrics |= language.answer_metrics(self, policy, s)
            metrics[f'eval/{s.name}/response_loss'] = totals['nll'] / max(totals['tokens'], 1)
        if data.text:
            metrics |= language.text_metrics(config, cfg, data.text, policy)
        language.log_samples(self, policy, step, metrics, data.template)
        return metrics


SPEC = StageSpec('sft', 'chat', 'answers', prepare, Sft, check)
