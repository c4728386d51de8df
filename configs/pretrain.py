"""Pretraining on real text: AWS's API documentation (botocore) and human small talk (chitchat), half of the rows each.

    python -m lm.main --config=configs/pretrain.py                 1.4M parameters, for a laptop's CPU
    python -m lm.main --config=configs/pretrain.py:depth=6         the dial: wider and deeper, longer
    python -m lm.main --config=configs/pretrain.py:124m            also 350m, 1b, 8b, 70b: for accelerators, your data

Two cores, no accelerator: EXPECTED
A run goes to runs/pretrain, and the same command goes on where it stopped.
"""

from lm import config, presets


def get_config(arg: str = '') -> config.Config:
    c = config.base()
    c.steps = 1500
    c.data.mixture = 'botocore:0.5,chitchat:0.5'
    return presets.apply(c, arg)
