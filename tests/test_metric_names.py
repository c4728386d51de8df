"""The names that a run's figures have say what they are."""

import jax
import numpy as np
import pytest
from running import lines

from lm.model import parameters, transformer
from lm.stages import language

NAMES = ('loss', 'cross_entropy', 'z_loss', 'accuracy', 'grad_norm', 'lr', 'skipped')


@pytest.mark.slow
def test_the_objective_is_cross_entropy_and_z_loss(lab, tmp_path):
    lab.train(tmp_path / 'run', steps=2, z_loss=1e-2, eval__every=2)
    trained = [r for r in lines(tmp_path / 'run') if 'train/loss' in r]
    for r in trained:
        assert r['train/loss'] == pytest.approx(r['train/cross_entropy'] + r['train/z_loss'], rel=1e-6)
        assert r['train/z_loss'] > 0.1  # of lse², at random weights about log(vocabulary)²
    names = {k for r in trained for k in r if k.startswith('train/')}
    assert names == {f'train/{k}' for k in NAMES}


def test_cross_entropy_is_the_mean_of_minus_log_p(tiny, one_device):
    """Whatever the coefficient of the z-loss."""
    draw = np.random.default_rng(0)
    params = parameters.init(jax.random.key(0), tiny)
    tokens = draw.integers(1, 250, (2, 16)).astype(np.int32)
    batch = {'tokens_BT': tokens, 'targets_BT': np.roll(tokens, -1, 1), 'weights_BT': np.ones((2, 16), np.float32)}
    logits = transformer.logits(params, tiny, transformer.forward(params, tiny, tokens)[0])
    logp = jax.nn.log_softmax(logits)[np.arange(2)[:, None], np.arange(16), batch['targets_BT']]
    for z_loss in (0.0, 0.1):
        loss = language.next_token_loss(tiny, z_loss=z_loss)
        terms, metrics = loss.terms({'policy': params}, batch, jax.random.key(0))
        weights = loss.denominators(batch)
        assert metrics['cross_entropy'] / weights['cross_entropy'] == pytest.approx(-float(logp.mean()), rel=1e-5)
        assert terms['loss'] == pytest.approx(float(metrics['cross_entropy'] + metrics['z_loss']), rel=1e-6)
        assert (float(metrics['z_loss']) > 0) == (z_loss > 0)
