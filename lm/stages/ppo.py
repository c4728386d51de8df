"""PPO with a critic (Schulman et al., 2017; Ouyang et al., 2022), by the published list of its details (Huang et al.,
2024)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import advantages
from lm.config import Config
from lm.losses import policy as losses
from lm.model import parameters, sequences
from lm.model.roles import ADAPTER_OF, Roles, assemble
from lm.runs import loading
from lm.runs.saved_config import Parent
from lm.settings import PPO
from lm.stages import online
from lm.stages.spec import Batch, StageSpec
from lm.training import flops


class Ppo(online.Online):
    """Trains a policy and a critic, which starts as the reward model with a head of zeros."""

    extra_measures = ('explained_variance',)
    extra = ('value_BT', 'return_BT')

    @property
    def rates(self) -> Mapping[str, Any]:
        rates, by = super().rates, self.config.critic.rate
        return {**rates, self._critic: jax.tree.map(lambda x: x * by, rates.get(self._critic, 1.0))}

    def cost(self) -> flops.Cost:
        """Those of the policy and of the critic, which has no head over the vocabulary."""
        policy = super().cost()
        return policy._replace(token=policy.token + self.lm_cost(head=False).token)

    @property
    def _critic(self) -> str:
        """The role of what is trained of the critic."""
        return 'critic' if self.adapter is None else ADAPTER_OF['critic']

    @property
    def _before(self) -> str:
        """The role of the model under the critic's adapter."""
        return 'reward' if self.config.reward_from else 'base'

    def abstract_roles(self) -> dict[str, Any]:
        if self.adapter is None:
            return {**super().abstract_roles(), 'critic': loading.abstract_params(self.cfg, 'critic')}
        return {**super().abstract_roles(), self._critic: self.abstract_adapter('critic', self._before)}

    def begin(self, abstract: Mapping[str, Any], frozen: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Parent]]:
        weights, parents = super().begin(abstract, frozen)
        own = parameters.shapes_of_scores(self.cfg)
        wanted = {name: x for name, x in abstract[self._critic].items() if name not in own}
        if self.adapter is None:
            run = self.config.reward_from or self.config.init_from
            body, parents['critic'] = loading.weights(run, wanted, warn=self.recorder.say)
        else:
            body = self.first_adapter(wanted, assemble({}, frozen)[self._before])
        where = loading.shardings_of({name: abstract[self._critic][name] for name in own})
        zeros = {name: jax.device_put(np.zeros(x.shape, x.dtype), where[name]) for name, x in own.items()}
        return {**weights, self._critic: body | zeros}, parents

    def measured(self, models: Roles, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return super().measured(models, rows) | {'value_BT': self.by_batches(models['critic'], rows, online.values)}

    def weigh(
        self, rows: Mapping[str, np.ndarray], score: np.ndarray, rollout: int, beta: float
    ) -> dict[str, np.ndarray]:
        """GAE of rewards that have the leash at each token and the score at the last one. While the critic warms up the
        policy has no advantage, so that it stays where it is."""
        c, mask_BT, value_BT = self.config, jnp.asarray(rows['weights_BT']), jnp.asarray(rows['value_BT'])
        last_BT = mask_BT * (jnp.cumsum(mask_BT, 1) == jnp.sum(mask_BT, 1, keepdims=True))
        reward_BT = last_BT * score[:, None]
        if c.rl.kl == 'reward':
            reward_BT -= beta * losses.k1(*(jnp.asarray(rows[name]) for name in ('old_BT', 'reference_BT'))) * mask_BT
        lam = by_length(jnp.sum(mask_BT, 1, keepdims=True)) if c.lam is None else c.lam
        reward_BT = advantages.whiten(reward_BT, mask_BT, centre=False)
        return_BT = advantages.gae(reward_BT, value_BT, mask_BT, lam=c.critic.lam) + value_BT
        advantage_BT = advantages.whiten(advantages.gae(reward_BT, value_BT, mask_BT, lam=lam), mask_BT)
        own = rows['weights_BT'] > 0
        left, spread = (np.var(np.asarray(x)[own]) for x in (return_BT - value_BT, return_BT))
        self.note(explained_variance=float(1 - left / max(float(spread), 1e-8)))
        warm = rollout >= c.critic.warmup
        return {'return_BT': np.asarray(return_BT), 'advantage_BT': np.asarray(advantage_BT) * warm}

    def more_terms(self, models: Roles, batch: Batch) -> dict[str, jax.Array]:
        value_BT, _ = sequences.token_values(models['critic'], self.cfg, batch)
        clip = self.config.critic.clip
        loss_BT = losses.value_loss(value_BT, batch['value_BT'], batch['return_BT'], clip=clip)
        return {'value': jnp.sum(loss_BT * batch['weights_BT'])}

    def more_coefficients(self) -> dict[str, float]:
        return {'value': 1.0}  # no parameter is shared with the policy


def by_length(length: jax.Array) -> jax.Array:
    """λ of GAE for responses of so many tokens, max(.95, 1 − 1/(.05·length)), so that the last reward reaches the first
    token of a long one (VAPO, arXiv 2504.05118, section 3.2)."""
    return jnp.maximum(0.95, 1 - 1 / (0.05 * jnp.maximum(length, 1)))


def settle(config: Config) -> None:
    """Sets what is None by PPO's own defaults."""
    online.settle(config, PPO)


SPEC = StageSpec('ppo', 'chat', 'answers', online.prepare, Ppo, online.check, settle)
