"""Pretraining: next-token cross-entropy on packed text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lm import progress
from lm.config import Config
from lm.data import pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.prepare import TAIL, Prepared, PreparedSource, prepare
from lm.data.prompts import Prompt, of_text
from lm.data.tokenizer import Tokenizer
from lm.evals import heldout
from lm.model import transformer
from lm.model.config import ModelConfig
from lm.model.feed_forward import aux_coefficients, aux_weights
from lm.runtime import StopRequest
from lm.sampling.generate import Sampling, generate
from lm.stages import setup, wiring
from lm.training import step as training
from lm.training.recorder import Recorder

TEMPERATURES = (0.0, 0.7)
FEW_TOKENS = 500  # to be measured on


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`."""
    return wiring.run(stage(), config, workdir, stop=stop, dry_run=dry_run)


def stage() -> wiring.Stage:
    """What is pretraining's own."""
    return wiring.Stage(
        prepare=prepare_text, epoch=epoch, batch=wiring.packed_batch, source=make_source,
        loss=lambda config, cfg: make_loss(cfg, z_loss=config.z_loss), evaluate=make_evaluate, describe=describe,
        prompts=lambda config, data: of_text([s.heldout for s in data.sources], data.tokenizer),
    )  # fmt: skip


def prepare_text(config: Config, tokenizer: str | None, say: Callable[[str], None]) -> Prepared:
    """The mixture, prepared."""
    return prepare(
        mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=tokenizer,
        heldout=config.data.heldout, progress=say,
    )  # fmt: skip


def epoch(config: Config, prepared: Prepared) -> int:
    """Steps in one epoch."""
    return setup.growth(config).steps_in(pipeline.rows_in_epoch(prepared, config.seq_len))


def describe(config: Config, prepared: Prepared) -> list[str]:
    """What is about to be trained on, a line a source."""
    del config
    return [describe_source(s) for s in prepared.sources]


def describe_source(s: PreparedSource) -> str:
    c = s.counts
    return (
        f'{s.name}: {s.weight:.0%} of the rows; {c["train_documents"]:,} documents of {len(s.train):,} tokens, '
        f'{told_of_heldout(s)}; {told_of_drops(s)}'
    )


def told_of_heldout(s: PreparedSource) -> str:
    """How much is held out, and a warning where that is too little to tell much."""
    documents, tail = s.counts['heldout_documents'], TAIL in s.counts['changed']
    held_out = f'the last {s.counts["heldout_bytes"]:,} bytes held out' if tail else f'{documents:,} held out'
    few = s.counts['heldout_tokens'] < FEW_TOKENS if tail else documents == 1
    return held_out + (' (too few for its held-out figures to say much: more text, or a larger data.heldout)' * few)


def told_of_drops(s: PreparedSource) -> str:
    """How many records were read, why some of them are left out, what was changed and what is not used."""
    listed = lambda found: ', '.join(f'{reason} {n:,}' for reason, n in sorted(found.items()))
    changed, unused = listed(s.counts['changed']), listed({key: n for key, (n, _) in s.counts['unused'].items()})
    more = f'{f", changed {changed}" if changed else ""}{f", not used {unused}" if unused else ""}'
    return f'read {s.counts["read"]:,}, dropped {listed(s.counts["dropped"]) or "nothing"}{more}'


def make_loss(cfg: ModelConfig, *, z_loss: float, sparse: bool = False) -> training.Loss:
    """Next-token cross-entropy with z-loss over packed rows: one term, since the head makes both in one pass, and its
    two parts as metrics.

    `sparse` is the head's, for rows of which much is not to be learned.
    """

    def terms(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
        del frozen, key
        rows = {name: batch.get(name) for name in ('segments_BT', 'positions_BT')}  # without: one segment a row
        h_BTD, aux = transformer.forward(params, cfg, batch['tokens_BT'], **rows)
        with jax.named_scope('head'):
            targets = (batch['targets_BT'], batch['weights_BT'])
            total, parts = transformer.nll(params, cfg, h_BTD, *targets, z_coef=z_loss, sparse=sparse)
        return {'loss': total, **aux}, {
            'cross_entropy': parts['nll'], 'z_loss': z_loss * parts['z'], 'accuracy': parts['correct']
        }  # fmt: skip

    def weights(batch: training.Batch) -> training.Sums:
        names = ('loss', 'cross_entropy', 'z_loss', 'accuracy')
        return dict.fromkeys(names, jnp.sum(batch['weights_BT'])) | aux_weights(cfg, batch)

    return training.Loss(terms, weights, {'loss': 1.0, **aux_coefficients(cfg)})


def make_source(config: Config, prepared: Prepared, start: int) -> wiring.Source:
    """source(state, i) -> batch i. Batches come in order; the state is not looked at."""
    return wiring.batches_of(pipeline.mix(prepared, seq_len=config.seq_len, seed=config.seed), config, start)


def make_evaluate(
    config: Config, cfg: ModelConfig, prepared: Prepared, prompts: Sequence[Prompt], recorder: Recorder
) -> wiring.Evaluate:
    """evaluate(state, step): held-out metrics, and the fixed prompts continued."""

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        metrics = text_metrics(config, cfg, prepared, state.weights)
        tell(config, cfg, prepared.tokenizer, state.weights, prompts, recorder, step, metrics)
        return metrics

    return evaluate


def tell(
    config: Config, cfg: ModelConfig, tokenizer: Tokenizer, params: Any, prompts: Sequence[Prompt], recorder: Recorder,
    step: int, metrics: Mapping[str, float], template: ChatTemplate | None = None,
) -> None:  # fmt: skip
    """Answers the fixed prompts into samples.jsonl, and says how it stands: the metrics worth a line, and an answer."""
    with progress.task('samples'):
        samples = continue_prompts(params, cfg, tokenizer, prompts, config.eval.max_new_tokens, config.seed, template)
    recorder.samples([{**s, 'stage': config.stage, 'step': step, 'score': None} for s in samples])
    shown = {k.removeprefix('eval/'): f'{v:.3f}' for k, v in metrics.items() if not k.endswith(('/loss', '/ppl'))}
    recorder.say(f'step {step}: ' + ' · '.join(f'{k} {v}' for k, v in shown.items()), style='bold')
    for one in [s for s in samples if (s['kind'] == 'raw') == (template is None)][:1] or samples[:1]:
        recorder.say(f'  {one["prompt"][-150:]}[…]{one["text"]}'.replace('\n', ' ')[:300], style='dim')


def text_metrics(config: Config, cfg: ModelConfig, prepared: Prepared, params: Any) -> dict[str, float]:
    """Loss, perplexity and bits per byte of each source's held-out text."""
    shape = {'batch_size': config.microbatch, 'seq_len': config.seq_len, 'max_rows': config.eval.rows}
    batches = {s.name: pipeline.heldout_batches(s, **shape) for s in prepared.sources}
    return heldout.by_source(params, cfg, batches, prepared.tokenizer)


def continue_prompts(
    params: Any, cfg: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, seed: int,
    template: ChatTemplate | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each prompt answered, greedily and at T = 0.7; without a template, and if it is raw, continued as plain text."""

    raw = lambda prompt: template is None or prompt.kind == 'raw'

    def ids(prompt: Prompt) -> list[int]:
        if prompt.ids:
            return list(prompt.ids)
        if template is None or raw(prompt):
            return tokenizer.encode_prompt(prompt.text)
        return template.prompt(tokenizer, [{'role': 'user', 'content': prompt.text}])

    asked = [(p, t) for t in TEMPERATURES for p in prompts]
    if not asked:
        return []
    out = generate(
        params, cfg, [ids(p) for p, _ in asked], max_new_tokens=max_new_tokens,
        stop_ids=template.stop_ids(tokenizer) if template else [tokenizer.eos_id],
        allowed=tokenizer.is_token, sampling=Sampling(temperature=[t for _, t in asked]), seed=seed,
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
