"""Preference optimisation without a reward model: DPO and its relatives, on pairs of responses."""

from collections.abc import Mapping

import jax

from lm.config import Config
from lm.data import pairs as pair_data
from lm.errors import UsageError
from lm.evals import preferences
from lm.losses import preference
from lm.losses.preference import LOSSES, Pairs, Response
from lm.model import sequences
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.roles import Roles
from lm.runs.saved_config import Parent
from lm.stages import language, pairs, reference
from lm.stages.pairs import PairData
from lm.stages.spec import Batch, Say, StageSpec
from lm.training import flops
from lm.training import step as training

REPLAY = 1.0  # the coefficient of the replayed text's cross-entropy


def check(config: Config) -> None:
    """Raises UsageError for settings that the loss does not take, and without a run to start from."""
    try:
        _settings(config)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not config.init_from:
        why = 'compares with the run it starts from, and does not branch'
        raise UsageError(f'stage={config.stage} {why}: set --config.init_from=DIR')


def _settings(config: Config) -> dict[str, float]:
    """The settings of the config's loss. Raises ValueError as `preference.settle`."""
    return preference.settle(config.loss, {key: config[key] for key in preference.SETTINGS})


def prepare(config: Config, tokenizer: str | None, say: Say) -> PairData:
    """Pairs, and for a loss that compares single answers with a baseline also these, each with an answer to another
    prompt."""
    return pairs.prepare(config, tokenizer, say, unpaired=LOSSES[config.loss].baseline)


class Dpo(pairs.PairTask):
    """Trains a policy; the reference is the run that it starts from."""

    @property
    def _taken(self) -> preference.Preference:
        """The entry of the loss in the table of losses."""
        return LOSSES[self.config.loss]

    @property
    def sides(self) -> int:
        return 3 if self._taken.baseline else 2

    @property
    def cached(self) -> bool:
        return self._taken.reference and self.config.reference == 'cached'

    @property
    def frozen(self) -> Mapping[str, str]:
        live = self._taken.reference and self.config.reference == 'live'
        return {**super().frozen, **({'reference': 'init_from'} if live and self.adapter is None else {})}

    def precompute(self, parents: Mapping[str, Parent]) -> dict[str, Parent]:
        self.data, known = reference.add(self, parents)
        return {'reference': known}

    def describe(self) -> list[str]:
        """For KTO also whether good and bad answers weigh what its authors advise (Ethayarajh et al., 2024, section
        4.2: λ_D·n_D / λ_U·n_U from 1 to 4/3)."""
        lines = super().describe()
        if not self._taken.baseline:
            return lines
        settings = _settings(self.config)
        good, bad = (sum(s.train.answers(side) for s in self.data.own.sources) for side in (0, 1))
        told = f'kto: {good:,} good and {bad:,} bad answers'
        if good and bad and not 1 <= (ratio := settings['lambda_d'] * good / (settings['lambda_u'] * bad)) <= 4 / 3:
            up = ('lambda_d', settings['lambda_u'] * bad / good)
            key, value = up if good < bad else ('lambda_u', settings['lambda_d'] * good / bad)
            told += f', which weigh {ratio:.2g} to 1; its authors advise 1 to 1.33, as with {key}={value:.3g}'
        return [*lines, told]

    def cost(self) -> flops.Cost:
        """Model FLOPs of a step, with the forward passes beside the one that is differentiated."""
        return self.lm_cost(forwards=(1 + self._taken.baseline) * (1 + len(self.frozen)) - 1)

    def loss(self) -> training.Loss:
        """The loss that the config names, of packed pairs; and of the text that is replayed, pretraining's."""
        config, cfg = self.config, self.cfg
        name, baseline, replay = config.loss, self._taken.baseline, bool(config.data.replay)
        cached = self.cached or not self._taken.reference
        settings = _settings(config)

        def responses(logp_BT: jax.Array, models: Roles, batch: Batch) -> list[Response]:
            live = None if cached else sequences.log_probs(models['reference'], cfg, batch)

            def known(side: int) -> jax.Array | None:
                if live is not None:
                    return jax.lax.stop_gradient(live[side])
                return batch.get(f'reference_{pair_data.SIDES[side]}_BP')

            by_side = sequences.by_side(logp_BT, batch)
            return [Response(x, batch[f'length_{pair_data.SIDES[i]}_BP'], known(i)) for i, x in enumerate(by_side)]

        def pre_pass(models: Roles, batch: Batch, key: jax.Array) -> training.Sums:
            del key
            logp_BT, *_ = sequences.token_log_probs(models['policy'], cfg, batch)
            return preference.baseline_sums(responses(logp_BT, models, batch)[2], batch['weight_BP'])

        def terms(
            models: Roles, batch: Batch, key: jax.Array, global_sums: training.Sums | None = None
        ) -> tuple[training.Sums, training.Sums]:
            del key
            logp_BT, _, aux = sequences.token_log_probs(models['policy'], cfg, batch)
            chosen, rejected = responses(logp_BT, models, batch)[:2]
            z0 = None if global_sums is None else preference.baseline(global_sums)
            both = Pairs(chosen, rejected, batch['label_BP'])
            found, metrics = preference.sums(name, both, batch['weight_BP'], settings=settings, z0=z0)
            found |= {'replay': -sequences.outside(logp_BT, batch)} if replay else {}
            return {**found, **aux}, metrics

        def denominators(batch: Batch) -> training.Sums:
            sizes = (batch['length_chosen_BP'], batch['length_rejected_BP'])
            found = preference.weights(name, batch['weight_BP'], *sizes)
            found |= {'replay': sequences.outside(batch['weights_BT'], batch)} if replay else {}
            return {**found, **aux_weights(cfg, batch)}

        coefs = preference.coefficients(name, nll=config.nll) | ({'replay': REPLAY} if replay else {})
        return training.Loss(terms, denominators, {**coefs, **aux_coefficients(cfg)}, pre_pass if baseline else None)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Held-out pairs, answers to their prompts, what is forgotten, and the fixed prompts."""
        metrics, policy, seq_len = {}, state.models['policy'], self.config.seq_len
        now = reference.measure(self, policy)
        for s, after, before in zip(self.data.own.sources, now, self.data.before, strict=True):
            found = preferences.policy_metrics(s.heldout, after.log_probs, before.log_probs, seq_len=seq_len)
            found |= after.answered | {f'reference_{k}': v for k, v in before.answered.items()}
            metrics |= {f'eval/{s.name}/{k}': v for k, v in found.items()}
        if self.data.text:
            metrics |= language.text_metrics(self.config, self.cfg, self.data.text, policy)
        language.log_samples(self, policy, step, metrics, self.data.template)
        return metrics


SPEC = StageSpec('dpo', 'pairs', 'answers', prepare, Dpo, check)
