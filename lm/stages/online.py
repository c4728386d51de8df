"""Shared by the stages that learn from what their policy draws: rollouts, scores, and the step on them."""

import abc
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import progress, sharding
from lm.config import Config, split_run
from lm.data import chats, pipeline
from lm.data.chats import Question, WithReplay
from lm.data.packing import shuffled
from lm.data.prompts import Prompt
from lm.errors import RunError, UsageError
from lm.losses import policy as losses
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.roles import Roles, assemble
from lm.multihost import processes
from lm.rl import rewards, verified
from lm.runs import checkpoint, reward_scale, rundir, saved_config
from lm.runs.saved_config import Parent
from lm.sampling import generate
from lm.stages import language, plan
from lm.stages.spec import ROWS, Batch, Say, Source, Task
from lm.training import step as training

ROUND = 32  # tokens to which the width of a row is rounded up
PENALTY = np.float32(-1)  # in place of the score of a response without an end of turn
MISMATCH_CAP = 2.0  # the largest importance weight of a token, and one over the least
WINDOW = 6  # rollouts over which a rising reward is seen
# Of a rollout: its scores, how its responses end, the gap between sampler and trainer (the largest |Δ log p|, and k3 a
# token), and k1 from the reference in nats a response; then those of verifiers and judges.
MEASURES = ('reward', 'reward_std', 'ended', 'length', 'mismatch_max', 'mismatch_kl', 'kl', *verified.MEASURES)


def check(config: Config) -> None:
    """Raises UsageError for settings that make no sense together, before anything is read."""
    rl = config.rl
    if not config.init_from:
        why = 'begins with a model that answers, and does not branch'
        raise UsageError(f'stage={config.stage} {why}: set --config.init_from=DIR')
    if not (config.reward_from or config.reward.fn or config.reward.verify or config.reward.judge):
        raise UsageError(
            f'stage={config.stage} needs a reward: set reward_from=DIR, or reward.fn, reward.verify or reward.judge='
            'package.module:function, or reward.verify=gym'
        )
    verified.check(config)
    if config.reward.fn:
        rewards.function(config.reward.fn)
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
        raise UsageError(f'rl.beta={rl.beta} with rl.kl=none does nothing: set rl.kl=reward or k3, or leave it out')
    if rl.kl != 'none' and not rl.beta:
        raise UsageError(f'rl.kl={rl.kl} with rl.beta=0 is no leash: set rl.beta, or rl.kl=none')
    if config.optim.batch_warmup:
        raise UsageError(f'optim.batch_warmup={config.optim.batch_warmup}: a rollout does not grow, set it to 0')
    if config.data.replay:
        raise UsageError(f'data.replay={config.data.replay}: this stage replays no text, set it to 0')


def prepare(config: Config, tokenizer: str | None, say: Say) -> WithReplay:
    """Conversations, of whose last answers the prompts are what stands before them."""
    data = language.prepare_dialogue(config, tokenizer, say, chats.form)
    for s in data.own.sources:
        chats.check(s, seq_len=config.seq_len)
    if config.reward_from:
        theirs = rundir.read_config(config.reward_from)
        if saved_config.about(theirs).output != 'scores':
            raise UsageError(f'reward_from={config.reward_from} is no reward model: name a run that gives scores')
        if theirs.get('tokenizer') not in (None, data.tokenizer.fingerprint):
            raise UsageError(f'reward_from={config.reward_from} has another tokenizer than {config.init_from}')
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
    measures: ClassVar[tuple[str, ...]] = MEASURES
    extra: ClassVar[tuple[str, ...]] = ()  # arrays of tokens beside those that every member of the family has

    def __post_init__(self) -> None:
        shape = self.responses, self.width
        self.rows = {name: np.zeros(shape, x.dtype) for name, x in self.batch().items()}
        self.health = np.full(len(self.measures), np.nan, np.float32)  # of the last rollout, in the order of measures
        self.means = np.full(WINDOW, np.nan, np.float32)  # the mean scores of the last rollouts, the newest at the end

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
        """Tokens of a row: room for the longest prompt with its response; seq_len where no data are read."""
        if self.data is None:
            return self.config.seq_len
        parts = jax.sharding.get_mesh().shape.get('seq', 1) * ROUND
        needed = max(length for *_, length in self.asked) + self.config.rl.max_new_tokens
        return min(self.config.seq_len, math.ceil(needed / parts) * parts)

    def epoch(self) -> int:
        return self.updates * max(1, len(self.asked) // self.config.rl.prompts)

    @property
    def frozen(self) -> Mapping[str, str]:
        rl = self.config.rl
        reference = {'reference': 'init_from'} if rl.kl != 'none' or rl.kl_budget else {}
        return reference | ({'reward': 'reward_from'} if self.config.reward_from else {})

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        names = ('old_BT', 'sampler_BT', 'advantage_BT', *self.extra)
        names += ('reference_BT',) if 'reference' in self.frozen else ()
        shape, arrays = (self.config.batch_size, self.width), ROWS | dict.fromkeys(names, np.float32)
        return plan.abstract_batch({name: (shape, dtype) for name, dtype in arrays.items()})

    # ---- rollouts ----

    @cached_property
    def asked(self) -> list[tuple[int, int, int]]:
        """(source, conversation, tokens) of each prompt that leaves room for a response."""
        rl, seq_len = self.config.rl, self.config.seq_len
        found = [
            (n, i, len(question.prompt))
            for n, s in enumerate(self.data.own.sources)
            for i in range(s.train.documents)
            if (question := self._question(n, i)) is not None and len(question.prompt) <= seq_len - rl.max_new_tokens
        ]
        if not found:
            raise UsageError(
                f'no prompt leaves room for rl.max_new_tokens={rl.max_new_tokens} in seq_len={seq_len}: set a longer '
                'seq_len'
            )
        return found

    def _questions(self, rollout: int) -> list[Question]:
        """The prompts of a rollout: each once in an epoch, in an order that the seed gives."""
        count, seed = self.config.rl.prompts, self.config.seed
        asked = (self.asked[shuffled(j, len(self.asked), seed)] for j in range(rollout * count, (rollout + 1) * count))
        return [self._question(source, conversation) for source, conversation, _ in asked]

    def _question(self, source: int, conversation: int) -> Any:
        """The last answer of a conversation and what stands before it; None if it has none."""
        ids, trained = self.data.own.sources[source].train.conversation(conversation)
        return chats.last_answer(ids, trained, self.config.seq_len)

    def precompute(self, parents: Mapping[str, Parent]) -> dict[str, Parent]:
        """Reads the scale of the reward model's scores: that of the checkpoint which the run began with."""
        if run := self.config.reward_from:
            step = parents['reward'].step if 'reward' in parents else checkpoint.locate(run)
            self.scale = reward_scale.read(epath.Path(split_run(run)[0]), step)
        if line := self.verified.baseline([self._question(n, i) for n, i, _ in self.asked]):
            self.recorder.say(line)
        return {}

    def source(self, start: int) -> Source:
        del start
        size, per_epoch = self.config.batch_size, self.responses // self.config.batch_size

        def source(state: training.TrainState, i: int) -> Batch:
            rollout, update = divmod(i, self.updates)
            if update == 0:
                with progress.task(f'rollout {rollout}'):
                    self.rows = self.roll_out(state, rollout)
            epoch, part = divmod(update, per_epoch)
            key = np.random.SeedSequence([self.config.seed, rollout, epoch])
            rows = np.random.default_rng(key).permutation(self.responses)[part * size : (part + 1) * size]
            return sharding.shard_batch({name: x[rows] for name, x in self.rows.items()})

        return source

    def roll_out(self, state: training.TrainState, rollout: int) -> dict[str, np.ndarray]:
        """Draws, scores and weighs: the rows of a rollout."""
        c, rl, data = self.config, self.config.rl, self.data
        models = assemble(state.trainable, state.frozen)
        questions = [q for q in self._questions(rollout) for _ in range(rl.group)]
        seed = int(np.random.SeedSequence([c.seed, rollout]).generate_state(1)[0])
        drawn = generate.draw(
            models['policy'], self.cfg, [q.prompt for q in questions], max_new_tokens=rl.max_new_tokens,
            stop_ids=data.stop_ids, temperature=rl.temperature, seed=seed,
        )  # fmt: skip
        ids = [[*q.prompt, *d.ids] for q, d in zip(questions, drawn, strict=True)]
        pad_id = data.own.sources[0].train.pad_id
        rows = _rows(ids, [len(q.prompt) for q in questions], self.width, pad_id)
        rows['sampler_BT'] = np.zeros_like(rows['weights_BT'])
        rows['sampler_BT'][rows['weights_BT'] > 0] = np.concatenate([d.logps for d in drawn])
        rows |= self.measured(models, rows)
        ended = np.array([d.ended for d in drawn])
        score = self.scores(models, questions, drawn, ids)
        self.note(**self._told(rows, score, ended))
        self.means = np.append(self.means[1:], np.float32(score.mean()))
        if rl.truncated == 'penalty':
            score = np.where(ended, score, PENALTY)
        elif rl.truncated == 'mask':
            rows['weights_BT'] = rows['weights_BT'] * ended[:, None]
        return rows | self.weigh(rows, score, rollout)

    @abc.abstractmethod
    def weigh(self, rows: Mapping[str, np.ndarray], score: np.ndarray, rollout: int) -> dict[str, np.ndarray]:
        """The advantages [responses, T] of a rollout, and what else the loss takes."""
        ...

    def measured(self, models: Roles, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The trainer's own log-probs of what was drawn, by the policy and the reference."""
        found = {'old_BT': self.by_batches(models['policy'], rows, log_probs)}
        if 'reference' in models:
            found['reference_BT'] = self.by_batches(models['reference'], rows, log_probs)
        return found

    def by_batches(self, params: Any, rows: Mapping[str, np.ndarray], of: Any) -> np.ndarray:
        """A function of tokens, [responses, T], a microbatch at a time."""
        size, out = self.config.execution.microbatch, []
        for at in range(0, self.responses, size):
            some = sharding.shard_batch({name: rows[name][at : at + size] for name in ROWS})
            out.append(np.asarray(of(params, some, self.cfg, self.config.rl.temperature)))
        return np.concatenate(out)

    def scores(self, models: Roles, questions: Any, drawn: Any, ids: Any) -> np.ndarray:
        """The score of each response, float32 [responses]."""
        c, total, tokenizer = self.config, np.zeros(self.responses, np.float32), self.data.tokenizer
        prompts = [tokenizer.decode(q.prompt) for q in questions]
        if 'reward' in models:
            at_once = {'width': self.width, 'rows': c.execution.microbatch}
            found = rewards.of_model(models['reward'], self.cfg, self.scale, ids, **at_once)
            total += rewards.checked(found, prompts, c.reward_from)
        if c.reward.fn:
            told = None
            if processes.first():  # one process asks, and tells the others
                said = [tokenizer.decode(d.ids[:-1] if d.ended else d.ids) for d in drawn]
                wanted = [tokenizer.decode(q.answer) for q in questions]
                try:
                    given = rewards.function(c.reward.fn)(prompts, said, wanted)
                except (Exception, SystemExit) as error:  # a user's own code
                    raise RunError(f'reward.fn={c.reward.fn}: {type(error).__name__}: {error}') from error
                told = rewards.checked(given, prompts, f'reward.fn={c.reward.fn}').tolist()
            total += np.asarray(processes.all_gather(told)[0], np.float32)
        score, told = self.verified.scores(questions, [d.ids[:-1] if d.ended else d.ids for d in drawn])
        self.note(**told)
        return total + score

    @cached_property
    def verified(self) -> verified.Verified:
        """The verifier and the judge, if the run has any."""
        return verified.Verified(self.config, self.data)

    def _told(self, rows: Mapping[str, np.ndarray], score: np.ndarray, ended: np.ndarray) -> dict[str, float]:
        """The health of a rollout."""
        mask, old = rows['weights_BT'], rows['old_BT']
        gap = (old - rows['sampler_BT']) * mask
        found = {
            'reward': float(score.mean()), 'reward_std': float(score.std()), 'ended': float(ended.mean()),
            'length': float(mask.sum(1).mean()), 'mismatch_max': float(np.abs(gap).max()),
            'mismatch_kl': float(np.sum(np.exp(gap) - 1 - gap) / mask.sum()),
        }  # fmt: skip
        if 'reference_BT' in rows:
            found['kl'] = float(((old - rows['reference_BT']) * mask).sum(1).mean())  # k1, nats a response
        return found

    def note(self, **measured: float) -> None:
        """Keeps measures of the last rollout."""
        for name, value in measured.items():
            self.health[self.measures.index(name)] = value

    def told(self) -> dict[str, float]:
        """{'rl/…': what is known of the last rollout}."""
        known = zip(self.measures, self.health.tolist(), strict=True)
        return {f'rl/{name}': value for name, value in known if not math.isnan(value)}

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
        return {**self.rows, 'health': self.health, 'means': self.means}

    def load(self, arrays: Mapping[str, Any]) -> None:
        self.rows = dict(arrays)
        self.health, self.means = (np.array(self.rows.pop(name)) for name in ('health', 'means'))

    # ---- the loss ----

    def loss(self) -> training.Loss:
        """The surrogate on the tokens that were drawn, and with `rl.kl=k3` the leash."""
        rl, cfg = self.config.rl, self.cfg
        clip = losses.Clip(rl.clip, rl.clip_low, rl.clip_high)

        def terms(models: Roles, batch: Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
            del key
            mask_BT, old_BT = batch['weights_BT'], batch['old_BT']
            logp_BT, entropy_BT, aux = sequences.token_log_probs(models['policy'], cfg, batch, rl.temperature)
            weight_BT = losses.token_weights(mask_BT, rl.aggregation)
            weight_BT *= losses.mismatch_weights(
                old_BT, batch['sampler_BT'], mask_BT, how=rl.mismatch, cap=MISMATCH_CAP
            )
            loss_BT, told = losses.surrogate(logp_BT, old_BT, batch['advantage_BT'], mask_BT, ratio=rl.ratio, clip=clip)
            found = {'policy': jnp.sum(weight_BT * loss_BT), **aux}
            if rl.kl == 'k3':
                found['kl'] = jnp.sum(weight_BT * losses.k3_loss(logp_BT, batch['reference_BT'], old_BT, mask_BT))
            metrics = {name: jnp.sum(x) for name, x in told.items()}
            return found | self.more_terms(models, batch), metrics | {'entropy': jnp.sum(entropy_BT * mask_BT)}

        def denominators(batch: Batch) -> training.Sums:
            mask_BT = batch['weights_BT']
            whole = losses.denominator(mask_BT, rl.aggregation, longest=rl.max_new_tokens)
            found = dict.fromkeys(('ratio', 'clipped', 'entropy', 'value'), jnp.sum(mask_BT))
            return found | {'policy': whole, 'kl': whole} | aux_weights(cfg, batch)

        coefs = {'policy': 1.0, **({'kl': rl.beta} if rl.kl == 'k3' else {}), **self.more_coefficients()}
        return training.Loss(terms, denominators, {**coefs, **aux_coefficients(cfg)})

    def more_terms(self, models: Roles, batch: Batch) -> dict[str, jax.Array]:
        """Terms of the objective beside the policy's."""
        del models, batch
        return {}

    def more_coefficients(self) -> dict[str, float]:
        return {}

    # ---- around the steps ----

    def describe(self) -> list[str]:
        c, rl = self.config, self.config.rl
        return [
            f'{len(self.asked):,} prompts; a rollout: {rl.prompts} prompts × {rl.group} responses of at most '
            f'{rl.max_new_tokens} tokens, {self.updates} steps of {c.batch_size}'
        ]

    def heldout_prompts(self) -> list[Prompt]:
        return language.heldout_questions(self)

    def evaluate(self, state: training.TrainState, step: int) -> Mapping[str, float]:
        """Answers to held-out questions, the rollout's health, the text that may have been forgotten, and the fixed
        prompts."""
        c, data, policy, metrics = self.config, self.data, state.models['policy'], self.told()
        for s in data.own.sources:
            metrics |= language.answer_metrics(self, policy, s, self.verified.verifier)
        if data.text:
            metrics |= language.text_metrics(c, self.cfg, data.text, policy)
        language.log_samples(self, policy, step, metrics, data.template)
        return metrics


def _rows(ids: Sequence[Sequence[int]], prompts: Sequence[int], width: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row for each prompt with its response, of which the response is to be learned; `prompts` are their lengths."""
    drawn = [np.arange(len(own)) >= n for own, n in zip(ids, prompts, strict=True)]
    pairs = zip(map(np.asarray, ids), drawn, strict=True)
    return dict(pipeline.stack([chats.segments_row([pair], width, pad_id) for pair in pairs]))


@partial(jax.jit, static_argnums=(2, 3))
def log_probs(params: Any, batch: Batch, cfg: ModelConfig, temperature: float) -> jax.Array:
    return sharding.replicated(sequences.token_log_probs(params, cfg, batch, temperature)[0])


@partial(jax.jit, static_argnums=(2, 3))
def values(params: Any, batch: Batch, cfg: ModelConfig, temperature: float) -> jax.Array:
    del temperature
    return sharding.replicated(sequences.token_values(params, cfg, batch)[0])
