"""Measures the README's tables again and writes them in place: `python benchmarks/remeasure.py [TABLE] [--runs=DIR]`.

Method: a table stands between `<!-- remeasure: TABLE: COMMAND -->` and `<!-- end -->`, and is made of the files of the
default runs (log.txt, metrics.jsonl, samples.jsonl, and what `lm.evaluate --rows 512` says of them). A run that is
missing or not finished is trained first by the README's own command; one of other settings than its config file has
today is refused. The caption names this machine, so run it where the runs were trained, with nothing else at work.
Without TABLE all of them. Prints one JSON line: the tables, and which of them changed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from lm import config as configs
from lm.errors import Parser, RunError, UsageError, leave, run_command
from lm.progress import say

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r'(<!-- remeasure: (\w+)[^\n]*-->\n)(.*?)(<!-- end -->)', re.DOTALL)
COMPARED = ('steps', 'batch_size', 'seq_len', 'seed', 'z_loss', 'nll', 'model', 'optim', 'data.mixture', 'data.replay')
QUESTION = 'What does CreateDefaultVpc do in EC2?'
WIDTH = 110  # characters of a line of the output
LAST = 4  # rollouts that metrics.jsonl tells of, over which a figure of them is averaged
EVALUATION = re.compile(r'step \d+: ')


class Run(NamedTuple):
    """A default run: its config file, the run that it starts from, the one that scores what it draws, and whether it is
    one step with an empty cache ('first') or with the cache that this left ('again')."""

    config: str
    parent: str | None = None
    reward: str | None = None
    one_step: str | None = None


RUNS = {
    'pretrain': Run('configs/pretrain.py'),
    'sft': Run('configs/sft.py', 'pretrain'),
    'reward': Run('configs/reward.py', 'sft'),
    'dpo': Run('configs/dpo.py', 'sft'),
    'dpo-decline': Run('configs/dpo.py:decline', 'sft'),
    'ppo': Run('configs/ppo.py', 'sft', 'reward'),
    'grpo': Run('configs/grpo.py', 'sft', 'reward'),
    'first': Run('configs/pretrain.py', one_step='first'),
    'again': Run('configs/pretrain.py', 'first', one_step='again'),
}


# ---- training what is missing ----


def arguments(name: str, folder: Path) -> list[str]:
    """The arguments of lm.main for a run: the README's, and where the runs lie."""
    run = RUNS[name]
    words = [f'--config={run.config}', f'--workdir={folder / name}']
    if run.one_step:
        return [*words, '--config.steps=1']
    starts = {'init_from': run.parent, 'reward_from': run.reward}
    return [*words, *(f'--config.{key}={folder / name}' for key, name in starts.items() if name)]


def make_ready(name: str, folder: Path) -> None:
    """Trains a run and what it starts from, as far as they are not finished."""
    run = RUNS[name]
    if is_finished(folder / name):
        return check_settings(name, folder)
    for other in filter(None, (run.parent, run.reward)):
        make_ready(other, folder)
    environment, cache = dict(os.environ), folder / 'first-cache'
    if run.one_step:
        environment['LM_CACHE'] = str(cache)
    if run.one_step == 'first':
        shutil.rmtree(cache, ignore_errors=True)
    say(f'training {folder / name}')
    command = [sys.executable, '-m', 'lm.main', *arguments(name, folder)]
    status = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode
    if status:
        raise RunError(f'training {folder / name} ended with status {status}: what it said stands above')


def is_finished(run: Path) -> bool:
    status = run / 'status.json'
    return status.exists() and json.loads(status.read_text())['state'] == 'done'


def check_settings(name: str, folder: Path) -> None:
    """Raises UsageError if a finished run was trained with other settings than its config file has today."""
    saved = dict(configs.leaves(json.loads((folder / name / 'config.json').read_text())['config']))
    today, _ = configs.load(f'{ROOT}/{RUNS[name].config}', [('steps', '1')] if RUNS[name].one_step else [])
    for key, value in configs.leaves(today):
        compared = key.startswith(COMPARED) and value is not None and key in saved
        if compared and saved[key] != value:
            raise UsageError(
                f'{folder / name} was trained with {key}={saved[key]}, and {RUNS[name].config} has {value}: remove '
                'that run, or name a folder of other runs with --runs=DIR'
            )


# ---- reading what runs wrote ----


def log_lines(run: Path) -> list[str]:
    return (run / 'log.txt').read_text().splitlines()


def seconds(run: Path) -> dict[str, float]:
    """{part of the run: seconds}, of all the times that it was started."""
    spent: dict[str, float] = {}
    for line in log_lines(run):
        if line.startswith('prepare '):
            for part, value in re.findall(r'(\w+) ([\d.]+) s', line):
                spent[part] = spent.get(part, 0.0) + float(value)
    return spent


def metrics(run: Path) -> list[dict[str, Any]]:
    """What the run measured, in order."""
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The run's own evaluations, in order."""
    return [line for line in metrics(run) if any(key.startswith('eval/') for key in line)]


def greedy_answer(run: Path, prompt: str) -> str:
    """The last greedy answer to one of the fixed prompts, on one line."""
    samples = map(json.loads, (run / 'samples.jsonl').read_text().splitlines())
    answers = [s['text'] for s in samples if s['prompt'] == prompt and s['temperature'] == 0]
    if not answers:
        raise UsageError(f'{run} did not answer {prompt!r}: train it with the prompts of configs/prompts.jsonl')
    return ' '.join(answers[-1].split())


def evaluated(folder: Path, names: Sequence[str], reward: str | None = None) -> dict[str, Mapping[str, Any]]:
    """{name: what `lm.evaluate --rows 512` says of a run, with its rewards by another}, asked again when a run is newer
    than what was kept of it."""
    kept = folder / (f'evaluate-by-{reward}.json' if reward else 'evaluate.json')
    newest = max((folder / name / 'metrics.jsonl').stat().st_mtime for name in names)
    if not kept.exists() or kept.stat().st_mtime < newest:
        command = [sys.executable, '-m', 'lm.evaluate', *(str(folder / name) for name in names), '--rows', '512']
        command += [f'--reward_from={folder / reward}', '--tasks=answers,heldout,rewards'] if reward else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RunError(f'lm.evaluate ended with status {done.returncode}: what it said stands above')
        kept.write_text(done.stdout)
    rows = json.loads(kept.read_text())['runs']
    return {Path(row['run']).name: row for row in rows}


def machine() -> str:
    """The class of this machine, and what computes there."""
    facts = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    named = re.search(r'^model name\s*: (.*)$', facts, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parts = [named[1].strip() if named else processor_name(), f'{cores} cores']
    if platform.machine() in ('x86_64', 'AMD64'):
        parts.append('AVX-512' if re.search(r'\bavx512f\b', facts) else 'no AVX-512')
    return f'{", ".join(parts)}; Python {sys.version_info[0]}.{sys.version_info[1]}, JAX {metadata.version("jax")}'


def processor_name() -> str:
    """The processor where no /proc/cpuinfo names it: on a Mac, or an ARM machine."""
    if sys.platform == 'darwin':
        command = ['sysctl', '-n', 'machdep.cpu.brand_string']
        return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


# ---- the tables: folder of the runs -> Markdown lines ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ['| ' + ' | '.join(cells) + ' |' for cells in (header, ['---'] * len(header), *rows)]


def percent(x: float) -> str:
    return f'{100 * x:.0f} %'


def refused(x: float) -> str:
    """A share that may be small: 0, 3.2 %, 82 %."""
    return '0' if x == 0 else percent(x) if x >= 0.1 else f'{100 * x:.1f} %'


def output(folder: Path) -> list[str]:
    """What the first command prints: all but most of its training steps and evaluations."""
    lines = [line if len(line) <= WIDTH else line[: WIDTH - 1] + '…' for line in outline(folder)]
    return [f'{machine()}.', '', '```', *lines, '```']


def outline(folder: Path) -> Iterator[str]:
    lines = log_lines(folder / 'pretrain')
    begun = next(i for i, line in enumerate(lines) if line.startswith('step '))
    marks = [i for i, line in enumerate(lines) if EVALUATION.match(line)]
    yield from lines[: begun + 1]
    for i in (marks[0], marks[-1]):
        yield '…'
        yield from lines[i : i + 2]  # with the sample below it
    yield lines[-1]


def answers(folder: Path) -> list[str]:
    """The same question, answered greedily by each model in turn."""
    rows = []
    for name in ('pretrain', 'sft', 'dpo'):
        text = greedy_answer(folder / name, QUESTION)
        rows.append([f'`runs/{name}`', text if len(text) <= 60 else text[:59].rstrip() + '…'])
    return table(['model', f'answer to “{QUESTION}”'], rows)


def pretrain(folder: Path) -> list[str]:
    """The default run: its quality, and where its time goes."""
    run = folder / 'pretrain'
    size = next(line for line in log_lines(run) if ' parameters, ' in line)
    history, spent, first, again = evaluations(run), *map(seconds, (run, folder / 'first', folder / 'again'))
    total = spent['total'] - spent['prepare']
    loss = [line['eval/bpb'] for line in history]
    falling = '; falling at every evaluation' if loss == sorted(loss, reverse=True) else ''
    bpb = ' / '.join(f'{history[-1][f"eval/{source}/bpb"]:.3f}' for source in ('botocore', 'chitchat'))
    to_step = [f'{s["compile"] + s["data"] + s["step"]:.1f} s' for s in (first, again)]
    compiling = f'compiling {spent["compile"]:.1f} s ({first["compile"]:.1f} s the first time)'
    parts = f'steps {spent["step"]:.0f} s, evaluations {spent["eval"]:.0f} s, {compiling}'
    rows = [
        ['held-out bits per byte, botocore / chitchat', bpb, f'the last evaluation, 256 rows of each source{falling}'],
        ['training', f'{total:.0f} s in all: {parts}', 'the last line of the log'],
        ['preparing the data, first time / after', f'{first["prepare"]:.0f} s / {again["prepare"]:.1f} s', 'the same'],
        ['data ready → first step done, first time / after', ' / '.join(to_step), 'a run of one step: compiles, steps'],
    ]
    return [f'{machine()}; {size}.', '', *table(['what', 'measured', 'how'], rows)]


STAGES = ('pretrain', 'sft', 'reward', 'dpo', 'dpo-decline')


def stages(folder: Path) -> list[str]:
    """What each stage gained, and what it cost."""
    header = [
        'run', 'training', 'answers that end, operations / small talk', 'F1, operations',
        'pairs ranked right, by log-prob per token / by reward', 'declines, invented / real operations',
        'bits per byte, botocore / chitchat',
    ]  # fmt: skip
    found = evaluated(folder, STAGES)
    rows = [
        [f'`runs/{name}`', f'{seconds(folder / name)["step"]:.0f} s', *stage_cells(found[name], found[name]['stage'])]
        for name in STAGES
    ]
    return [f'{machine()}.', '', *table(header, rows)]


def stage_cells(row: Mapping[str, Any], stage: str) -> Iterator[str]:
    """The metrics of a row; of a reward model only those of pairs."""
    get = lambda name: row[f'eval/{name}']
    text = stage != 'reward'
    yield f'{percent(get("operations/ended"))} / {percent(get("smalltalk/ended"))}' if text else ''
    yield f'{get("operations/f1"):.2f}'.removeprefix('0') if text else ''
    ranked = [row.get(f'eval/programmatic/{name}') for name in ('accuracy_per_token', 'accuracy')]
    shown = ['–' if x is None else percent(x) for x in ranked]
    yield ' / '.join(shown if ranked[1] is not None else shown[:1])
    yield f'{refused(get("decline/declined_invented"))} / {refused(get("decline/declined_real"))}' if text else ''
    yield f'{get("botocore/bpb"):.3f} / {get("chitchat/bpb"):.3f}' if text else ''


ONLINE = ('ppo', 'grpo')


def rewards(folder: Path) -> list[str]:
    """What the stages gained that learn from what they draw, and what it cost."""
    header = [
        'run', 'whole command', 'gain in reward', 'wins over `runs/sft`', 'k1, nats a response', 'answers that end',
        'F1, operations', 'bits per byte, botocore / chitchat',
    ]  # fmt: skip
    found = evaluated(folder, ONLINE, 'reward')
    rows = [[f'`runs/{name}`', *online_cells(folder / name, found[name])] for name in ONLINE]
    return [f'{machine()}.', '', *table(header, rows)]


def online_cells(run: Path, row: Mapping[str, Any]) -> Iterator[str]:
    get = lambda name: row[f'eval/{name}']
    far = [line['rl/kl'] for line in metrics(run) if 'rl/kl' in line][-LAST:]
    yield f'{seconds(run)["total"]:.0f} s'
    yield f'+{get("operations/reward_gain"):.2f}'.replace('+0', '+')
    yield percent(get('operations/win_rate'))
    yield f'{sum(far) / len(far):.1f}' if any(far) else '–'
    yield percent(get('operations/ended'))
    yield f'{get("operations/f1"):.2f}'.removeprefix('0')
    yield f'{get("botocore/bpb"):.3f} / {get("chitchat/bpb"):.3f}'


class Table(NamedTuple):
    lines: Callable[[Path], list[str]]
    runs: Sequence[str]


TABLES = {
    'output': Table(output, ('pretrain',)),
    'answers': Table(answers, ('pretrain', 'sft', 'dpo')),
    'stages': Table(stages, STAGES),
    'rewards': Table(rewards, ONLINE),
    'pretrain': Table(pretrain, ('pretrain', 'first', 'again')),
}


# ---- the command ----


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python benchmarks/remeasure.py', __doc__)
    parser.add_argument('table', nargs='?', metavar='TABLE', help=f'one of {", ".join(TABLES)}; default all of them')
    parser.add_argument('--runs', default=ROOT / 'runs', type=Path, metavar='DIR', help='folder of the runs (runs)')
    return parser.parse_args(argv)


def marked(text: str) -> list[str]:
    """The names of a text's marked tables, in order."""
    return [match[2] for match in MARKED.finditer(text)]


def rewritten(text: str, name: str, lines: Sequence[str]) -> str:
    """A text with one of its tables replaced."""
    body = '\n'.join(['', *lines, '', ''])
    return MARKED.sub(lambda match: match[1] + body + match[4] if match[2] == name else match[0], text)


def remeasure(argv: Sequence[str], readme: Path = ROOT / 'README.md') -> dict[str, Any]:
    """Writes the tables. Raises UsageError for a table that there is not, or that is not in the README."""
    flags = parse(argv)
    if flags.table not in (None, *TABLES):
        near = configs.nearest(flags.table, list(TABLES))
        raise UsageError(f'there is no table {flags.table}{near}: it is one of {", ".join(TABLES)}')
    names = [flags.table] if flags.table else list(TABLES)
    if missing := [name for name in names if name not in marked(readme.read_text())]:
        raise UsageError(f'{readme} has no table between <!-- remeasure: {missing[0]} --> and <!-- end -->')
    folder, changed = flags.runs.absolute(), []
    for name in names:
        for run in TABLES[name].runs:
            make_ready(run, folder)
        before = readme.read_text()
        after = rewritten(before, name, TABLES[name].lines(folder))
        if after != before:
            readme.write_text(after)
            changed.append(name)
    return {'benchmark': 'remeasure', 'tables': names, 'changed': changed}


def main() -> None:
    print(json.dumps(remeasure(sys.argv[1:])))


if __name__ == '__main__':
    leave(run_command(main))
