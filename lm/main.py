"""Trains a stage, or does a job.

    python -m lm.main --config=configs/STAGE.py[:ARG] [--workdir=DIR] [--config.KEY=VALUE …] [--dry_run]

Run the same command again and it goes on where it stopped. The last line on stdout is one JSON object with the last
metrics; everything else goes to stderr and into the run's directory. Exit status: 0 done, 1 failed while running,
2 a mistake in what was asked for, 75 saved after SIGTERM or Ctrl-C, 130 left by Ctrl-C before a run was begun.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence

from lm import config as configs
from lm import files, presets, runtime
from lm.errors import Parser, UsageError, leave, run_command
from lm.multihost import processes


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """(the flags, the settings)."""
    parser = Parser('python -m lm.main', __doc__)
    add = parser.add_argument
    add('--config', required=True, help='configs/STAGE.py, or configs/STAGE.py:ARG (a preset, or KEY=VALUE,…)')
    add('--config.KEY', dest='ignored', metavar='VALUE', help='any setting, e.g. --config.optim.lr=1e-3')
    add('--workdir', help='directory of the run; default runs/STAGE or runs/STAGE-ARG')
    add('--dry_run', action='store_true', help='compile the step, print memory and FLOPs, allocate nothing')
    add = parser.add_argument_group('several processes, which train one run together').add_argument
    whole = {name: configs.whole(f'--{name}') for name in ('num_processes', 'process_id', 'wait')}
    add(
        '--coordinator',
        metavar='HOST:PORT',
        help='where process 0 listens; auto: ask the cluster (Cloud TPU, Slurm, …)',
    )
    add('--num_processes', metavar='N', type=whole['num_processes'], help='how many there are')
    add('--process_id', metavar='I', type=whole['process_id'], help='which of them this is, from 0')
    add('--wait', metavar='SECONDS', type=whole['wait'], default=300, help='for the others to come (300)')
    words, settings = configs.split_settings(argv)
    return parser.parse_args(words), settings


def train(argv: Sequence[str]) -> dict:
    """Runs the stage or the job that the command line names, and returns its last metrics."""
    flags, settings = parse(argv)
    config, arg = configs.load(flags.config, settings)
    runtime.setup()
    from lm.jobs import JOBS
    from lm.runs import lineage, rundir
    from lm.stages import find, runner

    job = JOBS.get(config.stage)
    if job and flags.dry_run:
        raise UsageError(f'--dry_run compiles the step of a stage, and {job.name} takes none: leave it out')
    if job is None:
        find(config.stage)
    workdir = files.absolute(flags.workdir or f'runs/{presets.run_name(config.stage, arg)}')
    place = processes.place(flags.coordinator, flags.num_processes, flags.process_id, wait=flags.wait)
    facts = {} if place is None else {**rundir.facts(config), 'workdir': str(workdir), 'dry_run': flags.dry_run}
    with (
        contextlib.nullcontext(runtime.StopRequest()) if flags.dry_run else runtime.stop_request() as stop,
        processes.joined(place, facts, wait=flags.wait),
        contextlib.nullcontext() if flags.dry_run else rundir.claimed(workdir),
    ):
        runtime.start_jax()
        if job is not None:
            last = job.run(config, workdir, stop)
        else:
            stage = find(config.stage)
            lineage.inherit_model(config, stage.about, configs.chosen(flags.config, settings), workdir)
            last = runner.run(stage, config, workdir, stop=stop, dry_run=flags.dry_run)
        return last if processes.first() else {}


def main() -> int:
    return run_command(lambda: tell(train(sys.argv[1:])))


def tell(last: dict) -> None:
    """The last metrics as one line; of several processes the first alone has them."""
    if last:
        print(json.dumps(last))


if __name__ == '__main__':
    leave(main())
