"""Runs a stage: the run's directory, the data, the state, the compiled step, the one loop."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm import progress, sharding, xla
from lm.config import Config, leaves
from lm.data import chat_template
from lm.data.tokenizer import find_tokenizer
from lm.errors import RunError, UsageError
from lm.model import adapters, parameters
from lm.model.config import ModelConfig
from lm.multihost import processes
from lm.runs import checkpoint, execution, loading, rundir, saved_config
from lm.runs.saved_config import Parent
from lm.runtime import StopRequest
from lm.stages import fitting, plan
from lm.stages.spec import Batch, StageSpec, Task
from lm.training import flops
from lm.training import step as training
from lm.training.ledger import Ledger
from lm.training.loop import Hooks, run_loop, saved
from lm.training.recorder import Recorder

OTHER_DATA = 'was trained on other data: the sources changed, or how they are prepared'


def run(
    spec: StageSpec, config: Config, workdir: epath.Path, *, stop: StopRequest, dry_run: bool = False
) -> dict[str, Any]:
    """Trains, or resumes, the run at `workdir`, and returns its last metrics.

    Raises UsageError before anything is allocated, RunError and Preempted while running.
    """
    spec.settle(config)
    adapters.check(config)
    spec.check(config)
    found = rundir.open_workdir(config, workdir)
    with sharding.use_mesh(config.mesh) as mesh:
        plan.restore_resolved(config, found, mesh)
        cfg = execution.model_config(config)
        plan.check_mesh(config, mesh)
        if dry_run:
            return _dry_run(spec.open(config, cfg))
        return _train(spec, config, cfg, workdir, found, stop)


def _train(
    spec: StageSpec, config: Config, cfg: ModelConfig, workdir: epath.Path, found: Any, stop: StopRequest
) -> dict[str, Any]:
    # ---- data ----
    recorder, ledger = Recorder(), Ledger()
    task = spec.open(config, cfg, recorder=recorder)
    until = {key: value for key, value in leaves(config) if key in task.until}
    status = rundir.read_status(workdir) if found else {}
    if status.get('alarm') == until and until:
        raise RunError(f'{status["reason"]} (nothing has changed since)')
    fitting.check(config, cfg, _state_before_data(task))
    prompts = plan.fixed_prompts(config)
    tokenizer, own = config.data.tokenizer, workdir / 'tokenizer'
    if found and (tokenizer or 'asked_vocab_size' in found) and find_tokenizer(own):
        tokenizer = str(own)  # copied when the run began, or smaller than what was asked for
    # The other processes find it in a cache that they share, or make their own.
    with ledger('prepare'), progress.task('preparing the data'), processes.in_turn():
        data = spec.prepare(config, tokenizer, recorder.say)
    processes.assert_equal('prepared data', data.fingerprint)
    if found and found.get('data') != data.fingerprint:
        raise UsageError(f'{workdir} {OTHER_DATA}; name another --workdir')
    if config.branch_from and not found and rundir.read_config(config.branch_from)['data'] != data.fingerprint:
        raise UsageError(f'{config.branch_from} {OTHER_DATA}; use init_from')
    for line in xla.lines():
        recorder.say(line)
    recorder.say(f'data ready in {ledger.seconds["prepare"]:.1f} s')
    parents = saved_config.parents(found)
    kept = {'asked_vocab_size': found['asked_vocab_size']} if found and 'asked_vocab_size' in found else {}
    kept |= plan.shrink_vocabulary(config, data.tokenizer, recorder.say)
    task = dataclasses.replace(task, cfg=dataclasses.replace(cfg, vocab_size=config.model.vocab_size), data=data)
    task.prompts = prompts or task.heldout_prompts()
    with progress.task('packing the data into rows'):
        plan.resolve(config, found, cfg.dtype, epoch=task.epoch())

    # ---- the run's directory: config.json first, it is what makes it a run ----
    checkpoints = workdir / 'checkpoints'
    recorder.checkpointed(checkpoint.newest_sealed(checkpoints) if found else None)
    kept |= {'data': data.fingerprint, 'tokenizer': data.tokenizer.fingerprint}
    kept |= {'about': spec.about._replace(adapter=task.adapter)._asdict()}
    rundir.write_config(workdir, config, parents, **kept)
    recorder.open(workdir)
    with plan.log_failure(recorder, ledger, until):
        if processes.first():
            # With the chat template beside it, else ours if it fits: a run's directory is all it takes to talk to it.
            data.tokenizer.save(own)
            if (template := chat_template.find(tokenizer, data.tokenizer)) is not None:
                template.save(own)
        if found and checkpoint.listed(checkpoints)[0] == config.steps and _is_done(task, workdir):
            return recorder.last
        _fit(task, workdir, parents, kept, ledger, stop)
    return recorder.last


def _state_before_data(task: Task) -> training.TrainState:
    """The state as shapes and shardings, which the number of steps does not change: it may be that of an epoch."""
    task = task.at(task.config.execution.microbatch)
    task.config.steps = task.config.steps or 1
    return abstract_state(task, plan.make_optimizer(task.config)[0])


def _is_done(task: Task, workdir: epath.Path) -> bool:
    """Tells whether the run's last checkpoint holds, so that there is nothing left to do, and that is said."""
    config, recorder = task.config, task.recorder
    wanted = abstract_saved(task, abstract_state(task, plan.make_optimizer(config)[0]))
    try:
        checkpoint.read(workdir / 'checkpoints' / str(config.steps), wanted)
    except ValueError:
        return False  # what is damaged is named, and done again, where a run goes on
    recorder.rewind(config.steps)
    recorder.say(f'{workdir} is done, with {config.steps:,} steps: set more, or name another --workdir')
    recorder.status('done', config.steps)
    return True


def _fit(
    task: Task, workdir: epath.Path, parents: Mapping[str, Parent], kept: Mapping[str, Any], ledger: Ledger,
    stop: StopRequest,
) -> None:  # fmt: skip
    config, cfg, recorder = task.config, task.cfg, task.recorder
    for line in task.describe():
        recorder.say(line)
    with ledger('prepare'), progress.task('asking the model it starts from'):
        parents = {**parents, **task.precompute(parents)}
    recorder.status('compiling', 0)

    # ---- state and step ----
    optimizer, rate = plan.make_optimizer(config)
    abstract = abstract_state(task, optimizer)
    with ledger('compile'), progress.task('compiling the step'):
        step, told = tuned_step(task, optimizer, rate, abstract)
    fitting.check_compiled(config, cfg, abstract, step)
    rundir.write_config(workdir, config, parents, **kept)  # a run that is killed now has its microbatch
    recorder.settings = config.to_dict()
    for line in (*describe_run(task, tokens=_tokens(task.batch())), told):
        recorder.say(line)
    with progress.task('loading the weights'):
        state, parents = start(task, workdir, abstract, optimizer, parents)
    rundir.write_config(workdir, config, parents, **kept)  # with what was read just now

    # ---- loop ----
    source, grown, keep = task.source(int(state.step)), plan.growth(config), config.checkpoint.keep
    with checkpoint.Writer(workdir / 'checkpoints', keep=keep, whole=recorder.checkpointed) as writer:
        hooks = Hooks(
            recorder=recorder, ledger=ledger, writer=writer, evaluate=task.evaluate, alarm=task.alarm,
            state_dict=task.state_dict, cost=task.cost(), ceiling=flops.ceiling(), log_every=config.log.every,
            told=task.told, panel=task.panel, eval_every=config.eval.every, save_every=config.checkpoint.every,
            max_skips=config.optim.max_skips, profile=config.log.profile,
            batches=lambda i: grown.first(i) / config.batch_size,
        )  # fmt: skip
        run_loop(state, source, step, steps=config.steps, stop=stop, hooks=hooks)
    recorder.status('done', config.steps)


def describe_run(task: Task, *, tokens: int) -> list[str]:
    """The model, its attention, the mesh and how long it trains, a line each. `tokens` are those of a full batch."""
    config, cfg = task.config, task.cfg
    count, planned = fitting.count(parameters.shapes(cfg)), plan.planned_tokens(config, tokens)
    told = ''
    if task.adapter is not None:
        told = f' under {fitting.count(task.abstract_roles()):,} of an adapter, which alone are trained'
    mesh = {a: n for a, n in jax.sharding.get_mesh().shape.items() if n > 1} or 'one device'
    return [
        f'attention: {execution.told(config, cfg)}',
        f'{count:,} parameters{told}, {planned:,} tokens in {config.steps:,} steps, {cfg.dtype}, mesh: {mesh}',
    ]


def _tokens(batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Places for tokens in a full batch."""
    return math.prod(batch['tokens_BT'].shape)


def tuned_step(
    task: Task, optimizer: Any, rate: Any, abstract: training.TrainState, *, timed: bool = True
) -> tuple[Any, str]:
    """(the compiled step, its microbatch in words), which is filled in where the user left it to us."""
    build = partial(compile_step, task, optimizer, rate, abstract)
    # An online task has no batch before it has a state.
    batch = partial(first_batch, task) if timed and not task.online else None
    return plan.autotune_microbatch(task.config, task.cfg, abstract, build, batch, partly=task.online)


def first_batch(task: Task, microbatch: int) -> Batch:
    """A batch to time a step with."""
    return task.at(microbatch).source(0)(None, 0)


def counted(step: Callable) -> Callable:
    """The step, which also tells the tokens and the targets of its batch: padding is neither."""

    def fn(state: training.TrainState, batch: training.Batch) -> tuple[training.TrainState, dict[str, jax.Array]]:
        tokens, targets = jnp.sum(batch['segments_BT'] > 0), jnp.sum(batch['weights_BT'] > 0)
        state, metrics = step(state, batch)
        return state, {**metrics, 'tokens': tokens, 'targets': targets}

    return fn


def abstract_state(task: Task, optimizer: Any) -> training.TrainState:
    """The state, with what the step only reads, as shapes and shardings."""
    ema = task.config.optim.ema is not None
    state = plan.abstract_state(task.abstract_roles(), optimizer, task.config.seed, ema=ema)
    return dataclasses.replace(state, frozen={role: task.abstract_frozen(role) for role in task.frozen})


def abstract_saved(task: Task, abstract: training.TrainState) -> dict[str, Any]:
    """The tree of a checkpoint as shapes and shardings; the arrays that the task keeps are whole on every device."""
    everywhere = jax.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec())
    whole = lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=everywhere)
    return saved(abstract, jax.tree.map(whole, task.state_dict()))


def compile_step(task: Task, optimizer: Any, rate: Any, abstract: training.TrainState, microbatch: int) -> Any:
    """The step, compiled ahead of its first batch; a batch of another shape is then an error, not a second compile."""
    task = task.at(microbatch)
    config = task.config
    grown = plan.growth(config)
    fn = training.make_step(
        task.loss(), optimizer, clip=config.optim.clip, rate=rate, ema=config.optim.ema,
        microbatches=config.batch_size // microbatch, counts=grown.counts if grown.steps else None,
        rates=task.rates, filled=task.online,
    )  # fmt: skip
    return jax.jit(counted(fn), donate_argnums=0).lower(abstract, task.batch()).compile()


def start(
    task: Task, workdir: epath.Path, abstract: training.TrainState, optimizer: Any, parents: Mapping[str, Parent]
) -> tuple[training.TrainState, dict[str, Parent]]:
    """(the state to go on from: this run's newest checkpoint, else what the stage begins with; the runs that weights
    come from, by their role)."""
    config, recorder, wanted = task.config, task.recorder, abstract_saved(task, abstract)
    frozen, read = {}, {}
    for role, setting in task.frozen.items():
        known = (config[setting], abstract.frozen[role], parents.get(role))
        try:
            frozen[role], read[role] = loading.read_unchanged(*known, warn=recorder.say)
        except UsageError as error:
            raise UsageError(f'{error} (it is the {role} of this run, which each step reads)') from None
    newest = checkpoint.read_newest(
        workdir / 'checkpoints', wanted, warn=partial(recorder.say, style='red'), set_aside=True
    )
    recorder.rewind(0 if newest is None else newest[0])
    if newest is None and not config.branch_from:
        create = jax.jit(lambda p: training.create(p, {}, optimizer, config.seed, ema=config.optim.ema is not None))
        weights, began = task.begin(abstract.trainable, frozen)
        return dataclasses.replace(create(weights), frozen=frozen), {**parents, **began, **read}
    step, tree, meta = newest or loading.branch(config.branch_from, wanted, warn=recorder.say)
    # A checkpoint of an older version lets us know only the places for tokens in the batches before, padding with them.
    recorder.tokens = meta.get('tokens') or config.seq_len * plan.growth(config).first(step)
    recorder.say(f'branched from {config.branch_from} at step {step}' if newest is None else f'resumed at step {step}')
    if 'task' in tree:  # a checkpoint of another stage has none
        task.load(jax.device_get(tree.pop('task')))
    began = {}
    if newest is None:
        digest = checkpoint.saved_digest(meta, 'trainable', task.trains)
        began = {task.trains: Parent(config.branch_from, step, digest)}
    return training.TrainState(frozen=frozen, **tree), {**parents, **began, **read}


def _dry_run(task: Task) -> dict[str, Any]:
    """Compiles the step for this machine and prints what it would take."""
    config, cfg = task.config, task.cfg
    if config.steps is None:
        raise UsageError('a dry run reads no data, so it cannot count an epoch: set --config.steps')
    optimizer, rate = plan.make_optimizer(config)
    abstract, recorder = abstract_state(task, optimizer), task.recorder
    recorder.say(f'attention   {execution.told(config, cfg)}')
    fitting.report_state(recorder, config, cfg, abstract)
    with progress.task('compiling the step'):
        compiled, told = tuned_step(task, optimizer, rate, abstract, timed=False)
    recorder.say(told)
    tokens = _tokens(task.batch())
    cost = task.cost().of(tokens, tokens)
    fitting.report_plan(recorder, config, cfg, abstract, compiled, flops=cost, tokens=tokens)
    return {'dry_run': True, 'flops_per_step': cost, 'tokens': plan.planned_tokens(config, tokens)}
