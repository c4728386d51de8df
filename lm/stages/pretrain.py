"""Pretraining: next-token cross-entropy on packed text."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import processes, sharding, xla
from lm.config import Config
from lm.data import pipeline
from lm.data.prepare import Prepared, prepare
from lm.data.prompts import Prompt, load_prompts
from lm.data.tokenizer import Tokenizer, find_tokenizer
from lm.errors import UsageError
from lm.evals import heldout
from lm.model import transformer
from lm.model.transformer import ModelConfig
from lm.runtime import StopRequest
from lm.sampling.generate import Sampling, generate
from lm.stages import setup
from lm.training import checkpoint, flops, runs
from lm.training import step as training
from lm.training.ledger import Ledger
from lm.training.loop import Hooks, run_loop, saved
from lm.training.recorder import Recorder

BATCH = {
    'tokens_BT': np.int32,
    'targets_BT': np.int32,
    'weights_BT': np.float32,
    'segments_BT': np.int32,
    'positions_BT': np.int32,
}
TEMPERATURES = (0.0, 0.7)


def run(config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics.

    Raises UsageError before anything is allocated, RunError and Preempted while running.
    """
    found = runs.open_workdir(config, workdir)
    setup.recall(config, found)
    cfg = runs.model_config(config)
    with sharding.use_mesh(config.mesh) as mesh:
        setup.check_mesh(config, mesh)
        if dry_run:
            return _dry_run(config, cfg)
        return _train(config, cfg, workdir, found, stop)


def _train(config: Config, cfg: ModelConfig, workdir: epath.Path, found: Any, stop: StopRequest) -> dict[str, Any]:
    # ---- data ----
    ledger = Ledger()
    recorder = Recorder()
    prompts = load_prompts(config.eval.prompts)
    if not prompts:
        raise UsageError(f'eval.prompts={config.eval.prompts} has no prompt in it')
    tokenizer, own = config.data.tokenizer, workdir / 'tokenizer'
    if tokenizer and found and find_tokenizer(own):  # copied when the run began
        tokenizer = str(own)
    with ledger('prepare'), processes.in_turn():  # the others find it in a cache that they share, or make their own
        prepared = prepare(
            mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=tokenizer,
            heldout=config.data.heldout, progress=recorder.say,
        )  # fmt: skip
    processes.same('prepared data', prepared.fingerprint)
    if found and found['data'] != prepared.fingerprint:
        raise UsageError(f'{workdir} was trained on other data: the sources changed; name another --workdir')
    if config.branch_from and not found and runs.read_config(config.branch_from)['data'] != prepared.fingerprint:
        raise UsageError(f'{config.branch_from} was trained on other data: its sources changed; use init_from')
    for line in xla.lines():
        recorder.say(line)
    recorder.say(f'data ready in {ledger.seconds["prepare"]:.1f} s')
    setup.resolve(config, found, epoch=setup.growth(config).steps_in(pipeline.rows_in_epoch(prepared, config.seq_len)))

    # ---- the run's directory: config.json first, it is what makes it a run ----
    runs.write_config(workdir, config, data=prepared.fingerprint, tokenizer=prepared.tokenizer.fingerprint)
    recorder.open(workdir)
    with setup.told(recorder, ledger):
        _fit(config, cfg, workdir, prepared, prompts, recorder, ledger, stop)
    return recorder.last


def _fit(
    config: Config, cfg: ModelConfig, workdir: epath.Path, prepared: Prepared, prompts: Sequence[Prompt],
    recorder: Recorder, ledger: Ledger, stop: StopRequest,
) -> None:  # fmt: skip
    if processes.first():
        prepared.tokenizer.save(str(workdir / 'tokenizer'))
    for line in describe(config, cfg, prepared):
        recorder.say(line)
    recorder.status('compiling', 0)

    # ---- state and step ----
    optimizer, rate = setup.make_optimizer(config)
    abstract = setup.abstract_state(runs.abstract_params(cfg), optimizer, config.seed, ema=config.optim.ema is not None)
    build = partial(compile_step, config, cfg, optimizer, rate, abstract)
    with ledger('compile'):
        step, told = setup.settle_microbatch(
            config, cfg, abstract, build, lambda: make_source(config, prepared, start=0)(None, 0)
        )
    runs.write_config(workdir, config, data=prepared.fingerprint, tokenizer=prepared.tokenizer.fingerprint)
    recorder.say(told)
    state = start(config, cfg, workdir, abstract, optimizer, recorder)

    # ---- loop ----
    rows, grown = config.batch_size * config.seq_len, setup.growth(config)
    source = make_source(config, prepared, start=int(state.step))
    with checkpoint.Writer(workdir / 'checkpoints', keep=config.checkpoint.keep) as writer:
        hooks = Hooks(
            recorder=recorder, ledger=ledger, writer=writer,
            evaluate=make_evaluate(config, cfg, prepared, prompts, recorder),
            tokens=rows,
            flops=rows * flops.per_token(cfg.sizes, layers=cfg.layers, seq_len=config.seq_len, window=cfg.window),
            peak=sum(map(flops.peak, jax.devices())), log_every=config.log.every, eval_every=config.eval.every,
            save_every=config.checkpoint.every, max_skips=config.optim.max_skips, profile=config.log.profile,
            batches=lambda i: grown.first(i) / config.batch_size,
        )  # fmt: skip
        run_loop(state, source, step, steps=config.steps, stop=stop, hooks=hooks)
    recorder.status('done', config.steps)


def describe(config: Config, cfg: ModelConfig, prepared: Prepared) -> list[str]:
    """What is about to be trained on what, a line each."""
    tokens = setup.growth(config).first(config.steps) * config.seq_len
    lines = []
    for s in prepared.sources:
        c, dropped = s.counts, ', '.join(f'{reason} {n:,}' for reason, n in s.counts['dropped'].items()) or 'nothing'
        lines.append(
            f'{s.name}: {s.weight:.0%} of the rows; {c["train_documents"]:,} documents of {len(s.train):,} tokens, '
            f'{c["heldout_documents"]:,} held out; read {c["read"]:,}, dropped {dropped}'
        )
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(partial(transformer.init, cfg=cfg), jax.random.key(0))))
    mesh = {a: n for a, n in jax.sharding.get_mesh().shape.items() if n > 1} or 'one device'
    choice = runs.attention_choice(config)
    lines += [f'attention: {choice.name} ({choice.why})']
    lines += [f'{count:,} parameters, {tokens:,} tokens in {config.steps:,} steps, {cfg.dtype}, mesh: {mesh}']
    return lines


def make_loss(cfg: ModelConfig, *, z_loss: float) -> training.Loss:
    """Next-token cross-entropy with z-loss over packed rows: one term, since the head makes both in one pass."""

    def terms(params: Any, frozen: Any, batch: training.Batch, key: jax.Array) -> tuple[training.Sums, training.Sums]:
        del frozen, key
        rows = {name: batch.get(name) for name in ('segments_BT', 'positions_BT')}  # without: one segment a row
        h_BTD = transformer.forward(params, cfg, batch['tokens_BT'], **rows)
        with jax.named_scope('head'):
            total, parts = transformer.nll(params, cfg, h_BTD, batch['targets_BT'], batch['weights_BT'], z_coef=z_loss)
        return {'cross_entropy': total}, {'nll': parts['nll'], 'z': parts['z'], 'accuracy': parts['correct']}

    def weights(batch: training.Batch) -> training.Sums:
        return dict.fromkeys(('cross_entropy', 'nll', 'z', 'accuracy'), jnp.sum(batch['weights_BT']))

    return training.Loss(terms, weights, {'cross_entropy': 1.0})


def compile_step(
    config: Config, cfg: ModelConfig, optimizer: Any, rate: Any, abstract: training.TrainState, microbatch: int
) -> Any:
    """The step, compiled ahead of its first batch; a batch of another shape is then an error, not a second compile."""
    grown = setup.growth(config)
    fn = training.make_step(
        make_loss(cfg, z_loss=config.z_loss), optimizer, clip=config.optim.clip, rate=rate, ema=config.optim.ema,
        microbatches=config.batch_size // microbatch, counts=grown.counts if grown.steps else None,
    )  # fmt: skip
    batch = setup.abstract_batch(BATCH, batch_size=config.batch_size, seq_len=config.seq_len)
    return jax.jit(fn, donate_argnums=0).lower(abstract, batch).compile()


def start(
    config: Config, cfg: ModelConfig, workdir: epath.Path, abstract: Any, optimizer: Any, recorder: Recorder
) -> Any:
    """The state to go on from: this run's newest checkpoint, else the run it starts from, else random weights."""
    newest = checkpoint.read_newest(
        workdir / 'checkpoints', saved(abstract), warn=partial(recorder.say, style='red'), set_aside=True
    )
    if newest is not None:
        step, tree, _ = newest
        recorder.rewind(step)
        recorder.say(f'resumed at step {step}')
        return training.TrainState(frozen=None, **tree)
    recorder.rewind(0)
    create = jax.jit(lambda p: training.create(p, None, optimizer, config.seed, ema=config.optim.ema is not None))
    if config.branch_from:
        step, tree = runs.branch(config.branch_from, saved(abstract), warn=recorder.say)
        recorder.say(f'branched from {config.branch_from} at step {step}')
        return training.TrainState(frozen=None, **tree)
    if config.init_from:
        step, weights = runs.weights(config.init_from, abstract.trainable, warn=recorder.say)
        recorder.say(f'weights from {config.init_from} at step {step}')
        return create(weights)
    return create(transformer.init_sharded(jax.random.key(config.seed), cfg))


def make_source(config: Config, prepared: Prepared, *, start: int) -> Callable[[Any, int], dict[str, jax.Array]]:
    """source(state, i) -> batch i. Batches come in order; the state is not looked at."""
    local = sharding.local_rows(config.batch_size, config.seq_len)
    batches = pipeline.train_batches(
        prepared, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed, start=start,
        growth=setup.growth(config), rows=None if local is None else local.rows,
    )  # fmt: skip

    def source(state: Any, i: int) -> dict[str, jax.Array]:
        del state, i
        return sharding.shard_batch(next(batches), local)

    return source


def make_evaluate(
    config: Config, cfg: ModelConfig, prepared: Prepared, prompts: Sequence[Prompt], recorder: Recorder
) -> Callable:
    """evaluate(state, step): held-out metrics, and the fixed prompts continued."""
    tokenizer = prepared.tokenizer

    def evaluate(state: training.TrainState, step: int) -> Mapping[str, float]:
        batches = {
            s.name: pipeline.heldout_batches(
                s, batch_size=config.microbatch, seq_len=config.seq_len, max_rows=config.eval.rows
            )
            for s in prepared.sources
        }
        metrics = heldout.by_source(state.weights, cfg, batches, tokenizer.bytes_of_ids)
        samples = continue_prompts(state.weights, cfg, tokenizer, prompts, config.eval.max_new_tokens, config.seed)
        recorder.samples([{**s, 'stage': config.stage, 'step': step, 'score': None} for s in samples])
        shown = {k.removeprefix('eval/'): f'{v:.3f}' for k, v in metrics.items() if k.endswith('bpb')}
        recorder.say(f'step {step}: ' + ' · '.join(f'{k} {v}' for k, v in shown.items()), style='bold')
        raw = next((s for s in samples if s['kind'] == 'raw'), samples[0])
        recorder.say(f'  {raw["prompt"]}[…]{raw["text"]}'.replace('\n', ' ')[:300], style='dim')
        return metrics

    return evaluate


def continue_prompts(
    params: Any, cfg: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """Each prompt continued as plain text, greedily and at T = 0.7."""
    asked = [(p, t) for t in TEMPERATURES for p in prompts]
    out = generate(
        params, cfg, [[tokenizer.bos_id, *tokenizer.encode(p.text)] for p, _ in asked], max_new_tokens=max_new_tokens,
        stop_ids=[tokenizer.eos_id], sampling=Sampling(temperature=[t for _, t in asked]), seed=seed,
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


def _dry_run(config: Config, cfg: ModelConfig) -> dict[str, Any]:
    """Compiles the step for this machine and prints what it would take."""
    if config.steps is None:
        raise UsageError('a dry run reads no data, so it cannot count an epoch: set --config.steps')
    optimizer, rate = setup.make_optimizer(config)
    abstract = setup.abstract_state(runs.abstract_params(cfg), optimizer, config.seed, ema=config.optim.ema is not None)
    build = partial(compile_step, config, cfg, optimizer, rate, abstract)
    compiled, told = setup.settle_microbatch(config, cfg, abstract, build, None)
    recorder, choice = Recorder(), runs.attention_choice(config)
    recorder.say(f'attention   {choice.name} ({choice.why})')
    recorder.say(told)
    tokens = config.batch_size * config.seq_len
    cost = tokens * flops.per_token(cfg.sizes, layers=cfg.layers, seq_len=config.seq_len, window=cfg.window)
    setup.report_plan(recorder, config, cfg, abstract, compiled, flops=cost, tokens=tokens)
    planned = config.seq_len * setup.growth(config).first(config.steps)
    return {'dry_run': True, 'flops_per_step': cost, 'tokens': planned}
