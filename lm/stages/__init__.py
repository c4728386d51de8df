"""One module a stage, each with one function `run(config, workdir, …)`: wiring for the one loop."""

from lm.stages import dpo, pretrain, reward, sft

STAGES = {'pretrain': pretrain.run, 'sft': sft.run, 'reward': reward.run, 'dpo': dpo.run}
