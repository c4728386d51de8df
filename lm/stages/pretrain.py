"""Pretraining: next-token cross-entropy on packed text."""

from lm.stages import language
from lm.stages.spec import StageSpec
from lm.stages.text import TextTask
from lm.training import step as training


class Pretrain(TextTask):
    """Trains a policy from random weights, or further."""

    def loss(self) -> training.Loss:
        return language.next_token_loss(self.cfg, z_loss=self.config.z_loss)


SPEC = StageSpec('pretrain', 'text', 'text', language.prepare_text, Pretrain)
