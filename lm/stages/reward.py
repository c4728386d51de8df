"""A reward model: the decoder with a score in place of words, which learns which of two responses is better."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lm.config import Config
from lm.data.pairs import PairStore
from lm.errors import UsageError
from lm.evals import preferences
from lm.losses import reward
from lm.model import parameters, sequences
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.roles import Roles
from lm.runs import loading, reward_scale, rundir, saved_config
from lm.runs.saved_config import Parent
from lm.stages import pairs
from lm.stages.spec import Batch, StageSpec
from lm.training import flops
from lm.training import step as training


def check(config: Config) -> None:
    """Raises UsageError without a run to start from, and for a replay."""
    if not config.init_from:
        raise UsageError(f'stage={config.stage} begins with a model that answers: set --config.init_from=DIR')
    if config.data.replay:
        raise UsageError(f'data.replay={config.data.replay}: a reward model writes no text to forget, set it to 0')


class Reward(pairs.PairTask):
    """Trains the role `reward`."""

    makes = 'reward'

    def first_weights(self, abstract: Any, frozen: Mapping[str, Any]) -> tuple[Any, Parent | None]:
        """The body of the run it starts from, and a new score; of a reward model, both. Beside an adapter the score is
        trained whole."""
        run = self.config.init_from
        own = {name: abstract[name] for name in parameters.shapes_of_scores(self.cfg)}
        body, parent = super().first_weights({k: v for k, v in abstract.items() if k not in own}, frozen)
        if saved_config.about(rundir.read_config(run)).output == 'scores':
            return body | loading.weights(run, own, warn=self.recorder.say)[0], parent
        init = jax.jit(parameters.init_scores, static_argnums=1, out_shardings=loading.shardings_of(own))
        return body | init(jax.random.key(self.config.seed), self.cfg), parent

    def loss(self) -> training.Loss:
        """Bradley–Terry and, where config.centring is not 0, the term that keeps scores around 0."""
        config, cfg = self.config, self.cfg

        def terms(models: Roles, batch: Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
            del key
            (chosen, rejected), aux = sequences.scores_and_aux(models['reward'], cfg, batch)
            tables = {'margin': config.margins * batch['margin_BP'], 'label': batch['label_BP']}
            found, metrics = reward.sums(chosen, rejected, batch['weight_BP'], **tables)
            return {**found, **aux}, metrics

        denominators = lambda batch: {**reward.weights(batch['weight_BP']), **aux_weights(cfg, batch)}
        coefs = {'bradley_terry': 1.0, 'centring': config.centring, **aux_coefficients(cfg)}
        return training.Loss(terms, denominators, coefs)

    def cost(self) -> flops.Cost:
        return self.lm_cost(head=False)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Held-out pairs, beside what lengths alone would say; and the scale of the scores, which is kept with the
        run."""
        model, sources = state.models['reward'], self.data.own.sources
        scale = reward_scale.of_pairs(np.concatenate([self._scores(model, s.train) for s in sources]))
        if self.recorder.workdir is not None:
            reward_scale.write(self.recorder.workdir, step, scale)
        metrics = {'eval/reward_mean': scale.mean, 'eval/reward_std': scale.std}
        for s in sources:
            scores = self._scores(model, s.heldout)
            found = preferences.reward_metrics(s.heldout, scores, seq_len=self.config.seq_len)
            metrics |= {f'eval/{s.name}/{k}': v for k, v in found.items()}
        self.recorder.say(f'step {step}: ' + ' · '.join(f'{k[5:]} {v:.3f}' for k, v in metrics.items()), style='bold')
        return metrics

    def _scores(self, params: Any, store: PairStore) -> np.ndarray:
        in_order = pairs.in_order(self.config, store, self.config.eval.rows)
        return preferences.scores(params, self.cfg, in_order, store.pairs)


SPEC = StageSpec('reward', 'pairs', 'scores', pairs.prepare, Reward, check)
