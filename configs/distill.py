"""Distillation: a student of a quarter of the parameters learns the distributions of the model that was pretrained.

    python -m lm.main --config=configs/distill.py                  the teacher is runs/pretrain
    python -m lm.main --config=configs/distill.py --config.distill.divergence=reverse      or jsd
    python -m lm.main --config=configs/distill.py --config.distill.top_k=32    asks the teacher once, before training
    python -m lm.main --config=configs/distill.py:depth=6 --config.teacher_from=runs/pretrain-depth8

The text after the colon is of the student. Its tokenizer is the teacher's, and so is the text.
A run goes to runs/distill, and the same command goes on where it stopped.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Distill)
    c.teacher_from = 'runs/pretrain'
    c.model.dim, c.model.layers, c.model.heads, c.model.kv_heads, c.model.ffn_dim = 64, 2, 2, 2, 192
    c.steps = 1350
    c.optim.name, c.optim.lr = 'muon', 2.4e-2
    return presets.apply(c, arg)
