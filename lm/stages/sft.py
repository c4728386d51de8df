"""Supervised fine-tuning: imitate the assistant's part of conversations, with some of pretraining's text beside it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath

from lm.config import Config
from lm.data import chats, pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.chats import WithReplay
from lm.data.prepare import Form, PreparedSource, prepare
from lm.data.prompts import Prompt, of_questions
from lm.data.sizes import Sizes
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.evals import answers, heldout
from lm.model.config import ModelConfig
from lm.runtime import StopRequest
from lm.stages import pretrain, setup, wiring
from lm.training import step as training
from lm.training.recorder import Recorder


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics; see `wiring.run`.

    Raises UsageError without a run to start from: conversations alone make no language model.
    """
    if not (config.init_from or config.branch_from):
        raise UsageError(f'stage={config.stage} trains a model further: set --config.init_from=DIR')
    return wiring.run(stage(), config, workdir, stop=stop, dry_run=dry_run)


def stage() -> wiring.Stage:
    """What is fine-tuning's own: its rows. The loss is pretraining's, over the tokens that weigh something."""
    return wiring.Stage(
        prepare=prepare_chats, epoch=epoch, batch=wiring.packed_batch, source=make_source,
        loss=lambda config, cfg: pretrain.make_loss(cfg, z_loss=config.z_loss, sparse=True), evaluate=make_evaluate,
        describe=describe, prompts=heldout_questions,
    )  # fmt: skip


def prepare_chats(config: Config, tokenizer: str | None, say: Callable[[str], None]) -> WithReplay:
    """Conversations in the words of the tokenizer's chat template, and the text to replay."""
    data = prepare_dialogue(config, tokenizer, say, chats.form)
    for s in data.own.sources:
        chats.check(s, seq_len=config.seq_len)
    return data


def prepare_dialogue(
    config: Config, tokenizer: str | None, say: Callable[[str], None], form: Callable[[ChatTemplate], Form], *,
    unpaired: bool = False,
) -> WithReplay:  # fmt: skip
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


def epoch(config: Config, data: WithReplay) -> int:
    """Steps in one epoch."""
    return setup.growth(config).steps_in(_mixture(config, data).rows_in_epoch())


def _mixture(config: Config, data: WithReplay) -> pipeline.Mixture:
    return chats.mix(data, seq_len=config.seq_len, seed=config.seed, replay=config.data.replay)


def heldout_questions(config: Config, data: WithReplay) -> list[Prompt]:
    """What is asked in held-out conversations."""
    ask = partial(chats.questions, longest=config.seq_len)
    return of_questions([s.heldout for s in data.own.sources], ask, data.tokenizer)


def make_source(config: Config, data: WithReplay, start: int) -> wiring.Source:
    """source(state, i) -> batch i."""
    return wiring.batches_of(_mixture(config, data), config, start)


def describe(config: Config, data: WithReplay) -> list[str]:
    """What is about to be trained on, a line a source."""
    own, text = data.own.sources, data.text.sources if data.text else ()
    told = (describe_source(config, s) for s in own)
    return [*told, *(f'{beside(config)} {pretrain.describe_source(s)}' for s in text)]


def beside(config: Config) -> str:
    """The part that the text of pretraining has, before its description."""
    return f'{config.data.replay:.0%} of all rows replay' if config.data.replay else 'measured on'


def describe_source(config: Config, s: PreparedSource) -> str:
    c, rows = s.counts, chats.chat_rows(s, 'train', seq_len=config.seq_len)
    return (
        f"{s.name}: {s.weight:.0%} of the conversations' rows; {c['train_documents']:,} conversations of "
        f'{c["train_tokens"]:,} tokens, {pretrain.told_of_heldout(s)}; {told_of_length(config, rows.sizes)}; '
        f'{pretrain.told_of_drops(s)}'
    )


def told_of_length(config: Config, sizes: Sizes) -> str:
    """How many conversations or pairs are longer than there is room for."""
    return f'cut at {config.seq_len} tokens {sizes.cut:,}, left out {sizes.left_out:,}'


def make_evaluate(
    config: Config, cfg: ModelConfig, data: WithReplay, prompts: Sequence[Prompt], recorder: Recorder
) -> wiring.Evaluate:
    """evaluate(state, step): what is asked of an assistant, what it has forgotten, and the fixed prompts answered."""

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        metrics = chat_metrics(config, cfg, data, state.weights)
        if data.text:
            metrics |= pretrain.text_metrics(config, cfg, data.text, state.weights)
        pretrain.tell(config, cfg, data.tokenizer, state.weights, prompts, recorder, step, metrics, data.template)
        return metrics

    return evaluate


def chat_metrics(config: Config, cfg: ModelConfig, data: WithReplay, params: Any) -> dict[str, float]:
    """{'eval/SOURCE/response_loss', 'ended', 'f1'} of each source's held-out conversations."""
    metrics = {}
    for s in data.own.sources:
        rows = chats.chat_rows(s, 'heldout', seq_len=config.seq_len, shuffle=False)
        batches = pipeline.in_order(rows, batch_size=config.microbatch, max_rows=config.eval.rows)
        totals = heldout.sums(params, cfg, batches, data.tokenizer.bytes_of_ids, s.name)
        questions = chats.questions(s.heldout, config.eval.rows, longest=config.seq_len)
        found = answers.answered(
            params, cfg, data.tokenizer, questions, stop_ids=data.stop_ids, max_new_tokens=config.eval.max_new_tokens
        )  # fmt: skip
        metrics |= {f'eval/{s.name}/{k}': v for k, v in answers.quality(found).items()}
        metrics[f'eval/{s.name}/response_loss'] = totals['nll'] / max(totals['tokens'], 1)
    return metrics
