"""The GRPO family: a group of responses to each prompt, each better or worse than its group; no critic."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from lm import advantages
from lm.config import Config
from lm.errors import RunError, UsageError
from lm.settings import VARIANTS
from lm.stages import online
from lm.stages.spec import StageSpec


def check(config: Config) -> None:
    """Raises UsageError for settings that make no sense together."""
    online.check(config)
    if config.rl.group < 2 and config.advantage != 'reinforce++':
        raise UsageError(f'rl.group={config.rl.group}: advantage={config.advantage} compares responses, set at least 2')


class Grpo(online.Online):
    """Advantages of groups; a group whose scores do not differ teaches nothing and is left out."""

    extra_measures = ('groups_without_variance',)

    def weigh(
        self, rows: Mapping[str, np.ndarray], score: np.ndarray, rollout: int, beta: float
    ) -> dict[str, np.ndarray]:
        rl, mask_BT = self.config.rl, rows['weights_BT']
        grouped = self.config.advantage != 'reinforce++'
        same = grouped & np.repeat(self._same(score), rl.group)
        if rl.kl == 'reward':
            score = score - beta * ((rows['old_BT'] - rows['reference_BT']) * mask_BT).sum(1)
        score_PG = jnp.asarray(score.reshape(rl.prompts, rl.group))
        if self.config.advantage == 'max_rl' and float(score_PG.min()) < 0:
            raise RunError(
                f'advantage=max_rl takes scores of at least 0, and one is {float(score_PG.min()):.3g}: set another'
            )
        found = np.asarray(advantages.OF_GROUPS[self.config.advantage](score_PG)).reshape(-1, 1)
        self.note(groups_without_variance=float(same.mean()))
        return {'advantage_BT': found * mask_BT, 'weights_BT': mask_BT * ~same[:, None]}


def settle(config: Config) -> None:
    """Sets what is None by the variant."""
    for key, value in VARIANTS[config.variant].items():
        group, _, name = key.rpartition('.')
        owner = config[group] if group else config
        if owner[name] is None:
            owner[name] = value


SPEC = StageSpec('grpo', 'chat', 'answers', online.prepare, Grpo, check, settle)
