"""One module a stage, each with one function `run(config, workdir, …)`: wiring for the one loop."""

from lm.stages import pretrain, sft

STAGES = {'pretrain': pretrain.run, 'sft': sft.run}
