"""Whether the dial turns truly: `python benchmarks/dial.py [--depths=2,3,4,6] [--rates=0.5,1,2] [--horizon=0.25]
[--out=runs/dial] [--svg=FILE] [--config=…] [--config.KEY=VALUE …]`.

Method: each depth is trained at multiples of the rate that `:depth=N` gives it, over the same part of its horizon
(warmup with it, and weight decay against it, as the dial does), and its held-out bits per byte are taken at the end. If
the rate transfers, the best multiple is the same at each depth; if the rest does, bits per byte fall along a line in
FLOPs. Each run adds a line to OUT/results.jsonl, and what is there is not run again: stop it and go on as you like.
Prints one JSON line: the best multiple of each depth. With --svg the two are drawn (pip install -e '.[plots]').
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lm import config as configs
from lm import files
from lm import main as lm_main
from lm.errors import Parser, UsageError, leave, run_command
from lm.runs import execution, rundir
from lm.settings import INT32_MAX
from lm.training import flops

Result = dict[str, Any]


def numbers(kind: type) -> Any:
    """Reads '2,3,4' for argparse."""
    return lambda text: [kind(part) for part in text.split(',')]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser('python benchmarks/dial.py', __doc__)
    parser.add_argument('--config', default='configs/pretrain.py', help='the file; its own settings are depth 4')
    parser.add_argument('--depths', type=numbers(int), default=[2, 3, 4, 6])
    parser.add_argument('--rates', type=numbers(float), default=[0.5, 1.0, 2.0], help='multiples of the rate')
    parser.add_argument('--horizon', type=float, default=0.25, help='part of the steps that the dial gives')
    parser.add_argument('--out', default='runs/dial', help='folder of the results and the runs')
    parser.add_argument('--svg', help='file to draw the results into')
    words, settings = configs.split_settings(argv)
    return parser.parse_args(words), settings


def plan(flags: argparse.Namespace, given: list[tuple[str, str]]) -> Iterator[tuple[Result, list[str]]]:
    """(what identifies a run, its settings as arguments), small ones first."""
    for depth in sorted(flags.depths):
        config, _ = configs.load(f'{flags.config}:depth={depth}', given)
        if config.steps is None:
            raise UsageError('an epoch is no horizon that the dial moves: set --config.steps')
        for rate in flags.rates:
            moved = {
                'optim.lr': config.optim.lr * rate,
                'optim.weight_decay': config.optim.weight_decay / rate / flags.horizon,
                'optim.warmup': round(config.optim.warmup * flags.horizon),
                'steps': max(1, round(config.steps * flags.horizon)),
                'eval.every': INT32_MAX,  # the last step is evaluated all the same
                'checkpoint.keep': 1,
            }
            key = {'depth': depth, 'rate': rate, 'horizon': flags.horizon, 'settings': dict(given)}
            yield key, [f'--config.{k}={v}' for k, v in [*given, *moved.items()]]


def measure(key: Result, arguments: list[str], flags: argparse.Namespace) -> Result:
    """Trains one, or goes on training it, and returns its line."""
    begun = time.perf_counter()
    command = [f'--config={flags.config}:depth={key["depth"]}', *arguments]
    name = f'depth{key["depth"]}-rate{key["rate"]:g}-horizon{key["horizon"]:g}'
    workdir = files.absolute(flags.out) / name
    last = lm_main.train([*command, f'--workdir={workdir}'])
    config = rundir.read_config(str(workdir))['config']
    cfg = execution.model_config(config)
    tokens = config['steps'] * config['batch_size'] * config['seq_len']
    return {
        'benchmark': 'dial', **key, 'lr': config['optim']['lr'], 'weight_decay': config['optim']['weight_decay'],
        'steps': config['steps'], 'batch_size': config['batch_size'], 'tokens': tokens,
        'flops': tokens * flops.per_token(cfg, seq_len=config['seq_len']), 'bpb': last['eval/bpb'],
        'sources': {k.split('/')[1]: v for k, v in last.items() if k.count('/') == 2 and k.endswith('bpb')},
        'seconds': time.perf_counter() - begun, 'jax': jax.__version__,
    }  # fmt: skip


def draw(results: list[Result], path: str) -> None:
    """Bits per byte against FLOPs, a line a multiple of the rate; and by how much each multiple is above its depth's
    best, a line a depth."""
    import matplotlib

    matplotlib.use('svg')
    matplotlib.rcParams['svg.fonttype'] = 'none'  # letters, not their outlines
    from matplotlib import pyplot

    rates, depths = (sorted({r[key] for r in results}) for key in ('rate', 'depth'))
    lines = lambda key, value: sorted((r for r in results if r[key] == value), key=lambda r: (r['flops'], r['rate']))
    figure, (curve, rate) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for value in rates:
        found = lines('rate', value)
        label = f'{value:g} × rate'
        curve.plot([r['flops'] for r in found], [r['bpb'] for r in found], marker='o', label=label)
    for value in depths:
        found = lines('depth', value)
        above = [r['bpb'] - min(r['bpb'] for r in found) for r in found]
        rate.plot([r['rate'] for r in found], above, marker='o', label=f'depth {value}')
    curve.set(xlabel='FLOPs', xscale='log', ylabel='held-out bits per byte')
    rate.set(xlabel='multiple of the rate', xscale='log', ylabel="above the depth's best")
    rate.set_xticks(rates, [f'{r:g}' for r in rates])
    rate.minorticks_off()
    for axis in (curve, rate):
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path)


def run(argv: list[str]) -> None:
    flags, given = parse(argv)
    if flags.svg and importlib.util.find_spec('matplotlib') is None:
        raise UsageError("--svg needs matplotlib: pip install -e '.[plots]'")
    file = files.absolute(flags.out) / 'results.jsonl'
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    found = files.read_json_lines(file) if file.exists() else []
    results = []
    for key, arguments in plan(flags, given):
        same = [r for r in found if all(r[k] == v for k, v in key.items())]
        result = same[0] if same else measure(key, arguments, flags)
        if not same:
            files.append_line(file, json.dumps(result))
        results.append(result)
    best = {d: min((r for r in results if r['depth'] == d), key=lambda r: r['bpb']) for d in sorted(flags.depths)}
    shown = ('rate', 'lr', 'bpb', 'flops')
    print(json.dumps({'benchmark': 'dial', 'best': {d: {k: r[k] for k in shown} for d, r in best.items()}}))
    if flags.svg:
        draw(results, flags.svg)


if __name__ == '__main__':
    leave(run_command(lambda: run(sys.argv[1:])))
