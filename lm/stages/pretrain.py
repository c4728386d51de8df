"""Pretraining: next-token cross-entropy on packed text."""

from collections.abc import Mapping

from lm.data import pipeline
from lm.data.prompts import Prompt, of_text
from lm.stages import language, plan
from lm.stages.spec import Source, StageSpec, Task
from lm.training import step as training


class Pretrain(Task):
    """Its data are `Prepared` text."""

    def epoch(self) -> int:
        return plan.growth(self.config).steps_in(pipeline.rows_in_epoch(self.data, self.config.seq_len))

    def describe(self) -> list[str]:
        return [language.describe_text(s) for s in self.data.sources]

    def heldout_prompts(self) -> list[Prompt]:
        return of_text([s.heldout for s in self.data.sources], self.data.tokenizer)

    def loss(self) -> training.Loss:
        return language.next_token_loss(self.cfg, z_loss=self.config.z_loss)

    def source(self, start: int) -> Source:
        mixture = pipeline.mix(self.data, seq_len=self.config.seq_len, seed=self.config.seed)
        return language.batches_of(mixture, self.config, start)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Held-out metrics, and the fixed prompts continued."""
        policy = state.models['policy']
        metrics = language.text_metrics(self.config, self.cfg, self.data, policy)
        language.log_samples(self, policy, step, metrics)
        return metrics


SPEC = StageSpec('pretrain', 'text', 'text', language.prepare_text, Pretrain)
