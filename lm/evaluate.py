"""Measures a run: `python -m lm.evaluate DIR [--tasks heldout] [--mixture …] [--rows N]`; JSON on stdout.

heldout   loss, perplexity and bits per byte (exact bytes) of the held-out documents of each source
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm import config as configs
from lm import runtime, sharding
from lm.data import pipeline
from lm.data.prepare import Prepared, prepare
from lm.errors import Parser, UsageError, leave, run_command
from lm.evals import heldout
from lm.training import runs
from lm.training.runs import Model

TASKS = ('heldout',)
TOKENS_A_DEVICE = 1 << 15  # at once: more are not quicker, and what an accelerator trained with may not fit here


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.evaluate', __doc__)
    parser.add_argument('run', metavar='DIR', help='a run, or DIR@STEP for one of its checkpoints')
    parser.add_argument('--tasks', default='heldout', help=f'comma-separated, of {", ".join(TASKS)}')
    parser.add_argument('--mixture', help="sources to measure on; default the run's own")
    parser.add_argument(
        '--rows', type=configs.whole('--rows'), help='rows of each source at most; default all of its held-out text'
    )
    return parser.parse_args(argv)


def heldout_data(run: str, model: Model, mixture: str | None) -> Prepared:
    """The sources with their held-out documents, in the model's own tokens."""
    data = model.config['data']
    options = {'vocab_size': model.cfg.vocab_size, 'heldout': data['heldout']}
    say = lambda line: print(line, file=sys.stderr)
    own = runs.tokenizer_folder(run)
    if mixture is None and data['tokenizer'] is None:  # as the run prepared it, most likely still in the cache
        found = prepare(mixture=data['mixture'], tokenizer=None, progress=say, **options)
        if found.tokenizer.fingerprint == model.tokenizer.fingerprint:
            return found
    return prepare(mixture=mixture or data['mixture'], tokenizer=own, progress=say, **options)


def rows_at_once(microbatch: int, seq_len: int, devices: int) -> int:
    """The microbatch of training, or less where that was for a larger machine, shared by the devices."""
    rows = min(microbatch, max(1, TOKENS_A_DEVICE * devices // seq_len))
    return math.ceil(rows / devices) * devices


def evaluate(flags: argparse.Namespace) -> Mapping[str, Any]:
    """The metrics of the tasks asked for. Raises UsageError for an unknown task, a bad mixture or no such run."""
    for task in flags.tasks.split(','):
        if task not in TASKS:
            raise UsageError(f'--tasks={task}{configs.nearest(task, TASKS)}: it must be of {", ".join(TASKS)}')
    if flags.rows is not None and not 1 <= flags.rows <= configs.INT32_MAX:
        raise UsageError(f'--rows={flags.rows} must be at least 1 and at most {configs.INT32_MAX}')
    runtime.start_jax()
    with sharding.use_mesh() as mesh:
        model = runs.load(flags.run, warn=lambda line: print(line, file=sys.stderr))
        prepared = heldout_data(flags.run, model, flags.mixture)
        batch_size = rows_at_once(model.config['microbatch'], model.config['seq_len'], mesh.size)
        shape = {'batch_size': batch_size, 'seq_len': model.config['seq_len'], 'max_rows': flags.rows}
        batches = {s.name: pipeline.heldout_batches(s, **shape) for s in prepared.sources}
        metrics = heldout.by_source(model.params, model.cfg, batches, model.tokenizer.bytes_of_ids)
    return {'run': flags.run, 'step': model.step, 'devices': jax.device_count(), **metrics}


def main() -> int:
    runtime.setup()
    return run_command(lambda: print(json.dumps(evaluate(parse(sys.argv[1:])))))


if __name__ == '__main__':
    leave(main())
