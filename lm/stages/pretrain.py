"""Pretraining: next-token cross-entropy on packed text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lm.config import Config
from lm.data import pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.prepare import Prepared, PreparedSource, prepare
from lm.data.prompts import Prompt
from lm.data.tokenizer import Tokenizer
from lm.evals import heldout
from lm.model import transformer
from lm.model.transformer import ModelConfig
from lm.runtime import StopRequest
from lm.sampling.generate import Sampling, generate
from lm.stages import setup, wiring
from lm.training import step as training
from lm.training.recorder import Recorder

TEMPERATURES = (0.0, 0.7)


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`."""
    return wiring.run(stage(), config, workdir, stop=stop, dry_run=dry_run)


def stage() -> wiring.Stage:
    """What is pretraining's own."""
    return wiring.Stage(
        prepare=prepare_text, epoch=epoch, batch=wiring.packed_batch, source=make_source,
        loss=lambda config, cfg: make_loss(cfg, z_loss=config.z_loss), evaluate=make_evaluate, describe=describe,
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
        f'{c["heldout_documents"]:,} held out; {told_of_drops(s)}'
    )


def told_of_drops(s: PreparedSource) -> str:
    """How many records were read, why some of them are left out, what was changed and what is not used."""
    listed = lambda found: ', '.join(f'{reason} {n:,}' for reason, n in sorted(found.items()))
    changed, unused = listed(s.counts['changed']), listed({key: n for key, (n, _) in s.counts['unused'].items()})
    more = f'{f", changed {changed}" if changed else ""}{f", not used {unused}" if unused else ""}'
    return f'read {s.counts["read"]:,}, dropped {listed(s.counts["dropped"]) or "nothing"}{more}'


def make_loss(cfg: ModelConfig, *, z_loss: float, sparse: bool = False) -> training.Loss:
    """Next-token cross-entropy with z-loss over packed rows: one term, since the head makes both in one pass.

    `sparse` is the head's, for rows of which much is not to be learned.
    """

    def terms(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
        del frozen, key
        rows = {name: batch.get(name) for name in ('segments_BT', 'positions_BT')}  # without: one segment a row
        h_BTD = transformer.forward(params, cfg, batch['tokens_BT'], **rows)
        with jax.named_scope('head'):
            targets = (batch['targets_BT'], batch['weights_BT'])
            total, parts = transformer.nll(params, cfg, h_BTD, *targets, z_coef=z_loss, sparse=sparse)
        return {'cross_entropy': total}, {'nll': parts['nll'], 'z': parts['z'], 'accuracy': parts['correct']}

    def weights(batch: training.Batch) -> training.Sums:
        return dict.fromkeys(('cross_entropy', 'nll', 'z', 'accuracy'), jnp.sum(batch['weights_BT']))

    return training.Loss(terms, weights, {'cross_entropy': 1.0})


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
    samples = continue_prompts(params, cfg, tokenizer, prompts, config.eval.max_new_tokens, config.seed, template)
    recorder.samples([{**s, 'stage': config.stage, 'step': step, 'score': None} for s in samples])
    shown = {k.removeprefix('eval/'): f'{v:.3f}' for k, v in metrics.items() if not k.endswith(('/loss', '/ppl'))}
    recorder.say(f'step {step}: ' + ' · '.join(f'{k} {v}' for k, v in shown.items()), style='bold')
    one = next((s for s in samples if (s['kind'] == 'raw') == (template is None)), samples[0])
    recorder.say(f'  {one["prompt"]}[…]{one["text"]}'.replace('\n', ' ')[:300], style='dim')


def text_metrics(config: Config, cfg: ModelConfig, prepared: Prepared, params: Any) -> dict[str, float]:
    """Loss, perplexity and bits per byte of each source's held-out text."""
    shape = {'batch_size': config.microbatch, 'seq_len': config.seq_len, 'max_rows': config.eval.rows}
    batches = {s.name: pipeline.heldout_batches(s, **shape) for s in prepared.sources}
    return heldout.by_source(params, cfg, batches, prepared.tokenizer.bytes_of_ids)


def continue_prompts(
    params: Any, cfg: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, seed: int,
    template: ChatTemplate | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each prompt answered, greedily and at T = 0.7; without a template, and if it is raw, continued as plain text."""

    def ids(prompt: Prompt) -> list[int]:
        if template is None or prompt.kind == 'raw':
            return [tokenizer.bos_id, *tokenizer.encode(prompt.text)]
        return template.prompt(tokenizer, [{'role': 'user', 'content': prompt.text}])

    asked = [(p, t) for t in TEMPERATURES for p in prompts]
    out = generate(
        params, cfg, [ids(p) for p, _ in asked], max_new_tokens=max_new_tokens,
        stop_ids=template.stop_ids(tokenizer) if template else [tokenizer.eos_id],
        sampling=Sampling(temperature=[t for _, t in asked]), seed=seed,
    )  # fmt: skip
    return [
        {
            'prompt_id': p.id,
            'kind': p.kind,
            'prompt': p.text,
            'temperature': t,
            'text': tokenizer.decode(g.ids),
            'ended': g.ended,
        }
        for (p, t), g in zip(asked, out, strict=True)
    ]
