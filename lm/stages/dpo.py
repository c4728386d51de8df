"""Preference optimisation without a reward model: DPO and its relatives, on pairs of responses."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from etils import epath

from lm.config import Config, nearest
from lm.data import pairs as pair_data
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.evals import preferences
from lm.losses import preference
from lm.losses.preference import LOSSES, Pairs, Response
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.runtime import StopRequest
from lm.stages import pairs, pretrain, reference, wiring
from lm.stages.pairs import PairData
from lm.training import runs
from lm.training import step as training
from lm.training.recorder import Recorder

REPLAY = 1.0  # the coefficient of the replayed text's cross-entropy


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`."""
    check(config)
    return wiring.run(stage(config), config, workdir, stop=stop, dry_run=dry_run)


def stage(config: Config) -> wiring.Stage:
    """What is preference optimisation's own."""
    taken = LOSSES[config.loss]
    sides = 3 if taken.baseline else 2
    cached = taken.reference and config.reference == 'cached'
    live = taken.reference and config.reference == 'live'
    forwards = (1 + taken.baseline) * (1 + live) - 1  # beside the one that is differentiated
    return wiring.Stage(
        prepare=prepare, epoch=pairs.epoch,
        batch=partial(pairs.batch, sides=sides, reference=cached), source=pairs.make_source, loss=make_loss,
        evaluate=make_evaluate, describe=describe, prompts=pairs.heldout_questions,
        complete=partial(reference.add, cached=cached, live=live),
        frozen=lambda config, cfg: runs.abstract_params(cfg) if live else None,
        load_frozen=reference.load if live else wiring.no_frozen, cost=partial(wiring.lm_cost, forwards=forwards),
    )  # fmt: skip


def prepare(config: Config, tokenizer: str | None, say: Callable[[str], None]) -> PairData:
    """Pairs, and for a loss that compares single answers with a baseline also these, each with an answer to another
    prompt."""
    baseline = LOSSES[config.loss].baseline
    return pairs.prepare(config, tokenizer, say, sides=3 if baseline else 2, unpaired=baseline)


def describe(config: Config, data: PairData) -> list[str]:
    """What is about to be trained on, a line a source; and for KTO whether good and bad answers weigh what its authors
    advise (Ethayarajh et al., 2024, section 4.2: λ_D·n_D / λ_U·n_U from 1 to 4/3)."""
    lines = pairs.describe(config, data)
    if not LOSSES[config.loss].baseline:
        return lines
    taken = preference.settle(config.loss, {key: config[key] for key in preference.SETTINGS})
    good, bad = (sum(s.train.answers(side) for s in data.own.sources) for side in (0, 1))
    told = f'kto: {good:,} good and {bad:,} bad answers'
    if good and bad and not 1 <= (ratio := taken['lambda_d'] * good / (taken['lambda_u'] * bad)) <= 4 / 3:
        up = ('lambda_d', taken['lambda_u'] * bad / good)
        key, value = up if good < bad else ('lambda_u', taken['lambda_d'] * good / bad)
        told += f', which weigh {ratio:.2g} to 1; its authors advise 1 to 1.33, as with {key}={value:.3g}'
    return [*lines, told]


def check(config: Config) -> None:
    """Raises UsageError for a loss or reference that is not known, and for settings that the loss does not take."""
    for key, known in (('loss', tuple(LOSSES)), ('reference', ('cached', 'live'))):
        if config[key] not in known:
            raise UsageError(f'{key}={config[key]}{nearest(config[key], known)} is not one of {", ".join(known)}')
    asked = {name: config[name] for name in preference.SETTINGS}
    try:
        preference.settle(config.loss, asked)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not config.init_from:
        raise UsageError(f'stage={config.stage} compares with the run it starts from: set --config.init_from=DIR')


# ---- the loss ----


def make_loss(config: Config, cfg: ModelConfig) -> training.Loss:
    """The loss that the config names, of packed pairs; and of the text that is replayed, pretraining's."""
    name, taken, replay = config.loss, LOSSES[config.loss], bool(config.data.replay)
    settings = preference.settle(name, {key: config[key] for key in preference.SETTINGS})

    def responses(logp_BT: jax.Array, frozen: Any, batch: training.Batch) -> list[Response]:
        live = sequences.log_probs(frozen, cfg, batch) if frozen is not None else None

        def known(side: int) -> jax.Array | None:
            if live is not None:
                return jax.lax.stop_gradient(live[side])
            return batch.get(f'reference_{pair_data.SIDES[side]}_BP')

        by_side = sequences.by_side(logp_BT, batch)
        return [Response(x, batch[f'length_{pair_data.SIDES[i]}_BP'], known(i)) for i, x in enumerate(by_side)]

    def before(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> training.Sums:
        del key
        logp_BT = sequences.token_log_probs(params, cfg, batch)
        return preference.baseline_sums(responses(logp_BT, frozen, batch)[2], batch['weight_BP'])

    def terms(
        params: Any, frozen: Any, batch: training.Batch, key: jax.Array, given: Mapping[str, jax.Array] | None = None
    ) -> tuple[training.Sums, training.Sums]:
        del key
        logp_BT = sequences.token_log_probs(params, cfg, batch)
        chosen, rejected = responses(logp_BT, frozen, batch)[:2]
        z0 = None if given is None else preference.baseline(given)
        both = Pairs(chosen, rejected, batch['label_BP'])
        found, metrics = preference.sums(name, both, batch['weight_BP'], settings=settings, z0=z0)
        return {**found, 'replay': -sequences.outside(logp_BT, batch)} if replay else found, metrics

    def weights(batch: training.Batch) -> training.Sums:
        sizes = (batch['length_chosen_BP'], batch['length_rejected_BP'])
        found = preference.weights(name, batch['weight_BP'], *sizes)
        return {**found, 'replay': sequences.outside(batch['weights_BT'], batch)} if replay else found

    coefs = preference.coefficients(name, nll=config.nll) | ({'replay': REPLAY} if replay else {})
    return training.Loss(terms, weights, coefs, before if taken.baseline else None)


# ---- evaluation ----


def make_evaluate(
    config: Config, cfg: ModelConfig, data: PairData, prompts: Sequence[Prompt], recorder: Recorder
) -> wiring.Evaluate:
    """evaluate(state, step): held-out pairs, answers to their prompts, what is forgotten, and the fixed prompts."""

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        metrics = {}
        now = reference.measure(config, cfg, data, state.weights)
        for s, policy, before in zip(data.own.sources, now, data.before, strict=True):
            found = preferences.policy_metrics(s.heldout, policy.log_probs, before.log_probs, seq_len=config.seq_len)
            found |= policy.answered | {f'reference_{k}': v for k, v in before.answered.items()}
            metrics |= {f'eval/{s.name}/{k}': v for k, v in found.items()}
        if data.text:
            metrics |= pretrain.text_metrics(config, cfg, data.text, state.weights)
        pretrain.tell(config, cfg, data.tokenizer, state.weights, prompts, recorder, step, metrics, data.template)
        return metrics

    return evaluate
