"""Distillation: a student learns the distributions of a larger model over the next token (Hinton et al., 2015)."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import Config, base
from lm.data import pipeline
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.losses import distill as losses
from lm.model import head, sequences, transformer
from lm.model.config import ModelConfig
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.head import Teacher
from lm.model.roles import Roles
from lm.runs import execution, loading, rundir, saved_config
from lm.runs.saved_config import Parent
from lm.settings import Settings
from lm.stages import fitting, language, plan, teacher
from lm.stages.spec import Batch, StageSpec
from lm.stages.teacher import Answers
from lm.stages.text import TextTask
from lm.training import flops
from lm.training import step as training


def settle(config: Config) -> None:
    """Takes from the teacher what is left open: the tokenizer, the size of the vocabulary unless the student is a run,
    and the text where none is named.

    Raises UsageError without a teacher, and for settings that differ from its own.
    """
    if not config.teacher_from:
        raise UsageError('stage=distill learns from a teacher: set --config.teacher_from=DIR')
    saved, defaults = rundir.read_config(config.teacher_from), base(Settings)
    theirs = saved['config']
    if saved_config.about(saved).output == 'scores':
        raise UsageError(f'teacher_from={config.teacher_from} is a reward model, which has no words: name another run')
    if config.data.tokenizer is None:
        config.data.tokenizer = rundir.tokenizer_folder(config.teacher_from)
    if not (config.init_from or config.branch_from):
        _take(config, 'model.vocab_size', theirs['model']['vocab_size'], defaults.model.vocab_size)
    if not config.data.mixture:
        if not (mixture := saved_config.pretraining_of(saved)):
            raise UsageError(f'{config.teacher_from} names no text that it learned: set --config.data.mixture=MIXTURE')
        config.data.mixture = mixture
        _take(config, 'data.heldout', theirs['data']['heldout'], defaults.data.heldout)
    if config.distill.divergence == 'jsd' and config.distill.jsd_beta is None:
        config.distill.jsd_beta = 0.5


def _take(config: Config, key: str, theirs: Any, default: Any) -> None:
    """Sets what is at its default to the teacher's. Raises UsageError if it is neither."""
    group, name = key.split('.')
    if config[group][name] not in (theirs, default):
        raise UsageError(
            f'{key}={config[group][name]} differs from {config.teacher_from}, which has {theirs}: leave it out'
        )
    config[group][name] = theirs


def check(config: Config) -> None:
    """Raises UsageError for a loss that cannot be, and for a student that has other words than its teacher."""
    c = config.distill
    if c.jsd_beta is not None and c.divergence != 'jsd':
        raise UsageError(
            f'distill.jsd_beta={c.jsd_beta} does nothing with distill.divergence={c.divergence}: leave it out'
        )
    if c.top_k is not None and c.divergence != 'forward':
        raise UsageError(
            f'distill.divergence={c.divergence} needs a live teacher: leave distill.top_k={c.top_k} out, or set forward'
        )
    if c.top_k is not None and c.top_k > config.model.vocab_size:
        raise UsageError(f'distill.top_k={c.top_k} is more than the vocabulary has ({config.model.vocab_size})')
    if config.lora.rank and not config.init_from:
        raise UsageError(f'lora.rank={config.lora.rank} trains factors over a run: set --config.init_from=DIR')
    own, words, rows = config.data.tokenizer, rundir.tokenizer_folder(config.teacher_from), config.model.vocab_size
    theirs = rundir.read_config(config.teacher_from)['config']['model']['vocab_size']
    if own != words and Tokenizer.load(own).fingerprint != Tokenizer.load(words).fingerprint:
        raise UsageError(
            f'{config.init_from or own} has another tokenizer than the teacher {config.teacher_from}: a student needs '
            'the same, name another run'
        )
    if rows != theirs:
        raise UsageError(
            f'model.vocab_size={rows} differs from the teacher {config.teacher_from}, which has {theirs}: a student '
            'needs as many, name another run'
        )


class Distill(TextTask):
    """Trains a student, the policy; the teacher is read at each step, or asked once before the first."""

    answers: Sequence[Answers] | None = None  # of a teacher that was asked, for each source

    @property
    def live(self) -> bool:
        """Whether each step reads the teacher."""
        return self.config.distill.top_k is None

    @property
    def frozen(self) -> Mapping[str, str]:
        return {**super().frozen, **({'teacher': 'teacher_from'} if self.live else {})}

    @cached_property
    def teacher(self) -> ModelConfig:
        """The shape of the teacher, run in the student's dtype."""
        saved = rundir.read_config(self.config.teacher_from)['config']
        model = base(Settings).model.to_dict() | saved['model']  # a setting newer than that run has its default
        own = self.config.execution.to_dict() | {'dtype': self.cfg.dtype}
        return execution.model_config({'model': model, 'execution': own}, training=False)

    def abstract_frozen(self, role: str) -> Any:
        if role != 'teacher':
            return super().abstract_frozen(role)
        return loading.abstract_in_use(self.config.teacher_from, self.teacher)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        if self.live:
            return super().batch()
        shape = self.config.batch_size, self.config.seq_len
        return super().batch() | plan.abstract_batch(teacher.abstract(*shape, self.config.distill.top_k))

    def mixture(self) -> pipeline.Mixture:
        found = super().mixture()
        if self.answers is None:
            return found
        rows = tuple(teacher.AnsweredRows(*each) for each in zip(found.rows, self.answers, strict=True))
        return pipeline.Mixture(rows, found.weights)

    def precompute(self, parents: Mapping[str, Parent]) -> dict[str, Parent]:
        if self.live:
            return {}
        self.answers, known = teacher.ask(self, self.teacher, super().mixture(), parents.get('teacher'))
        return {'teacher': known}

    def describe(self) -> list[str]:
        count = fitting.count(loading.shapes(self.teacher))
        return [*super().describe(), f'the teacher: {self.config.teacher_from}, {count:,} parameters']

    def cost(self) -> flops.Cost:
        """Model FLOPs of a step, with a live teacher's forward pass: a third of what training it would take."""
        if not self.live:
            return self.lm_cost()
        own, theirs = self.lm_cost(), flops.cost(self.teacher, seq_len=self.config.seq_len)
        return flops.Cost(own.token + theirs.token / 3, own.target + theirs.target / 3)

    def known(self, models: Roles, batch: Batch) -> Teacher:
        """The teacher's distributions over a batch."""
        if not self.live:
            return Teacher(tuple(batch[name] for name in teacher.NAMES))
        other, cfg = models['teacher'], self.teacher
        with jax.named_scope('teacher'):
            h_BTD, w, options = transformer.head_inputs(other, cfg, sequences.hidden(other, cfg, batch)[0])
        return Teacher((jax.lax.stop_gradient(h_BTD),), w, options['dims'], options['softcap'])

    def loss(self) -> training.Loss:
        """One term, since the head makes its parts in one pass, and these as metrics."""
        cfg, c, z_loss = self.cfg, self.config.distill, self.config.z_loss
        apart = partial(losses.divergence, kind=c.divergence, beta=c.jsd_beta) if self.live else losses.top_k_divergence
        of_token = head.Distillation(apart, c.alpha, c.temperature, z_loss)

        def terms(models: Roles, batch: Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
            del key
            h_BTD, aux = sequences.hidden(models['policy'], cfg, batch)
            h_BTD, w, options = transformer.head_inputs(models['policy'], cfg, h_BTD)
            targets = batch['targets_BT'], batch['weights_BT']
            with jax.named_scope('head'):
                total, parts = head.distill(h_BTD, w, self.known(models, batch), *targets, of_token, **options)
            return {'loss': total, **aux}, {
                'divergence': parts['divergence'], 'cross_entropy': parts['nll'], 'z_loss': z_loss * parts['z'],
                'accuracy': parts['correct'],
            }  # fmt: skip

        def denominators(batch: Batch) -> training.Sums:
            names = ('loss', 'divergence', 'cross_entropy', 'z_loss', 'accuracy')
            return dict.fromkeys(names, jnp.sum(batch['weights_BT'])) | aux_weights(cfg, batch)

        return training.Loss(terms, denominators, {'loss': 1.0, **aux_coefficients(cfg)})


SPEC = StageSpec('distill', 'text', 'text', language.prepare_text, Distill, check, settle)
