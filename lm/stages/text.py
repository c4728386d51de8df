"""Shared by the stages that learn from packed text: their batches and what is measured."""

from collections.abc import Mapping

from lm.data import pipeline
from lm.data.prompts import Prompt, of_text
from lm.stages import language, plan
from lm.stages.spec import Source, Task
from lm.training import step as training


class TextTask(Task):
    """Its data are `Prepared` text."""

    def mixture(self) -> pipeline.Mixture:
        """The rows of a run."""
        return pipeline.mix(self.data, seq_len=self.config.seq_len, seed=self.config.seed)

    def epoch(self) -> int:
        return plan.growth(self.config).steps_in(pipeline.rows_in_epoch(self.data, self.config.seq_len))

    def describe(self) -> list[str]:
        return [language.describe_text(s) for s in self.data.sources]

    def heldout_prompts(self) -> list[Prompt]:
        return of_text([s.heldout for s in self.data.sources], self.data.tokenizer)

    def source(self, start: int) -> Source:
        return language.batches_of(self.mixture(), self.config, start)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Held-out metrics, and the fixed prompts continued."""
        policy = state.models['policy']
        metrics = language.text_metrics(self.config, self.cfg, self.data, policy)
        language.log_samples(self, policy, step, metrics)
        return metrics
