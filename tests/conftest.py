"""Eight fake CPU devices, full-precision products, what tests share, and how long a module of them may take."""

import collections
import gc
import importlib.metadata
import math
import os
import sys
from pathlib import Path

# Tests compile much and compute little: one LLVM module a program and, where jaxlib still has them, the older emitters
# take a third of the time.
FAST = ['--xla_cpu_parallel_codegen_split_count=1', '--xla_force_host_platform_device_count=8']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    FAST.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FAST])
os.environ['JAX_PLATFORMS'] = 'cpu'
# One cache of programs for the processes that tests start on one device, and for the next time.
XLA_CACHE = Path(os.environ.get('LM_CACHE', '~/.cache/lm')).expanduser() / 'tests-xla'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(XLA_CACHE)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '1'  # warnings are shown: a test reads what the partitioner warns of

import jax  # noqa: E402
import pytest  # noqa: E402

from lm import sharding  # noqa: E402
from lm.model.config import ModelConfig  # noqa: E402

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_enable_compilation_cache', False)  # several devices have none: `runtime.start_jax`
gc.set_threshold(200_000, 20, 50)  # JAX's caches are no garbage, and looking for some in them cost a twelfth

# The meshes that every layout-dependent property is tried on, by the sizes of their axes.
MESHES = {
    'one': {},
    'data8': {'data': 8},
    'fsdp8': {'fsdp': 8},
    'fsdp2-seq2-tensor2': {'fsdp': 2, 'seq': 2, 'tensor': 2},
    'data2-fsdp2-tensor2': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'tensor4': {'tensor': 4},
    'seq4-tensor2': {'seq': 4, 'tensor': 2},
    'data2-tensor2-expert2': {'data': 2, 'tensor': 2, 'expert': 2},
}
QUICK = ('one', 'fsdp2-seq2-tensor2', 'data2-tensor2-expert2')  # every axis is split in one of them
MINUTE = 60.0  # seconds that a module of quick tests may take before the summary names it


@pytest.fixture(params=[pytest.param(n, id=n, marks=() if n in QUICK else pytest.mark.slow) for n in MESHES])
def mesh(request):
    """Each mesh in turn, entered; the quick tests have three of them."""
    shape = MESHES[request.param]
    with sharding.use_mesh(shape, jax.devices()[: math.prod(shape.values())]) as entered:
        yield entered


@pytest.fixture
def one_device():
    """A mesh of one device, entered."""
    with sharding.use_mesh({}, jax.devices()[:1]) as entered:
        yield entered


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    """A tiny corpus and the commands that train on it, with a cache of the tests' own."""
    import running

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield running.make_lab(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='session', autouse=True)
def compiled_once():
    """Compiles the steps of runs that differ in nothing which a step is made of once: half of what a tiny run takes."""
    from lm.config import leaves
    from lm.stages import runner

    real, known = runner.compile_step, {}
    apart = (
        'log.',
        'eval.',
        'checkpoint.',
        'init_from',
        'branch_from',
        'data.mixture',
        'data.pretraining',
        'data.tokenizer',
    )

    def compile_step(task, optimizer, rate, abstract, microbatch):
        settings = [(k, v) for k, v in leaves(task.config) if not k.startswith(apart)]
        shapes = jax.tree.leaves((abstract, task.at(microbatch).batch()))
        key = str((type(task), settings, task.cfg, shapes, [x.sharding for x in shapes], microbatch))
        if key not in known:
            known[key] = real(task, optimizer, rate, abstract, microbatch)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, 'compile_step', compile_step)
        yield


@pytest.fixture(scope='session')
def trained(lab, tmp_path_factory):
    """A finished run of the tiny settings, which nobody may change: a test that would works on a copy."""
    workdir = tmp_path_factory.mktemp('trained') / 'run'
    lab.train(workdir)
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}
    yield workdir
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob('*')}, 'a test has changed the run that all share'


@pytest.fixture
def call(monkeypatch, capsys):
    """call(command, *words) -> (exit status, stdout, stderr), as if typed; in this process."""
    import importlib

    def run(name, *words):
        monkeypatch.setattr(sys, 'argv', [f'lm.{name}', *map(str, words)])
        capsys.readouterr()
        try:
            status = importlib.import_module(f'lm.{name}').main()
        except SystemExit as left:
            status = left.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def dialogues(lab, tmp_path_factory):
    """Conversations and pairs beside the corpus, and the stages that learn from them."""
    import dialogues

    return dialogues.make(lab, tmp_path_factory.mktemp('dialogues'))


@pytest.fixture
def tiny() -> ModelConfig:
    """A decoder small enough for a test and odd enough to show mistakes: grouped heads, a padded vocabulary."""
    return ModelConfig(vocab_size=250, vocab_multiple=64, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_dim=64)


@pytest.fixture
def set_block(monkeypatch):
    """A function that sets how many queries a block of attention has."""
    from lm.model import causal_blocks

    def set_to(size):
        for name in ('LEAST_BLOCK', 'MOST_BLOCK'):
            monkeypatch.setattr(causal_blocks, name, size)

    return set_to


class Budget:
    """Names the modules that took longer than MINUTE, at the end."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report) -> None:
        self._seconds[report.nodeid.partition('::')[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter) -> None:
        for module, seconds in sorted(self._seconds.items(), key=lambda found: -found[1]):
            if seconds > MINUTE:
                terminalreporter.write_line(f'{module} took {seconds:.0f} s, over a minute: make it quicker', red=True)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items) -> None:
    """One worker for each module, and one for all whose tests share the runs of `dialogues`."""
    talking = {item.path for item in items if 'dialogues' in item.fixturenames}
    for item in items:
        item.add_marker(pytest.mark.xdist_group('dialogues' if item.path in talking else item.path.stem))


def pytest_configure(config) -> None:
    if not hasattr(config, 'workerinput') and config.option.markexpr == 'not slow':
        config.pluginmanager.register(Budget())
