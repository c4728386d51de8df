"""Memory: what cannot fit is refused before it compiles, with what would fit."""

import pytest
import running

from lm import main as lm_main
from lm.errors import RunError, UsageError
from lm.runs import execution
from lm.stages import runner

PRESET = f'{running.CONFIG}:8b'


def words(lab, tmp_path, *more):
    return [f'--config={PRESET}', f'--workdir={tmp_path / "run"}', f'--config.data.mixture={lab.mixture}', *more]


@pytest.fixture
def limit(monkeypatch):
    """limit(bytes) sets what a device has, and makes an error of reading data and of compiling."""

    def to(size):
        monkeypatch.setattr(execution, 'memory_limit', lambda device: size)
        monkeypatch.setattr(runner, 'compile_step', lambda *args: pytest.fail('it was to be seen before'))

    return to


def test_what_cannot_fit_is_refused_before_it_compiles(lab, tmp_path, limit):
    limit(4 << 30)
    with pytest.raises(UsageError) as refused:
        lm_main.train(words(lab, tmp_path))
    said = str(refused.value)
    assert said.startswith('does not fit: at least ') and 'GiB per device of 4 GiB' in said
    assert 'configs/pretrain.py:1b or smaller' in said and 'such devices (mesh.fsdp)' in said
    assert not (tmp_path / 'run').exists()


def test_the_number_of_devices_is_one_that_fits(lab, tmp_path, limit):
    limit(1 << 30)
    with pytest.raises(UsageError) as refused:
        lm_main.train(words(lab, tmp_path))
    said = str(refused.value)
    needed, (devices, _) = float(said.split()[5]), said.rpartition(' or more')[0].rsplit(' ', 1)[1:] + ['']
    assert needed * 8 / int(devices.replace(',', '')) <= 1.0  # of eight fake devices


def test_the_dry_run_has_the_same_figures(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execution, 'memory_limit', lambda device: 10_000)
    with pytest.raises(RunError, match='does not fit: .*what would fit: '):
        lm_main.train(lab.argv(tmp_path / 'run', '--dry_run', execution__microbatch=8))
    told = capsys.readouterr().err
    with pytest.raises(UsageError) as refused:
        lm_main.train(lab.argv(tmp_path / 'run', execution__microbatch=8))
    at_least = float(next(line.split()[2] for line in told.splitlines() if line.startswith('at least')))
    assert float(str(refused.value).split()[5]) == pytest.approx(at_least, rel=0.01, abs=5e-4)
    in_all = float(next(line.split()[2] for line in told.splitlines() if line.startswith('in all')))
    assert at_least <= in_all


def test_a_container_has_less_than_the_machine(monkeypatch, tmp_path):
    (tmp_path / 'max').write_text('max')
    (tmp_path / 'bytes').write_text('8000')
    monkeypatch.setattr(execution, 'CONTAINER_LIMITS', (str(tmp_path / 'max'), str(tmp_path / 'bytes')))
    import jax

    assert execution.memory_limit(jax.devices()[0]) == 1000
