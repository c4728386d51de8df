"""Preference optimisation without a reward model: DPO and its relatives, on pairs of responses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from lm import processes
from lm.config import Config
from lm.data import cache
from lm.data import pairs as pair_data
from lm.data.prepare import PreparedSource
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.evals import answers, preferences
from lm.losses import preference
from lm.losses.preference import LOSSES, Pairs, Response
from lm.model import sequences
from lm.model.transformer import ModelConfig
from lm.runtime import StopRequest
from lm.stages import pairs, pretrain, wiring
from lm.stages.pairs import PairData
from lm.training import checkpoint, runs
from lm.training import step as training
from lm.training.recorder import Recorder

RECIPE = 1  # part of the cache's key: raise it when what the reference says changes


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`."""
    settle(config)
    return wiring.run(stage(config), config, workdir, stop=stop, dry_run=dry_run)


def stage(config: Config) -> wiring.Stage:
    """What is preference optimisation's own."""
    sides = 3 if LOSSES[config.loss].baseline else 2
    live = _live(config)
    return wiring.Stage(
        prepare=partial(pairs.prepare, sides=sides), epoch=pairs.epoch, batch=partial(pairs.batch, sides=sides),
        source=pairs.make_source, loss=make_loss, evaluate=make_evaluate, describe=pairs.describe,
        complete=add_reference if _cached(config) else wiring.as_it_is,
        frozen=lambda config, cfg: runs.abstract_params(cfg) if live else None,
        load_frozen=load_reference if live else wiring.no_frozen,
    )  # fmt: skip


def settle(config: Config) -> None:
    """Fills in what the loss takes where the user left it open. Raises UsageError for what it does not take."""
    asked = {name: config[name] for name in ('beta', 'margin', 'label_smoothing')}
    try:
        preference.settle(config.loss, asked)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if config.reference not in ('cached', 'live'):
        raise UsageError(f'reference={config.reference} must be cached or live')
    if not config.init_from:
        raise UsageError(f'stage={config.stage} compares with the run it starts from: set --config.init_from=DIR')


def _cached(config: Config) -> bool:
    return LOSSES[config.loss].reference and config.reference == 'cached'


def _live(config: Config) -> bool:
    return LOSSES[config.loss].reference and config.reference == 'live'


# ---- the loss ----


def make_loss(config: Config, cfg: ModelConfig) -> training.Loss:
    """The loss that the config names, of packed pairs."""
    name, taken = config.loss, LOSSES[config.loss]
    settings = preference.settle(name, {key: config[key] for key in ('beta', 'margin', 'label_smoothing')})

    def responses(params: Any, frozen: Any, batch: training.Batch) -> list[Response]:
        reference = sequences.log_probs(frozen, cfg, batch) if frozen is not None else None
        logps = sequences.log_probs(params, cfg, batch)

        def known(side: int) -> jax.Array | None:
            if reference is not None:
                return jax.lax.stop_gradient(reference[side])
            return batch.get(f'reference_{pair_data.SIDES[side]}_BP')

        return [Response(x, batch[f'length_{pair_data.SIDES[i]}_BP'], known(i)) for i, x in enumerate(logps)]

    def before(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> training.Sums:
        del key
        return preference.baseline_sums(responses(params, frozen, batch)[2], batch['weight_BP'])

    def terms(
        params: Any, frozen: Any, batch: training.Batch, key: jax.Array, given: Mapping[str, jax.Array] | None = None
    ) -> tuple[training.Sums, training.Sums]:
        del key
        chosen, rejected = responses(params, frozen, batch)[:2]
        z0 = None if given is None else preference.baseline(given)
        both = Pairs(chosen, rejected, batch['label_BP'])
        return preference.sums(name, both, batch['weight_BP'], settings=settings, z0=z0)

    def weights(batch: training.Batch) -> training.Sums:
        sizes = (batch['length_chosen_BP'], batch['length_rejected_BP'])
        return preference.weights(name, batch['weight_BP'], *sizes)

    coefs = preference.coefficients(name, nll=config.nll)
    return training.Loss(terms, weights, coefs, before if taken.baseline else None)


# ---- the reference ----


def load_reference(config: Config, cfg: ModelConfig, abstract: Any, say: Callable[[str], None]) -> Any:
    """The weights that the policy is compared with: those it starts from."""
    return runs.weights(config.init_from, abstract, warn=say)[1]


def add_reference(config: Config, cfg: ModelConfig, data: PairData, say: Callable[[str], None]) -> PairData:
    """The data with the reference's log-probs of the training pairs and of those that evaluation looks at: computed
    once, then kept in the cache under what they depend on, so that the step holds one model."""
    abstract = runs.abstract_params(cfg)
    params = runs.weights(config.init_from, abstract, warn=say)[1]
    key = {
        'recipe': RECIPE, 'weights': checkpoint.checksums(params), 'data': data.own.fingerprint,
        'model': repr(cfg), 'seq_len': config.seq_len,
    }  # fmt: skip

    def write(directory: epath.Path) -> None:
        say('log-probs of the reference')
        for i, s in enumerate(data.own.sources):
            found = preferences.log_probs(params, cfg, pairs.in_order(config, s.train), s.train.pairs)
            np.save(directory / f'{i}.npy', found)

    with processes.in_turn():
        folder = cache.build('reference', key, write)
    found = tuple(np.load(folder / f'{i}.npy') for i in range(len(data.own.sources)))
    return dataclasses.replace(data, reference=found)


# ---- evaluation ----


def make_evaluate(
    config: Config, cfg: ModelConfig, data: PairData, prompts: Sequence[Prompt], recorder: Recorder
) -> wiring.Evaluate:
    """evaluate(state, step): held-out pairs, answers to their prompts, what is forgotten, and the fixed prompts."""
    before: dict[str, tuple[np.ndarray, dict[str, float]]] = {}  # of the reference, measured when first asked for

    def log_probs(params: Any, s: PreparedSource) -> np.ndarray:
        batches = pairs.in_order(config, s.heldout, config.eval.rows)
        return preferences.log_probs(params, cfg, batches, s.heldout.pairs)

    def answered(params: Any, s: PreparedSource) -> dict[str, float]:
        questions = pair_data.questions(s.heldout, config.eval.rows, longest=config.seq_len)
        told = answers.answered(
            params, cfg, data.tokenizer, questions, stop_ids=data.stop_ids, max_new_tokens=config.eval.max_new_tokens
        )  # fmt: skip
        return answers.metrics(told)

    def measure_reference() -> None:
        params = load_reference(config, cfg, runs.abstract_params(cfg), recorder.say)
        before.update({s.name: (log_probs(params, s), answered(params, s)) for s in data.own.sources})

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        metrics = {}
        if not before:
            measure_reference()
        for s in data.own.sources:
            reference, told = before[s.name]
            policy = log_probs(state.weights, s)
            found = preferences.policy_metrics(s.heldout, policy, reference, seq_len=config.seq_len)
            found |= answered(state.weights, s) | {f'reference_{k}': v for k, v in told.items()}
            metrics |= {f'eval/{s.name}/{k}': v for k, v in found.items()}
        if data.text:
            metrics |= pretrain.text_metrics(config, cfg, data.text, state.weights)
        pretrain.tell(config, cfg, data.tokenizer, state.weights, prompts, recorder, step, metrics, data.template)
        return metrics

    return evaluate
