"""Held-out loss, perplexity and bits per byte against the same by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from lm import sharding
from lm.evals import heldout
from lm.evals.tasks import rows_at_once
from lm.model import parameters, transformer

B, T = 8, 16


def batches(cfg, n):
    rng = np.random.default_rng(0)
    for _ in range(n):
        yield {
            'tokens_BT': rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32),
            'targets_BT': rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32),
            'weights_BT': (rng.random((B, T)) < 0.7).astype(np.float32),
            'segments_BT': np.ones((B, T), np.int32),
            'positions_BT': np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
        }


@pytest.fixture
def model(tiny):
    return dataclasses.replace(tiny, layers=1, scan=True)


@pytest.fixture
def bytes_V(tiny):
    """How many bytes each id spells; the first eight are control symbols."""
    out = np.random.default_rng(1).integers(1, 7, tiny.vocab_size)
    out[:8] = 0
    return out


def log_softmax(params, cfg, tokens_BT):
    return jax.nn.log_softmax(transformer.logits(params, cfg, transformer.forward(params, cfg, tokens_BT)[0]))


def by_hand(params, cfg, bytes_V, n):
    totals = dict.fromkeys(('nll', 'tokens', 'byte_nll', 'bytes'), 0.0)
    for batch in batches(cfg, n):
        logp_BTV = jax.jit(log_softmax, static_argnums=1)(params, cfg, batch['tokens_BT'])
        nll_BT = -np.take_along_axis(np.asarray(logp_BTV), batch['targets_BT'][..., None], -1)[..., 0]
        for b, t in zip(*np.nonzero(batch['weights_BT']), strict=True):
            written = bytes_V[batch['targets_BT'][b, t]]
            totals['nll'] += float(nll_BT[b, t])
            totals['tokens'] += 1
            totals['byte_nll'] += float(nll_BT[b, t]) if written else 0
            totals['bytes'] += float(written)
    return totals


@pytest.mark.parametrize('mesh', [pytest.param('data8', marks=pytest.mark.slow), 'fsdp2-seq2-tensor2'], indirect=True)
def test_sums_are_those_by_hand(mesh, model, bytes_V):
    params = parameters.init_sharded(jax.random.key(0), model)
    got = heldout.sums(params, model, batches(model, 2), bytes_V)
    assert got == pytest.approx(expected_sums(model, bytes_V), rel=1e-5)


def expected_sums(cfg, bytes_V):
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        return by_hand(parameters.init_sharded(jax.random.key(0), cfg), cfg, bytes_V, 2)


def test_bits_per_byte_weigh_each_source_by_its_bytes():
    a = {'nll': 30.0, 'tokens': 10.0, 'byte_nll': 24.0, 'bytes': 40.0}
    b = {'nll': 8.0, 'tokens': 4.0, 'byte_nll': 8.0, 'bytes': 10.0}
    got = heldout.metrics({'a': a, 'b': b})
    assert got == pytest.approx(
        {
            'eval/a/loss': 3.0, 'eval/a/ppl': math.exp(3), 'eval/a/bpb': 24 / 40 / math.log(2),
            'eval/b/loss': 2.0, 'eval/b/ppl': math.exp(2), 'eval/b/bpb': 8 / 10 / math.log(2),
            'eval/loss': 38 / 14, 'eval/bpb': 32 / 50 / math.log(2),
        }
    )  # fmt: skip


def test_a_model_that_knows_nothing_pays_the_entropy_of_its_alphabet():
    """256 words of one byte each, all equally likely: eight bits per byte."""
    nll = math.log(256) * 100
    assert heldout.bpb({'nll': nll, 'tokens': 100, 'byte_nll': nll, 'bytes': 100}) == pytest.approx(8.0)


def test_rows_at_once_are_those_of_training_unless_they_were_for_a_larger_machine():
    assert rows_at_once(8, 256, 1) == 8
    assert rows_at_once(8, 256, 16) == 16
    assert rows_at_once(None, 1024, 1) == 32  # converted, never trained
    assert rows_at_once(480, 1024, 1) == 32
    assert rows_at_once(480, 1024, 8) == 256
    assert rows_at_once(3, 2**20, 4) == 4
