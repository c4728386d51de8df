"""Best-of-n: a run draws answers to questions about AWS operations, a reward scores them, and the best are kept.

    python -m lm.main --config=configs/generate.py                 asks runs/sft, scored by runs/reward
    python -m lm.main --config=configs/generate.py --config.keep=rejection --config.threshold=0.5
    python -m lm.main --config=configs/sft.py --workdir=runs/sft-best --config.init_from=runs/sft \
        --config.data.mixture=runs/generate/answers.jsonl

The answers go to runs/generate/answers.jsonl, in the form that fine-tuning reads; the same command goes on where it
stopped. Two cores with other work on them: two minutes for 256 prompts × 8 answers, of which 99 % end; the mean score
is .75, that of the kept ones 1.07 (1 is one standard deviation of a pair's scores). Held-out questions are not asked.
Sampling and scoring are those of configs/grpo.py: `reward.fn` is taken, too.
"""

from lm import config, presets, settings


def get_config(arg: str = '') -> config.Config:
    c = config.base(settings.Generate)
    c.init_from = presets.parent('sft', arg)
    c.reward_from = presets.parent('reward', arg)
    c.data.mixture = 'operations'
    return c
