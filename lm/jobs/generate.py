"""Best-of-n and rejection sampling: a run draws n answers to each prompt, a reward scores them, the best are kept.

In the directory:

    prompts.jsonl   the conversations whose last answers are drawn anew, chosen when the job began
    scores.jsonl    a line a prompt: the score of each of its n answers, which of them ended, how many are kept
    answers.jsonl   the kept answers as conversations (`messages`), for configs/sft.py, with `score`, `rank` among the
                    n (1 is the best), `n` and `prompt_id`; earlier answers in them are not to be learned

A batch is a pure function of the settings, the weights and its number, and a job that was killed goes on after the last
one that is in the files: they end the same, bit for bit, on the same devices and versions.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files, progress, sharding
from lm.config import Config
from lm.data import chats, prompt_sets
from lm.data.chat_template import ChatTemplate
from lm.data.chats import Question
from lm.data.records import Chat
from lm.data.sources import parse_mixture
from lm.data.tokenizer import Tokenizer
from lm.errors import Preempted, UsageError
from lm.jobs import spec
from lm.jobs.spec import JobSpec, Say
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.rl import rewards, verified
from lm.runs import execution, loading, rundir, saved_config
from lm.runs.saved_config import Parent
from lm.runtime import StopRequest
from lm.sampling import generate
from lm.stages import plan
from lm.training.ledger import Ledger
from lm.training.recorder import Recorder

PROMPTS, SCORES, ANSWERS = 'prompts.jsonl', 'scores.jsonl', 'answers.jsonl'


def check(config: Config) -> None:
    """Raises UsageError for settings that make no sense together, before anything is read."""
    if not config.init_from:
        raise UsageError('stage=generate asks a run that answers: set --config.init_from=DIR')
    verified.check(config)
    if config.reward.normalise:
        raise UsageError(
            'reward.normalise is by what is scored at once, so that scores of other prompts would not compare: set '
            'reward.weights in its place'
        )
    if config.data.tokenizer:
        raise UsageError(f'data.tokenizer={config.data.tokenizer}: answers are in that of init_from, leave it out')
    if config.batch_size % config.n:
        raise UsageError(f'batch_size={config.batch_size} is not a multiple of n={config.n}: change one of them')
    if config.keep == 'best_of_n' and config.n < 2:
        raise UsageError(f'n={config.n}: keep=best_of_n compares answers, set at least 2')
    if config.keep == 'best_of_n' and config.threshold is not None:
        raise UsageError(f'threshold={config.threshold} is of keep=rejection: leave it out, or set that')
    if config.keep == 'rejection' and config.threshold is None:
        raise UsageError('keep=rejection keeps answers from a score on: set --config.threshold')


# ---- what is asked ----


class Speaker(NamedTuple):
    """The tokenizer and the template that conversations are read with."""

    tokenizer: Tokenizer
    template: ChatTemplate
    longest: int  # tokens of a prompt at most

    @staticmethod
    def of(config: Config) -> 'Speaker':
        """That of `init_from`. Raises UsageError if it gives scores, or no prompt fits."""
        saved, folder = rundir.read_config(config.init_from), rundir.tokenizer_folder(config.init_from)
        if saved_config.about(saved).output == 'scores':
            raise UsageError(f'init_from={config.init_from} is a reward model, which has not learned to speak')
        longest = saved['config']['seq_len'] - config.max_new_tokens
        if longest < 1:
            raise UsageError(
                f'max_new_tokens={config.max_new_tokens} leaves no room for a prompt: {config.init_from} has '
                f'seq_len={saved["config"]["seq_len"]}'
            )
        tokenizer = Tokenizer.load(folder)
        return Speaker(tokenizer, ChatTemplate.load(folder, tokenizer), longest)

    def question(self, chat: Mapping[str, Any]) -> Question | None:
        """A conversation up to its last answer, and that answer; None if it cannot be asked."""
        try:
            ids, trained = self.template.encode(self.tokenizer, chat['messages'], tools=chat.get('tools'))
        except UsageError:  # the template has no place for it
            return None
        found = chats.last_answer(np.asarray(ids), np.asarray(trained, np.uint8), len(ids))
        return found if found is not None and len(found.prompt) <= self.longest else None


def choose(config: Config, speaker: Speaker, count: int, say: Say) -> list[Chat]:
    """The conversations to ask."""
    return prompt_sets.choose(
        config.data.mixture, count=count, seed=config.seed, heldout=config.data.heldout, strict=config.data.strict,
        usable=lambda chat: speaker.question(chat) is not None, say=say,
    )  # fmt: skip


def show(config: Config, count: int, say: Say) -> list[tuple[str, str]]:
    """The first prompts as they are asked."""
    speaker = Speaker.of(config)
    found = choose(config, speaker, config.prompts, say)[:count]
    text = lambda chat: '\n'.join(f'{m["role"]}: {m["content"]}' for m in chat['messages'][:-1])
    return [(f'prompt {i}: {chat["source"]}', text(chat)) for i, chat in enumerate(found)]


# ---- what is kept ----


def kept(config: Config, answers: Sequence[str], score: np.ndarray, ended: np.ndarray) -> Iterator[tuple[int, int]]:
    """(the place of an answer among those to a prompt, its rank by score) of the answers to keep, the best first.

    Only what ended and says something can be learned from; the same words are kept once.
    """
    said: set[str] = set()
    order: list[int] = np.argsort(-score, kind='stable').tolist()
    for rank, i in enumerate(order, 1):
        if not ended[i] or not answers[i].strip() or answers[i] in said:
            continue
        if config.threshold is not None and score[i] < config.threshold:
            return
        said.add(answers[i])
        yield i, rank
        if config.keep == 'best_of_n':
            return


def record_of(chat: Mapping[str, Any], answer: str, **more: Any) -> dict[str, Any]:
    """A conversation whose last answer is `answer`, which alone is to be learned."""
    before = [m | {'train': False} if m['role'] == 'assistant' else m for m in chat['messages'][:-1]]
    tools = {'tools': chat['tools']} if 'tools' in chat else {}
    return {'messages': [*before, {'role': 'assistant', 'content': answer}], **tools, **more}


# ---- the files ----


def resumed(workdir: epath.Path, total: int, size: int) -> list[dict[str, Any]]:
    """The lines of scores.jsonl to go on after: whole batches of `size` prompts, with which answers.jsonl agrees. Both
    files are cut back to them, as a kill or damage may have left more."""
    scores, answers = (files.read_json_lines(workdir / name) for name in (SCORES, ANSWERS))
    written = Counter(a.get('prompt_id') for a in answers)
    sound = lambda i, line: line.get('prompt_id') == i and line.get('kept') == written[i]
    whole = sum(1 for _ in takewhile(lambda one: sound(*one), enumerate(scores[:total])))
    done = whole if whole == total else whole - whole % size
    left = {SCORES: scores[:done], ANSWERS: [a for a in answers if a.get('prompt_id', total) < done]}
    for name, lines in left.items():
        if (workdir / name).exists():
            files.write_text(workdir / name, ''.join(map(_line, lines)))
    return left[SCORES]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + '\n'


class Grown(NamedTuple):
    """The two files, where this process writes them."""

    scores: files.Growing
    answers: files.Growing

    def add(self, scores: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> None:
        """Adds a batch: its answers are on disk before the lines that say they are."""
        for file, lines in ((self.answers, answers), (self.scores, scores)):
            file.add(''.join(map(_line, lines)).encode())
            file.flush()


def summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The measures of so many prompts: mean scores of all answers and of the kept, and the part that ended."""
    of_all = [x for line in scores for x in line['scores']]
    best = [x for line in scores for x in line['kept_scores']]
    ended = [x for line in scores for x in line['ended']]
    found = {'prompts': len(scores), 'answers': len(of_all), 'kept': len(best)}
    means = {'score': of_all, 'kept_score': best, 'ended': ended}
    return found | {name: float(np.mean(values)) for name, values in means.items() if values}


# ---- the work ----


class Models(NamedTuple):
    """The run that answers, and the reward model, if there is one."""

    params: Any
    cfg: ModelConfig
    reward: rewards.Model | None
    verified: verified.Verified
    parents: dict[str, Parent]


def load(config: Config, before: Mapping[str, Parent], speaker: Speaker, say: Say) -> Models:
    """Raises UsageError if they are not those that the job began with."""

    def weights(run: str, role: str) -> tuple[Any, ModelConfig, Parent]:
        cfg = execution.model_config(rundir.read_config(run)['config'], training=False)
        params, parent = loading.read_unchanged(run, loading.abstract_in_use(run, cfg), before.get(role), warn=say)
        return params, cfg, parent

    params, cfg, parent = weights(config.init_from, 'policy')
    parents, reward = {'policy': parent}, None
    if run := config.reward_from:
        judge, judge_cfg, parents['reward'] = weights(run, 'reward')
        scale = rewards.read_scale(run, parents['reward'].step)
        width = config.max_new_tokens + speaker.longest
        reward = rewards.Model(judge, judge_cfg, scale, width, config.batch_size)
    names = [name for name, _ in parse_mixture(config.data.mixture)]
    asks = verified.Verified(config, speaker.tokenizer, speaker.template, names)
    return Models(generate.prepare(params, cfg, batch=config.batch_size), cfg, reward, asks, parents)


def batch(
    config: Config, models: Models, speaker: Speaker, asked: Sequence[Mapping[str, Any]], first: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of scores.jsonl, records of answers.jsonl) of the prompts from `first` on that are drawn at once."""
    n, tokenizer, template = config.n, speaker.tokenizer, speaker.template
    questions = [q for chat in asked if (q := speaker.question(chat)) is not None for _ in range(n)]
    drawn = generate.draw(
        models.params, models.cfg, [q.prompt for q in questions], max_new_tokens=config.max_new_tokens,
        stop_ids=template.stop_ids(tokenizer), temperature=config.temperature,
        seed=int(np.random.SeedSequence([config.seed, first]).generate_state(1)[0]),
    )  # fmt: skip
    found = rewards.scores(config, tokenizer, questions, drawn, models.reward)
    score = rewards.combined(found | models.verified.scores(questions, drawn)[0], config)
    lines, records = [], []
    for j, chat in enumerate(asked):
        own, of = drawn[j * n : (j + 1) * n], score[j * n : (j + 1) * n]
        texts = [tokenizer.decode(d.ids[:-1] if d.ended else d.ids) for d in own]
        ended = [d.ended and _can_be_learned(speaker, chat, text) for d, text in zip(own, texts, strict=True)]
        best = list(kept(config, texts, of, np.array(ended)))
        more = {'prompt_id': first + j, 'n': n}
        records += [record_of(chat, texts[i], **more, rank=rank, score=float(of[i])) for i, rank in best]
        lines.append(
            {
                'prompt_id': first + j, 'kept': len(best), 'scores': of.tolist(), 'ended': [d.ended for d in own],
                'kept_scores': [float(of[i]) for i, _ in best], 'tokens': sum(len(d.ids) for d in own),
            }
        )  # fmt: skip
    return lines, records


def _can_be_learned(speaker: Speaker, chat: Mapping[str, Any], answer: str) -> bool:
    """Tells whether the template shows this answer as it is: some strip it."""
    try:
        record = record_of(chat, answer)
        speaker.template.check(speaker.tokenizer, record['messages'], tools=record.get('tools'))
    except UsageError:
        return False
    return True


def run(config: Config, workdir: epath.Path, stop: StopRequest) -> dict[str, Any]:
    """Draws what is not drawn yet, and returns the measures of all.

    Raises UsageError before anything is allocated, RunError and Preempted while running.
    """
    check(config)
    saved = spec.open_workdir(config, workdir, SCORES)
    speaker, recorder, ledger = Speaker.of(config), Recorder(), Ledger()
    if config.reward_from:
        own = {'tokenizer': speaker.tokenizer.fingerprint, 'beside': config.init_from}
        rewards.check_model(config.reward_from, **own)
    with sharding.use_mesh(config.mesh):
        asked: Sequence[Mapping[str, Any]] = []
        if saved is None and processes.first():
            with ledger('prepare'), progress.task('choosing prompts'):
                asked = [prompt_sets.to_json(chat) for chat in choose(config, speaker, config.prompts, recorder.say)]
        with progress.task('loading the weights'):
            models = load(config, saved_config.parents(saved), speaker, recorder.say)
        rundir.write_config(workdir, config, models.parents, **{rundir.JOB: config.stage})
        recorder.settings = config.to_dict()
        recorder.open(workdir)
        with plan.log_failure(recorder, ledger, {}):
            if asked:
                files.write_text(workdir / PROMPTS, ''.join(map(_line, asked)))
            processes.all_gather('prompts')
            return _answer(config, workdir, models, speaker, recorder, ledger, stop)


def _answer(
    config: Config, workdir: epath.Path, models: Models, speaker: Speaker, recorder: Recorder, ledger: Ledger,
    stop: StopRequest,
) -> dict[str, Any]:  # fmt: skip
    asked = files.read_json_lines(workdir / PROMPTS)
    total, size = len(asked), config.batch_size // config.n
    scores = processes.all_gather(resumed(workdir, total, size) if processes.first() else [])[0]
    recorder.rewind(len(scores))
    if scores:
        recorder.say(f'resumed after {len(scores)} of {total} prompts')
    grown = Grown(files.Growing(workdir / SCORES), files.Growing(workdir / ANSWERS))
    stop.patient = True
    with recorder.bar(start=len(scores), steps=total, what='answers'):
        for first in range(len(scores), total, size):
            recorder.status('generating', first, steps=total)
            begun = ledger.spent('step')
            with ledger('step'):
                lines, records = batch(config, models, speaker, asked[first : first + size], first)
            scores += lines
            if processes.first():
                grown.add(lines, records)
            recorder.checkpointed(len(scores))
            tokens = sum(line['tokens'] for line in lines) / max(ledger.spent('step') - begun, 1e-9)
            measured = {f'generate/{k}': v for k, v in summary(scores).items()}
            recorder.metrics(len(scores), measured | {'perf/tokens_per_s': tokens})
            recorder.advance(len(scores), total, told(summary(scores)), what='prompt')
            if stop.after(len(scores)) and len(scores) < total:
                raise Preempted(
                    f'saved after {len(scores)} of {total} prompts, {stop.signal}: run the same command again to go on'
                )
    found = summary(scores)
    recorder.say(f'{total:,} prompts × {config.n} answers: {told(found)}')
    if found['kept']:
        recorder.say(f'to learn from them: --config=configs/sft.py --config.data.mixture={workdir / ANSWERS}')
    else:
        recorder.say('no answer was kept: set a lower threshold, or a larger max_new_tokens', style='red')
    recorder.status('done', len(scores))
    return {'step': len(scores), **found}


def told(found: Mapping[str, float]) -> str:
    """Measures in words."""
    best = f', of the {found["kept"]:,} kept {found["kept_score"]:.3f}' if found['kept'] else ', none kept'
    return f'mean score {found["score"]:.3f}{best}, {found["ended"]:.0%} ended'


SPEC = JobSpec('generate', check, run, show)
