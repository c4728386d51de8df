"""The microbatch that is chosen where the user leaves it to us: what fits, or what is quickest, with few compiles."""

import functools
import json
import math
import types

import numpy as np
import pytest
import running

from lm import config as configs
from lm.errors import RunError, UsageError
from lm.runs import execution, loading
from lm.stages import plan, pretrain, runner
from lm.training import microbatch


def divisors(n, parts=1):
    return microbatch.options(n, parts)


def test_options_divide_the_batch_and_are_shared_by_the_devices():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(12, 2) == [2, 4, 6, 12]
    assert divisors(24, 8) == [8, 24]
    assert divisors(7) == [1, 7]


def searched(found, size, limit):
    """(what `largest` says, what it asked about)."""
    asked = []

    def bytes_of(m):
        assert m not in asked, 'compiled twice'
        asked.append(m)
        return size(m)

    return microbatch.largest(found, bytes_of, limit), asked


SIZES = {
    'linear': lambda m: 1000 + 10 * m,
    'flat then steep': lambda m: 1000 + m**2,
    'fragments': lambda m: 1000 + 10 * m + 37 * (m % 7),
    'does not compile': lambda m: 1000 + 10 * m if m <= 30 else math.inf,
    'one accumulates': lambda m: 1000 + 10 * m + (0 if m == 480 else 400),
    'constant': lambda m: 1000,
}


@pytest.mark.parametrize('name', SIZES)
@pytest.mark.parametrize('found', [divisors(n, p) for n, p in ((480, 1), (480, 8), (8, 1), (2048, 16), (7, 1), (8, 8))])
def test_the_largest_that_fits_is_found(name, found):
    """Against trying all of them; where memory is not quite monotone, what is found fits all the same."""
    for limit in (0, 999, 1000, 1001, 1010, 1100, 1310, 1700, 3000, 5800, 10**9):
        chosen, asked = searched(found, SIZES[name], limit)
        fitting = [m for m in found if SIZES[name](m) <= limit]
        assert chosen in fitting or (not fitting and chosen == found[0])
        if name in ('linear', 'flat then steep', 'does not compile', 'constant'):
            assert chosen == max(fitting, default=found[0])
        assert len(asked) <= 5 + math.ceil(math.log2(max(2, len(found))))


def test_linear_memory_takes_four_compiles():
    asked = [len(searched(divisors(480), SIZES['linear'], limit)[1]) for limit in range(1000, 6000, 50)]
    assert max(asked) <= 5 and np.mean(asked) < 4.2


def test_candidates_are_far_apart_and_not_tiny():
    assert microbatch.candidates(divisors(8), 256) == [8]
    assert microbatch.candidates(divisors(32), 256) == [32, 8]
    assert microbatch.candidates(divisors(128), 256) == [128, 32, 8]
    assert microbatch.candidates(divisors(480), 1024) == [480, 120, 30]
    assert microbatch.candidates([8], 4096) == [8]


def test_the_whole_batch_unless_another_is_clearly_quicker():
    assert microbatch.fastest({32: 1.0, 8: 0.97}) == 32
    assert microbatch.fastest({32: 1.0, 8: 0.9, 2: 0.8}) == 2
    assert microbatch.fastest({32: 1.0, 8: 1.3}) == 32


def compiled(size):
    """What looks like a compiled step that takes `size` bytes."""
    memory = types.SimpleNamespace(
        argument_size_in_bytes=size, temp_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0
    )
    return types.SimpleNamespace(memory_analysis=lambda: memory)


def test_what_does_not_compile_for_want_of_memory_does_not_fit():
    def build(m):
        if m > 4:
            raise RuntimeError('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm')
        return compiled(m)

    assert microbatch.choose(divisors(16), build, limit=100, seq_len=64).microbatch == 4
    with pytest.raises(RuntimeError, match='another'):
        microbatch.choose(divisors(16), lambda m: exec('raise RuntimeError("another")'), limit=100, seq_len=64)


def test_only_what_fits_is_timed():
    def time_them(steps):
        assert list(steps) == [32, 8]
        return {32: 1.0, 8: 0.5}

    choose = lambda limit: microbatch.choose(divisors(128), compiled, limit=limit, seq_len=256, time_them=time_them)
    choice = choose(100)
    assert choice.microbatch == 8 and choice.why == 'seconds a step: 1 s with 32, 0.5 s with 8'
    assert choose(20).microbatch == 16  # one alone fits: no time is needed, and more fit than that one


def test_a_choice_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path))
    first = microbatch.remembered({'a': 1}, lambda: microbatch.Choice(8, 'timed'))
    assert first == microbatch.remembered({'a': 1}, lambda: pytest.fail('asked again')) == (8, 'timed')
    assert microbatch.remembered({'a': 2}, lambda: microbatch.Choice(4, 'x')).microbatch == 4


# ---- in a run ----


def saved_microbatch(workdir):
    return json.loads((workdir / 'config.json').read_text())['config']['execution']['microbatch']


@pytest.fixture
def accelerator(monkeypatch):
    """Pretends that the devices are accelerators with so many bytes of memory."""

    def pretend(limit):
        monkeypatch.setattr(execution, 'memory_limit', lambda device: limit)
        monkeypatch.setattr(microbatch, 'candidates', lambda found, seq_len: found[-1:])

    return pretend


@pytest.mark.slow
def test_the_compiled_steps_say_what_fits(lab, one_device, accelerator):
    config, _ = configs.load(running.CONFIG, configs.split_settings(lab.argv(None, model__layers=1))[1])
    config.execution.dtype = 'float32'
    cfg = execution.model_config(config)
    optimizer, rate = plan.make_optimizer(config)
    abstract = plan.abstract_state({'policy': loading.abstract_params(cfg)}, optimizer, config.seed)
    own = (pretrain.Pretrain(config, cfg), optimizer, rate, abstract)
    build = functools.cache(functools.partial(runner.compile_step, *own))
    sizes = {m: microbatch.step_bytes(build(m)) for m in (2, 4, 8)}
    assert sizes[2] < sizes[4] < sizes[8]
    accelerator((sizes[4] + 1000) / execution.USED['cpu'])
    step, told = plan.autotune_microbatch(config, cfg, abstract, build, None)
    assert config.execution.microbatch == 4 and step is build(4) and told.startswith('microbatch 4 (of 8, what fits')


@pytest.mark.slow
def test_a_small_memory_takes_a_small_microbatch_and_a_resumed_run_keeps_it(lab, tmp_path, accelerator, monkeypatch):
    """What comes out does not depend on it, beyond rounding."""
    accelerator(2**30)
    lab.train(tmp_path / 'large', steps=4, batch_size=16)
    assert 'microbatch 16 (the whole batch)' in (tmp_path / 'large' / 'log.txt').read_text()
    taken, real = [], microbatch.step_bytes
    monkeypatch.setattr(microbatch, 'step_bytes', lambda compiled: taken.append(real(compiled)) or taken[-1])
    lab.train(None, '--dry_run', steps=4, batch_size=16, execution__microbatch=8)
    accelerator(max(taken) + 1)
    small = tmp_path / 'small'
    lab.train(small, steps=4, batch_size=16)
    accelerator(2**30)
    lab.train(small, steps=5, batch_size=16)
    assert [saved_microbatch(tmp_path / name) for name in ('large', 'small')] == [16, 8]
    a, b = running.measured(tmp_path / 'large'), running.measured(small)
    for key in a:
        assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert running.lines(tmp_path / 'large', 'samples.jsonl') == running.lines(small, 'samples.jsonl')[:2]


@pytest.mark.slow
def test_on_a_cpu_the_quickest_is_timed_once(lab, tmp_path, monkeypatch):
    """A run that was killed before its first checkpoint chooses again, and finds the same."""
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(microbatch, 'MIN_TOKENS', 1)
    monkeypatch.setattr(microbatch, 'SECONDS', 0.0)
    monkeypatch.setattr(microbatch, 'QUICKER', 100)  # whatever is quickest
    real, asked = microbatch.time_steps, []

    def time_steps(steps, abstract, batch):
        asked.append({m: s * m for m, s in real(steps, abstract, batch).items()})
        return {m: float(m) for m in asked[-1]}

    monkeypatch.setattr(microbatch, 'time_steps', time_steps)
    with monkeypatch.context() as patch:
        patch.setattr(runner, 'start', lambda *args: (_ for _ in ()).throw(RunError('killed here')))
        with pytest.raises(RunError):
            lab.train(tmp_path / 'run', steps=2, batch_size=32)
    assert saved_microbatch(tmp_path / 'run') == 8
    lab.train(tmp_path / 'run', steps=2, batch_size=32)
    assert [list(seconds) for seconds in asked] == [[32, 8]] and min(asked[0].values()) > 0
    lab.train(tmp_path / 'fixed', steps=2, batch_size=32, execution__microbatch=8)
    assert running.measured(tmp_path / 'run') == running.measured(tmp_path / 'fixed')


def test_what_was_timed_and_is_damaged_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path))
    choose = lambda: microbatch.remembered({'a': 1}, lambda: microbatch.Choice(4, 'measured'))
    assert choose().microbatch == 4
    (file,) = tmp_path.glob('microbatch/*/choice.json')
    file.write_text('{"micro')
    with pytest.raises(UsageError, match='damaged .*: delete that folder'):
        choose()


def test_a_dry_run_times_nothing(lab, capsys, monkeypatch):
    monkeypatch.setattr(microbatch, 'time_steps', lambda *args: pytest.fail('timed'))
    monkeypatch.setattr(microbatch, 'MIN_TOKENS', 1)
    lab.train('/nowhere', '--dry_run', batch_size=32)
    assert 'microbatch 32 (the whole batch; timed at the start of a run)' in capsys.readouterr().err
