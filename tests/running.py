"""A tiny corpus, tiny settings, and the commands, in this process or in one of their own."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lm import config as configs
from lm import main as lm_main
from lm import sharding
from lm.multihost import hub
from lm.runs import loading
from lm.training.recorder import Recorder

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / 'configs' / 'pretrain.py')

SETTINGS = {
    'steps': 12, 'batch_size': 8, 'seq_len': 32,
    'model.vocab_size': 300, 'model.dim': 32, 'model.layers': 2, 'model.heads': 4, 'model.kv_heads': 2,
    'model.head_dim': 8, 'model.ffn_dim': 64, 'execution.scan': True,  # one layer to trace
    'optim.name': 'adamw', 'optim.lr': 3e-3, 'optim.schedule': 'cosine', 'optim.final': 0.1, 'optim.warmup': 2,
    'data.heldout': 0.1, 'checkpoint.every': 4, 'log.every': 1,
    'eval.every': 6, 'eval.rows': 8, 'eval.max_new_tokens': 4,
}  # fmt: skip

WORDS = ['the', 'a', 'bucket', 'table', 'queue', 'returns', 'deletes', 'name', 'list', 'of', 'role', 'hello', 'music']

DEVICES = '--xla_force_host_platform_device_count=1'  # where no test has asked for more


@dataclass(frozen=True)
class Lab:
    """Where the corpus and the prompts of the tests lie."""

    folder: Path

    def argv(self, workdir: Path | str | None, *words: str, config: str = CONFIG, **settings: Any) -> list[str]:
        """The command line of a tiny run; settings as data__mixture='…', None leaves one out."""
        named = {'data.mixture': self.mixture, 'eval.prompts': str(self.folder / 'prompts.jsonl')}
        given = SETTINGS | named | {k.replace('__', '.'): v for k, v in settings.items()}
        where = [] if workdir is None else [f'--workdir={workdir}']
        return [f'--config={config}', *where, *(f'--config.{k}={v}' for k, v in given.items() if v is not None), *words]

    @property
    def mixture(self) -> str:
        return f'{self.folder / "one.jsonl"}:0.7,{self.folder / "two.jsonl"}:0.3'

    def train(self, workdir: Path | str, *words: str, **settings: Any) -> dict[str, Any]:
        """Trains in this process, on all of its devices."""
        return lm_main.train(self.argv(workdir, *words, **settings))

    @property
    def inherited(self) -> dict[str, None]:
        """Leaves out the settings of the model, which come from another run."""
        return {key.replace('.', '__'): None for key in SETTINGS if key.startswith('model.')}

    def start(
        self, workdir: Path | str, *words: str, devices: int = 1, code: str | None = None, **settings: Any
    ) -> subprocess.Popen:
        """Starts a run in a process of its own; `code` is run in place of the command."""
        command = [sys.executable, *(['-m', 'lm.main'] if code is None else ['-c', code])]
        env = {
            **os.environ, 'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': re.sub(r'(device_count=)\d+', rf'\g<1>{devices}', os.environ.get('XLA_FLAGS', DEVICES)),
            # As in conftest.py, so that both compute the same.
            'JAX_DEFAULT_MATMUL_PRECISION': 'highest', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        }  # fmt: skip
        arguments = self.argv(workdir, *words, **settings)
        return subprocess.Popen(command + arguments, cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True)


def load_config(*settings: str, arg: str = '') -> ConfigDict:
    """configs/pretrain.py with settings as typed."""
    words, pairs = configs.split_settings(settings)
    assert not words
    return configs.load(f'{CONFIG}:{arg}' if arg else CONFIG, pairs)[0]


@contextlib.contextmanager
def all_devices() -> Iterator[None]:
    with sharding.use_mesh():
        yield


def one_object(out: str) -> dict[str, Any]:
    """What a command said on stdout: one JSON object and nothing else."""
    (line,) = out.splitlines()
    return json.loads(line, parse_constant=lambda word: pytest.fail(f'{word} is no JSON'))


def make_lab(folder: Path) -> Lab:
    """Writes the corpus, the same every time."""
    draw = random.Random(0)
    for name, documents in (('one', 240), ('two', 120)):
        texts = (' '.join(draw.choices(WORDS, k=draw.randint(4, 40))) + f' {i}.' for i in range(documents))
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    prompt = {'id': 'raw', 'kind': 'raw', 'text': 'the bucket'}
    (folder / 'prompts.jsonl').write_text(json.dumps(prompt) + '\n')
    return Lab(folder)


def lines(workdir: Path, name: str = 'metrics.jsonl') -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()]


def measured(workdir: Path) -> dict[tuple[int, str], float]:
    """{(step, train/*, eval/* or rl/*): value}, after making sure that none is there twice."""
    found = [
        ((r['step'], k), v) for r in lines(workdir) for k, v in r.items() if k.startswith(('train/', 'eval/', 'rl/'))
    ]
    assert len(found) == len(dict(found)), 'a metric is there twice for one step'
    return dict(found)


def status(workdir: Path) -> dict[str, Any]:
    return json.loads((Path(workdir) / 'status.json').read_text())


def steps_saved(workdir: Path) -> list[int]:
    folder = Path(workdir) / 'checkpoints'
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int, seconds: float = 60) -> None:
    """Until metrics.jsonl has a line of this step or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        file = Path(workdir) / 'metrics.jsonl'
        if file.exists() and f'"step": {step},' in file.read_text():
            return
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def params(workdir: Path):
    with all_devices():
        return jax.tree.map(np.asarray, loading.load(str(workdir), warn=pytest.fail).params)


def assert_same(a: Path, b: Path) -> None:
    """Bit for bit: metrics, samples and parameters."""
    assert measured(a) == measured(b)
    assert lines(a, 'samples.jsonl') == lines(b, 'samples.jsonl')
    jax.tree.map(np.testing.assert_array_equal, params(a), params(b))


def signal_at(monkeypatch, step: int, number: int, times: int = 1) -> None:
    """Sends this process a signal when the metrics of a step are written."""
    real, left = Recorder.metrics, [times]

    def metrics(self, at, values):
        real(self, at, values)
        if at >= step and left[0]:
            left[0] -= 1
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Recorder, 'metrics', metrics)


def coordinator() -> str:
    return f'127.0.0.1:{hub.free_port()}'


def ended(started: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, list[str]]]:
    """(status, stdout, lm's own lines of stderr) of each."""
    told = [process.communicate(timeout=seconds) for process in started]
    return [
        (process.returncode, out, [line for line in err.splitlines() if line.startswith('lm: ')])
        for process, (out, err) in zip(started, told, strict=True)
    ]


def assert_measured_alike(a: Path, b: Path) -> None:
    """The same measurements, to the order of float32's sums; the same samples."""
    ours, theirs = measured(a), measured(b)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose([ours[k] for k in theirs], list(theirs.values()), rtol=2e-5, atol=1e-6)
    assert lines(a, 'samples.jsonl') == lines(b, 'samples.jsonl')
