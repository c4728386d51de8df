"""Supervised fine-tuning of a pretrained model: questions about AWS operations (botocore) and small talk (chitchat).

    python -m lm.main --config=configs/sft.py                      starts from runs/pretrain
    python -m lm.main --config=configs/sft.py:depth=6              starts from runs/pretrain-depth6
    python -m lm.main --config=configs/sft.py:lora                 trains an adapter of rank 16 over runs/pretrain
    python -m lm.main --config=configs/sft.py:gym                  turns 2×2 matrices, for configs/grpo.py:gym
    python -m lm.main --config=configs/sft.py:smollm2              starts from runs/smollm2, which lm.convert makes

Two cores (AMD EPYC), no accelerator: a quarter of a minute of preparing the first time, then 130 s; every greedy answer
to a held-out question ends by itself (98 % of small talk), F1 .40, bits per byte as before or better. Of :smollm2, 135M
parameters, a run takes 5.8 GB at most, and an evaluation 83 s (Intel Xeon with AVX-512).
A run goes to runs/sft, and the same command goes on where it stopped.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Sft)
    task, arg = presets.own(arg, ('gym',))
    c.init_from = presets.parent('pretrain', arg)
    c.steps = 750
    c.batch_size = 16
    c.optim.name, c.optim.lr = 'muon', 6e-3
    c.z_loss = 0.0
    c.data.mixture = 'operations:0.6,smalltalk:0.4'
    c.data.replay = 0.25
    c.eval.max_new_tokens = 96
    if task == 'gym':  # so few steps that much is left to be learned by trial
        c.steps = 68
        c.optim.lr, c.optim.schedule, c.optim.warmup = 4e-3, 'constant', 20
        c.data.mixture = 'gym:rotate_matrix'
        c.data.replay = 0.0
        c.eval.max_new_tokens = 12
    return presets.apply(c, arg)
