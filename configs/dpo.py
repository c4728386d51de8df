"""Direct preference optimisation: a fine-tuned model learns to prefer the true answer to another operation's.

    python -m lm.main --config=configs/dpo.py                      starts from runs/sft
    python -m lm.main --config=configs/dpo.py:decline              learns to decline what it does not know
    python -m lm.main --config=configs/dpo.py --config.loss=simpo  or cdpo, robust, ipo, orpo, kto

Two cores (Intel Xeon with AVX-512, beside other work): 35 s for what the reference says of the pairs, then 123 s; of
held-out pairs 95 % are right by reward and 91 % per token (80 % before), the chosen answers' loss is 0.05 higher, F1
.41. With `:decline` 389 s; 82 % of invented operations are declined and 3.2 % of real ones.
A run goes to runs/dpo, and the same command goes on where it stopped.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Dpo)
    source, arg = presets.own(arg, ('ratings', 'decline'))
    c.init_from = presets.parent('sft', arg)
    c.steps = 450 if source == 'decline' else None  # None: one epoch
    c.batch_size = 64
    c.optim.name, c.optim.lr = 'muon', 2e-3 if source == 'decline' else 1e-3
    c.nll = 3.0 if source == 'decline' else 1.0
    c.data.replay = 0.25 if source == 'decline' else 0.0
    c.eval.rows = 512
    c.data.mixture = source or 'programmatic'
    c.eval.max_new_tokens = 96
    return presets.apply(c, arg)
