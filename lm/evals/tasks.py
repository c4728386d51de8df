"""The evaluation tasks that `lm.evaluate` lists, the same questions, pairs and texts whatever the run's stage, so that
their rows compare; and a reward model's score of one answer.

What a run was only pretrained on has no marks of a conversation; it is asked through its tokenizer's template all the
same, so that its row shows where it began.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lm.config import split_run
from lm.data import chats, pairs, pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.prepare import TEXT, Prepared, prepare
from lm.data.records import Kind
from lm.data.sources import has_default, open_source, parse_mixture
from lm.errors import UsageError
from lm.evals import answers, gains, heldout, preferences
from lm.model import sequences
from lm.rl import rewards
from lm.runs import loading, reward_scale, rundir, saved_config
from lm.runs.loading import Model
from lm.sampling import generate
from lm.settings import INT32_MAX

DRAWN = 256  # responses drawn at once, about
TOKENS_A_DEVICE = 1 << 15  # at once: more are not quicker, and what an accelerator trained with may not fit here
Say = Callable[[str], None]
_FORMS = {'chat': chats.form, 'pairs': pairs.form}


class Limits(NamedTuple):
    """The size of an evaluation: rows of each source at most (None: all), and tokens of an answer; and the reward model
    that judges, for a task that asks one."""

    rows: int | None
    max_new_tokens: int
    reward_from: str | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A run that is measured, on the current mesh."""

    run: str
    model: Model
    say: Say

    @property
    def seq_len(self) -> int:
        return self.model.config['seq_len']

    @property
    def scored(self) -> bool:
        """True for a reward model."""
        return self.model.about.output == 'scores'

    @property
    def template(self) -> ChatTemplate:
        """The run's chat template. Raises UsageError if its tokenizer has none."""
        return ChatTemplate.load(rundir.tokenizer_folder(self.run), self.model.tokenizer)

    @property
    def rows_at_once(self) -> int:
        return rows_at_once(self.model.config['execution']['microbatch'], self.seq_len, jax.sharding.get_mesh().size)


def rows_at_once(microbatch: int | None, seq_len: int, devices: int) -> int:
    """The microbatch of training, or less where that was for a larger machine, shared by the devices. None: it was not
    trained here."""
    most = max(1, TOKENS_A_DEVICE * devices // seq_len)
    rows = min(microbatch or most, most)
    return math.ceil(rows / devices) * devices


# ---- the tasks: (subject, prepared, limits) -> metrics ----


def ask(subject: Subject, questions: Sequence[chats.Question], limits: Limits) -> list[answers.Answered]:
    model, tokenizer = subject.model, subject.model.tokenizer
    options = {'stop_ids': subject.template.stop_ids(tokenizer), 'max_new_tokens': limits.max_new_tokens}
    return answers.answered(model.params, model.cfg, tokenizer, questions, **options)


def _answers(subject: Subject, prepared: Prepared, limits: Limits) -> dict[str, float]:
    metrics, told = {}, []
    for s in prepared.sources:
        found = ask(subject, chats.questions(s.heldout, limits.rows or INT32_MAX, longest=subject.seq_len), limits)
        if not found:
            subject.say(f'left out {s.name}: no held-out answer ends within seq_len={subject.seq_len}')
            continue
        metrics |= _named(s.name, answers.quality(found))
        told += found
    return metrics | ({'eval/ended': answers.quality(told)['ended']} if told else {})


def _refusals(subject: Subject, prepared: Prepared, limits: Limits) -> dict[str, float]:
    metrics = {}
    for s in prepared.sources:
        asked = pairs.questions(s.heldout, limits.rows or INT32_MAX, longest=subject.seq_len)
        metrics |= _named(s.name, answers.refusals(ask(subject, asked, limits)))
    return metrics


def _preferences(subject: Subject, prepared: Prepared, limits: Limits) -> dict[str, float]:
    model, seq_len, metrics = subject.model, subject.seq_len, {}
    measure = preferences.scores if subject.scored else preferences.log_probs
    reference = None if subject.scored else reference_of(subject)
    for s in prepared.sources:
        if not pairs.sizes(s.heldout, seq_len).survey.used:
            subject.say(f'left out {s.name}: no held-out pair has two different responses within seq_len={seq_len}')
            continue
        options = {'seq_len': seq_len, 'batch_size': subject.rows_at_once, 'most': limits.rows}
        batches, count = preferences.in_order(s.heldout, **options), s.heldout.pairs
        before = None if reference is None else measure(reference, model.cfg, batches, count)
        after = measure(model.params, model.cfg, batches, count)
        if subject.scored:
            found = preferences.reward_metrics(s.heldout, after, seq_len=seq_len)
        else:
            found = preferences.policy_metrics(s.heldout, after, before, seq_len=seq_len)
        metrics |= _named(s.name, found)
    return metrics


def _rewards(subject: Subject, prepared: Prepared, limits: Limits) -> dict[str, float]:
    """A reward model's scores of responses drawn at temperature 1, beside those of the run that it started from."""
    model, metrics = subject.model, {}
    assert limits.reward_from is not None
    judge = loading.load(limits.reward_from, warn=subject.say)
    if judge.about.output != 'scores' or judge.tokenizer.fingerprint != model.tokenizer.fingerprint:
        what = 'no reward model' if judge.about.output != 'scores' else f'of another tokenizer than {subject.run}'
        raise UsageError(f'--reward_from={limits.reward_from} is {what}: name a run that gives scores')
    scale = reward_scale.read(epath.Path(split_run(limits.reward_from)[0]), judge.step)
    before, width, most = began(subject), min(subject.seq_len, judge.config['seq_len']), limits.max_new_tokens
    options = {'max_new_tokens': most, 'stop_ids': subject.template.stop_ids(model.tokenizer), 'temperature': 1.0}

    def answer(params: Any, some: Sequence[chats.Question], at: int) -> np.ndarray:
        drawn = generate.draw(params, model.cfg, [q.prompt for q in some], seed=at, **options)
        ids = [[*q.prompt, *d.ids][:width] for q, d in zip(some, drawn, strict=True)]
        return rewards.of_model(judge.params, judge.cfg, scale, ids, width=width, rows=subject.rows_at_once)

    for s in prepared.sources:
        asked = chats.questions(s.heldout, limits.rows or INT32_MAX, longest=width)
        asked, rows = [q for q in asked if len(q.prompt) < width], DRAWN // subject.rows_at_once * subject.rows_at_once
        rows = max(rows, subject.rows_at_once)
        if not asked:
            subject.say(f'left out {s.name}: no held-out prompt leaves room for an answer within {width} tokens')
            continue
        now = gains.scores(partial(answer, model.params), asked, rows=rows)
        if before is None:
            metrics |= _named(s.name, {'reward': float(now.mean())})
            continue
        then = gains.scores(partial(answer, before), asked * gains.BASELINE, rows=rows)
        metrics |= _named(s.name, gains.metrics(now, then.reshape(gains.BASELINE, len(asked)).T))
    return metrics


def began(subject: Subject) -> Any:
    """The weights of the run that a run started from; None if there is none, or it is gone."""
    run = subject.model.config.get('init_from')
    try:
        abstract = loading.abstract_params(subject.model.cfg)
        return loading.weights(run, abstract, warn=subject.say)[0] if run else None
    except UsageError as error:
        subject.say(f'{subject.run}: nothing to compare its rewards with ({error})')
        return None


def reference_of(subject: Subject) -> Any:
    """The weights that preference optimisation began with; None for other runs, and where they are gone or others."""
    began = saved_config.parents(rundir.read_config(subject.run)).get('reference')
    if began is None:
        return None
    try:
        params, now = loading.weights(began.path, loading.abstract_params(subject.model.cfg), warn=subject.say)
        loading.check_unchanged(began, params, now)
        return params
    except UsageError as error:
        subject.say(f'{subject.run}: no implicit rewards without its reference ({error})')
        return None


def _heldout(subject: Subject, prepared: Prepared, limits: Limits) -> dict[str, float]:
    model = subject.model
    shape = {'batch_size': subject.rows_at_once, 'seq_len': subject.seq_len, 'max_rows': limits.rows}
    batches = {s.name: pipeline.heldout_batches(s, **shape) for s in prepared.sources}
    return heldout.by_source(model.params, model.cfg, batches, model.tokenizer)


def _named(source: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f'eval/{source}/{name}': value for name, value in metrics.items()}


class Task(NamedTuple):
    """A task: the kind of its data, the default mixture of it (None: the text that a run was pretrained on), whether
    runs may bring their own, and what is measured."""

    kind: Kind
    mixture: str | None
    own: bool
    measure: Callable[[Subject, Prepared, Limits], dict[str, float]]


TASKS: Mapping[str, Task] = {
    'answers': Task('chat', 'operations,smalltalk', True, _answers),
    'preferences': Task('pairs', 'programmatic', True, _preferences),
    'refusals': Task('pairs', 'decline', False, _refusals),
    'heldout': Task('text', None, True, _heldout),
    'rewards': Task('chat', 'operations', True, _rewards),
}
USUAL = tuple(name for name in TASKS if name != 'rewards')  # which needs a reward model to be named


# ---- which tasks, on what ----


def plan(
    asked: Sequence[str] | None, saved: Mapping[str, Mapping[str, Any]], given: Mapping[str, str | None], say: Say
) -> dict[str, str | None]:
    """{task: its mixture; None for the text that each run was pretrained on}.

    The data are the default ones; runs that were trained on other data alone are asked about those.

    Args:
      asked: names of tasks; None: all that can be done, and `say` is told why others cannot.
      saved: config.json of each run, by its name.
      given: {task: the mixture that the user names}.

    Raises:
      UsageError: what the user names cannot be done, or nothing can.
    """
    chosen: dict[str, str | None] = {}
    missing: dict[str, list[str]] = {}
    for task in asked or USUAL:
        try:
            chosen[task] = _mixture(task, saved, given.get(task))
        except UsageError as error:
            if asked or given.get(task):  # the user named it
                raise
            missing.setdefault(str(error), []).append(task)
    if not chosen:
        raise UsageError(next(iter(missing)))
    for why, left_out in missing.items():
        say(f'left out {", ".join(left_out)}: {why}')
    return chosen


def _mixture(task: str, saved: Mapping[str, Mapping[str, Any]], given: str | None) -> str | None:
    """The mixture of a task. Raises UsageError if there is none, or one of its sources cannot be opened."""
    mixture = given or _usual(task, saved)
    texts = [saved_config.pretraining_of(run) for run in saved.values() if saved_config.about(run).output != 'scores']
    for part in [mixture] if mixture else filter(None, dict.fromkeys(texts)):
        for name, _ in parse_mixture(part):
            open_source(name, TASKS[task].kind)
    return mixture


def _usual(task: str, saved: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The default mixture of a task, or the runs' own where none of theirs is a default one."""
    known, kind = TASKS[task], TASKS[task].kind
    if known.mixture is None:
        return None
    trained = [run['config']['data']['mixture'] for run in saved.values() if saved_config.about(run).data == kind]
    own = [mixture for mixture in trained if known.own and not has_default(mixture)]
    if own and len(own) == len(trained):
        return own[0]
    read = [run['config']['data'].get(key) for run in saved.values() for key in ('mixture', 'pretraining')]
    if any(has_default(mixture) for mixture in read if mixture):
        return known.mixture
    raise UsageError(
        'no run read the default data (botocore, chitchat); --chats and --pairs name other questions, pairs'
    )


# ---- measuring ----


def fitting(names: Sequence[str] | None, run: str, saved: Mapping[str, Any]) -> list[str]:
    """Those of some tasks (None: all) that a run can be measured on: a reward model has preferences alone.

    Raises UsageError if others are asked for, and none is left.
    """
    fit = [task for task in names or USUAL if task == 'preferences' or saved_config.about(saved).output != 'scores']
    if names and not fit:
        raise UsageError(f'{run} is a reward model, which gives scores: --tasks=preferences is what it can be asked')
    return fit


def measure(subject: Subject, planned: Mapping[str, str | None], limits: Limits) -> dict[str, float]:
    """The metrics of tasks on their mixtures, 'eval/SOURCE/NAME' for most. Raises UsageError for data that cannot be
    had."""
    metrics = {}
    for name, mixture in planned.items():
        mixture = mixture or saved_config.pretraining_of(subject.model.saved)
        if mixture is None:
            subject.say(f'{subject.run}: what it was pretrained on is not known; --mixture names text to measure on')
            continue
        metrics |= TASKS[name].measure(subject, prepared(subject, TASKS[name].kind, mixture), limits)
    return metrics


def prepared(subject: Subject, kind: Kind, mixture: str) -> Prepared:
    """A mixture in the subject's own tokens and words."""
    data = subject.model.config['data']
    options = {'vocab_size': subject.model.cfg.vocab_size, 'heldout': data['heldout'], 'progress': subject.say}
    if kind == 'text' and data['tokenizer'] is None and mixture == data['mixture']:
        # As the run prepared it, most likely still in the cache.
        asked = rundir.read_config(subject.run).get('asked_vocab_size', subject.model.cfg.vocab_size)
        found = prepare(mixture=mixture, tokenizer=None, **(options | {'vocab_size': asked}))
        if found.tokenizer.fingerprint == subject.model.tokenizer.fingerprint:
            return found
    # A run that learned from single answers is asked about such.
    options['unpaired'] = kind == 'pairs' and subject.model.config.get('loss') == 'kto'
    options['form'] = TEXT if kind == 'text' else _FORMS[kind](subject.template)
    return prepare(mixture=mixture, tokenizer=rundir.tokenizer_folder(subject.run), **options)


# ---- one answer ----


def score(subject: Subject, prompt: str, answer: str) -> dict[str, Any]:
    """{'score', 'raw', 'mean', 'std', 'tokens', 'cut'}: the normalised score (raw − mean)/std of an answer to a prompt.

    It is read at the last token of the prompt with the answer and the end of its turn; or, as in training, where the
    sequence is cut because it is longer than what the model was trained on.

    Raises:
      UsageError: it is no reward model, something is empty, or nothing of the answer is left.
      RunError: the run has kept no scale for its scores yet.
    """
    if not subject.scored:
        raise UsageError(f'{subject.run} is no reward model (stage={subject.model.config["stage"]}): name one')
    if not prompt.strip() or not answer.strip():
        raise UsageError(f'--score: the {"prompt" if not prompt.strip() else "answer"} is empty')
    model, seq_len = subject.model, subject.seq_len
    messages = [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]
    ids, trained = subject.template.encode(model.tokenizer, messages)
    if not any(trained[:seq_len]):
        raise UsageError(f'--score: the prompt alone fills the {seq_len} tokens that {subject.run} was trained on')
    scale = reward_scale.read(epath.Path(split_run(subject.run)[0]), model.step)
    row_BT = np.array([ids[:seq_len]], np.int32)
    length_B = np.array([row_BT.size], np.int32)
    raw = float(jax.jit(sequences.last_scores, static_argnums=1)(model.params, model.cfg, row_BT, length_B)[0])
    found = {'score': (raw - scale.mean) / scale.std, 'raw': raw, **scale._asdict(), 'tokens': row_BT.size}
    return found | {'cut': len(ids) > seq_len}
