"""What is the same in every stage: the run's directory, the data, the state, the compiled step, the one loop."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import processes, progress, sharding, xla
from lm.config import Config
from lm.data import chat_template, pipeline
from lm.data.prompts import Prompt
from lm.data.tokenizer import Tokenizer, find_tokenizer
from lm.errors import UsageError
from lm.model import parameters
from lm.model.config import ModelConfig
from lm.runtime import StopRequest
from lm.stages import fitting, setup
from lm.training import checkpoint, flops, runs
from lm.training import step as training
from lm.training.ledger import Ledger
from lm.training.loop import Hooks, run_loop, saved
from lm.training.recorder import Recorder

Source = Callable[[Any, int], Mapping[str, jax.Array]]
Evaluate = Callable[[training.TrainState, int], Mapping[str, float]]
KEPT = ('reference', 'asked_vocab_size')  # of config.json, what a run that goes on is told by itself
# Of packed rows of tokens.
ROWS = {
    'tokens_BT': np.int32,
    'targets_BT': np.int32,
    'weights_BT': np.float32,
    'segments_BT': np.int32,
    'positions_BT': np.int32,
}


class Data(Protocol):
    """What a stage trains on; `fingerprint` changes with all that it is made of."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


def first_weights(config: Config, cfg: ModelConfig, abstract: Any, say: Callable[[str], None]) -> Any:
    """The weights of the run it starts from, else random ones."""
    if not config.init_from:
        return parameters.init_sharded(jax.random.key(config.seed), cfg)
    step, weights = runs.weights(config.init_from, abstract, warn=say)
    say(f'weights from {config.init_from} at step {step}')
    return weights


def as_it_is(config: Config, cfg: ModelConfig, data: Any, found: Any, say: Callable[[str], None]) -> tuple[Any, dict]:
    """The data alone."""
    del config, cfg, found, say
    return data, {}


def lm_cost(config: Config, cfg: ModelConfig, width: int, *, head: bool = True, forwards: int = 0) -> flops.Cost:
    """Model FLOPs of a stage that trains a language model, see `flops.cost`."""
    del config
    return flops.cost(cfg, seq_len=width, head=head, forwards=forwards)


def no_frozen(*_: Any) -> None:
    """Nothing but what is trained."""


class Stage(NamedTuple):
    """What is a stage's own. `data` below is what its `prepare` gave; `say` tells the user a line."""

    # (config, folder of the tokenizer to use or None, say) -> data
    prepare: Callable[[Config, str | None, Callable[[str], None]], Any]
    # (config, data) -> steps in one epoch
    epoch: Callable[[Config, Any], int]
    # (config, data; None in a dry run) -> a batch as shapes and shardings; as `source`, with config.microbatch resolved
    batch: Callable[[Config, Any], Mapping[str, jax.ShapeDtypeStruct]]
    # (config, data, start) -> source(state, i), to be asked for start, start + 1, …
    source: Callable[[Config, Any, int], Source]
    # (config, cfg) -> the loss
    loss: Callable[[Config, ModelConfig], training.Loss]
    # (config, cfg, data, prompts, recorder) -> evaluate(state, step) -> metrics
    evaluate: Callable[[Config, ModelConfig, Any, Sequence[Prompt], Recorder], Evaluate]
    # (config, data) -> lines on it
    describe: Callable[[Config, Any], list[str]]
    # (config, cfg, data, config.json of a run that goes on, say) -> (data, with what another model has to say of it;
    # what config.json is to keep of that)
    complete: Callable[[Config, ModelConfig, Any, Any, Callable[[str], None]], tuple[Any, dict[str, Any]]] = as_it_is
    # cfg -> what is trained, as shapes and shardings
    abstract: Callable[[ModelConfig], Any] = runs.abstract_params
    # (config, cfg, abstract, say) -> the weights to begin with
    weights: Callable[[Config, ModelConfig, Any, Callable[[str], None]], Any] = first_weights
    # (config, cfg) -> what the step reads and does not train, as shapes and shardings; None: nothing
    frozen: Callable[[Config, ModelConfig], Any] = no_frozen
    # (config, cfg, places a row) -> model FLOPs
    cost: Callable[[Config, ModelConfig, int], flops.Cost] = lm_cost
    # (config, cfg, frozen as shapes, say) -> the same as arrays
    load_frozen: Callable[[Config, ModelConfig, Any, Callable[[str], None]], Any] = no_frozen
    # (config, data) -> held-out beginnings to be answered, where the data are not the default ones
    prompts: Callable[[Config, Any], list[Prompt]] = lambda config, data: []


def run(
    stage: Stage, config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False
) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics.

    Raises UsageError before anything is allocated, RunError and Preempted while running.
    """
    found = runs.open_workdir(config, workdir)
    with sharding.use_mesh(config.mesh) as mesh:
        setup.recall(config, found, mesh)
        cfg = runs.model_config(config)
        setup.check_mesh(config, mesh)
        if dry_run:
            return _dry_run(stage, config, cfg)
        return _train(stage, config, cfg, workdir, found, stop)


def _train(
    stage: Stage, config: Config, cfg: ModelConfig, workdir: epath.Path, found: Any, stop: StopRequest
) -> dict[str, Any]:
    # ---- data ----
    fitting.check(config, cfg, _state_before_data(stage, config, cfg))
    ledger = Ledger()
    recorder = Recorder()
    prompts = setup.fixed_prompts(config)
    tokenizer, own = config.data.tokenizer, workdir / 'tokenizer'
    if found and (tokenizer or 'asked_vocab_size' in found) and find_tokenizer(own):
        tokenizer = str(own)  # copied when the run began, or smaller than what was asked for
    # The other processes find it in a cache that they share, or make their own.
    with ledger('prepare'), progress.task('preparing the data'), processes.in_turn():
        data = stage.prepare(config, tokenizer, recorder.say)
    processes.same('prepared data', data.fingerprint)
    if found and found['data'] != data.fingerprint:
        raise UsageError(f'{workdir} was trained on other data: the sources changed; name another --workdir')
    if config.branch_from and not found and runs.read_config(config.branch_from)['data'] != data.fingerprint:
        raise UsageError(f'{config.branch_from} was trained on other data: its sources changed; use init_from')
    for line in xla.lines():
        recorder.say(line)
    recorder.say(f'data ready in {ledger.seconds["prepare"]:.1f} s')
    prompts = prompts or stage.prompts(config, data)
    kept = {key: found[key] for key in KEPT if key in found} if found else {}
    kept |= setup.shrink_vocabulary(config, data.tokenizer, recorder.say)
    cfg = dataclasses.replace(cfg, vocab_size=config.model.vocab_size)
    with progress.task('packing the data into rows'):
        setup.resolve(config, found, epoch=stage.epoch(config, data))

    # ---- the run's directory: config.json first, it is what makes it a run ----
    checkpoints = workdir / 'checkpoints'
    recorder.checkpointed(checkpoint.newest_sealed(checkpoints) if found else None)
    runs.write_config(workdir, config, data=data.fingerprint, tokenizer=data.tokenizer.fingerprint, **kept)
    recorder.open(workdir)
    with setup.told(recorder, ledger):
        if processes.first():
            _save_words(data.tokenizer, tokenizer, workdir / 'tokenizer')
        if (
            found
            and checkpoint.listed(checkpoints)[0] == config.steps
            and _is_done(stage, config, cfg, workdir, recorder)
        ):
            return recorder.last
        _fit(stage, config, cfg, workdir, found, data, kept, prompts, recorder, ledger, stop)
    return recorder.last


def _state_before_data(stage: Stage, config: Config, cfg: ModelConfig) -> training.TrainState:
    """The state as shapes and shardings, which the number of steps does not change: it may be that of an epoch."""
    config = setup.with_microbatch(config, config.microbatch)
    config.steps = config.steps or 1
    return abstract_state(stage, config, cfg, setup.make_optimizer(config)[0])


def _save_words(tokenizer: Tokenizer, given: str | None, folder: epath.Path) -> None:
    """The tokenizer in the run's folder, and the chat template that lies beside it, else ours if it fits: a run's
    directory is all that it takes to talk to it."""
    tokenizer.save(folder)
    template = chat_template.find(given, tokenizer)
    if template is not None:
        template.save(folder)


def _is_done(stage: Stage, config: Config, cfg: ModelConfig, workdir: epath.Path, recorder: Recorder) -> bool:
    """Tells whether the run's last checkpoint holds, so that there is nothing left to do, and that is said."""
    wanted = saved(abstract_state(stage, config, cfg, setup.make_optimizer(config)[0]))
    try:
        checkpoint.read(workdir / 'checkpoints' / str(config.steps), wanted)
    except ValueError:
        return False  # what is damaged is named, and done again, where a run goes on
    recorder.rewind(config.steps)
    recorder.say(f'{workdir} is done, with {config.steps:,} steps: set more, or name another --workdir')
    recorder.status('done', config.steps)
    return True


def _fit(
    stage: Stage, config: Config, cfg: ModelConfig, workdir: epath.Path, found: Any, data: Any, kept: dict[str, Any],
    prompts: Sequence[Prompt], recorder: Recorder, ledger: Ledger, stop: StopRequest,
) -> None:  # fmt: skip
    for line in stage.describe(config, data):
        recorder.say(line)
    with ledger('prepare'), progress.task('asking the model it starts from'):
        data, more = stage.complete(config, cfg, data, found, recorder.say)
    recorder.status('compiling', 0)

    # ---- state and step ----
    optimizer, rate = setup.make_optimizer(config)
    abstract = abstract_state(stage, config, cfg, optimizer)
    build = partial(compile_step, stage, config, cfg, data, optimizer, rate, abstract)
    with ledger('compile'), progress.task('compiling the step'):
        first = lambda m: stage.source(setup.with_microbatch(config, m), data, 0)(None, 0)
        step, told = setup.settle_microbatch(config, cfg, abstract, build, first)
    kept |= more
    fitting.check_compiled(config, cfg, abstract, step)
    runs.write_config(workdir, config, data=data.fingerprint, tokenizer=data.tokenizer.fingerprint, **kept)
    recorder.settings = config.to_dict()
    tokens, grown = _tokens(stage.batch(config, data)), setup.growth(config)
    for line in describe_run(config, cfg, tokens=tokens):
        recorder.say(line)
    recorder.say(told)
    with progress.task('loading the weights'):
        state = start(stage, config, cfg, workdir, abstract, optimizer, recorder)

    # ---- loop ----
    source = stage.source(config, data, int(state.step))
    keep = config.checkpoint.keep
    with checkpoint.Writer(workdir / 'checkpoints', keep=keep, whole=recorder.checkpointed) as writer:
        hooks = Hooks(
            recorder=recorder, ledger=ledger, writer=writer,
            evaluate=stage.evaluate(config, cfg, data, prompts, recorder),
            cost=stage.cost(config, cfg, _width(stage, config, data)), ceiling=flops.ceiling(),
            log_every=config.log.every, eval_every=config.eval.every, save_every=config.checkpoint.every,
            max_skips=config.optim.max_skips, profile=config.log.profile,
            batches=lambda i: grown.first(i) / config.batch_size,
        )  # fmt: skip
        run_loop(state, source, step, steps=config.steps, stop=stop, hooks=hooks)
    recorder.status('done', config.steps)


def describe_run(config: Config, cfg: ModelConfig, *, tokens: int) -> list[str]:
    """The model, its attention, the mesh and how long it trains, a line each. `tokens` are those of a full batch."""
    planned = tokens * setup.growth(config).first(config.steps) // config.batch_size
    count = sum(x.size for x in jax.tree.leaves(parameters.shapes(cfg)))
    mesh = {a: n for a, n in jax.sharding.get_mesh().shape.items() if n > 1} or 'one device'
    choice = runs.attention_choice(config)
    return [
        f'attention: {choice.name} ({choice.why})',
        f'{count:,} parameters, {planned:,} tokens in {config.steps:,} steps, {cfg.dtype}, mesh: {mesh}',
    ]


def _tokens(batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Places for tokens in a full batch."""
    return math.prod(batch['tokens_BT'].shape)


def _width(stage: Stage, config: Config, data: Any) -> int:
    """Places for tokens in a row."""
    return stage.batch(config, data)['tokens_BT'].shape[1]


def counted(step: Callable) -> Callable:
    """The step, which also tells the tokens and the targets of its batch: padding is neither."""

    def fn(state: training.TrainState, batch: training.Batch) -> tuple[training.TrainState, dict[str, jax.Array]]:
        tokens, targets = jnp.sum(batch['segments_BT'] > 0), jnp.sum(batch['weights_BT'] > 0)
        state, metrics = step(state, batch)
        return state, {**metrics, 'tokens': tokens, 'targets': targets}

    return fn


def abstract_state(stage: Stage, config: Config, cfg: ModelConfig, optimizer: Any) -> training.TrainState:
    """The state as shapes and shardings."""
    ema = config.optim.ema is not None
    state = setup.abstract_state(stage.abstract(cfg), optimizer, config.seed, ema=ema)
    return dataclasses.replace(state, frozen=stage.frozen(config, cfg))


def compile_step(
    stage: Stage, config: Config, cfg: ModelConfig, data: Any, optimizer: Any, rate: Any,
    abstract: training.TrainState, microbatch: int,
) -> Any:  # fmt: skip
    """The step, compiled ahead of its first batch; a batch of another shape is then an error, not a second compile."""
    config = setup.with_microbatch(config, microbatch)
    grown = setup.growth(config)
    fn = training.make_step(
        stage.loss(config, cfg), optimizer, clip=config.optim.clip, rate=rate, ema=config.optim.ema,
        microbatches=config.batch_size // microbatch, counts=grown.counts if grown.steps else None,
    )  # fmt: skip
    return jax.jit(counted(fn), donate_argnums=0).lower(abstract, stage.batch(config, data)).compile()


def start(
    stage: Stage, config: Config, cfg: ModelConfig, workdir: epath.Path, abstract: training.TrainState, optimizer: Any,
    recorder: Recorder,
) -> training.TrainState:  # fmt: skip
    """The state to go on from: this run's newest checkpoint, else what the stage begins with."""
    frozen = stage.load_frozen(config, cfg, abstract.frozen, recorder.say)
    newest = checkpoint.read_newest(
        workdir / 'checkpoints', saved(abstract), warn=partial(recorder.say, style='red'), set_aside=True
    )
    if newest is not None:
        step, tree, meta = newest
        recorder.rewind(step)
        recorder.tokens = meta.get('tokens') or _tokens_before(config, step)
        recorder.say(f'resumed at step {step}')
        return training.TrainState(frozen=frozen, **tree)
    recorder.rewind(0)
    if config.branch_from:
        step, tree, meta = runs.branch(config.branch_from, saved(abstract), warn=recorder.say)
        recorder.tokens = meta.get('tokens') or _tokens_before(config, step)
        recorder.say(f'branched from {config.branch_from} at step {step}')
        return training.TrainState(frozen=frozen, **tree)
    create = jax.jit(lambda p: training.create(p, None, optimizer, config.seed, ema=config.optim.ema is not None))
    state = create(stage.weights(config, cfg, abstract.trainable, recorder.say))
    return dataclasses.replace(state, frozen=frozen)


def _tokens_before(config: Config, step: int) -> int:
    """Places for tokens in the batches before a step, padding with them: all that a checkpoint of an older version lets
    us know."""
    return config.seq_len * setup.growth(config).first(step)


def _dry_run(stage: Stage, config: Config, cfg: ModelConfig) -> dict[str, Any]:
    """Compiles the step for this machine and prints what it would take."""
    if config.steps is None:
        raise UsageError('a dry run reads no data, so it cannot count an epoch: set --config.steps')
    optimizer, rate = setup.make_optimizer(config)
    abstract = abstract_state(stage, config, cfg, optimizer)
    build = partial(compile_step, stage, config, cfg, None, optimizer, rate, abstract)
    recorder, choice = Recorder(), runs.attention_choice(config)
    recorder.say(f'attention   {choice.name} ({choice.why})')
    fitting.report_state(recorder, config, cfg, abstract)
    with progress.task('compiling the step'):
        compiled, told = setup.settle_microbatch(config, cfg, abstract, build, None)
    recorder.say(told)
    tokens = _tokens(stage.batch(config, None))
    cost = stage.cost(config, cfg, _width(stage, config, None)).of(tokens, tokens)
    fitting.report_plan(recorder, config, cfg, abstract, compiled, flops=cost, tokens=tokens)
    planned = tokens * setup.growth(config).first(config.steps) // config.batch_size
    return {'dry_run': True, 'flops_per_step': cost, 'tokens': planned}


# ---- what stages have in common ----


def packed_batch(config: Config, data: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed rows as shapes and shardings."""
    del data
    return setup.abstract_batch(ROWS, batch_size=config.batch_size, seq_len=config.seq_len)


def sharded(batches: Iterator[Mapping[str, np.ndarray]], local: sharding.LocalRows | None) -> Source:
    """source(state, i): the next batch, on this process's devices."""

    def source(state: Any, i: int) -> dict[str, jax.Array]:
        del state, i
        return sharding.shard_batch(next(batches), local)

    return source


def batches_of(mixture: pipeline.Mixture, config: Config, start: int) -> Source:
    """source(state, i): this process's rows of batch i of a mixture, on its devices."""
    local = sharding.local_rows(config.batch_size, config.seq_len)
    rows = None if local is None else local.rows
    growth = setup.growth(config)
    return sharded(
        pipeline.batches(mixture, batch_size=config.batch_size, start=start, growth=growth, rows=rows), local
    )
