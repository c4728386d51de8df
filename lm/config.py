"""A run's settings as files and the command line say them: a ConfigDict of what `lm.settings` declares, which
`configs/*.py` and `--config.KEY=VALUE` change; every mistake is one line.

`--config.*` is read here and not by absl, which answers an unknown key with a traceback, cannot set a field whose value
is None, and makes the string 'None' of None (ml_collections 1.1).
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lm.errors import UsageError
from lm.settings import INT32_MAX, Bound, Settings, Shared

# A ConfigDict. Its fields are declared at run time, by `base`, where no type checker sees them.
Config: TypeAlias = Any

# What may differ when a run is resumed; a key or a whole branch.
MAY_DIFFER = (
    'steps', 'log', 'eval', 'checkpoint', 'mesh', 'execution.scan', 'execution.remat', 'rl.beta', 'rl.kl_budget',
    'rl.kl_target',
)  # fmt: skip
# Names that settings had before: commands still say them, and the runs of then.
RENAMED = {
    'microbatch': 'execution.microbatch',
    'remat': 'execution.remat',
    'attention': 'execution.attention',
    'precision.compute': 'execution.dtype',
    'model.scan': 'execution.scan',
}
# Settings by the names that other trainers give them, and ours.
ELSEWHERE = {
    name: ours
    for ours, names in {
        'optim.lr': 'learning_rate peak_lr max_lr',
        'optim.name': 'optimizer optimizer_name optim_type',
        'optim.schedule': 'lr_scheduler_type lr_schedule scheduler',
        'optim.warmup': 'warmup_steps warmup_iters',
        'optim.clip': 'max_grad_norm grad_clip gradient_clip',
        'optim.b1': 'beta1 adam_beta1',
        'optim.b2': 'beta2 adam_beta2',
        'steps': 'max_steps max_iters num_steps train_steps total_steps num_iterations',
        'batch_size': 'batch bsz global_batch_size train_batch_size',
        'execution.microbatch': 'gradient_accumulation_steps per_device_train_batch_size per_device_batch_size '
        'micro_batch_size',
        'seq_len': 'max_length max_seq_length max_seq_len sequence_length context_length block_size',
        'execution.remat': 'gradient_checkpointing activation_checkpointing',
        'data.mixture': 'data dataset datasets dataset_name data_path train_file',
        'init_from': 'model_name model_name_or_path init_checkpoint pretrained',
        'model.dim': 'hidden_size d_model n_embd emb_dim width',
        'model.layers': 'n_layer n_layers num_layers num_hidden_layers depth',
        'model.heads': 'n_head n_heads num_heads num_attention_heads',
        'model.ffn_dim': 'intermediate_size mlp_dim d_ff',
        'checkpoint.every': 'save_steps save_interval save_every',
        'eval.every': 'eval_steps eval_interval eval_every',
        'log.every': 'logging_steps log_interval log_every',
        'execution.dtype': 'dtype bf16 mixed_precision torch_dtype precision',
    }.items()
    for name in names.split()
}


class Field(NamedTuple):
    """A setting, as its class declares it."""

    default: Any
    kind: type
    optional: bool  # it may be None
    bound: Bound | None


def base(kind: type[Shared] = Settings) -> Config:
    """The settings of a class with their defaults. It is locked: a slip of the pen is an error."""
    config: Any = ConfigDict()
    for key, field in fields_of(kind).items():
        *parents, last = key.split('.')
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        if field.optional:  # None until it is set
            node[last] = placeholder(field.kind)
        if field.default is not None:
            node[last] = field.default
    return config.lock()


@functools.cache
def fields_of(kind: type[Shared]) -> Mapping[str, Field]:
    """{dotted key: setting} of a class of settings."""
    return dict(_fields_in(kind(), ''))


def _fields_in(group: Any, prefix: str) -> Iterator[tuple[str, Field]]:
    """(dotted key, setting) of a group of settings, whose values are the defaults."""
    types = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        key, default, alternatives = prefix + field.name, getattr(group, field.name), typing.get_args(types[field.name])
        if dataclasses.is_dataclass(default):
            yield from _fields_in(default, f'{key}.')
        else:
            one = alternatives[0] if alternatives else types[field.name]
            yield key, Field(default, one, type(None) in alternatives, field.metadata['bound'])


def known() -> dict[str, Field]:
    """{dotted key: setting} of all classes of settings that there are."""
    return {key: field for kind in _kinds() for key, field in fields_of(kind).items()}


def _kinds() -> list[type[Shared]]:
    """All classes of settings, those of stages first."""
    kinds: list[type[Shared]] = [Settings, Shared]
    for kind in kinds:
        kinds += [k for k in kind.__subclasses__() if k not in kinds]
    return kinds


# ---- reading the command line ----


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the words that are no settings, the pairs KEY, VALUE of `--config.KEY=VALUE`).

    Raises UsageError if one has no value.
    """
    words, settings = [], []
    rest = iter(argv)
    for word in rest:
        if not word.startswith('--config.'):
            words.append(word)
            continue
        key, equals, text = word.removeprefix('--config.').partition('=')
        if not equals:
            text = next(rest, None)
            if text is None:
                raise UsageError(f'--config.{key} has no value: write --config.{key}=VALUE')
        settings.append((key, text))
    return words, settings


def leaves(config: Config, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def nearest(word: str, words: Sequence[str]) -> str:
    """' (did you mean X?)' with the nearest of the words, upper and lower case alike, or ''."""
    lower = {w.lower(): w for w in reversed(words)}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return f' (did you mean {lower[found[0]]}?)' if found else ''


def parse_value(key: str, text: str, kind: type, optional: bool) -> Any:
    """Reads `text` as the declared type. '1e3' is an int where exact; 'none' is None where None is allowed."""
    if text.lower() == 'none' and optional:
        return None
    try:
        if kind is bool:
            return {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
        if kind is int:
            number = float(text)
            if number != int(number):
                raise ValueError
            return int(text) if text.lstrip('+-').isdigit() else int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {int: 'a whole number', float: 'a number', bool: 'true or false'}.get(kind, kind.__name__)
        raise UsageError(f'{key}={text}: must be {wanted}{" or none" if optional else ""}') from None


def whole(flag: str) -> Callable[[str], int]:
    """Reads a command's flag as a setting is read ('1e3' is 1000), for argparse's `type`."""
    return lambda text: parse_value(flag, text, int, False)


def check_flags(flags: Mapping[str, Any], bounds: Mapping[str, Bound]) -> None:
    """Raises UsageError for a command's flag that is set and not within its bound."""
    for name, bound in bounds.items():
        if flags[name] is not None and not bound.holds(flags[name]):
            raise UsageError(f'--{name}={flags[name]} must be {bound.words}')


def override(config: Config, key: str, text: str) -> None:
    """Sets one dotted key from its text. Raises UsageError for an unknown key (naming the nearest) or a wrong type."""
    key, own = RENAMED.get(key, key), dict(leaves(config))
    if key not in own:
        owners = dict.fromkeys(kind().stage for kind in _kinds() if key in fields_of(kind))
        if owners:
            raise UsageError(
                f'{key} is a setting of stage {" and ".join(owners)}: stage {config.stage} has no use for it'
            )
        raise UsageError(f'unknown setting {key}{_nearest_setting(key, list(own))}')
    *parents, last = key.split('.')
    node = config
    for parent in parents:
        node = node[parent]
    field = known().get(key) or Field(None, node.get_type(last), own[key] is None, None)  # a config file may add some
    choices = field.bound.choices if field.bound else ()  # one of them may be 'none'
    node[last] = text if text in choices else parse_value(key, text, field.kind, field.optional)


def _nearest_setting(key: str, keys: Sequence[str]) -> str:
    """As `nearest`, of a setting: first by the last part of its name, then by its name elsewhere."""
    last = key.lower().rsplit('.', 1)[-1].replace('-', '_')
    last = ELSEWHERE.get(last, last)
    by_last = [k for k in keys if last in (k, k.rsplit('.', 1)[-1])]
    return f' (did you mean {by_last[0]}?)' if by_last else nearest(key, keys)


def load(path_and_arg: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[Config, str]:
    """Reads `configs/STAGE.py[:ARG]` and applies the overrides: (the config, ARG).

    Raises UsageError if there is no such file, it has no `get_config` or fails, or a key or value is wrong.
    """
    path, arg = _split_arg(path_and_arg)
    config = _run_file(path, arg)
    for key, text in overrides:
        override(config, key, text)
    said = {key for key, _ in overrides} | {part.partition('=')[0] for part in arg.split(',')}
    if 'branch_from' in config and config.branch_from and 'init_from' not in said:  # in place of the file's own
        config.init_from = None
    check(config)
    return config, arg


def chosen(path_and_arg: str, overrides: Sequence[tuple[str, str]]) -> set[str]:
    """The settings that the command line names, or that its ARG moves."""
    path, arg = _split_arg(path_and_arg)
    plain, moved = (dict(leaves(_run_file(path, a))) for a in ('', arg))
    return {RENAMED.get(key, key) for key, _ in overrides} | {key for key in moved if moved[key] != plain.get(key)}


def _split_arg(path_and_arg: str) -> tuple[str, str]:
    """'configs/pretrain.py:124m' -> ('configs/pretrain.py', '124m')."""
    path, colon, arg = path_and_arg.partition('.py:')
    return (f'{path}.py', arg) if colon else (path, '')


def _run_file(path: str, arg: str) -> Config:
    """Returns what the file's get_config(arg) gives."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f'--config={path}: no such file (a stage is configs/pretrain.py, from a checkout of lm)')
    spec = importlib.util.spec_from_file_location('lm_config', file)
    if spec is None or spec.loader is None:
        raise UsageError(f'--config={path}: not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if 'get_config' not in vars(module):
            raise UsageError(f'--config={path}: has no function get_config(arg)')
        return _moved(module.get_config(arg))
    except UsageError:
        raise
    except Exception as error:  # whatever a person's own file does; a name, a place and a reason fit one line
        reason = (str(error).splitlines() or [''])[0][:200]  # ml_collections shows the whole config after it
        old = next((f' ({o} is {new} now)' for o, new in RENAMED.items() if f'"{o}"' in reason), '')
        raise UsageError(f'--config={path}{_line_in(file, error)}: {type(error).__name__}: {reason}{old}') from error


def _moved(config: Config) -> Config:
    """The config of a file that adds settings by the names that they had before."""
    for key, value in dict(leaves(config)).items():
        if key in RENAMED:
            override(config, key, str(value))
            *parents, name = key.split('.')
            with config.unlocked():
                del (config[parents[0]] if parents else config)[name]
    return config


def _line_in(file: Path, error: Exception) -> str:
    """':LINE' of the last place in the file that an error passed, or ''."""
    if isinstance(error, SyntaxError):
        return f':{error.lineno}'
    frames = traceback.extract_tb(error.__traceback__)
    return next((f':{f.lineno}' for f in reversed(frames) if Path(f.filename) == file), '')


def check(config: Config) -> None:
    """Raises UsageError for values that no run can have, whatever its data and devices."""
    declared = known()
    for key, value in leaves(config):
        bound = declared[key].bound if key in declared else None
        if bound is None or (value is None and declared[key].optional) or bound.holds(value):
            continue
        if bound.choices:
            told = ', '.join(('None',) * declared[key].optional + bound.choices)
            raise UsageError(f'{key}={value}{nearest(str(value), bound.choices)} is not one of {told}')
        raise UsageError(f'{key}={value} must be {bound.words}')
    if 'optim' in config:  # a job has none
        _check_steps(config)


def _check_steps(config: Config) -> None:
    """Raises UsageError for a batch, its parts or a beginning that no training can have."""
    if config.batch_size * config.seq_len > INT32_MAX:
        raise UsageError(
            f'batch_size={config.batch_size} × seq_len={config.seq_len} must be at most {INT32_MAX} tokens a step'
        )
    microbatch = config.execution.microbatch or config.batch_size
    if config.batch_size % microbatch:
        raise UsageError(f'batch_size={config.batch_size} is not a multiple of execution.microbatch={microbatch}')
    if config.optim.batch_warmup and microbatch == config.batch_size:
        raise UsageError(
            f'optim.batch_warmup={config.optim.batch_warmup} grows the batch by microbatches: set execution.microbatch '
            f'below batch_size={config.batch_size}'
        )
    if config.init_from and config.branch_from:
        raise UsageError('init_from and branch_from are two ways to start: set one of them')


# ---- a run's saved settings ----


def with_todays_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a config.json with its settings where they stand today."""
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in saved.items()}
    for old, today in RENAMED.items():
        (*parents, name), (group, field) = old.split('.'), today.split('.')
        node = new.get(parents[0]) if parents else new
        if isinstance(node, dict) and name in node and isinstance(new.setdefault(group, {}), dict):
            new[group][field] = node.pop(name)
    if new.get('precision') == {}:
        del new['precision']
    return new


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of the settings that differ and must not when a run is resumed.

    What the run resolved for itself (None in `new`) stays as it is saved; None for `execution.attention` is the choice
    of the platform that the run goes on on.
    """
    defaults = {key: field.default for key, field in known().items()}
    a, b = defaults | dict(leaves(old)), dict(leaves(new))  # a setting newer than the run has its default
    fixed = [k for k in b if k.split('.')[0] not in MAY_DIFFER and k not in MAY_DIFFER]
    plain: Callable[[Any], Any] = lambda v: json.loads(json.dumps(v))
    resolved = ('execution.microbatch', 'execution.dtype', 'execution.attention')
    differ = lambda k: plain(a.get(k)) != plain(b[k]) and not (k in resolved and b[k] is None)
    return {k: (a.get(k), b[k]) for k in fixed if differ(k)}


# ---- a run by name ----


def split_run(run: str) -> tuple[str, str | None]:
    """'DIR@STEP' -> (DIR, STEP), 'DIR' -> (DIR, None). A folder's own name may have an @ in it."""
    folder, at, step = run.rpartition('@')
    if not at or epath.Path(run).exists():
        return run, None
    return (folder, step) if step.isdecimal() or epath.Path(folder).exists() else (run, None)
