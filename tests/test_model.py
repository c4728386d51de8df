"""The decoder: what it can see, that its forms agree, and that it is the graph it says it is."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close

from lm import sharding
from lm.data.packing import PackedRows
from lm.data.store import TokenStore
from lm.errors import UsageError
from lm.model import parameters, transformer
from lm.model.config import REMAT, ModelConfig
from lm.model.layers import rms_norm

B, T = 8, 16
Z = 1e-2


@pytest.fixture
def batch(tiny):
    """Packed rows with ragged weights, some of them 0."""
    return make_batch(tiny)


def make_batch(cfg, seed=0):
    rng = np.random.default_rng(seed)
    begins_BT = rng.random((B, T)) < 0.2
    begins_BT[:, 0] = True
    starts_BT = np.maximum.accumulate(np.where(begins_BT, np.arange(T), 0), axis=1)
    return {
        'tokens_BT': rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32),
        'targets_BT': rng.integers(0, cfg.vocab_size, (B, T), dtype=np.int32),
        'weights_BT': (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32),
        'segments_BT': np.cumsum(begins_BT, axis=1, dtype=np.int32),
        'positions_BT': (np.arange(T) - starts_BT).astype(np.int32),
    }


def make_params(cfg, seed=1):
    """Parameters away from their symmetric start: norms that are not 1, residual branches that are not small."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        noise = 0.2 * rng.standard_normal(x.shape, np.float32)
        return jnp.asarray(1 + noise if 'norm' in path[-1].key else noise)

    return jax.tree.map_with_path(leaf, jax.eval_shape(partial(parameters.init, cfg=cfg), jax.random.key(0)))


def loss(params, batch, cfg):
    h_BTD, _ = transformer.forward(
        params, cfg, batch['tokens_BT'], segments_BT=batch['segments_BT'], positions_BT=batch['positions_BT']
    )
    return transformer.nll(params, cfg, h_BTD, batch['targets_BT'], batch['weights_BT'], z_coef=Z)


value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)


# ---- what a token can see ----


def gradient_TT(cfg, params, segments_T, positions_T):
    """max |d h_t·r / d embedding of token s| at [t, s], with every token of the row another id."""
    tokens_T = np.random.default_rng(0).permutation(cfg.vocab_size)[:T].astype(np.int32)
    r_TD = jax.random.normal(jax.random.key(0), (T, cfg.dim))

    def projected_T(embed_VD):
        options = {'segments_BT': segments_T[None], 'positions_BT': positions_T[None]}
        return jnp.sum(
            transformer.forward({**params, 'embed_VD': embed_VD}, cfg, tokens_T[None], **options)[0][0] * r_TD, axis=1
        )

    jacobian_TVD = jax.jit(jax.jacrev(projected_T))(params['embed_VD'])
    return np.max(np.abs(jacobian_TVD[:, tokens_T]), axis=-1)


def test_a_token_sees_itself_and_its_segment_before_it_alone(tiny, set_block):
    set_block(4)
    segments_T = np.array([1] * 7 + [2] * 5 + [3] * 4, np.int32)
    positions_T = np.concatenate([np.arange(7), np.arange(5), np.arange(4)]).astype(np.int32)
    t, s = np.arange(T)[:, None], np.arange(T)
    expected_TT = (s <= t) & (segments_T[:, None] == segments_T)
    cfg = dataclasses.replace(tiny, scan=True)
    np.testing.assert_array_equal(gradient_TT(cfg, make_params(cfg), segments_T, positions_T) != 0, expected_TT)


def test_a_window_bounds_what_one_layer_sees(tiny, set_block):
    set_block(4)
    cfg = dataclasses.replace(tiny, layers=1, window=3)
    behind = np.arange(T)[:, None] - np.arange(T)
    seen_TT = gradient_TT(cfg, make_params(cfg), np.ones(T, np.int32), np.arange(T, dtype=np.int32)) != 0
    np.testing.assert_array_equal(seen_TT, (behind >= 0) & (behind < 3))


def test_packed_equals_unpacked(tiny):
    """A row as the pack plan makes it, segments, positions, targets and weights, against its documents one by one."""
    cfg = dataclasses.replace(tiny, scan=True)
    params = make_params(cfg)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, cfg.vocab_size, n) for n in (9, 5, 9, 2)]
    offsets = np.cumsum([0, *map(len, documents)])
    store = TokenStore(np.concatenate(documents).astype(np.uint16), offsets.astype(np.int64), 0)
    row = PackedRows(store, seq_len=offsets[-1] + 3, seed=0, shuffle=False).row(0)
    packed = {f'{name}B{dims}': x[None] for name, dims, x in ((*k.rsplit('T', 1), v) for k, v in row.items())}
    packed = {name + 'T': x for name, x in packed.items()}

    @jax.jit
    def parts(tokens_BT, targets_BT, weights_BT, segments_BT=None, positions_BT=None):
        h_BTD, _ = transformer.forward(params, cfg, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
        return transformer.nll(params, cfg, h_BTD, targets_BT, weights_BT, z_coef=Z)[1]

    alone = [parts(d[None, :-1], d[None, 1:], np.ones((1, len(d) - 1), np.float32)) for d in documents]
    expected = {name: sum(float(p[name]) for p in alone) for name in alone[0]}
    assert float(packed['weights_BT'].sum()) == sum(len(d) - 1 for d in documents)
    assert jax.device_get(parts(**packed)) == pytest.approx(expected, rel=1e-6)


def test_what_else_is_in_a_row_changes_no_bit(tiny, batch):
    cfg = dataclasses.replace(tiny, scan=True)
    params = make_params(cfg)
    first_BT = batch['segments_BT'] == 1
    forward = jax.jit(lambda *args, **rows: transformer.forward(*args, **rows)[0], static_argnums=1)
    options = {name: batch[name] for name in ('segments_BT', 'positions_BT')}
    other_BT = np.where(first_BT, batch['tokens_BT'], (batch['tokens_BT'] + 17) % cfg.vocab_size)
    before_BTD, after_BTD = (np.asarray(forward(params, cfg, t, **options)) for t in (batch['tokens_BT'], other_BT))
    np.testing.assert_array_equal(before_BTD[first_BT], after_BTD[first_BT])
    assert np.all(np.any(before_BTD[~first_BT] != after_BTD[~first_BT], axis=-1))


# ---- the forms of one computation ----


@pytest.fixture(scope='module')
def reference():
    """(configuration, parameters, batch, loss, gradients) unrolled on one device without a mesh."""
    cfg = ModelConfig(vocab_size=250, vocab_multiple=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_dim=64)
    params, batch = make_params(cfg), make_batch(cfg)
    return cfg, params, batch, jax.device_get(value_and_grad(params, batch, cfg))


FORMS = [(True, 'none'), (True, 'full'), (True, 'names'), (False, 'dots'), (False, 'full')]


@pytest.mark.parametrize(('scan', 'remat'), FORMS)
def test_scanning_and_rematerialising_change_nothing(reference, scan, remat):
    cfg, params, batch, expected = reference
    assert_close(value_and_grad(params, batch, dataclasses.replace(cfg, scan=scan, remat=remat)), expected, 1e-6)


@pytest.mark.parametrize('scan', [False, True])
def test_remat_policies_save_what_they_say(tiny, batch, scan):
    """Bytes kept from the forward for the backward pass: fewer with each policy."""
    params = make_params(tiny)
    kept = {}
    for remat in REMAT:
        cfg = dataclasses.replace(tiny, scan=scan, remat=remat)
        forward = lambda p, cfg=cfg: transformer.forward(p, cfg, batch['tokens_BT'])[0]
        residuals = jax.eval_shape(lambda p, forward=forward: jax.vjp(forward, p)[1], params)
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))
    assert kept['full'] < kept['names'] < kept['dots'] < kept['none'], kept


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'unrolled'])
def test_loss_and_gradients_are_the_same_on_every_mesh(reference, mesh, scan, request):
    cfg, params, batch, expected = reference
    if not scan and 'fsdp2-seq2-tensor2' not in request.node.name:
        pytest.skip('unrolled is tried on the most mixed mesh')
    placed = jax.device_put(params, sharding.shardings(mesh, sharding.param_specs(params)))
    got = value_and_grad(placed, sharding.shard_batch(batch), dataclasses.replace(cfg, scan=scan))
    assert_close(got, expected)
    own = jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), got[1], placed)
    assert all(jax.tree.leaves(own)), 'a gradient does not lie where its parameter does'


@pytest.mark.parametrize('mesh', ['fsdp2-seq2-tensor2'], indirect=True)
def test_kv_heads_that_do_not_divide_the_mesh(reference, mesh):
    cfg, _, batch, _ = reference
    cfg = dataclasses.replace(cfg, kv_heads=1, layers=1, tied=False, window=5, attn_softcap=2.0)
    params = make_params(cfg)
    expected = jax.device_get(plain_value_and_grad(params, batch, cfg))
    placed = jax.device_put(params, sharding.shardings(mesh, sharding.param_specs(params)))
    assert_close(value_and_grad(placed, sharding.shard_batch(batch), cfg), expected)


# ---- the graph ----


def plain_loss(params, batch, cfg):
    """The same decoder in the plainest jax.numpy: no seam, no blocks, heads repeated, all logits at once."""
    tokens, segments, positions = batch['tokens_BT'], batch['segments_BT'], batch['positions_BT']
    norm = lambda x, scale: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.norm_eps) * scale
    half = cfg.head_dim // 2
    angle = positions[..., None, None] * cfg.rope_theta ** (-jnp.arange(half) / half)
    turn = lambda x: jnp.concatenate(
        [
            x[..., :half] * jnp.cos(angle) - x[..., half:] * jnp.sin(angle),
            x[..., half:] * jnp.cos(angle) + x[..., :half] * jnp.sin(angle),
        ],
        axis=-1,
    )
    cap = lambda x, limit: x if limit is None else limit * jnp.tanh(x / limit)
    behind = np.arange(T)[:, None] - np.arange(T)
    mask = (behind >= 0) & (behind < (cfg.window or T)) & (segments[:, :, None] == segments[:, None])
    x = params['embed_VD'][tokens]
    for i in range(cfg.layers):
        w = {name: value[i] for name, value in params['layers'].items()}
        y = norm(x, w['attn_norm_D'])
        q, k, v = (jnp.einsum('btd,dnh->btnh', y, w[name]) for name in ('wq_DNH', 'wk_DKH', 'wv_DKH'))
        if cfg.qk_norm:
            q, k = norm(q, w['q_norm_H']), norm(k, w['k_norm_H'])
        q, k, v = turn(q), *(jnp.repeat(a, cfg.heads // cfg.kv_heads, axis=2) for a in (turn(k), v))
        scores = cap(jnp.einsum('btnh,bsnh->bnts', q, k) / cfg.head_dim**0.5, cfg.attn_softcap)
        probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum('bnts,bsnh,nhd->btd', probs, v, w['wo_NHD'])
        y = norm(x, w['mlp_norm_D'])
        x = x + (jax.nn.silu(y @ w['w_gate_DF']) * (y @ w['w_up_DF'])) @ w['w_down_FD']
    h = norm(x, params['final_norm_D'])
    table = params['embed_VD'].T if cfg.tied else params['head_DV']
    logits = cap(h @ table[:, : cfg.vocab_size], cfg.logit_softcap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    at_target = jnp.take_along_axis(logits, batch['targets_BT'][..., None], axis=-1)[..., 0]
    weights = batch['weights_BT']
    correct = jnp.argmax(logits, axis=-1) == batch['targets_BT']
    parts = {'nll': lse - at_target, 'z': lse**2, 'correct': correct}
    parts = {name: jnp.sum(weights * value) for name, value in parts.items()}
    return parts['nll'] + Z * parts['z'], parts


plain_value_and_grad = jax.jit(jax.value_and_grad(plain_loss, has_aux=True), static_argnums=2)

GRAPHS = {
    'default': {'layers': 2},
    'untied-window-caps': {'tied': False, 'window': 5, 'attn_softcap': 2.0, 'logit_softcap': 1.5},
    'no-qk-norm-mqa-theta': {'qk_norm': False, 'kv_heads': 1, 'rope_theta': 100.0, 'norm_eps': 1e-2},
    'mha': {'kv_heads': 4, 'window': 1},
}


@pytest.mark.parametrize('change', GRAPHS.values(), ids=list(GRAPHS))
def test_the_graph_is_the_plain_decoders(tiny, batch, change):
    cfg = dataclasses.replace(tiny, **{'layers': 1, 'scan': True, **change})
    params = make_params(cfg)
    assert_close(value_and_grad(params, batch, cfg), plain_value_and_grad(params, batch, cfg))


@pytest.mark.parametrize('tied', [True, False])
def test_vocabulary_padding_has_no_probability_and_no_gradient(tiny, batch, tied):
    cfg = dataclasses.replace(tiny, tied=tied, layers=1, scan=True)
    params = make_params(cfg)
    name, axis = ('embed_VD', 0) if tied else ('head_DV', 1)
    padding = np.arange(params[name].shape[axis]) >= cfg.vocab_size
    assert padding.any()
    (value, parts), grads = value_and_grad(params, batch, cfg)
    assert np.all(np.compress(padding, grads[name], axis) == 0) and np.any(np.compress(~padding, grads[name], axis))
    huge = np.where(padding[:, None] if tied else padding, 100.0, params[name]).astype(np.float32)
    (other, other_parts), _ = value_and_grad({**params, name: huge}, batch, cfg)
    assert other == value and jax.device_get(other_parts) == jax.device_get(parts)
    assert transformer.logits(params, cfg, jnp.ones((1, 2, cfg.dim))).shape == (1, 2, cfg.vocab_size)


def test_init_has_the_shapes_and_scales_it_says():
    cfg = ModelConfig(vocab_size=1000, dim=64, layers=8, heads=4, kv_heads=2, head_dim=32, ffn_dim=128, tied=False)
    params = jax.jit(parameters.init, static_argnums=1)(jax.random.key(0), cfg)
    residual = (2 * cfg.layers) ** -0.5
    std = {
        'embed_VD': 64**-0.5, 'head_DV': 64**-0.5, 'wq_DNH': 64**-0.5, 'wk_DKH': 64**-0.5, 'wv_DKH': 64**-0.5,
        'wo_NHD': 128**-0.5 * residual, 'w_gate_DF': 64**-0.5, 'w_up_DF': 64**-0.5, 'w_down_FD': 128**-0.5 * residual,
    }  # fmt: skip
    for path, x in jax.tree.leaves_with_path(params):
        name = path[-1].key
        lead = (cfg.layers,) if path[0].key == 'layers' else ()
        assert x.shape == lead + tuple(cfg.sizes[d] for d in sharding.dims_of(name)) and x.dtype == jnp.float32
        if 'norm' in name:
            assert np.all(x == 1)
        else:
            np.testing.assert_allclose(np.std(x), std[name], rtol=0.03, err_msg=name)
            assert abs(np.mean(x)) < 0.02 * np.std(x)
    assert cfg.sizes['V'] == 1024


def test_activations_have_the_dtype_and_norms_and_losses_are_float32(reference):
    cfg, params, batch, ((exact, _), _) = reference
    cfg = dataclasses.replace(cfg, dtype='bfloat16', scan=True)
    h_BTD, _ = jax.eval_shape(partial(transformer.forward, cfg=cfg), params, tokens_BT=batch['tokens_BT'])
    assert h_BTD.dtype == jnp.bfloat16
    (value, parts), grads = value_and_grad(params, batch, cfg)
    assert {x.dtype for x in jax.tree.leaves((value, parts, grads))} == {np.dtype('float32')}
    assert value == pytest.approx(float(exact), rel=1e-2)
    large = jnp.full((1, 4), 3e38, jnp.bfloat16)
    assert np.all(np.isfinite(rms_norm(large / 1e20, jnp.ones(4), eps=1e-6)))


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ({'kv_heads': 3}, 'kv_heads=3'),
        ({'head_dim': 7}, 'head_dim=7'),
        ({'pattern': 'lokal'}, "'lokal' is not one of"),
        ({'pattern': 'local'}, 'set model.window'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny, change, says):
    with pytest.raises(UsageError, match=says):
        dataclasses.replace(tiny, **change)
