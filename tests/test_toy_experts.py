"""A new feed-forward is one file: here experts that all tokens pass, weighted by a router, with a load-balancing loss.

Nothing but this file knows of them, and they are trained, split over a mesh, decoded from a cache and counted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lm import sharding
from lm.model import feed_forward, kv_cache, parameters, seam, transformer
from lm.model.config import ModelConfig
from lm.model.feed_forward import FeedForward
from lm.model.param import matrix
from lm.stages import dpo, reward
from lm.stages.language import next_token_loss
from lm.training import flops
from lm.training import optimizer as optim
from lm.training import step as training

COEF = 0.5
ADAMW = {'b1': 0.9, 'b2': 0.95, 'eps': 1e-2, 'weight_decay': 0.1}
OPTIMIZERS = {
    'adamw': optim.adamw(lambda step: 0.02, **ADAMW),
    'muon': optim.muon_adamw(lambda step: 0.02, momentum=0.9, dtype=jnp.float32, **ADAMW),
    'adafactor': optim.adafactored(lambda step: 0.02, weight_decay=0.1),
}


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    """A decoder of experts."""

    experts: int = 4

    @property
    def sizes(self):
        return super().sizes | {'E': self.experts}


def toy(y_BTD, layer, cfg, real_BT):
    """Every expert's output, weighted by the router; and, of each row, how uneven its experts' shares are (1: even)."""
    p_BTE = jax.nn.softmax(seam.einsum('BTD,DE->BTE', y_BTD, layer['router_DE'], dtype=jnp.float32))
    h_BTEF = jax.nn.silu(seam.einsum('BTD,EDF->BTEF', y_BTD, layer['w_in_EDF']))
    weight_BTE = jax.reshard(p_BTE.astype(h_BTEF.dtype), P(*jax.typeof(h_BTEF).sharding.spec[:3]))
    h_BTEF = h_BTEF * weight_BTE[..., None]
    real_BT = jnp.ones(p_BTE.shape[:2]) if real_BT is None else real_BT.astype(jnp.float32)
    real_BT = jax.reshard(real_BT, P(*jax.typeof(p_BTE).sharding.spec[:2]))
    tokens_B = jnp.maximum(jnp.sum(real_BT, 1), 1)
    share_BE = jnp.sum(p_BTE * real_BT[..., None], 1) / tokens_B[:, None]
    uneven_B = cfg.experts * jnp.sum(jnp.square(share_BE), -1)
    balance = jnp.sum(jnp.sum(real_BT, 1) * uneven_B) / cfg.layers
    return seam.einsum('BTEF,EFD->BTD', h_BTEF, layer['w_out_EFD']), {'balance': balance}


ROWS = (matrix('router_DE', 'D'), matrix('w_in_EDF', 'D'), matrix('w_out_EFD', 'F', 'residual'))


@pytest.fixture
def cfg(tiny, monkeypatch):
    monkeypatch.setitem(feed_forward.FEED_FORWARDS, 'toy', FeedForward(ROWS, toy, lambda cfg: {'balance': COEF}))
    return ToyConfig(**dataclasses.asdict(tiny) | {'feed_forward': 'toy', 'layers': 2})


def batch_of(cfg, rows=8, T=16):
    draw = np.random.default_rng(0)
    segments_BT = np.where(np.arange(T) < draw.integers(4, T + 1, (rows, 1)), 1, 0).astype(np.int32)
    tokens_BT, targets_BT = draw.integers(0, cfg.vocab_size, (2, rows, T), dtype=np.int32)
    return {
        'tokens_BT': tokens_BT, 'targets_BT': targets_BT, 'weights_BT': segments_BT.astype(np.float32),
        'segments_BT': segments_BT, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
    }  # fmt: skip


def trained(cfg, shape, *, microbatches=1, steps=1, name='adamw'):
    """(the state, each step's metrics) on a mesh of this shape."""
    with sharding.use_mesh(shape, jax.devices()[: math.prod(shape.values())]):
        step = training.make_step(
            next_token_loss(cfg, z_loss=0.0), OPTIMIZERS[name], clip=None, microbatches=microbatches
        )
        params = parameters.init_sharded(jax.random.key(0), cfg)
        params['layers']['router_DE'] = params['layers']['router_DE'] * 8  # far from even
        state = jax.jit(lambda p: training.create({'policy': p}, {}, OPTIMIZERS[name], 0))(params)
        step, batch, found = jax.jit(step), sharding.shard_batch(batch_of(cfg)), []
        for _ in range(steps):
            state, metrics = step(state, batch)
            found.append(jax.device_get(metrics))
        return state, found


def test_the_auxiliary_loss_is_a_term_of_training_and_falls(cfg):
    _, found = trained(cfg, {}, steps=12)
    first, last = found[0], found[-1]
    assert first['loss'] == pytest.approx(first['cross_entropy'] + COEF * first['balance'], rel=1e-6)
    assert first['balance'] > 1.2 and last['balance'] - 1 < 0.8 * (first['balance'] - 1)


def test_a_mesh_microbatches_and_a_scan_give_the_same_update(cfg):
    """The sums are over rows: accumulated as one batch, split as whole, scanned as unrolled."""
    expected, before = trained(cfg, {})
    other = dataclasses.replace(cfg, scan=True, remat='full')
    state, after = trained(other, {'data': 2, 'tensor': 2, 'expert': 2}, microbatches=2)
    assert_close(state.trainable, expected.trainable, 1e-4)
    assert_close(after, before, 1e-5)
    assert state.trainable['policy']['layers']['w_in_EDF'].sharding.spec[1] == 'expert'


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_trains_experts(cfg, name):
    state, found = trained(cfg, {}, steps=3, name=name)
    before = parameters.init(jax.random.key(0), cfg)['layers']['w_in_EDF']
    assert found[-1]['loss'] < found[0]['loss'] and np.any(before != state.trainable['policy']['layers']['w_in_EDF'])


def test_padding_has_no_share(cfg, one_device):
    params, batch = parameters.init(jax.random.key(0), cfg), batch_of(cfg)
    rows = {name: batch[name] for name in ('segments_BT', 'positions_BT')}
    forward = jax.jit(lambda tokens_BT: transformer.forward(params, cfg, tokens_BT, **rows)[1]['balance'])
    other_BT = np.where(batch['segments_BT'] == 0, (batch['tokens_BT'] + 17) % cfg.vocab_size, batch['tokens_BT'])
    assert forward(batch['tokens_BT']) == forward(other_BT)
    assert feed_forward.aux_weights(cfg, batch)['balance'] == np.sum(batch['segments_BT'])


def test_decoding_from_a_cache_is_the_full_forward(cfg, one_device):
    params, tokens_BT = parameters.init(jax.random.key(0), cfg), batch_of(cfg, rows=2)['tokens_BT']
    expected_BTD, _ = transformer.forward(params, cfg, tokens_BT)
    ready = parameters.unstacked(params, cfg, batch=2)
    h_BTD, cache = kv_cache.forward_cached(ready, cfg, tokens_BT[:, :10], kv_cache.empty_cache(cfg, 2, 16))
    more_BTD, _ = kv_cache.forward_cached(ready, cfg, tokens_BT[:, 10:], cache)
    np.testing.assert_allclose(jnp.concatenate([h_BTD, more_BTD], 1), expected_BTD, atol=1e-5)


def test_their_flops_are_counted(cfg, tiny):
    D, F, E = cfg.dim, cfg.ffn_dim, cfg.experts
    gated = dataclasses.replace(tiny, layers=cfg.layers)
    more = flops.per_token(cfg, seq_len=16) - flops.per_token(gated, seq_len=16)
    assert more == 6 * cfg.layers * (D * E + 2 * E * D * F - 3 * D * F)


@pytest.mark.parametrize(('of', 'role'), [(dpo.Dpo, 'policy'), (reward.Reward, 'reward')])
def test_the_losses_of_pairs_have_the_auxiliary_term_too(cfg, one_device, of, role):
    settings = ConfigDict({
        'data': {'replay': 0.0}, 'loss': 'orpo', 'reference': 'cached', 'nll': None, 'beta': 0.1, 'margin': None,
        'label_smoothing': None, 'lambda_d': None, 'lambda_u': None, 'margins': 0.0, 'centring': 0.0,
    })  # fmt: skip
    batch = batch_of(cfg)
    own = np.where(batch['segments_BT'] > 0, np.arange(16) >= 2, -1)
    batch |= {'sequence_BT': own, 'last_BT': np.roll(batch['segments_BT'], -1, 1) == 0}
    batch |= {f'length_{side}_BP': np.full((8, 1), 2) for side in ('chosen', 'rejected')}
    batch |= {'weight_BP': np.ones((8, 1)), 'label_BP': np.ones((8, 1)), 'margin_BP': np.zeros((8, 1))}
    loss, params = of(settings, cfg).loss(), parameters.init(jax.random.key(0), cfg)
    params |= parameters.init_scores(jax.random.key(1), cfg) if role == 'reward' else {}
    terms, _ = jax.jit(loss.terms)({role: params}, batch, jax.random.key(0))
    assert terms['balance'] > 0 and loss.coefs['balance'] == COEF
    assert loss.denominators(batch)['balance'] == np.sum(batch['segments_BT'])
