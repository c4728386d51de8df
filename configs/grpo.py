"""GRPO: groups of answers to questions about AWS operations, scored by the reward model; no critic.

python -m lm.main --config=configs/grpo.py                     starts from runs/sft, scored by runs/reward
python -m lm.main --config=configs/grpo.py:gym                 starts from runs/sft-gym, scored by a program
python -m lm.main --config=configs/grpo.py --config.reward_from=none --config.reward.fn=package.module:function
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Grpo)
    c.init_from = presets.parent('sft', arg)
    task, arg = presets.own(arg, ('gym',))
    c.reward_from = None if task == 'gym' else presets.parent('reward', arg)
    c.steps = 100
    c.batch_size = 64
    c.optim.name, c.optim.lr = 'muon', 5e-4
    c.optim.schedule, c.optim.warmup, c.optim.weight_decay = 'linear', 5, 0.0
    c.data.mixture = 'operations'
    c.eval.every = 50
    c.eval.max_new_tokens = 96
    if task == 'gym':
        c.reward.verify = 'gym'
        c.steps, c.batch_size = 120, 128
        c.data.mixture = 'gym:rotate_matrix'
        c.rl.max_new_tokens = 12
        c.eval.every = 40
        c.eval.max_new_tokens = 12
    return presets.apply(c, arg)
