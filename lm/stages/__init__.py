"""The stages: a module each, and the registry, which is the only list of them."""

from collections.abc import Iterable

from lm.config import nearest
from lm.errors import UsageError
from lm.stages import dpo, pretrain, reward, sft
from lm.stages.spec import StageSpec

STAGES = {spec.name: spec for spec in (pretrain.SPEC, sft.SPEC, reward.SPEC, dpo.SPEC)}


def check_settings(spec: StageSpec, keys: Iterable[str]) -> None:
    """Raises UsageError for a setting that other stages have and this one has no use for."""
    for key in keys:
        owners = [other.name for other in STAGES.values() if key in other.settings]
        if owners and key not in spec.settings:
            raise UsageError(f'{key} is a setting of stage {" and ".join(owners)}: stage {spec.name} has no use for it')


def find(stage: str) -> StageSpec:
    """The spec of a stage. Raises UsageError if there is none of that name."""
    if stage not in STAGES:
        raise UsageError(f'stage={stage}{nearest(stage, list(STAGES))}: one of {", ".join(STAGES)}')
    return STAGES[stage]
