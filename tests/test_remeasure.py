"""The README's tables are written again from runs' files, in place, and nothing else is."""

import importlib
import json
import os
from pathlib import Path

import pytest

from lm.errors import UsageError

ROOT = Path(__file__).parents[1]
LOG = """reading botocore
1,377,664 parameters, 2,764,800 tokens in 1,350 steps, float32, mesh: one device
step 10/1350: loss 8.291 · 1,361 tokens/s · MFU 27%
step 250: bpb 1.893
  The name of the[…] same
step 500: bpb 1.700
  The name of the[…] other
step 1350: bpb 1.500
  The name of the[…] last
prepare 15.1 s · compile 0.8 s · data 0.5 s · step 125.2 s · eval 10.1 s · checkpoint 0.2 s · total 152.0 s
"""
README = """# lm

<!-- remeasure: {0}: python benchmarks/remeasure.py {0} -->

old figures

<!-- end -->

In between.

<!-- remeasure: other -->
not ours
<!-- end -->
"""


@pytest.fixture
def remeasure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    return importlib.import_module('remeasure')


def write_run(folder, name, *, log=LOG, answer='Creates\na VPC.', settings=None):
    """A finished run's files, as far as they are read."""
    run = folder / name
    run.mkdir(parents=True)
    (run / 'log.txt').write_text(log)
    (run / 'status.json').write_text('{"state": "done"}')
    (run / 'config.json').write_text(json.dumps({'config': settings or {}}))
    evaluations = [{'step': 250, 'eval/bpb': 1.9}, {'step': 1350, 'train/loss': 3.0}]
    last = {'step': 1350, 'eval/bpb': 1.5, 'eval/botocore/bpb': 1.328, 'eval/chitchat/bpb': 1.7524}
    drawn = [{'step': step, 'rl/kl': kl} for step, kl in ((1, 9.0), *((i, 2.0) for i in range(2, 11)), (11, 3.0))]
    (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, [*evaluations, *drawn, last])) + '\n')
    sample = {'prompt': 'What does CreateDefaultVpc do in EC2?', 'temperature': 0.0, 'text': answer}
    (run / 'samples.jsonl').write_text(json.dumps(sample) + '\n' + json.dumps(sample | {'temperature': 0.7}) + '\n')


def write_evaluation(folder, names):
    """What lm.evaluate would say of them, newer than they are."""
    text = {
        'eval/operations/ended': 0.435, 'eval/smalltalk/ended': 0.004, 'eval/operations/f1': 0.0535,
        'eval/programmatic/accuracy_per_token': 0.541, 'eval/decline/declined_invented': 0.8175,
        'eval/decline/declined_real': 0.032, 'eval/botocore/bpb': 1.3274, 'eval/chitchat/bpb': 1.7524,
    }  # fmt: skip
    scores = {'eval/programmatic/accuracy': 0.912}
    rows = [
        {'run': str(folder / name), 'stage': name.partition('-')[0], **(scores if name == 'reward' else text)}
        for name in names
    ]
    gains = {'eval/operations/reward_gain': 0.488, 'eval/operations/win_rate': 0.751}
    for kept, found in (('evaluate', rows), ('evaluate-by-reward', [row | gains for row in rows])):
        (folder / f'{kept}.json').write_text(json.dumps({'runs': found}))
        os.utime(folder / f'{kept}.json', (2**33, 2**33))


@pytest.mark.parametrize(
    ('table', 'expected'),
    [
        ('output', ['reading botocore', '…', 'step 250: bpb 1.893', '  The name of the[…] last', LOG.splitlines()[-1]]),
        ('answers', ['| `runs/sft` | Creates a VPC. |']),
        (
            'stages',
            [
                '| `runs/sft` | 125 s | 44 % / 0 % | .05 | 54 % | 82 % / 3.2 % | 1.327 / 1.752 |',
                '| `runs/reward` | 125 s |  |  | – / 91 % |  |  |',
            ],
        ),
        ('rewards', ['| `runs/ppo` | 152 s | +.49 | 75 % | 2.2 | 44 % | .05 | 1.327 / 1.752 |']),
        (
            'pretrain',
            [
                '| held-out bits per byte, botocore / chitchat | 1.328 / 1.752 | the last evaluation, 256 rows of each '
                'source; falling at every evaluation |',
                '| training | 137 s in all: steps 125 s, evaluations 10 s, compiling 0.8 s (3.0 s the first time) | '
                'the last line of the log |',
                '| preparing the data, first time / after | 15 s / 0.3 s | the same |',
                '| data ready → first step done, first time / after | 4.1 s / 0.9 s | a run of one step: compiles, '
                'steps |',
            ],
        ),
    ],
)
def test_a_table_is_rewritten_and_nothing_else(remeasure, tmp_path, table, expected):
    one_step = 'prepare {} s · compile {} s · data 0.1 s · step {} s · eval 1.0 s · checkpoint 0.1 s · total 9.0 s\n'
    for name in remeasure.RUNS:
        log = {'first': one_step.format(15.2, 3.0, 1.0), 'again': one_step.format(0.3, 0.7, 0.1)}.get(name, LOG)
        write_run(tmp_path / 'runs', name, log=log)
    write_evaluation(tmp_path / 'runs', remeasure.STAGES + remeasure.ONLINE)
    readme, before = tmp_path / 'README.md', README.format(table)
    readme.write_text(before)

    result = remeasure.remeasure([table, f'--runs={tmp_path / "runs"}'], readme)

    after = readme.read_text()
    start, end = before.index('old figures'), before.index('\n\n<!-- end -->')
    assert after.startswith(before[:start]) and after.endswith(before[end:])
    body = after[start : len(after) - len(before[end:])].splitlines()
    assert 'old figures' not in body and set(expected) <= set(body)
    assert ('JAX' in body[0]) == (table != 'answers')
    assert result['changed'] == [table]
    assert remeasure.remeasure([table, f'--runs={tmp_path / "runs"}'], readme)['changed'] == []


def test_only_the_first_and_the_last_evaluation_are_shown(remeasure, tmp_path):
    write_run(tmp_path, 'pretrain')
    assert [line for line in remeasure.output(tmp_path) if 'bpb' in line] == [
        'step 250: bpb 1.893',
        'step 1350: bpb 1.500',
    ]


def test_an_unknown_table_is_refused_with_the_nearest_name(remeasure, tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text(README.format('stages'))
    with pytest.raises(UsageError, match=r'no table stage \(did you mean stages\?\): it is one of output, '):
        remeasure.remeasure(['stage'], readme)
    with pytest.raises(UsageError, match='no table between <!-- remeasure: answers -->'):
        remeasure.remeasure(['answers'], readme)
    assert readme.read_text() == README.format('stages')


def test_a_run_of_other_settings_is_refused(remeasure, tmp_path):
    write_run(tmp_path, 'pretrain', settings={'optim': {'lr': 0.1}, 'batch_size': 8})
    with pytest.raises(UsageError, match=r'was trained with optim.lr=0.1, and configs/pretrain.py has 0.024'):
        remeasure.make_ready('pretrain', tmp_path)


def test_a_missing_run_is_trained_after_what_it_starts_from(remeasure, monkeypatch, tmp_path):
    asked = []

    def train(command, **options):
        asked.append(command[3:])
        return remeasure.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(remeasure.subprocess, 'run', train)
    remeasure.make_ready('dpo', tmp_path)
    assert asked == [
        ['--config=configs/pretrain.py', f'--workdir={tmp_path}/pretrain'],
        ['--config=configs/sft.py', f'--workdir={tmp_path}/sft', f'--config.init_from={tmp_path}/pretrain'],
        ['--config=configs/dpo.py', f'--workdir={tmp_path}/dpo', f'--config.init_from={tmp_path}/sft'],
    ]


def test_the_readme_and_the_script_know_the_same_tables(remeasure):
    text = (ROOT / 'README.md').read_text()
    assert sorted(remeasure.marked(text)) == sorted(remeasure.TABLES)
    assert text.count('<!-- remeasure') == text.count('<!-- end -->') == len(remeasure.TABLES)
    for name, table in remeasure.TABLES.items():
        assert f'<!-- remeasure: {name}: python benchmarks/remeasure.py {name} -->' in text
        for run in map(remeasure.RUNS.get, table.runs):
            assert f'-m lm.main --config={run.config}' in text, 'trained by a command of the README'
