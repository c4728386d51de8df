"""One module a stage, each with one function `run(config, workdir, …)`: wiring for the one loop."""

from collections.abc import Callable
from typing import Any

from lm.config import nearest
from lm.errors import UsageError
from lm.stages import dpo, pretrain, reward, sft

STAGES = {'pretrain': pretrain.run, 'sft': sft.run, 'reward': reward.run, 'dpo': dpo.run}


def run_of(stage: str) -> Callable[..., dict[str, Any]]:
    """The function of a stage. Raises UsageError if there is none of that name."""
    if stage not in STAGES:
        raise UsageError(f'stage={stage}{nearest(stage, list(STAGES))}: one of {", ".join(STAGES)}')
    return STAGES[stage]
