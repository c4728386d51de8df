"""PPO: answers to questions about AWS operations, scored by the reward model, held near where they began by a KL leash.

python -m lm.main --config=configs/ppo.py                      starts from runs/sft, scored by runs/reward
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Ppo)
    c.init_from = presets.parent('sft', arg)
    c.reward_from = presets.parent('reward', arg)
    c.steps = 104
    c.batch_size = 256
    c.optim.name, c.optim.lr, c.optim.eps = 'muon', 3e-3, 1e-5
    c.optim.schedule, c.optim.warmup, c.optim.weight_decay = 'linear', 0, 0.0
    c.data.mixture = 'operations'
    c.eval.every = 52
    c.eval.max_new_tokens = 96
    return presets.apply(c, arg)
