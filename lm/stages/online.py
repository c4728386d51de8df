"""Shared by the stages that learn from what their policy draws: rollouts, scores, and the step on them."""

import abc
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lm import advantages, progress, sharding
from lm.config import Config
from lm.data import chats, pipeline
from lm.data.chats import Question, WithReplay
from lm.data.prompts import Prompt
from lm.errors import UsageError
from lm.losses import policy as losses
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.roles import Roles, assemble
from lm.multihost import processes
from lm.rl import rewards, rollouts, verified
from lm.rl.prompts import Prompts
from lm.rl.rollouts import Packing, Scored
from lm.runs import checkpoint
from lm.runs.saved_config import Parent
from lm.sampling import generate
from lm.settings import CLIP_HIGH
from lm.stages import held_out, language, plan
from lm.stages.spec import ROWS, Batch, Say, Source, Task
from lm.training import step as training

ROUND = 32  # tokens to which the width of a row is rounded up
PENALTY = np.float32(-1)  # in place of the score of a response without an end of turn
MISMATCH_CAP = 2.0  # the largest importance weight of a token, and one over the least
WINDOW = 6  # rollouts over which a rising reward is seen
HORIZON = 10_000  # responses over which β moves by its error
# Of a rollout: its scores, how its responses end, the gap between sampler and trainer (the largest |Δ log p|, and k3 a
# token), and the KL from the reference in nats a response, by k1 and by k3.
MEASURES = ('reward', 'reward_std', 'ended', 'length', 'mismatch_max', 'mismatch_kl', 'kl', 'kl_k3', 'beta')
PANEL = ('reward', 'exact', 'kl', 'length', 'ended')  # of them, in the progress bar


def check(config: Config) -> None:
    """Raises UsageError for settings that make no sense together, before anything is read."""
    rl = config.rl
    if not config.init_from:
        why = 'begins with a model that answers, and does not branch'
        raise UsageError(f'stage={config.stage} {why}: set --config.init_from=DIR')
    verified.check(config)
    if (rl.prompts * rl.group) % config.batch_size:
        raise UsageError(
            f'a rollout of rl.prompts={rl.prompts} × rl.group={rl.group} responses is not a multiple of '
            f'batch_size={config.batch_size}: change one of them'
        )
    if rl.max_new_tokens >= config.seq_len:
        raise UsageError(
            f'rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in seq_len={config.seq_len}'
        )
    if rl.kl == 'none' and rl.beta:
        raise UsageError(f'rl.beta={rl.beta} with rl.kl=none does nothing: set rl.kl, or leave it out')
    if rl.kl != 'none' and not rl.beta:
        raise UsageError(f'rl.kl={rl.kl} with rl.beta=0 is no leash: set rl.beta, or leave rl.kl out')
    if rl.mismatch == 'none' and rl.mismatch_ratio != 'token':
        raise UsageError(f'rl.mismatch_ratio={rl.mismatch_ratio} with rl.mismatch=none does nothing: set rl.mismatch')
    if rl.kl_target and rl.kl != 'reward':
        raise UsageError(f'rl.kl_target={rl.kl_target} moves the beta of rl.kl=reward, not of {rl.kl}')
    if rl.resample and rl.group < 2:
        raise UsageError(f'rl.resample={rl.resample} compares the responses of a group: set rl.group of at least 2')
    if config.optim.batch_warmup:
        raise UsageError(f'optim.batch_warmup={config.optim.batch_warmup}: a rollout does not grow, set it to 0')
    if config.data.replay:
        raise UsageError(f'data.replay={config.data.replay}: this stage replays no text, set it to 0')


def settle(config: Config, defaults: Mapping[str, Any]) -> None:
    """Sets what is None by what is said (no leash without β, no β without a leash, a clip's own bound), then by the
    defaults."""
    rl = config.rl
    if rl.beta == 0 and rl.kl is None:
        rl.kl = 'none'
    if rl.kl == 'none' and rl.beta is None:
        rl.beta = 0.0
    if rl.clip_high is None:
        rl.clip_high = CLIP_HIGH.get(rl.clip)
    for key, value in defaults.items():
        group, _, name = key.rpartition('.')
        owner = config[group] if group else config
        if name in owner and owner[name] is None:
            owner[name] = value


def prepare(config: Config, tokenizer: str | None, say: Say) -> WithReplay:
    """Conversations, of whose last answers the prompts are what stands before them."""
    data = language.prepare_dialogue(config, tokenizer, say, chats.form)
    for s in data.own.sources:
        chats.check(s, seq_len=config.seq_len)
    if config.reward_from:
        own = {'tokenizer': data.tokenizer.fingerprint, 'beside': config.init_from}
        theirs = rewards.check_model(config.reward_from, **own)
        own, other = config.model.to_dict(), theirs['config']['model']
        if different := sorted(k for k in other if k in own and other[k] != own[k]):
            raise UsageError(
                f'reward_from={config.reward_from} has another model ({different[0]}={other[different[0]]})'
            )
    return data


class Online(Task):
    """Draws responses to prompts, scores them, and learns from each rollout for `rl.epochs` epochs.

    A rollout is a pure function of the parameters, the seed and its number. Its rows are kept in checkpoints, so that a
    run which dies in the middle of one goes on with the same.
    """

    online = True
    until: ClassVar[tuple[str, ...]] = ('rl.beta', 'rl.kl_budget', 'rl.kl_target')
    extra: ClassVar[tuple[str, ...]] = ()  # arrays of tokens beside those that every member of the family has
    extra_measures: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        shape = self.responses, self.width
        self.rows = {name: np.zeros(shape, x.dtype) for name, x in self.batch().items()}
        self.health = np.full(len(self.measures), np.nan, np.float32)  # of the last rollout, in the order of measures
        self.means = np.full(WINDOW, np.nan, np.float32)  # the mean scores of the last rollouts, the newest at the end
        self.moved_beta = np.float32(self.config.rl.beta or 0)
        self.before: list[dict[str, np.ndarray]] = []  # scores of the policy as it began, of each source
        self.began: Parent | None = None  # what that was, of a run that goes on

    # ---- sizes ----

    @property
    def responses(self) -> int:
        """In a rollout."""
        return self.config.rl.prompts * self.config.rl.group

    @property
    def updates(self) -> int:
        """Steps on a rollout."""
        return self.config.rl.epochs * (self.responses // self.config.batch_size)

    @cached_property
    def width(self) -> int:
        """Tokens of a row: room for the longest prompt with its response, four times, so that little of a row is empty;
        seq_len where no data are read."""
        if self.data is None:
            return self.config.seq_len
        parts = jax.sharding.get_mesh().shape.get('seq', 1) * ROUND
        needed = 4 * (self.asked.longest + self.config.rl.max_new_tokens)
        return min(self.config.seq_len, math.ceil(needed / parts) * parts)

    def epoch(self) -> int:
        return self.updates * max(1, len(self.asked) // self.config.rl.prompts)

    @property
    def leashed(self) -> bool:
        """Whether there is a reference: with an adapter it is the base."""
        return self.config.rl.kl != 'none' or self.config.rl.kl_budget is not None

    @property
    def frozen(self) -> Mapping[str, str]:
        reference = {'reference': 'init_from'} if self.leashed and self.adapter is None else {}
        return {**super().frozen, **reference, **({'reward': 'reward_from'} if self.config.reward_from else {})}

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ('old_BT', 'sampler_BT', 'reference_BT', 'advantage_BT', *self.extra)
        shape, arrays = (self.config.batch_size, self.width), ROWS | dict.fromkeys(names, np.float32)
        return plan.abstract_batch({name: (shape, dtype) for name, dtype in arrays.items()})

    # ---- rollouts ----

    @cached_property
    def asked(self) -> Prompts:
        c = self.config
        return Prompts(self.data.own.sources, seq_len=c.seq_len, max_new_tokens=c.rl.max_new_tokens, seed=c.seed)

    def questions(self, rollout: int, again: int = 0) -> list[Question]:
        """The prompts of a rollout; those that are drawn again, in another order."""
        count = self.config.rl.prompts
        return [self.asked.at(j, again)[1] for j in range(rollout * count, (rollout + 1) * count)]

    def precompute(self, parents: Mapping[str, Parent]) -> dict[str, Parent]:
        """Reads the scale of the reward model's scores: that of the checkpoint which the run began with."""
        self.began = parents.get('policy')
        if run := self.config.reward_from:
            step = parents['reward'].step if 'reward' in parents else checkpoint.locate(run)
            self.scale = rewards.read_scale(run, step)
        if line := self.verified.baseline(self.asked.all()):
            self.recorder.say(line)
        return {}

    def source(self, start: int) -> Source:
        del start
        size, per_epoch = self.config.batch_size, self.responses // self.config.batch_size

        # Row j·n + i is of microbatch i of n: the first of them are filled first.
        count = size // self.config.execution.microbatch
        places = np.arange(size).reshape(-1, count).T.reshape(-1)

        def source(state: training.TrainState, i: int) -> Batch:
            rollout, update = divmod(i, self.updates)
            if update == 0:
                with progress.task(f'rollout {rollout}'):
                    self.rows = self.roll_out(state, rollout)
                processes.assert_equal(f'the rows of rollout {rollout}', _digest(self.rows))
            epoch, part = divmod(update, per_epoch)
            key = np.random.SeedSequence([self.config.seed, rollout, epoch])
            taken = np.random.default_rng(key).permutation(self.responses)[part * size : (part + 1) * size]
            rows = {name: x[taken] for name, x in self.rows.items()}
            laid = self.packing(rows).lay(rows)
            whole = {name: np.zeros((size, self.width), x.dtype) for name, x in laid.items()}
            for name, x in laid.items():
                whole[name][places[: len(x)]] = x
            return sharding.shard_batch(whole)

        return source

    def roll_out(self, state: training.TrainState, rollout: int) -> dict[str, np.ndarray]:
        """Draws, scores and weighs: the rows of a rollout. With `rl.resample` groups whose scores do not differ give
        way to those of other prompts (DAPO's dynamic sampling)."""
        c, rl = self.config, self.config.rl
        models = assemble(state.trainable, state.frozen)
        found, failed = self._scored(models, self.questions(rollout), [c.seed, rollout])
        score = rewards.combined(found.scores, c)
        for again in range(1, rl.resample + 1):
            if not (wanted := self._same(score)).any():
                break
            others, more = self._scored(models, self.questions(rollout, again), [c.seed, rollout, again])
            found = found.filled(wanted, others, ~self._same(rewards.combined(others.scores, c)), rl.group)
            score = rewards.combined(found.scores, c)
            failed.update(more)
        ended = np.array([d.ended for d in found.drawn])
        rows = self.rows_of(found)
        rows |= self.measured(models, rows)
        beta, told = self.beta, self._told(rows, found, ended)
        self.note(**told, **failed, **({'beta': beta} if rl.kl == 'reward' else {}))
        if rl.kl_target:
            self._move_beta()
        self.means = np.append(self.means[1:], np.float32(told['reward']))
        if rl.truncated == 'penalty':
            score = np.where(ended, score, PENALTY)
        elif rl.truncated == 'rising':
            score = score + rollouts.overlong([len(d.ids) for d in found.drawn], rl.max_new_tokens)
        elif rl.truncated == 'mask':
            rows['weights_BT'] = rows['weights_BT'] * ended[:, None]
        return rows | self.weigh(rows, score, rollout, beta)

    @abc.abstractmethod
    def weigh(
        self, rows: Mapping[str, np.ndarray], score: np.ndarray, rollout: int, beta: float
    ) -> dict[str, np.ndarray]:
        """The advantages [responses, T] of a rollout, and what else the loss takes; `beta` is that of a leash in the
        reward."""
        ...

    def _scored(self, models: Roles, questions: Sequence[Question], seed: Sequence[int]) -> tuple[Scored, Counter[str]]:
        """(responses to questions, `rl.group` to each, with their scores; how many got none of a source)."""
        asked = [q for q in questions for _ in range(self.config.rl.group)]
        drawn = self.draw(models['policy'], asked, seed)
        scores, failed = self.scores(models, asked, drawn)
        return Scored(asked, drawn, scores), failed

    def draw(self, policy: Any, asked: Sequence[Question], seed: Sequence[int]) -> list[generate.Drawn]:
        """A response to each question, at most a rollout's."""
        rl, first = self.config.rl, int(np.random.SeedSequence(seed).generate_state(1)[0])
        return generate.draw(
            policy, self.cfg, [q.prompt for q in asked], max_new_tokens=rl.max_new_tokens,
            stop_ids=self.data.stop_ids, temperature=rl.temperature, seed=first,
        )  # fmt: skip

    def rows_of(self, found: Scored) -> dict[str, np.ndarray]:
        """A row for each response after its prompt, in which the response is to be learned."""
        rows = dict(pipeline.stack([self._row(q.prompt, d.ids) for q, d in zip(found.asked, found.drawn, strict=True)]))
        rows['sampler_BT'] = np.zeros_like(rows['weights_BT'])
        rows['sampler_BT'][rows['weights_BT'] > 0] = np.concatenate([d.logps for d in found.drawn])
        rows['reference_BT'] = np.zeros_like(rows['weights_BT'])  # where nobody is the reference
        return rows

    def _row(self, prompt: Sequence[int], drawn: Sequence[int]) -> Any:
        ids = np.array([*prompt, *drawn])
        pad_id = self.data.own.sources[0].train.pad_id
        return chats.segments_row([(ids, np.arange(len(ids)) >= len(prompt))], self.width, pad_id)

    def _same(self, score: np.ndarray) -> np.ndarray:
        """[prompts] bool: groups that teach nothing."""
        return np.asarray(advantages.same(jnp.asarray(score.reshape(-1, self.config.rl.group))))

    def measured(self, models: Roles, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The trainer's own log-probs of what was drawn, by the policy and the reference."""
        found = {'old_BT': self.by_batches(models['policy'], rows, log_probs)}
        if self.leashed:
            found['reference_BT'] = self.by_batches(models['reference'], rows, log_probs)
        return found

    def by_batches(self, params: Any, rows: Mapping[str, np.ndarray], of: Any) -> np.ndarray:
        """A function of tokens, [responses, T], a microbatch of packed rows at a time."""
        size, out, packing = self.config.execution.microbatch, [], self.packing(rows)
        laid = packing.lay({name: rows[name] for name in ROWS})
        for at in range(0, len(packing.rows), size):
            some = {name: x[at : at + size] for name, x in laid.items()}
            empty = [(0, size - len(some['tokens_BT'])), (0, 0)]
            some = sharding.shard_batch({name: np.pad(x, empty) for name, x in some.items()})
            out.append(np.asarray(of(params, some, self.cfg, self.config.rl.temperature)))
        return packing.unpack(np.concatenate(out), self.responses)

    def packing(self, rows: Mapping[str, np.ndarray]) -> Packing:
        return Packing.of((rows['segments_BT'] > 0).sum(1).tolist(), self.width)

    def scores(
        self, models: Roles, asked: Sequence[Question], drawn: Sequence[generate.Drawn]
    ) -> tuple[dict[str, np.ndarray], Counter[str]]:
        """({source: the score of each response}, before its weight; how many got none, by a measure's name)."""
        c, model = self.config, None
        if 'reward' in models:
            model = rewards.Model(models['reward'], self.cfg, self.scale, self.width, c.execution.microbatch)
        found = rewards.scores(c, self.data.tokenizer, asked, drawn, model)
        more, failed = self.verified.scores(asked, drawn)
        return found | more, failed

    @cached_property
    def verified(self) -> verified.Verified:
        """The verifier and the judge, if the run has any."""
        data = self.data
        return verified.Verified(self.config, data.tokenizer, data.template, [s.name for s in data.own.sources])

    # ---- health ----

    def _told(self, rows: Mapping[str, np.ndarray], found: Scored, ended: np.ndarray) -> dict[str, float]:
        """The health of a rollout."""
        mask, old = rows['weights_BT'], rows['old_BT']
        score = rewards.combined(found.scores, self.config, normalise=False)
        gap = (old - rows['sampler_BT']) * mask
        told = {
            'reward': float(score.mean()), 'reward_std': float(score.std()), 'ended': float(ended.mean()),
            'length': float(mask.sum(1).mean()), 'mismatch_max': float(np.abs(gap).max()),
            'mismatch_kl': float(np.sum(np.exp(gap) - 1 - gap) / mask.sum()),
        }  # fmt: skip
        if 'verify' in found.scores:
            told['exact'] = float(np.mean(found.scores['verify'] == 1))
        if len(found.scores) > 1:
            told |= {f'reward_{name}': float(x.mean()) for name, x in found.scores.items()}
        if self.leashed:
            apart = (old - rows['reference_BT']) * mask
            told['kl'] = float(apart.sum(1).mean())
            told['kl_k3'] = float((np.exp(-apart) - 1 + apart).sum(1).mean())
        return told

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what is measured of a rollout."""
        several = rewards.sources(self.config)
        more = (f'reward_{name}' for name in several if len(several) > 1)
        return (*MEASURES, *verified.MEASURES, *more, *self.extra_measures)

    def note(self, **measured: float) -> None:
        """Keeps measures of the last rollout."""
        for name, value in measured.items():
            self.health[self.measures.index(name)] = value

    def told(self) -> dict[str, float]:
        known = zip(self.measures, self.health.tolist(), strict=True)
        return {f'rl/{name}': value for name, value in known if not math.isnan(value)}

    def panel(self) -> str:
        told = self.told()
        return ' · '.join(f'{name} {told[f"rl/{name}"]:.3g}' for name in PANEL if f'rl/{name}' in told)

    @property
    def beta(self) -> float:
        """The coefficient of a leash in the reward, as it is now."""
        return float(self.moved_beta) if self.config.rl.kl_target else self.config.rl.beta

    def _move_beta(self) -> None:
        """β ← β(1 + error·n/horizon), error = KL/target − 1 within ± 0.2, n the responses since (Ziegler et al., 2019,
        section 2.2)."""
        error = np.clip(self.told()['rl/kl'] / self.config.rl.kl_target - 1, -0.2, 0.2)
        self.moved_beta = np.float32(self.moved_beta * (1 + error * self.responses / HORIZON))

    def alarm(self, metrics: Mapping[str, float]) -> str | None:
        """Reward that rises while the policy leaves the budget of its leash is a reward that is hacked."""
        budget, kl = self.config.rl.kl_budget, self.told().get('rl/kl')
        before = self.means[:-1][~np.isnan(self.means[:-1])]
        if not budget or kl is None or kl <= budget or (before.size and self.means[-1] <= before.mean()):
            return None
        return (
            f'the reward rises and the policy is {kl:.1f} nats a response from the reference, rl.kl_budget={budget}: '
            'it is being hacked; set a larger rl.beta or rl.kl_budget'
        )

    def state_dict(self) -> dict[str, Any]:
        beta = np.array([self.config.rl.beta, self.moved_beta], np.float32)  # as it was set, and as it is
        return {**self.rows, 'health': self.health, 'means': self.means, 'beta': beta}

    def load(self, arrays: Mapping[str, Any]) -> None:
        rows = dict(arrays)
        self.health, self.means = (np.array(rows.pop(name)) for name in ('health', 'means'))
        before, moved = rows.pop('beta')
        if before == np.float32(self.config.rl.beta):  # another one begins anew
            self.moved_beta = np.float32(moved)
        self.rows = rows

    # ---- the loss ----

    def loss(self) -> training.Loss:
        """The surrogate on the tokens that were drawn, and the leash where it is a loss."""
        rl, cfg = self.config.rl, self.cfg
        clip = losses.Clip(rl.clip, rl.clip_low, rl.clip_high)

        def terms(models: Roles, batch: Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
            del key
            mask_BT, old_BT = batch['weights_BT'], batch['old_BT']
            h_BTD, aux = sequences.hidden(models['policy'], cfg, batch)
            logp_BT, entropy_BT = sequences.of_hidden(models['policy'], cfg, h_BTD, batch, rl.temperature)
            own = {'segments_BT': batch['segments_BT']}
            weight_BT = losses.token_weights(mask_BT, rl.aggregation, **own)
            weight_BT *= losses.mismatch_weights(
                old_BT, batch['sampler_BT'], mask_BT, how=rl.mismatch, ratio=rl.mismatch_ratio, cap=MISMATCH_CAP, **own
            )
            loss_BT, told = losses.surrogate(
                logp_BT, old_BT, batch['advantage_BT'], mask_BT, ratio=rl.ratio, clip=clip, **own
            )
            found = {'policy': jnp.sum(weight_BT * loss_BT), **aux}
            if rl.kl == 'k3':
                found['kl'] = jnp.sum(weight_BT * losses.k3_loss(logp_BT, batch['reference_BT'], old_BT, mask_BT))
            elif rl.kl == 'full':
                both = (models['policy'], models['reference'])
                found['kl'] = jnp.sum(weight_BT * sequences.token_kl(*both, cfg, h_BTD, batch, rl.temperature))
            metrics = {name: jnp.sum(x) for name, x in told.items()}
            return found | self.more_terms(models, batch), metrics | {'entropy': jnp.sum(entropy_BT * mask_BT)}

        def denominators(batch: Batch) -> training.Sums:
            mask_BT = batch['weights_BT']
            own = {'segments_BT': batch['segments_BT'], 'most': self.config.batch_size * rl.max_new_tokens}
            whole = losses.denominator(mask_BT, rl.aggregation, **own)
            found = dict.fromkeys(('ratio', 'clipped', 'entropy', 'value'), jnp.sum(mask_BT))
            return found | {'policy': whole, 'kl': whole} | aux_weights(cfg, batch)

        coefs = {'policy': 1.0, **({'kl': rl.beta} if rl.kl in ('k3', 'full') else {}), **self.more_coefficients()}
        return training.Loss(terms, denominators, {**coefs, **aux_coefficients(cfg)})

    def more_terms(self, models: Roles, batch: Batch) -> dict[str, jax.Array]:
        """Terms of the objective beside the policy's."""
        del models, batch
        return {}

    def more_coefficients(self) -> dict[str, float]:
        return {}

    # ---- around the steps ----

    def describe(self) -> list[str]:
        c, rl, asked = self.config, self.config.rl, self.asked
        lines = [
            f'{len(asked):,} prompts; a rollout: {rl.prompts} prompts × {rl.group} responses of at most '
            f'{rl.max_new_tokens} tokens, {self.updates} steps of {c.batch_size}'
        ]
        if asked.too_long:
            lines.append(f'{asked.too_long:,} prompts left out: longer than seq_len − rl.max_new_tokens')
        return lines

    def heldout_prompts(self) -> list[Prompt]:
        return language.heldout_questions(self)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Answers to held-out questions and their scores, the text that may have been forgotten, and the fixed
        prompts."""
        c, data, policy, metrics = self.config, self.data, state.models['policy'], {}
        with progress.task('held-out rewards'):
            gained = held_out.gained(self, state)
        for s, found in zip(data.own.sources, gained, strict=True):
            metrics |= {f'eval/{s.name}/{name}': value for name, value in found.items()}
            metrics |= language.answer_metrics(self, policy, s, self.verified.verifier)
        if data.text:
            metrics |= language.text_metrics(c, self.cfg, data.text, policy)
        language.log_samples(self, policy, step, metrics, data.template)
        return metrics


def _digest(rows: Mapping[str, np.ndarray]) -> str:
    """A digest of rows, which all processes must have alike: each puts its part of them on its devices."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(rows):
        hashed.update(rows[name].tobytes())
    return hashed.hexdigest()


@partial(jax.jit, static_argnums=(2, 3))
def log_probs(params: Any, batch: Batch, cfg: ModelConfig, temperature: float) -> jax.Array:
    return sharding.replicated(sequences.token_log_probs(params, cfg, batch, temperature)[0])


@partial(jax.jit, static_argnums=(2, 3))
def values(params: Any, batch: Batch, cfg: ModelConfig, temperature: float) -> jax.Array:
    del temperature
    return sharding.replicated(sequences.token_values(params, cfg, batch)[0])
