"""The plan of a run: what the user left open is filled in, and what does not fit together is refused."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lm import interrupts, sharding
from lm.config import Config
from lm.data.growth import Growth
from lm.data.prompts import DEFAULT_FILE, Prompt, load_prompts
from lm.data.sources import has_default
from lm.data.tokenizer import Tokenizer
from lm.errors import Alarm, Preempted, RunError, UsageError
from lm.model.config import ModelConfig
from lm.model.roles import Roles
from lm.multihost import processes
from lm.runs import checkpoint, execution
from lm.training import microbatch
from lm.training import optimizer as optim
from lm.training import step as training
from lm.training.ledger import Ledger
from lm.training.recorder import Recorder


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raises UsageError where an axis would not divide what it is for."""
    size = mesh.shape
    if size['expert'] > 1:
        raise UsageError(f'mesh.expert={size["expert"]}: no parameter has experts to split, leave it at 1')
    batch = size['data'] * size['fsdp']
    micro = config.execution.microbatch or config.batch_size
    needs = (
        ('batch_size', config.batch_size, 'data × mesh.fsdp', batch),
        ('execution.microbatch', micro, 'data × mesh.fsdp', batch),
        ('seq_len', config.seq_len, 'seq', size['seq']),
        ('model.heads', config.model.heads, 'tensor', size['tensor']),
        ('model.ffn_dim', config.model.ffn_dim, 'tensor', size['tensor']),
    )
    for key, value, axis, parts in needs:
        if value % parts:
            raise UsageError(f'{key}={value} is not a multiple of mesh.{axis}={parts}: change one of them')


def resolve(config: Config, saved: Mapping[str, Any] | None, dtype: str, *, epoch: int) -> None:
    """Fills in what the user left to us, the microbatch aside.

    Args:
      dtype: of the activations. epoch: steps in one epoch of the data.

    Raises:
      UsageError: a branch that begins after its end.
    """
    config.steps = config.steps or max(1, epoch)
    config.execution.dtype = dtype
    if config.branch_from and not saved and (begins := checkpoint.locate(config.branch_from)) >= config.steps:
        raise UsageError(f'steps={config.steps}: {config.branch_from} is at step {begins} already, set more steps')


def fixed_prompts(config: Config) -> list[Prompt]:
    """The prompts of a file: the one that is named, else ours where the mixture has the default data; none of other
    data. Raises UsageError for a file that cannot be read or has none in it."""
    path = config.eval.prompts
    if not path and DEFAULT_FILE.exists() and has_default(config.data.mixture):
        path = DEFAULT_FILE
    found = load_prompts(path) if path else []
    if path and not found:
        raise UsageError(f'eval.prompts={path} has no prompt in it')
    return found


def shrink_vocabulary(config: Config, tokenizer: Tokenizer, say: Callable[[str], None]) -> dict[str, int]:
    """Gives the model the vocabulary that its text had enough for. Returns what config.json is to keep: how many were
    asked for, so that the same command goes on."""
    asked, have = config.model.vocab_size, tokenizer.vocab_size
    if config.data.tokenizer or have >= asked:
        return {}
    say(f'the text is too little for a vocabulary of {asked:,}: the tokenizer and the model have {have:,}')
    config.model.vocab_size = have
    return {'asked_vocab_size': asked}


def restore_resolved(config: Config, saved: Mapping[str, Any] | None, mesh: Mesh) -> None:
    """Fills in what the user left to us and a saved run has resolved: another device must not change the run. Its
    microbatch is found anew where the mesh cannot share it."""
    if saved:
        own, theirs = config.execution, saved['config']['execution']
        shared = theirs['microbatch'] and theirs['microbatch'] % (mesh.shape['data'] * mesh.shape['fsdp']) == 0
        own.microbatch = own.microbatch or (theirs['microbatch'] if shared else None)
        own.dtype = own.dtype or theirs['dtype']


@contextlib.contextmanager
def log_failure(recorder: Recorder, ledger: Ledger, until: Mapping[str, Any]) -> Iterator[None]:
    """Inside runs the training: if it ends early, status.json and log.txt say why; of an alarm also the settings of
    which one has to change before it goes on."""

    def ended(reason: str, state: str = 'failed', **more: Any) -> None:
        with contextlib.suppress(RunError):  # the disk may be what failed
            recorder.say(ledger.line())
            recorder.note(reason)
            recorder.flush()
            recorder.status(state, reason=reason, **more)

    def failed(error: BaseException) -> None:
        reason = ' '.join(str(error).split()) or type(error).__name__
        alarm = {'alarm': dict(until)} if isinstance(error, Alarm) else {}
        ended(reason, 'preempted' if isinstance(error, Preempted) else 'failed', **alarm)

    try:
        processes.farewell(ended)
        with interrupts.undoing(failed):
            yield
    except BaseException as error:
        processes.settle(error)
        failed(error)
        raise
    recorder.say(ledger.line())
    recorder.flush()


def growth(config: Config) -> Growth:
    """The growth of a config's batch, its microbatch resolved."""
    microbatch = config.execution.microbatch or config.batch_size
    return Growth(microbatch, config.batch_size // microbatch, config.optim.batch_warmup)


def planned_tokens(config: Config, tokens: int) -> int:
    """Places for tokens in all steps of a config, given those of a full batch."""
    return tokens * growth(config).first(config.steps) // config.batch_size


def make_optimizer(config: Config) -> tuple[Any, Any]:
    """(the optimizer, its schedule) of a config with its steps resolved."""
    o = config.optim
    rate = optim.schedule(o.schedule, lr=o.lr, steps=config.steps, warmup=o.warmup, decay=o.decay, final=o.final)
    options = {'b1': o.b1, 'b2': o.b2, 'eps': o.eps, 'weight_decay': o.weight_decay}
    if o.name == 'muon':
        dtype = execution.resolve(config, training=False).dtype
        return optim.muon_adamw(rate, momentum=o.momentum, dtype=dtype, **options), rate
    if o.name == 'adafactor':
        return optim.adafactored(rate, weight_decay=o.weight_decay), rate
    return optim.adamw(rate, **options), rate


def abstract_state(trainable: Roles, optimizer: Any, seed: int, *, ema: bool = False) -> training.TrainState:
    """The state as shapes and shardings: what is restored into, and what a dry run compiles with."""
    shapes = jax.eval_shape(lambda p: training.create(p, {}, optimizer, seed, ema=ema), trainable)
    return checkpoint.abstract(shapes)


def autotune_microbatch(
    config: Config, cfg: ModelConfig, abstract: training.TrainState, build: Callable[[int], Any],
    batch: Callable[[int], training.Batch] | None, *, partly: bool = False,
) -> tuple[Any, str]:  # fmt: skip
    """(the compiled step, the microbatch in words), with execution.microbatch filled in if the user left it to us.

    Args:
      build: microbatch -> the compiled step.
      batch: microbatch -> a batch to time its step with; None: nothing is timed.
      partly: batches are filled in part: a microbatch of half the usual least costs less than rows that hold nothing.
    """
    if config.execution.microbatch:
        return build(config.execution.microbatch), f'microbatch {config.execution.microbatch}'
    build, mesh = functools.cache(build), jax.sharding.get_mesh()
    found = microbatch.options(config.batch_size, mesh.shape['data'] * mesh.shape['fsdp'])
    device = mesh.devices.flat[0]
    if partly:
        wanted = microbatch.MIN_TOKENS // 2 if device.platform == 'cpu' else microbatch.ACCELERATOR_TOKENS
        enough = [m for m in found if m * config.seq_len >= wanted]
        found = [m for m in found if m <= enough[0]] if enough else found
    memory = execution.least_memory(device)
    limit = memory and memory * execution.used(device.platform)
    search = functools.partial(microbatch.choose, found, build, limit=limit, seq_len=config.seq_len)
    alone = jax.process_count() == 1  # clocks differ: several processes time nothing
    timed = alone and not partly and device.platform == 'cpu' and len(microbatch.candidates(found, config.seq_len)) > 1
    if timed and batch is not None:
        time_them = lambda steps: microbatch.time_steps(steps, abstract, {m: batch(m) for m in steps})
        key = {
            'stage': config.stage, 'batch': [config.batch_size, config.seq_len], 'model': cfg.key,
            'optimizer': config.optim.name, 'device': device.device_kind, 'cpus': os.cpu_count(),
            'mesh': dict(mesh.shape), 'jax': jax.__version__,
        }  # fmt: skip
        choice = microbatch.remembered(key, lambda: search(time_them=time_them))
    else:
        choice = search()
    config.execution.microbatch = choice.microbatch
    if partly:
        choice = choice._replace(why=f'of {config.batch_size}: only those are computed that hold something')
    later = '; timed at the start of a run' if timed and batch is None else ''
    return build(config.execution.microbatch), f'microbatch {config.execution.microbatch} ({choice.why}{later})'


def abstract_batch(arrays: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch, {name: (shape, dtype)}, as shapes and shardings on the current mesh; a name ends with its dims."""
    mesh = jax.sharding.get_mesh()
    where = lambda name, shape: jax.NamedSharding(mesh, sharding.activation_spec(sharding.dims_of(name), shape))
    return {name: jax.ShapeDtypeStruct(shape, t, sharding=where(name, shape)) for name, (shape, t) in arrays.items()}
