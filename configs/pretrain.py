"""Pretraining on real text: AWS's API documentation (botocore) and human small talk (chitchat), half of the rows each.

    python -m lm.main --config=configs/pretrain.py                 1.4M parameters, for a laptop's CPU
    python -m lm.main --config=configs/pretrain.py:depth=6         the dial: wider and deeper, and longer
    python -m lm.main --config=configs/pretrain.py:124m            also 350m, 1b, 8b, 70b: for accelerators, your data

Two cores (AMD EPYC), no accelerator: 15 s of preparing the first time, then two to three minutes; held-out bits per
byte 1.33 (botocore) and 1.75 (chitchat). 16 GiB of memory are plenty: it takes about one.
A run goes to runs/pretrain, and the same command goes on where it stopped.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Pretrain)
    c.steps = 1350
    c.optim.name, c.optim.lr = 'muon', 2.4e-2
    c.data.mixture = 'botocore:0.5,chitchat:0.5'
    return presets.apply(c, arg)
