"""The stages: a module each, and the registry, which is the only list of them."""

from lm.config import nearest
from lm.errors import UsageError
from lm.stages import distill, dpo, grpo, ppo, pretrain, reward, sft
from lm.stages.spec import StageSpec

STAGES = {
    spec.name: spec for spec in (pretrain.SPEC, sft.SPEC, reward.SPEC, dpo.SPEC, grpo.SPEC, ppo.SPEC, distill.SPEC)
}


def find(stage: str) -> StageSpec:
    """The spec of a stage. Raises UsageError if there is none of that name."""
    if stage not in STAGES:
        raise UsageError(f'stage={stage}{nearest(stage, list(STAGES))}: one of {", ".join(STAGES)}')
    return STAGES[stage]
