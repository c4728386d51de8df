"""Measures runs: `python -m lm.evaluate DIR… [--tasks answers,preferences,refusals,heldout] [--rows N]`.

A table on stderr, a run a row; on stdout one JSON object: the metrics of one run, or of several as {"runs": [...]}.
All runs are asked the same, so that stages compare; a reward model has a row of preferences alone.

answers       greedy answers to held-out questions: whether they end by themselves, F1 against the data's answers
preferences   held-out pairs: which response is likelier per token; which has the higher reward, that of a reward model
              or, after preference optimisation, the implicit one
refusals      invented operations and real ones: the part of each that is declined
rewards       with --reward_from=DIR: that reward model's scores of drawn answers, beside those of the run that it
              started from, and how often they win
heldout       loss, perplexity and bits per byte (exact bytes) of the held-out documents that the run was pretrained on
lm_eval:TASK  a task of EleutherAI's lm-evaluation-harness by its name, or a task of your own by its YAML file
              (pip install -e '.[eval]'). More of its settings from Python, where a run is a model like others:
                  import lm_eval; from lm.evals.harness import Harness
                  lm_eval.simple_evaluate(model=Harness('runs/sft'), tasks=['hellaswag'], num_fewshot=5)

`python -m lm.evaluate DIR --score PROMPT ANSWER` has a reward model score an answer.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lm import config as configs
from lm import runtime, sharding
from lm.errors import Parser, UsageError, checked, install, leave, run_command
from lm.evals import tasks
from lm.evals.tasks import Limits, Subject
from lm.progress import say, task
from lm.runs import checkpoint, loading, rundir, saved_config
from lm.settings import INT32_MAX, MAX_NEW_TOKENS, Bound, up_to

HARNESS = 'lm_eval:'
# What the table shows of 'eval/SOURCE/NAME', the source above it.
SHOWN = {
    'ended': 'ends', 'f1': 'F1', 'exact': 'exact', 'accuracy_per_token': 'per token', 'accuracy': 'by reward',
    'reward_gain': 'gain', 'win_rate': 'wins', 'declined_invented': 'invented', 'declined_real': 'real',
    'bpb': 'bits/byte',
}  # fmt: skip
Column = tuple[str, str, str]  # metric, source or task, what it is


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.evaluate', __doc__)
    whole = lambda name: configs.whole(f'--{name}')
    parser.add_argument('runs', nargs='+', metavar='DIR', help='a run, DIR@STEP, a Hugging Face folder or a GGUF file')
    parser.add_argument('--tasks', help='comma-separated; default all that the installed data allow, lm_eval aside')
    parser.add_argument('--mixture', help='text to measure on; default what each run was pretrained on')
    parser.add_argument('--chats', help='questions for answers; default operations,smalltalk')
    parser.add_argument('--pairs', help='pairs for preferences; default programmatic')
    parser.add_argument(
        '--reward_from', metavar='DIR', help='a reward model, for rewards, which alone is then the default'
    )
    parser.add_argument('--rows', type=whole('rows'), help='rows, questions or pairs of each source at most')
    parser.add_argument('--max_new_tokens', type=whole('max_new_tokens'), default=96, help='of an answer (96)')
    parser.add_argument('--num_fewshot', type=whole('num_fewshot'), help='lm_eval: examples before each question')
    parser.add_argument(
        '--apply_chat_template', action='store_true', help='lm_eval: ask in the marks of a conversation'
    )
    parser.add_argument('--score', nargs=2, metavar=('PROMPT', 'ANSWER'), help="a reward model's score of an answer")
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot be measured with."""
    limits = {'rows': (1, INT32_MAX), 'max_new_tokens': (1, MAX_NEW_TOKENS), 'num_fewshot': (0, 1000)}
    bound = lambda least, most: Bound(f'at least {least} and at most {most}', up_to(most, least).holds)
    configs.check_flags(vars(flags), {name: bound(*ends) for name, ends in limits.items()})
    if flags.score and (len(flags.runs) > 1 or flags.tasks):
        raise UsageError('--score asks one reward model for one score: name one run and no --tasks')
    for name, text in zip(('prompt', 'answer'), flags.score or (), strict=False):
        checked(text, f'--score: the {name}')


def asked(flags: argparse.Namespace) -> tuple[list[str] | None, list[str]]:
    """(the tasks that are named, None for the default ones; those of the harness). Raises UsageError for others."""
    if flags.tasks is None:
        return None, []
    names = [name.strip() for name in flags.tasks.split(',')]
    harness = [name.removeprefix(HARNESS) for name in names if name.startswith(HARNESS)]
    if harness and importlib.util.find_spec('lm_eval') is None:
        raise UsageError(f'{HARNESS}TASK needs the package lm-eval: {install("eval")}')
    own = [name for name in names if not name.startswith(HARNESS)]
    for name in own:
        if name not in tasks.TASKS:
            known = f'it must be of {", ".join(tasks.TASKS)}, or {HARNESS}TASK'
            raise UsageError(f'--tasks={name}{configs.nearest(name, list(tasks.TASKS))}: {known}')
    return own, harness


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """The metrics of the runs. Raises UsageError for an unknown task, a bad mixture or no such run."""
    check(flags)
    named, harness = asked(flags)
    saved = {run: rundir.read_config(run) for run in flags.runs}
    for run in flags.runs:
        checkpoint.locate(run)
    if flags.score:
        return score(flags)
    named = ['rewards'] if flags.reward_from and not named and not harness else named
    if 'rewards' in (named or ()) and not flags.reward_from:
        raise UsageError('--tasks=rewards asks a reward model: name it with --reward_from=DIR')
    given = {'answers': flags.chats, 'rewards': flags.chats, 'preferences': flags.pairs, 'heldout': flags.mixture}
    fit = {run: tasks.fitting(named, run, saved[run]) for run in flags.runs}
    with task('looking for the data'):
        planned = {} if harness and not named else tasks.plan(named, saved, given, say)
    runtime.start_jax()
    found = []
    for run in flags.runs:
        with sharding.use_mesh():
            subject = loaded(run)
            own = {name: mixture for name, mixture in planned.items() if name in fit[run]}
            with task(run):
                metrics = tasks.measure(subject, own, Limits(flags.rows, flags.max_new_tokens, flags.reward_from))
            metrics |= ask_harness(subject, harness, flags) if harness else {}
            model = subject.model
            of = {'run': run, 'stage': model.config['stage'], 'step': model.step, 'devices': jax.device_count()}
            found.append(of | metrics)
    unlike(saved)
    show(found)
    return found[0] if len(found) == 1 else {'runs': found}


def loaded(run: str) -> Subject:
    """The run, on the current mesh."""
    with task(f'loading {run}'):
        return Subject(run, loading.load(run, warn=say), say)


def score(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns what a reward model says of an answer. Raises UsageError if the run is none."""
    (run,) = flags.runs
    runtime.start_jax()
    with sharding.use_mesh():
        subject = loaded(run)
        found = tasks.score(subject, *flags.score)
    if found['cut']:
        say(f'the answer is longer than {run} was trained on: its first {found["tokens"]} tokens are scored')
    return {'run': run, 'step': subject.model.step, **found}


def ask_harness(subject: Subject, names: Sequence[str], flags: argparse.Namespace) -> dict[str, float]:
    """The metrics of tasks of lm-evaluation-harness. Raises UsageError for one that it does not have."""
    from lm.evals import harness  # imports lm_eval, which not everyone has

    options = {'num_fewshot': flags.num_fewshot, 'apply_chat_template': flags.apply_chat_template, 'limit': flags.rows}
    return harness.measure(subject, names, **options)


def unlike(saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Says what keeps the rows of several runs from comparing."""
    lengths = {run['config']['seq_len'] for run in saved.values()}
    texts = {saved_config.pretraining_of(run) for run in saved.values()}
    for name, values in (('seq_len', lengths), ('text of pretraining', texts)):
        if len(values) > 1:
            say(f'these runs differ in their {name} ({", ".join(map(str, values))}): not all of their rows compare')


# ---- the table ----


def columns(found: Sequence[Mapping[str, Any]]) -> Iterator[Column]:
    """The columns of what is known of any run, source by source."""
    keys = dict.fromkeys(key for row in found for key in row)
    for source in filter(None, dict.fromkeys(map(source_of, keys))):
        for name, words in SHOWN.items():
            if (key := f'eval/{source}/{name}') in keys:
                yield key, os.path.basename(source), words
    for key in keys:
        if key.startswith('lm_eval/') and '_stderr' not in key:
            task, _, metric = key.removeprefix('lm_eval/').rpartition('/')
            yield key, task, metric


def source_of(key: str) -> str:
    """'SOURCE' of 'eval/SOURCE/NAME', else ''."""
    first, _, rest = key.partition('/')
    return rest.rpartition('/')[0] if first == 'eval' else ''


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """The runs as rows, on stderr: below each other as many tables as it takes to cut no word off."""
    console = Console(stderr=True, width=width_of(), highlight=False)
    options = console.options.update(width=2 * console.width)  # in which a table that is too wide is seen to be
    fits = lambda shown: Measurement.get(console, options, table(found, shown)).maximum <= console.width
    for shown in side_by_side(columns(found), fits):
        console.print(table(found, shown))


def width_of() -> int | None:
    """Characters of a line; None: what the terminal has."""
    return None if sys.stderr.isatty() else 1000


def side_by_side(shown: Iterable[Column], fits: Callable[[Sequence[Column]], bool]) -> Iterator[list[Column]]:
    """Columns in groups of which each fits, a source's together where that is possible."""
    group: list[Column] = []
    for _, of_source in groupby(shown, lambda column: column[1]):
        same = list(of_source)
        for i, column in enumerate(same):
            if group and not fits([*group, column] if i else group + same):
                yield group
                group = []
            group.append(column)
    yield group


def table(found: Sequence[Mapping[str, Any]], shown: Sequence[Column]) -> Table:
    """The runs as rows, with some of the columns; a source is named above the first of its own."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column('run', overflow='fold')
    made.add_column('step', justify='right')
    before = None
    for _, source, words in shown:
        made.add_column(f'{"" if source == before else source}\n{words:>5}', justify='right', no_wrap=True)
        before = source
    for row in found:
        cells = [f'{row[key]:.3f}' if key in row else '' for key, *_ in shown]
        made.add_row(row['run'], str(row['step']), *cells)
    return made


def main() -> int:
    runtime.setup()
    return run_command(lambda: print(json.dumps(evaluate(parse(sys.argv[1:])))))


if __name__ == '__main__':
    leave(main())
