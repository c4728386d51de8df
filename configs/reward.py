"""A reward model: which of two answers to a question about AWS operations is the true one.

    python -m lm.main --config=configs/reward.py                   starts from runs/sft
    python -m lm.main --config=configs/reward.py:ratings           people's ratings of small talk: mostly noise

Two cores (Intel Xeon with AVX-512, beside other work): 108 s; right of 91 % of held-out pairs (the shorter one: 50 %).
A run goes to runs/reward, and the same command goes on where it stopped.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Reward)
    source, arg = presets.own(arg, ('ratings', 'decline'))
    c.init_from = presets.parent('sft', arg)
    c.steps = None  # one epoch
    c.batch_size = 64
    c.optim.name, c.optim.lr = 'muon', 3e-3
    c.data.mixture = source or 'programmatic'
    c.eval.rows = 512
    c.seq_len = 512 if source == 'ratings' else c.seq_len  # whole conversations
    return presets.apply(c, arg)
