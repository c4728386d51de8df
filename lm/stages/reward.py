"""A reward model: the decoder with a score in place of words, which learns which of two responses is better."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from lm.config import Config
from lm.data.pairs import PairStore
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.evals import preferences
from lm.losses import reward
from lm.model import parameters, sequences
from lm.model.config import ModelConfig
from lm.runtime import StopRequest
from lm.stages import pairs, wiring
from lm.stages.pairs import PairData
from lm.training import normalisation, runs
from lm.training import step as training
from lm.training.recorder import Recorder


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`."""
    if not config.init_from:
        raise UsageError(f'stage={config.stage} begins with a model that answers: set --config.init_from=DIR')
    if config.data.replay:
        raise UsageError(f'data.replay={config.data.replay}: a reward model writes no text to forget, set it to 0')
    return wiring.run(stage(), config, workdir, stop=stop, dry_run=dry_run)


def stage() -> wiring.Stage:
    """What is the reward model's own."""
    return wiring.Stage(
        prepare=pairs.prepare, epoch=pairs.epoch, batch=pairs.batch, source=pairs.make_source, loss=make_loss,
        evaluate=make_evaluate, describe=pairs.describe, abstract=runs.abstract_scored, weights=first_weights,
        cost=partial(wiring.lm_cost, head=False),
    )  # fmt: skip


def first_weights(config: Config, cfg: ModelConfig, abstract: Any, say: Callable[[str], None]) -> Any:
    """The body of the run it starts from, and a new score; of a reward model, both."""
    if runs.is_scored(runs.read_config(config.init_from)['config']):
        return wiring.first_weights(config, cfg, abstract, say)
    own = jax.eval_shape(lambda: parameters.init_scores(jax.random.key(0), cfg))
    body = wiring.first_weights(config, cfg, {k: v for k, v in abstract.items() if k not in own}, say)
    where = {name: abstract[name].sharding for name in own}
    return body | jax.jit(parameters.init_scores, static_argnums=1, out_shardings=where)(
        jax.random.key(config.seed), cfg
    )


def make_loss(config: Config, cfg: ModelConfig) -> training.Loss:
    """Bradley–Terry and, where config.centring is not 0, the term that keeps scores around 0."""

    def terms(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
        del frozen, key
        chosen, rejected = sequences.scores(params, cfg, batch)
        tables = {'margin': config.margins * batch['margin_BP'], 'label': batch['label_BP']}
        return reward.sums(chosen, rejected, batch['weight_BP'], **tables)

    def weights(batch: training.Batch) -> training.Sums:
        return reward.weights(batch['weight_BP'])

    return training.Loss(terms, weights, {'bradley_terry': 1.0, 'centring': config.centring})


def make_evaluate(
    config: Config, cfg: ModelConfig, data: PairData, prompts: Sequence[Prompt], recorder: Recorder
) -> wiring.Evaluate:
    """evaluate(state, step): held-out pairs, beside what lengths alone would say; and the scale of the scores, which is
    kept with the run."""
    del prompts  # a reward model has no answers

    def scores(params: Any, store: PairStore) -> np.ndarray:
        return preferences.scores(params, cfg, pairs.in_order(config, store, config.eval.rows), store.pairs)

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        known = np.concatenate([scores(state.weights, s.train) for s in data.own.sources])
        scale = normalisation.of_pairs(known)
        if recorder.workdir is not None:
            normalisation.write(recorder.workdir, step, scale)
        metrics = {'eval/reward_mean': scale.mean, 'eval/reward_std': scale.std}
        for s in data.own.sources:
            found = preferences.reward_metrics(s.heldout, scores(state.weights, s.heldout), seq_len=config.seq_len)
            metrics |= {f'eval/{s.name}/{k}': v for k, v in found.items()}
        recorder.say(f'step {step}: ' + ' · '.join(f'{k[5:]} {v:.3f}' for k, v in metrics.items()), style='bold')
        return metrics

    return evaluate
