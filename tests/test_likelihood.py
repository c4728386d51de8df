"""Log-likelihoods and generation up to a stop string, against the model itself, a sequence at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.data.tokenizer import train_tokenizer
from lm.evals import likelihood
from lm.evals.likelihood import Request, before, windows
from lm.model import head, parameters, transformer
from lm.sampling.choice import Sampling
from lm.sampling.generate import generate

LENGTH = 16


def ids(rng, n, vocab=250):
    return rng.integers(8, vocab, n).tolist()


def make_requests():
    rng = np.random.default_rng(0)
    return [Request(ids(rng, a), ids(rng, b)) for a, b in [(1, 3), (5, 4), (40, 6), (1, 150), (3, 0)]]


def test_windows_as_the_harness_documents_them():
    """Each id once, the last piece with a full context; a long context is cut on the left."""
    assert list(windows([9], range(10), 4)) == [
        ([9, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2),
    ]  # fmt: skip
    assert list(windows(range(10), [10, 11], 4)) == [([7, 8, 9, 10, 11], 2)]
    assert list(windows([1, 2], [3], 4)) == [([1, 2, 3], 1)]
    assert not list(windows([1], [], 4))


@functools.partial(jax.jit, static_argnums=1)
def logp_and_best(params, cfg, row_BT):
    """head.logp of one row, and argmax of its whole logits."""
    h_BTD, _ = transformer.forward(params, cfg, row_BT[:, :-1])
    w, dims = transformer.head_weight(params, cfg)
    logp_BT, _, _ = head.logp(h_BTD, w, row_BT[:, 1:], dims=dims, vocab_size=cfg.vocab_size)
    return logp_BT[0], jnp.argmax(transformer.logits(params, cfg, h_BTD), -1)[0]


def directly(params, cfg, request):
    """One window at a time, each a row of its own."""
    total, greedy = 0.0, True
    for window, asked in windows(*request, LENGTH):
        logp, best = logp_and_best(params, cfg, np.array([window], np.int32))
        total += float(np.sum(np.asarray(logp)[-asked:], dtype=np.float64))
        greedy &= best[-asked:].tolist() == window[-asked:]
    return total, greedy


@functools.lru_cache
def expected(cfg):
    """(requests, what is expected of them); one of them is as greedy decoding has it."""
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        params, requests = parameters.init_sharded(jax.random.key(0), cfg), make_requests()
        (drawn,) = generate(params, cfg, [requests[1].context], max_new_tokens=4, stop_ids=[0])
        requests[1] = Request(requests[1].context, drawn.ids)
        return requests, [directly(params, cfg, r) for r in requests]


@pytest.mark.parametrize('mesh', [pytest.param('fsdp8', marks=pytest.mark.slow), 'fsdp2-seq2-tensor2'], indirect=True)
def test_log_likelihoods_are_those_of_the_head(mesh, tiny, monkeypatch):
    monkeypatch.setattr(likelihood, 'TOKENS_A_DEVICE', 16)  # several batches
    cfg = dataclasses.replace(tiny, layers=1)
    requests, right = expected(cfg)
    seen = []
    params = parameters.init_sharded(jax.random.key(0), cfg)
    found = likelihood.log_likelihoods(params, cfg, requests, length=LENGTH, done=seen.append)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in right], rtol=1e-5, atol=1e-5)
    assert [f[1] for f in found] == [e[1] for e in right] == [False, True, False, False, True]
    assert found[4] == (0.0, True) and sum(seen) == 13 and len(seen) > 1


def test_text_before_the_first_stop():
    assert before('one two three', ['three', 'two']) == 'one '
    assert before('one', ['two', '']) is None
    assert before('one', ['one']) == ''


def test_generation_ends_before_a_stop_string(tiny, one_device):
    tokenizer = train_tokenizer(['the bucket returns a table of roles\n' * 8], vocab_size=290)
    cfg = dataclasses.replace(tiny, layers=1, vocab_size=290)
    params = parameters.init_sharded(jax.random.key(1), cfg)
    rng = np.random.default_rng(1)
    prompts = [ids(rng, n, 290) for n in (3, 9, 5)]
    options = {'stop_ids': tokenizer.stop_ids, 'max_new_tokens': 24}
    whole = [tokenizer.decode(g.ids) for g in generate(params, cfg, prompts, **options)]
    stop = whole[1][len(whole[1]) // 2 :][:2]
    for stops in ([], [stop], [stop, whole[0][1:3]]):
        found = likelihood.completions(params, cfg, tokenizer, prompts, stops=stops, sampling=Sampling(), **options)
        assert found == [text if (cut := before(text, stops)) is None else cut for text in whole]
        assert bool(stops) == (found != whole)
