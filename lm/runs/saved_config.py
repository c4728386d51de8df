"""The facts in a run's config.json beside its settings: its stage, and the runs that its weights came from."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from lm import config as configs
from lm.data.records import Kind
from lm.errors import UsageError
from lm.model import quantized
from lm.model.adapters import ADAPTERS
from lm.model.roles import ADAPTER_OF


class Parent(NamedTuple):
    """A run that weights come from."""

    path: str
    step: int  # of its checkpoint; UNKNOWN where an older version did not say
    digest: str  # of its weights, see `checkpoint.digest`; '' where an older version did not say


UNKNOWN = -1
OUTPUTS = ('text', 'answers', 'scores')


class About(NamedTuple):
    """Facts about a run's stage that need no code of the stage."""

    data: str  # kind of records that it learns from: 'text', 'chat', 'pairs'
    output: str  # 'text' that continues, 'answers' in a conversation, or 'scores'
    adapter: str | None = None  # of `adapters.ADAPTERS`, which is then all that the run trains
    quantized: str | None = None  # how the matrices of its layers lie: 'int8', 'int4:32', 'nf4'; None: as arrays

    @property
    def role(self) -> str:
        """The role of the model that it makes."""
        return 'reward' if self.output == 'scores' else 'policy'

    @property
    def trains(self) -> str:
        """The role of what is trained."""
        return self.role if self.adapter is None else ADAPTER_OF[self.role]


# Of the stages that older versions had: their runs do not say.
_BEFORE_ABOUT = {
    'pretrain': About('text', 'text'), 'sft': About('chat', 'answers'), 'reward': About('pairs', 'scores'),
}  # fmt: skip


def check(saved: Mapping[str, Any]) -> None:
    """Raises UsageError, as the rest of a sentence on a config.json, for what is not of the form that it should be, or
    of a newer version."""
    config = saved['config']
    for name in ('model', 'optim', 'data', 'execution', *({'precision'} & set(config))):
        if not isinstance(config.get(name), Mapping):
            raise UsageError(f'is damaged (config.{name} is missing or no group): restore it, or name another run')
    for group in ('model', 'execution'):
        for name, value in config[group].items():
            field = configs.fields_of(configs.Settings).get(f'{group}.{name}')
            if field is None:
                raise UsageError(f'has {group}.{name}, which this version does not know: use a newer lm')
            if value is not None and field.bound and (obstacle := field.bound.obstacle(value)):
                raise UsageError(f'is damaged (config.{group}.{name}={value} {obstacle}): restore it')
    told = saved.get('about', {})
    if not isinstance(told, Mapping) or not isinstance(saved.get('parents', {}), Mapping | list):
        raise UsageError('is damaged (about and parents are to be objects): restore it, or name another run')
    if unknown := set(told) - set(About._fields):
        raise UsageError(f'has about.{min(unknown)}, which this version does not know: use a newer lm')
    try:
        own, known = about(saved), parents(saved)
        sound = all(isinstance(p.path, str) and isinstance(p.digest, str) for p in known.values())
    except (TypeError, IndexError):
        sound, own = False, About('text', 'text')
    if not sound:
        raise UsageError('is damaged (about or parents): restore it, or name another run')
    if own.output not in OUTPUTS or own.data not in get_args(Kind) or not isinstance(own.adapter, str | None):
        raise UsageError(f'has a run of {own.data} that gives {own.output}, which this version does not know')
    if own.adapter is not None and own.adapter not in ADAPTERS:
        raise UsageError(f'has an adapter ({own.adapter}), which this version does not know: use a newer lm')
    if own.quantized is not None:
        try:
            quantized.parse(own.quantized)
        except (UsageError, AttributeError):
            why = f'has weights quantized as {own.quantized}, which this version does not know: use a newer lm'
            raise UsageError(why) from None


def about(saved: Mapping[str, Any]) -> About:
    """The kind of data and the output of a run with this config.json."""
    if 'about' in saved:
        return About(**saved['about'])
    return _BEFORE_ABOUT.get(saved['config']['stage'], About('pairs', 'answers'))


def parents(saved: Mapping[str, Any] | None) -> dict[str, Parent]:
    """The runs that weights of a run came from, by their role, as its config.json has them. Older ones have a list
    without roles, and of DPO's reference the digest beside it."""
    found = (saved or {}).get('parents', {})
    if isinstance(found, Mapping):
        return {role: Parent(**parent) for role, parent in found.items()}
    if saved is None or not found:
        return {}
    digests = {about(saved).trains: '', 'reference': saved.get('reference')}
    return {role: Parent(found[0], UNKNOWN, digest) for role, digest in digests.items() if digest is not None}


def base_of(saved: Mapping[str, Any]) -> Parent:
    """The run under an adapter. Raises UsageError where none is named: it was not yet read."""
    known = parents(saved)
    if 'base' not in known:
        raise UsageError('a run of an adapter names no base: it ended before it had read one, run its command again')
    return known['base']


def pretraining_of(saved: Mapping[str, Any]) -> str | None:
    """The text that a run was pretrained on, as far as its config.json says."""
    return saved['config']['data'].get('mixture' if about(saved).data == 'text' else 'pretraining')


def weights_item(saved: Mapping[str, Any]) -> str:
    """The item of a checkpoint, of a run with these saved settings, that has the weights for use."""
    averages = saved['optim'].get('ema') is not None  # older runs do not name the setting
    return 'ema' if averages else 'trainable'
