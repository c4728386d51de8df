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
    rl = config.rl
    if rl.group < 2 and config.advantage != 'reinforce++':
        raise UsageError(f'rl.group={rl.group}: advantage={config.advantage} compares responses, set at least 2')
    if config.advantage == 'max_rl' and (rl.kl == 'reward' or rl.truncated in ('penalty', 'rising')):
        own = f'rl.kl={rl.kl}' if rl.kl == 'reward' else f'rl.truncated={rl.truncated}'
        raise UsageError(f'advantage=max_rl takes scores of at least 0, and {own} takes from them: set another')


class Grpo(online.Online):
    """Advantages of groups; one whose responses are all as good teaches nothing and is left out."""

    extra_measures = ('groups_without_variance',)

    def weigh(
        self, rows: Mapping[str, np.ndarray], score: np.ndarray, rollout: int, beta: float
    ) -> dict[str, np.ndarray]:
        rl, mask_BT = self.config.rl, rows['weights_BT']
        same = np.repeat(self._same(score), rl.group)
        if rl.kl == 'reward':
            score = score - beta * ((rows['old_BT'] - rows['reference_BT']) * mask_BT).sum(1)
        score_PG = jnp.asarray(score.reshape(rl.prompts, rl.group))
        if self.config.advantage == 'max_rl' and float(score_PG.min()) < 0:
            raise RunError(
                f'advantage=max_rl takes scores of at least 0, and one is {float(score_PG.min()):.3g}: set another'
            )
        found = np.asarray(advantages.OF_GROUPS[self.config.advantage](score_PG)).reshape(-1, 1)
        self.note(groups_without_variance=float(same.mean()))
        # A leash teaches where scores do not: one in the reward where it tells responses apart, one in the loss always.
        compared = rl.kl in ('none', 'reward') and self.config.advantage != 'reinforce++'
        idle = compared & np.repeat(self._same(score), rl.group)
        return {'advantage_BT': found * mask_BT, 'weights_BT': mask_BT * ~idle[:, None]}


def settle(config: Config) -> None:
    """Sets what is None by the variant."""
    online.settle(config, VARIANTS[config.variant])


SPEC = StageSpec('grpo', 'chat', 'answers', online.prepare, Grpo, check, settle)
