"""Shared by the stages that train a language model: text and conversations, their loss, and samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lm import progress, sharding
from lm.config import Config
from lm.data import chats, pipeline
from lm.data.bestfit import Sizes
from lm.data.chat_template import ChatTemplate
from lm.data.chats import Question, WithReplay
from lm.data.prepare import TAIL, Form, Prepared, PreparedSource, prepare
from lm.data.prompts import Prompt, of_questions
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.evals import answers, heldout
from lm.model import transformer
from lm.model.config import ModelConfig
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.model.roles import Roles
from lm.sampling.choice import Sampling
from lm.sampling.generate import generate
from lm.stages import plan
from lm.stages.spec import Batch, Say, Source, Task
from lm.training import step as training

SizesOf: TypeAlias = Callable[[PreparedSource, int], Sizes]
TEMPERATURES = (0.0, 0.7)
FEW_TOKENS = 500  # to be measured on

# ---- data ----


def prepare_text(config: Config, tokenizer: str | None, say: Say) -> Prepared:
    """The mixture, prepared."""
    return prepare(
        mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=tokenizer,
        heldout=config.data.heldout, progress=say,
    )  # fmt: skip


def prepare_dialogue(
    config: Config, tokenizer: str | None, say: Say, form: Callable[[ChatTemplate], Form], *, unpaired: bool = False
) -> WithReplay:
    """The mixture in the form that fits a template, and the text of pretraining, where it is known.

    Raises UsageError without a tokenizer: it comes with the run to start from.
    """
    if tokenizer is None:
        raise UsageError(f'stage={config.stage} trains a model further: set --config.init_from=DIR')
    if not config.data.pretraining:
        say('no text of pretraining is known: none is replayed or measured; data.pretraining=MIXTURE names it')
    template = ChatTemplate.load(tokenizer, Tokenizer.load(tokenizer))
    options = {'tokenizer': tokenizer, 'vocab_size': config.model.vocab_size, 'heldout': config.data.heldout}
    reading = {'form': form(template), 'strict': config.data.strict, 'unpaired': unpaired}
    own = prepare(mixture=config.data.mixture, progress=say, **reading, **options)
    text = prepare(mixture=config.data.pretraining, progress=say, **options) if config.data.pretraining else None
    return WithReplay(own, text, template)


def sharded(batches: Iterator[Mapping[str, np.ndarray]], local: sharding.LocalRows | None) -> Source:
    """source(state, i): the next batch, on this process's devices."""

    def source(state: Any, i: int) -> Batch:
        del state, i
        return sharding.shard_batch(next(batches), local)

    return source


def batches_of(mixture: pipeline.Mixture, config: Config, start: int) -> Source:
    """source(state, i): this process's rows of batch i of a mixture, on its devices."""
    local = sharding.local_rows(config.batch_size, config.seq_len)
    rows = None if local is None else local.rows
    growth = plan.growth(config)
    return sharded(
        pipeline.batches(mixture, batch_size=config.batch_size, start=start, growth=growth, rows=rows), local
    )


# ---- in words ----


def describe_text(s: PreparedSource) -> str:
    """A line on a source of text."""
    return _described(s, 'rows', 'documents', len(s.train), '')


def describe_dialogue(config: Config, data: WithReplay, whole: str, records: str, sizes_of: SizesOf) -> list[str]:
    """A line on each source of records, conversations or pairs, and on each of the text beside them.

    Args:
      whole: what the source is a part of.
      sizes_of: (source, seq_len) -> how many records are longer than there is room for.
    """
    lines = []
    for s in data.own.sources:
        sizes = sizes_of(s, config.seq_len)
        length = f'cut at {config.seq_len} tokens {sizes.cut:,}, left out {sizes.left_out:,}; '
        lines.append(_described(s, whole, records, s.counts['train_tokens'], length))
    share = f'{config.data.replay:.0%} of all rows replay' if config.data.replay else 'measured on'
    return lines + [f'{share} {describe_text(s)}' for s in (data.text.sources if data.text else ())]


def _described(s: PreparedSource, whole: str, records: str, tokens: int, length: str) -> str:
    count = s.counts['train_documents']
    share = f'{s.name}: {s.weight:.0%} of the {whole}; {count:,} {records} of {tokens:,} tokens'
    return f'{share}, {told_of_heldout(s)}; {length}{told_of_drops(s)}'


def told_of_heldout(s: PreparedSource) -> str:
    """Tells how much is held out, and adds a warning where that is too little to tell much."""
    documents, tail = s.counts['heldout_documents'], TAIL in s.counts['changed']
    held_out = f'the last {s.counts["heldout_bytes"]:,} bytes held out' if tail else f'{documents:,} held out'
    few = s.counts['heldout_tokens'] < FEW_TOKENS if tail else documents == 1
    return held_out + (' (too few for its held-out figures to say much: more text, or a larger data.heldout)' * few)


def told_of_drops(s: PreparedSource) -> str:
    """Tells how many records were read, why some of them are left out, what was changed and what is not used."""
    listed = lambda found: ', '.join(f'{reason} {n:,}' for reason, n in sorted(found.items()))
    changed, unused = listed(s.counts['changed']), listed({key: n for key, (n, _) in s.counts['unused'].items()})
    more = f'{f", changed {changed}" if changed else ""}{f", not used {unused}" if unused else ""}'
    return f'read {s.counts["read"]:,}, dropped {listed(s.counts["dropped"]) or "nothing"}{more}'


# ---- the loss ----


def next_token_loss(cfg: ModelConfig, *, z_loss: float, sparse: bool = False) -> training.Loss:
    """Next-token cross-entropy with z-loss over packed rows: one term, since the head makes both in one pass, and its
    two parts as metrics.

    `sparse` is the head's, for rows of which much is not to be learned.
    """

    def terms(models: Roles, batch: Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
        del key
        params = models['policy']
        rows = {name: batch.get(name) for name in ('segments_BT', 'positions_BT')}  # without: one segment a row
        h_BTD, aux = transformer.forward(params, cfg, batch['tokens_BT'], **rows)
        with jax.named_scope('head'):
            targets = (batch['targets_BT'], batch['weights_BT'])
            total, parts = transformer.nll(params, cfg, h_BTD, *targets, z_coef=z_loss, sparse=sparse)
        return {'loss': total, **aux}, {
            'cross_entropy': parts['nll'], 'z_loss': z_loss * parts['z'], 'accuracy': parts['correct']
        }  # fmt: skip

    def denominators(batch: Batch) -> training.Sums:
        names = ('loss', 'cross_entropy', 'z_loss', 'accuracy')
        return dict.fromkeys(names, jnp.sum(batch['weights_BT'])) | aux_weights(cfg, batch)

    return training.Loss(terms, denominators, {'loss': 1.0, **aux_coefficients(cfg)})


# ---- evaluation ----


def text_metrics(config: Config, cfg: ModelConfig, prepared: Prepared, params: Any) -> dict[str, float]:
    """Loss, perplexity and bits per byte of each source's held-out text."""
    shape = {'batch_size': config.execution.microbatch, 'seq_len': config.seq_len, 'max_rows': config.eval.rows}
    batches = {s.name: pipeline.heldout_batches(s, **shape) for s in prepared.sources}
    return heldout.by_source(params, cfg, batches, prepared.tokenizer)


def answered(task: Task, params: Any, questions: Sequence[Question]) -> list[answers.Answered]:
    """The greedy answer of a task's model to each question about its data."""
    data, most = task.data, task.config.eval.max_new_tokens
    return answers.answered(params, task.cfg, data.tokenizer, questions, stop_ids=data.stop_ids, max_new_tokens=most)


def answer_metrics(task: Task, params: Any, s: PreparedSource) -> dict[str, float]:
    """{'eval/SOURCE/ended', '…/f1'} of the answers to a source's held-out questions."""
    questions = chats.questions(s.heldout, task.config.eval.rows, longest=task.config.seq_len)
    return {f'eval/{s.name}/{k}': v for k, v in answers.quality(answered(task, params, questions)).items()}


def heldout_questions(task: Task, questions: Callable[..., list[Question]] = chats.questions) -> list[Prompt]:
    """The fixed prompts of own conversations, or of pairs by their `questions`: those that are held out."""
    ask = partial(questions, longest=task.config.seq_len)
    return of_questions([s.heldout for s in task.data.own.sources], ask, task.data.tokenizer)


def log_samples(
    task: Task, params: Any, step: int, metrics: Mapping[str, float], template: ChatTemplate | None = None
) -> None:
    """Answers the fixed prompts into samples.jsonl, and says how it stands: the metrics worth a line, and an answer."""
    config, recorder = task.config, task.recorder
    with progress.task('samples'):
        samples = answer_prompts(task, params, template)
    recorder.samples([{**s, 'stage': config.stage, 'step': step, 'score': None} for s in samples])
    shown = {k.removeprefix('eval/'): f'{v:.3f}' for k, v in metrics.items() if not k.endswith(('/loss', '/ppl'))}
    recorder.say(f'step {step}: ' + ' · '.join(f'{k} {v}' for k, v in shown.items()), style='bold')
    for one in [s for s in samples if (s['kind'] == 'raw') == (template is None)][:1] or samples[:1]:
        recorder.say(f'  {one["prompt"][-150:]}[…]{one["text"]}'.replace('\n', ' ')[:300], style='dim')


def answer_prompts(task: Task, params: Any, template: ChatTemplate | None) -> list[dict[str, Any]]:
    """Each prompt answered, greedily and at T = 0.7; without a template, and if it is raw, continued as plain text."""
    tokenizer, config = task.data.tokenizer, task.config
    raw = lambda prompt: template is None or prompt.kind == 'raw'

    def ids(prompt: Any) -> Sequence[int]:
        if prompt.ids:
            return list(prompt.ids)
        if template is None or raw(prompt):
            return tokenizer.encode_prompt(prompt.text)
        return template.prompt(tokenizer, [{'role': 'user', 'content': prompt.text}])

    asked = [(p, t) for t in TEMPERATURES for p in task.prompts]
    if not asked:
        return []
    out = generate(
        params, task.cfg, [ids(p) for p, _ in asked], max_new_tokens=config.eval.max_new_tokens,
        stop_ids=template.stop_ids(tokenizer) if template else [tokenizer.eos_id],
        allowed=tokenizer.is_token, sampling=Sampling(temperature=[t for _, t in asked]), seed=config.seed,
    )  # fmt: skip
    return [
        {
            'prompt_id': p.id,
            'kind': p.kind,
            'prompt': p.text,
            'temperature': t,
            'text': tokenizer.decode(g.ids, continued=raw(p)),
            'ended': g.ended,
        }
        for (p, t), g in zip(asked, out, strict=True)
    ]
