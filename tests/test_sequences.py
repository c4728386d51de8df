"""From packed rows to sequences: each one's log-prob and score are those that it has alone, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES
from stores import pair_store

from lm import sharding
from lm.data import pairs, pipeline
from lm.model import parameters, sequences, transformer
from lm.model.config import ModelConfig

SEQ_LEN = 16
CFG = ModelConfig(
    vocab_size=250, vocab_multiple=64, dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, ffn_dim=64, logit_softcap=20.0
)


def drawn(count=9, sides=2):
    """Pairs of random ids; some sides are longer than SEQ_LEN."""
    draw = np.random.default_rng(0)
    return [
        [
            (draw.integers(1, 250, n).tolist(), [False] * 3 + [True] * (n - 3))
            for n in draw.integers(4, 22 if i % 2 else 8, sides).tolist()
        ]
        for i in range(count)
    ]


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    """(the pairs, a packed batch of them with empty slots and an empty row, the numbers of the pairs by slot)."""
    said = drawn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path_factory.mktemp('cache')))
        found = pairs.in_order(pair_store(tmp_path_factory.mktemp('p') / 'p', said), seq_len=SEQ_LEN)
        assert found.slots > 1 and len(found) < 8
        rows = [found.row(i) for i in range(len(found))]
        batch = pipeline.stack(rows + [found.empty] * (8 - len(found)))
    return said, batch, [found.numbers(i).tolist() for i in range(len(found))]


@pytest.fixture(scope='module')
def params():
    key = jax.random.key(0)
    own = parameters.init_scores(jax.random.key(1), CFG)
    return parameters.init(key, CFG) | own | {'bias_score': jnp.float32(0.3)}


def placed(params):
    return jax.device_put(params, sharding.shardings(jax.sharding.get_mesh(), sharding.param_specs(params)))


def by_pair(values, numbers):
    """[pairs, sides] from [B, P] a side; what is in an empty slot is 0."""
    values = [np.asarray(jax.device_get(v)) for v in values]
    out = np.full((9, len(values)), np.nan, np.float32)
    empty = np.ones(values[0].shape, bool)
    for row, slots in enumerate(numbers):
        for slot, n in enumerate(slots):
            out[n] = [v[row, slot] for v in values]
            empty[row, slot] = False
    assert all((v[empty] == 0).all() for v in values)
    return out


FACTORS = np.random.default_rng(2).normal(size=(2, 9, 2)).astype(np.float32)


def measured(params, batch, numbers):
    """(Σ factor·value over all sequences, (log-probs, scores)): each sequence counts differently."""
    place = np.zeros((2, 2, *batch['weight_BP'].shape), np.float32)
    for row, slots in enumerate(numbers):
        for slot, n in enumerate(slots):
            place[:, :, row, slot] = FACTORS[:, n]
    found = sequences.log_probs(params, CFG, batch), sequences.scores(params, CFG, batch)
    total = sum(
        jnp.sum(v * f) for values, fs in zip(found, place, strict=True) for v, f in zip(values, fs, strict=True)
    )
    return total, found


@pytest.fixture(scope='module')
def alone(packed, params):
    """Of each sequence in a row of its own, without a mesh and by the plain logits: ((log-probs, scores) as [pairs,
    sides], the gradient of `measured`'s sum)."""
    sides = [(np.array(ids[:SEQ_LEN]), np.array(t[:SEQ_LEN])) for pair in packed[0] for ids, t in pair]
    pad = lambda x: np.pad(x, (0, SEQ_LEN - len(x)))
    tokens_BT, trained_BT = (np.stack([pad(side[k]) for side in sides]) for k in range(2))
    last_B1 = np.array([len(ids) - 1 for ids, _ in sides])[:, None]

    def total(params):
        h_BTD, _ = transformer.forward(params, CFG, tokens_BT)
        logp_BTV = jax.nn.log_softmax(transformer.logits(params, CFG, h_BTD)[..., : CFG.vocab_size])
        logp_BT = jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], axis=2)[..., 0]
        logp_B = jnp.sum(jnp.where(trained_BT[:, 1:], logp_BT, 0), axis=1)
        score_BT = h_BTD @ params['score_D'] + params['bias_score']
        found = jnp.stack([logp_B, jnp.take_along_axis(score_BT, last_B1, axis=1)[:, 0]]).reshape(FACTORS.shape)
        return jnp.sum(FACTORS * found), found

    (_, found), slope = jax.device_get(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
    return found, slope


QUICK = ('fsdp2-seq2-tensor2',)


@pytest.mark.parametrize(
    'mesh', [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MESHES], indirect=True
)
def test_each_sequence_is_as_if_it_were_alone(mesh, packed, params, alone):
    """Its log-prob, its score, and what moves them."""
    _, batch, numbers = packed
    measure = jax.jit(jax.value_and_grad(lambda p, b: measured(p, b, numbers), has_aux=True))
    (_, found), slope = measure(placed(params), sharding.shard_batch(batch))
    for values, expected in zip(found, alone[0], strict=True):
        np.testing.assert_allclose(by_pair(values, numbers), expected, rtol=2e-5, atol=2e-5)
        assert all(v.dtype == np.float32 for v in values)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(alone[1]))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * largest, rtol=0)
    jax.tree.map(close, jax.device_get(slope), alone[1])


def test_a_score_is_read_at_the_last_token_alone(one_device, packed, params):
    """What stands in the padding, or in another sequence, does not move it; the last token does."""
    _, batch, _ = packed
    score = jax.jit(lambda b: sequences.scores(params, CFG, b))
    before = score(batch)
    tokens_BT = batch['tokens_BT'].copy()
    tokens_BT[batch['sequence_BT'] < 0] = 17
    jax.tree.map(np.testing.assert_array_equal, score({**batch, 'tokens_BT': tokens_BT}), before)
    last = np.argwhere((batch['sequence_BT'] == 0) & (batch['last_BT'] > 0))
    for row, place in last[:2]:
        tokens_BT = batch['tokens_BT'].copy()
        tokens_BT[row, place] = 250 - tokens_BT[row, place]
        after = score({**batch, 'tokens_BT': tokens_BT})
        changed = [np.argwhere(np.asarray(a) != np.asarray(b)).tolist() for a, b in zip(after, before, strict=True)]
        assert changed == [[[row, 0]], []]


def test_scores_begin_at_random_and_without_a_bias():
    wide = dataclasses.replace(CFG, dim=4096)
    found = parameters.init_scores(jax.random.key(0), wide)
    assert found['score_D'].shape == (4096,) and found['score_D'].dtype == jnp.float32
    assert float(found['score_D'].std()) == pytest.approx(4097**-0.5, rel=0.04)
    assert abs(float(found['score_D'].mean())) < 4 * 4097**-0.5 / 64
    assert found['bias_score'] == 0 and found['bias_score'].shape == ()
    narrow = np.concatenate(
        [parameters.init_scores(jax.random.key(i), dataclasses.replace(CFG, dim=3))['score_D'] for i in range(800)]
    )
    assert narrow.std() == pytest.approx(0.5, rel=0.06), 'D + 1, not D'
