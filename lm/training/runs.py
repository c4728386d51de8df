"""A run's directory: what lies in it, opening it to train, loading it to use."""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from lm import files, interrupts, locks, processes, runtime, sharding
from lm.config import Config, base, differences, leaves, split_run
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.interop import folders
from lm.model import attention_kernels, parameters
from lm.model.adapters import ADAPTERS
from lm.model.config import ModelConfig
from lm.model.roles import SCORED, assemble
from lm.training import checkpoint

LOCK = '.lock'
VERSIONED = (
    'lm-jax',
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
    'sentencepiece',
    'tokenizers',
    'numpy',
)
NUMERIC = ('enable_x64', 'default_matmul_precision', 'default_prng_impl', 'threefry_partitionable')  # settings of JAX


class Parent(NamedTuple):
    """A run that weights come from."""

    path: str
    step: int  # of its checkpoint; UNKNOWN where an older version did not say
    digest: str  # of its weights, see `checkpoint.digest`


UNKNOWN = -1


class About(NamedTuple):
    """What there is to know of a run's stage without the code of the stage."""

    data: str  # kind of records that it learns from: 'text', 'chat', 'pairs'
    output: str  # 'text' that continues, 'answers' in a conversation, or 'scores'
    adapter: str | None = None  # of `adapters.ADAPTERS`, which is then all that the run trains

    @property
    def role(self) -> str:
        """The role of the model that it makes."""
        return 'reward' if self.output == 'scores' else 'policy'

    @property
    def trains(self) -> str:
        """The role of what is trained."""
        return self.role if self.adapter is None else 'adapter'


# Of the stages that older versions had: their runs do not say.
_BEFORE_ABOUT = {
    'pretrain': About('text', 'text'), 'sft': About('chat', 'answers'), 'reward': About('pairs', 'scores'),
}  # fmt: skip


class Model(NamedTuple):
    """A trained model, ready to be used."""

    params: Any
    cfg: ModelConfig
    tokenizer: Tokenizer
    saved: Mapping[str, Any]  # config.json
    step: int

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings."""
        return self.saved['config']

    @property
    def about(self) -> About:
        return about(self.saved)


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The frozen shape of the model that a config (a ConfigDict, or a saved one) describes, as this platform runs it.

    Raises UsageError for sizes that do not fit each other, and an attention that the platform lacks.
    """
    dtype = runtime.compute_dtype(config['precision']['compute'])
    attention = attention_choice(config).name
    return ModelConfig(**dict(config['model']), remat=config['remat'], attention=attention, dtype=dtype)


def attention_choice(config: Mapping[str, Any]) -> attention_kernels.Choice:
    """The attention that a config gets here, and why."""
    model, dtype = config['model'], runtime.compute_dtype(config['precision']['compute'])
    needs = {'dtype': dtype, 'head_dim': model['head_dim'], 'softcap': model['attn_softcap']}
    return attention_kernels.choose(attention_kernels.this_device(), asked=config['attention'], **needs)


def read_config(run: str) -> dict[str, Any]:
    """The saved config.json of 'DIR' or 'DIR@STEP'. Raises UsageError if it is not a run."""
    folder = epath.Path(split_run(run)[0])
    file = folder / 'config.json'
    if folder.suffix.lower() == '.gguf' and folder.is_file():
        raise UsageError(f'{folder} is not a run: it is a GGUF file, {folders.converted(folder)}')
    if not file.exists():
        raise UsageError(f'{folder} is not a run: it {folders.reason(folder)}')
    try:
        saved = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f'{file} is damaged ({error}): restore it, or train in another workdir') from None
    if not isinstance(saved, dict) or not isinstance(saved.get('config'), dict):
        other = isinstance(saved, dict) and ('architectures' in saved or 'model_type' in saved)
        what = f'it is a Hugging Face folder, {folders.converted(folder)}' if other else 'its config.json is of another'
        raise UsageError(f'{folder} is not a run: {what}')
    if missing := sorted({'model', 'optim', 'stage', 'seq_len'} - set(saved['config'])):
        raise UsageError(f'{file} is damaged (config.{missing[0]} is missing): restore it, or train in another workdir')
    return saved


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Inside, this process alone trains in `workdir`: two at once would spoil each other's files.

    The lock is the system's, which lets it go however the process ends. What was made for it is removed again unless
    the run has put something there. A bucket has no locks. Of several processes, the first holds it for all.

    Raises UsageError if another process trains there, or nothing can be written there.
    """
    if '://' in os.fspath(workdir) or not processes.first():
        yield
        return
    _check_folder(workdir)
    folder, made, lock = Path(workdir), [], None

    def release(*_: Any) -> None:
        if lock is not None:
            locks.drop(lock)
        for path in made:
            with contextlib.suppress(OSError):  # it was not made, or it is a run now
                path.rmdir()

    try:
        try:
            made = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = locks.take(folder / LOCK)
        except BlockingIOError:
            raise UsageError(f'another process trains in {folder}: wait for it or stop it') from None
        except OSError as error:
            raise UsageError(f'{workdir} cannot be written ({error.strerror}): name another --workdir') from error
        with interrupts.undoing(release):
            yield
    finally:
        release()


def _check_folder(workdir: epath.Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f'{workdir} is a file: name another --workdir')


def open_workdir(config: Config, workdir: epath.Path) -> dict[str, Any] | None:
    """The saved config.json if `workdir` holds this run already, None if it is new.

    A run that never had a checkpoint has nothing to lose: it begins again, under whatever settings.

    Raises UsageError if it holds another run, one that is beyond its last step or has lost its checkpoints, or files
    that are no run.
    """
    _check_folder(workdir)
    if not workdir.exists():
        return None
    if not (workdir / 'config.json').exists():
        if any(path.name != LOCK and not files.is_temporary(path) for path in workdir.iterdir()):
            raise UsageError(f'{workdir} holds files that are not a run: name another --workdir')
        return None
    saved = read_config(str(workdir))
    steps = checkpoint.listed(workdir / 'checkpoints')
    if not steps:
        _check_nothing_lost(workdir)
        return None
    if config.model.vocab_size == saved.get('asked_vocab_size'):  # its text was too little for so many
        config.model.vocab_size = saved['config']['model']['vocab_size']
    different = differences(saved['config'], config.to_dict())
    if different:
        keys = ', '.join(f'{k} ({old} there, {new} now)' for k, (old, new) in sorted(different.items())[:4])
        more = f' and {len(different) - 4} more' if len(different) > 4 else ''
        raise UsageError(f'{workdir} holds another run: {keys}{more}; name another --workdir')
    checkpoint.check_layout(workdir / 'checkpoints')
    at = checkpoint.newest_sealed(workdir / 'checkpoints')  # not what only looks like a later step
    if config.steps and at and config.steps < at:
        raise UsageError(f'{workdir} is at step {at} already, steps={config.steps}: set more')
    return saved


def _check_nothing_lost(workdir: epath.Path) -> None:
    """Raises UsageError if a run without checkpoints had one: to begin again would cut its metrics and samples."""
    status = read_status(workdir)
    if status.get('state') == 'done':
        had = f'is done, with {status["step"]} steps'
    elif status.get('saved') is not None:
        had = f'was saved at step {status["saved"]}'
    elif not status and (workdir / 'metrics.jsonl').exists():
        had = 'has metrics.jsonl of steps that were taken, and no status.json'
    else:
        return
    raise UsageError(
        f'{workdir} {had}, and its checkpoints are gone: bring {workdir / "checkpoints"} back, name another --workdir, '
        f'or delete {workdir} to begin again'
    )


def read_status(workdir: epath.Path) -> dict[str, Any]:
    """status.json of a run, {} if it has none that can be read."""
    try:
        status = json.loads((workdir / 'status.json').read_text())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def inherit_model(
    config: Config, own: About, chosen: Collection[str], workdir: epath.Path | None = None, *, weights: bool = True
) -> None:
    """With init_from or branch_from, takes the model and the tokenizer of that run.

    Once `workdir` holds the run, its own config.json says all that the parent did, and the parent may be gone.

    Args:
      own: of the stage that is to run. chosen: the settings that the command line names or moves.
      weights: whether a checkpoint of that run will be needed.

    Raises:
      UsageError: one of them is a model.* that differs, a branch has other data, a stage that speaks is to start from
        a reward model, data.tokenizer gives other ids than that run's, or there is no such run or checkpoint.
    """
    parent = config.init_from or config.branch_from
    if not parent:
        return
    resumed = workdir is not None and (workdir / 'config.json').exists() and checkpoint.listed(workdir / 'checkpoints')
    whole = read_config(str(workdir) if resumed else parent)
    saved, theirs = whole['config'], about(whole)
    if weights and not resumed:
        checkpoint.locate(parent)
    if theirs.output == 'scores' and own.output != 'scores':
        raise UsageError(
            f'{parent} is a reward model, which gives scores and has not learned to speak: set init_from to the run '
            f'that it started from ({saved["init_from"]})'
        )
    if theirs.adapter is not None and not resumed and not config.branch_from:
        under = parents(whole)['base'].path
        raise UsageError(f'{parent} is an adapter ({theirs.adapter}) over {under}: set init_from={under}')
    if config.branch_from and not resumed:
        _check_branch(config, saved)
    model = base().model.to_dict() | saved['model']  # a setting newer than that run has its default
    for key in sorted(chosen):
        name = key.removeprefix('model.')
        if key.startswith('model.') and config.model[name] != model[name]:
            raise UsageError(f'{key}={config.model[name]} differs from {parent}, which has {model[name]}: leave it out')
    config.model.update(model)
    if config.data.pretraining is None and own.data != 'text':
        config.data.pretraining = pretraining_of(whole)
    if config.data.tokenizer is None:
        config.data.tokenizer = tokenizer_folder(parent)
    elif not resumed and config.data.tokenizer != tokenizer_folder(parent):
        _check_tokenizer(config.data.tokenizer, parent)


def pretraining_of(saved: Mapping[str, Any]) -> str | None:
    """The text that a run was pretrained on, as far as its config.json says."""
    return saved['config']['data'].get('mixture' if about(saved).data == 'text' else 'pretraining')


def _check_branch(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises UsageError where a position in the parent's data is not one in the branch's."""
    old, new = dict(leaves(saved)), dict(leaves(config))
    if old['optim.name'] != new['optim.name']:
        raise UsageError(
            f'{config.branch_from} has the state of optim.name={old["optim.name"]}: set it so, or start with init_from'
        )
    position = ['optim.batch_warmup', 'microbatch'] if new['optim.batch_warmup'] else ['optim.batch_warmup']
    keys = [
        'batch_size',
        'seq_len',
        'seed',
        *(k for k in position if k in old),
        *(k for k in new if k.startswith('data.') and k in old),
    ]
    same_tokens = new['data.tokenizer'] in (None, old['data.tokenizer'], tokenizer_folder(config.branch_from))
    other = [k for k in keys if old[k] != new[k] and not (k == 'data.tokenizer' and same_tokens)]
    if other:
        told = ', '.join(f'{k} ({old[k]} there, {new[k]} now)' for k in other)
        raise UsageError(f'{config.branch_from} has other data: {told}; set them as there, or start with init_from')


def _check_tokenizer(given: str, parent: str) -> None:
    """Raises UsageError unless the ids that a parent has learned stand for the same by another tokenizer, which may
    have more."""
    own = Tokenizer.load(tokenizer_folder(parent)).pieces
    if Tokenizer.load(given).pieces[: len(own)] != own:
        raise UsageError(f'data.tokenizer={given} gives other ids than those that {parent} has learned: leave it out')


def tokenizer_folder(run: str) -> str:
    """The folder of a run's tokenizer."""
    return str(epath.Path(split_run(run)[0]) / 'tokenizer')


def write_config(workdir: epath.Path, config: Config, parents: Mapping[str, Parent], **more: Any) -> None:
    """Writes config.json: the resolved settings, the runs that weights come from by their role, and where they ran.

    Raises UsageError if one of several processes does not see it: checkpoints are written together.
    """
    named = {role: parent._asdict() for role, parent in parents.items()}
    value = {'config': config.to_dict(), 'parents': named, 'versions': versions(), 'commit': commit(), **more}
    if processes.first():
        files.write_json(workdir / 'config.json', value)
    processes.exchange('written')
    seen = processes.exchange((workdir / 'config.json').exists())
    if not all(seen):
        raise UsageError(
            f'process {seen.index(False)} does not see {workdir} of process 0: name a folder that all share'
        )


def facts(config: Config) -> dict[str, Any]:
    """What must be the same in all processes of a run: {setting or name of a package: value}."""
    found = {f'jax_{name}': jax.config.values[f'jax_{name}'] for name in NUMERIC}
    return {**dict(leaves(config)), **versions(), 'python': platform.python_version(), 'commit': commit(), **found}


def load(run: str, *, warn: Callable[[str], None]) -> Model:
    """Loads 'DIR' (its newest checkpoint that holds) or 'DIR@STEP' onto the current mesh, parameters alone.

    Raises UsageError if there is no such run or checkpoint, RunError if nothing in it can be read.
    """
    saved = read_config(run)
    cfg = model_config(saved['config'] | {'attention': None})  # what it was trained with, this platform may lack
    with ThreadPoolExecutor(1) as beside:  # half a second, where a vocabulary is large
        reading = beside.submit(Tokenizer.load, tokenizer_folder(run))
        params, parent = weights(run, abstract_params(cfg, about(saved).role), warn=warn)
    try:
        tokenizer = reading.result()
    except OSError as error:
        raise RunError(f'the tokenizer of {run} cannot be read: {error}') from error
    if saved.get('tokenizer') not in (None, tokenizer.fingerprint):
        warn(
            f'{tokenizer_folder(run)} is not the tokenizer that the run was trained with: it was changed or is damaged'
        )
    return Model(params, cfg, tokenizer, saved, parent.step)


def weights(run: str, abstract: Any, *, warn: Callable[[str], None]) -> tuple[Any, Parent]:
    """(what a run's checkpoint has for use, whence): the average of its weights if it kept one, else the weights.

    Args:
      abstract: the parameters, or some of them, as shapes and shardings.
    """
    saved = read_config(run)
    item, own, frozen = weights_item(saved['config']), about(saved), {}
    if own.adapter is not None:
        frozen['base'] = read_unchanged(parents(saved)['base'].path, abstract, parents(saved)['base'], warn=warn)[0]
        abstract = abstract_adapter(own.adapter, abstract)
    step, tree, meta = checkpoint.find(run, {item: {own.trains: abstract}}, warn=warn)
    models = assemble(tree[item], frozen)
    return models[own.role], Parent(run, step, checkpoint.saved_digest(meta, item, own.trains))


def weights_item(saved: Mapping[str, Any]) -> str:
    """Where in a checkpoint of a run with these saved settings the weights for use are."""
    return 'ema' if _averages(saved) else 'trainable'


def branch(
    run: str, abstract: Mapping[str, Any], *, warn: Callable[[str], None]
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(step, a checkpoint's tree to go on from, its meta). An average that the run did not keep begins with its
    weights."""
    begins = 'ema' in abstract and not _averages(read_config(run)['config'])
    asked = {k: v for k, v in abstract.items() if not (begins and k == 'ema')}
    step, tree, meta = checkpoint.find(run, asked, warn=warn)
    tree = tree | ({'ema': jax.tree.map(jax.numpy.copy, tree['trainable'])} if begins else {})
    return step, tree, meta


def read_unchanged(
    run: str, abstract: Any, before: Parent | None, *, warn: Callable[[str], None]
) -> tuple[Any, Parent]:
    """`weights` of a run. Raises UsageError if they are not those that another run began with (None: it begins now)."""
    params, now = weights(run, abstract, warn=warn)
    check_unchanged(before, params, now)
    return params, now


def check_unchanged(before: Parent | None, params: Any, now: Parent) -> None:
    """Raises UsageError if weights that were read now are not those that a run began with. Older versions took the
    digest of converted models after the cast."""
    if before is not None and before.digest != now.digest and checkpoint.digest(params) != before.digest:
        raise UsageError(
            f'{now.path} has other weights than when this run began: bring them back, or name another --workdir'
        )


def parents(saved: Mapping[str, Any] | None) -> dict[str, Parent]:
    """The runs that weights of a run came from, by their role, as its config.json has them. Older ones have a list
    without roles, and of DPO's reference the digest beside it."""
    found = (saved or {}).get('parents', {})
    if isinstance(found, Mapping):
        return {role: Parent(**parent) for role, parent in found.items()}
    digest = (saved or {}).get('reference')
    return {'reference': Parent(found[0], UNKNOWN, digest)} if digest else {}


def _averages(saved: Mapping[str, Any]) -> bool:
    """Whether a run with these saved settings kept an average of its weights; older ones do not name the setting."""
    return saved['optim'].get('ema') is not None


def abstract_params(cfg: ModelConfig, role: str = 'policy') -> Any:
    """The parameters of a role as shapes, dtypes and shardings on the current mesh."""
    return with_shardings(shapes(cfg, role))


def abstract_adapter(name: str, base: Any) -> Any:
    """An adapter over parameters, both as shapes, dtypes and shardings on the current mesh."""
    return with_shardings(jax.eval_shape(lambda key: ADAPTERS[name](key, base), jax.random.key(0)))


def abstract_model(saved: Mapping[str, Any], cfg: ModelConfig) -> Any:
    """What `load` gives of a run with this config.json, as shapes, dtypes and shardings on the current mesh."""
    own = about(saved)
    params = abstract_params(cfg, own.role)
    if own.adapter is None:
        return params
    return assemble({'adapter': abstract_adapter(own.adapter, params)}, {'base': params})['policy']


def shapes(cfg: ModelConfig, role: str = 'policy') -> Any:
    """The parameters of a role as shapes and dtypes."""
    return parameters.shapes(cfg, scored=role in SCORED)


def about(saved: Mapping[str, Any]) -> About:
    """What a run with this config.json learns from and puts out."""
    if 'about' in saved:
        return About(**saved['about'])
    return _BEFORE_ABOUT.get(saved['config']['stage'], About('pairs', 'answers'))


def with_shardings(tree: Any) -> Any:
    """A parameter-like tree of shapes with the shardings that its names say."""
    mesh = jax.sharding.get_mesh()
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, tree, sharding.shardings(mesh, sharding.param_specs(tree)))


def versions() -> dict[str, str | None]:
    """What is installed of what a run's numbers depend on."""
    return {name: _version(name) for name in VERSIONED}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, if this is one."""
    root = Path(__file__).parents[2]
    try:
        command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
