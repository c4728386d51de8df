"""What a run's config.json says of it beside its settings: its stage, and the runs that its weights came from."""

from collections.abc import Mapping
from typing import Any, NamedTuple


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


def about(saved: Mapping[str, Any]) -> About:
    """What a run with this config.json learns from and puts out."""
    if 'about' in saved:
        return About(**saved['about'])
    return _BEFORE_ABOUT.get(saved['config']['stage'], About('pairs', 'answers'))


def parents(saved: Mapping[str, Any] | None) -> dict[str, Parent]:
    """The runs that weights of a run came from, by their role, as its config.json has them. Older ones have a list
    without roles, and of DPO's reference the digest beside it."""
    found = (saved or {}).get('parents', {})
    if isinstance(found, Mapping):
        return {role: Parent(**parent) for role, parent in found.items()}
    digest = (saved or {}).get('reference')
    return {'reference': Parent(found[0], UNKNOWN, digest)} if digest else {}


def pretraining_of(saved: Mapping[str, Any]) -> str | None:
    """The text that a run was pretrained on, as far as its config.json says."""
    return saved['config']['data'].get('mixture' if about(saved).data == 'text' else 'pretraining')


def weights_item(saved: Mapping[str, Any]) -> str:
    """Where in a checkpoint of a run with these saved settings the weights for use are."""
    return 'ema' if averages(saved) else 'trainable'


def averages(saved: Mapping[str, Any]) -> bool:
    """Whether a run with these saved settings kept an average of its weights; older ones do not name the setting."""
    return saved['optim'].get('ema') is not None
