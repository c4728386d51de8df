"""XLA's settings by platform."""

import os
import subprocess
import sys

import jax
import pytest

from lm import runtime, xla


@pytest.fixture
def clean(monkeypatch):
    for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS'):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def as_platform(patch, name):
    patch.setattr(xla, 'platform', lambda: name)


@pytest.mark.parametrize(('name', 'variable'), [('gpu', 'XLA_FLAGS'), ('tpu', 'LIBTPU_INIT_ARGS')])
def test_a_platform_gets_its_flags(clean, name, variable):
    as_platform(clean, name)
    xla.setup()
    assert os.environ[variable].split() == [f'--{flag}={value}' for flag, (value, _) in xla.FLAGS[name].items()]
    assert {'XLA_FLAGS', 'LIBTPU_INIT_ARGS'} & set(os.environ) == {variable}
    first, *why = xla.lines()
    assert first == f'xla: {name} {variable}={os.environ[variable]}'
    assert why == [f'  --{flag}={value}: {reason}' for flag, (value, reason) in xla.FLAGS[name].items()]


def test_what_the_person_sets_wins(clean):
    as_platform(clean, 'gpu')
    mine = '--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_autotune_level=0'
    clean.setenv('XLA_FLAGS', mine)
    xla.setup()
    assert os.environ['XLA_FLAGS'].startswith(mine) and os.environ['XLA_FLAGS'].count('latency_hiding') == 1
    assert 'xla_gpu_enable_pipelined_all_gather=true' in os.environ['XLA_FLAGS']
    assert len(xla.lines()) == len(xla.FLAGS['gpu']) and 'latency_hiding' not in ''.join(xla.lines()[1:])
    before = os.environ['XLA_FLAGS']
    xla.setup()
    assert os.environ['XLA_FLAGS'] == before


@pytest.mark.parametrize('name', ['cpu', 'metal'])
def test_other_platforms_keep_their_defaults(clean, name):
    as_platform(clean, name)
    xla.setup()
    assert 'XLA_FLAGS' not in os.environ and xla.lines() == [f'xla: {name}, its defaults']


@pytest.mark.parametrize(('asked', 'found'), [('cpu', 'cpu'), ('cuda,cpu', 'gpu'), ('tpu', 'tpu')])
def test_the_platform_is_the_one_that_jax_is_told(asked, found):
    before = jax.config.values['jax_platforms']
    try:
        jax.config.update('jax_platforms', asked)
        assert xla.platform() == found
    finally:
        jax.config.update('jax_platforms', before)


def test_xla_knows_the_flags():
    """It ends a process that names another."""
    flags = ' '.join(f'--{flag}={value}' for flag, (value, _) in xla.FLAGS['gpu'].items())
    for more, ends_well in (('', True), (' --xla_gpu_no_such_flag=1', False)):
        env = {**os.environ, 'XLA_FLAGS': flags + more, 'JAX_PLATFORMS': 'cpu'}
        done = subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], env=env, capture_output=True)
        assert (done.returncode == 0) == ends_well


@pytest.mark.parametrize(('devices', 'cached'), [(1, True), (8, False)])
def test_programs_for_several_cpu_devices_do_not_come_out_of_the_cache(monkeypatch, devices, cached):
    monkeypatch.setattr(jax, 'device_count', lambda: devices)
    before = jax.config.values['jax_enable_compilation_cache']
    try:
        jax.config.update('jax_enable_compilation_cache', True)
        runtime.start_jax()
        assert jax.config.values['jax_enable_compilation_cache'] == cached
    finally:
        jax.config.update('jax_enable_compilation_cache', before)
