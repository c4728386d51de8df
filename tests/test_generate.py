"""Generation: the cache is the forward pass, rows do not know each other, the filters keep what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.model import kv_cache, parameters, transformer
from lm.model.config import ModelConfig
from lm.sampling import choice
from lm.sampling import generate as module
from lm.sampling.choice import GREEDY, Sampling, sample
from lm.sampling.generate import generate, stream

CFG = ModelConfig(
    vocab_size=60, vocab_multiple=64, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_dim=32, scan=True
)
STOP = 0


@functools.cache
def weights(cfg):
    """Weights large enough that a token depends on all before it."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        noise = 0.5 * rng.standard_normal(x.shape, np.float32)
        return np.ones_like(noise) if 'norm' in path[-1].key else noise

    return jax.tree.map_with_path(leaf, jax.eval_shape(lambda: parameters.init(jax.random.key(0), cfg)))


def params_of(cfg):
    return jax.device_put(weights(cfg))


def place(params, mesh):
    return jax.device_put(params, sharding.shardings(mesh, sharding.param_specs(params)))


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CFG.vocab_size, n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnums=1)
def full_logits(params, cfg, tokens_BT):
    return transformer.logits(params, cfg, transformer.forward(params, cfg, tokens_BT)[0])


@functools.cache
def greedy_by_forward(cfg, prompt, n):
    """Greedy continuation without a cache: the whole text is read again for each token."""
    tokens = np.zeros((1, len(prompt) + n), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + n):
        tokens[0, i] = np.argmax(full_logits(params_of(cfg), cfg, tokens)[0, i - 1])
    return tokens[0, len(prompt) :].tolist()


# ---- the cache ----


@functools.partial(jax.jit, static_argnums=(1, 3))
def cached_logits(params, cfg, tokens_BT, parts):
    """Logits read in parts through a cache longer than the text, rows at different places of it."""
    cache = kv_cache.empty_cache(cfg, tokens_BT.shape[0], tokens_BT.shape[1] + 5)
    out, start = [], 0
    for size in parts:
        h_BTD, cache = kv_cache.forward_cached(params, cfg, tokens_BT[:, start : start + size], cache)
        out.append(transformer.logits(params, cfg, h_BTD))
        start += size
    return jnp.concatenate(out, axis=1)


VARIANTS = {
    'scan': {},
    'unrolled-window-untied': {'scan': False, 'window': 3, 'tied': False, 'attn_softcap': 3.0, 'kv_heads': 1},
}


@pytest.mark.parametrize(
    ('mesh', 'change'),
    [
        pytest.param(mesh, change, id=f'{mesh}-{name}', marks=() if n == m else pytest.mark.slow)
        for n, (name, change) in enumerate(VARIANTS.items())
        for m, mesh in enumerate(('one', 'fsdp2-seq2-tensor2'))
    ],
    indirect=['mesh'],
)
def test_cached_logits_are_those_of_the_whole_forward(mesh, change):
    cfg = dataclasses.replace(CFG, **change)
    params = weights(cfg)
    tokens_BT = np.array(prompts_of(*[10] * 8), np.int32)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = np.asarray(full_logits(jax.device_put(params), cfg, tokens_BT))
    got = cached_logits(place(params, mesh), cfg, tokens_BT, (6, 1, 1, 2))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_each_row_of_a_cache_is_filled_on_its_own():
    cfg, params = CFG, params_of(CFG)
    tokens_BT = np.array(prompts_of(6, 6), np.int32)
    read = jax.jit(kv_cache.forward_cached, static_argnums=1)
    count_B = jnp.array([5, 2])  # the third and later tokens of row 1 are padding
    _, cache = read(params, cfg, tokens_BT, kv_cache.empty_cache(cfg, 2, 8), count_B=count_B)
    next_B = jnp.array([7, 9])
    h_BTD, cache = read(params, cfg, next_B[:, None], cache)
    got = transformer.logits(params, cfg, h_BTD)[:, 0]
    for row, length in enumerate((5, 2)):
        text = np.append(tokens_BT[row, :length], next_B[row])[None]
        np.testing.assert_allclose(got[row], full_logits(params, cfg, text)[0, -1], atol=1e-4)


# ---- generating ----


@pytest.fixture
def small_pieces(monkeypatch):
    """Prompts are read eight tokens at a time and rounded up to eight, so short ones show the seams. (The compiled
    functions read both at trace time; no other test uses these shapes.)"""
    monkeypatch.setattr(module, 'PREFILL_CHUNK', 8)
    monkeypatch.setattr(module, 'ROUND', 8)


@pytest.mark.parametrize(
    'mesh', ['one', pytest.param('data2-fsdp2-tensor2', marks=pytest.mark.slow), 'seq4-tensor2'], indirect=True
)
def test_ragged_greedy_rows_are_each_row_by_whole_forwards(mesh, small_pieces):
    """Prompts that end within, at and after a piece; two of them exactly at its edge."""
    prompts = prompts_of(1, 3, 7, 8, 9, 16, 17, 20)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = [greedy_by_forward(CFG, tuple(p), 6) for p in prompts]
    out = generate(place(weights(CFG), mesh), CFG, prompts, max_new_tokens=6, stop_ids=[CFG.vocab_size + 1])
    assert [g.ids for g in out] == expected and not any(g.ended for g in out)


@pytest.mark.slow
def test_turns_of_several_tokens_draw_the_same(small_pieces, one_device, monkeypatch):
    """Their ends are no multiples of the cache's sizes, nor of what was asked for."""
    monkeypatch.setattr(module, 'TURNS', {'cpu': 8})
    prompts, never = prompts_of(2, 3, seed=1), [CFG.vocab_size + 1]
    expected = [greedy_by_forward(CFG, tuple(p), 22) for p in prompts]
    parts = list(stream(params_of(CFG), CFG, prompts, max_new_tokens=22, every=5, stop_ids=never))
    assert [g.ids for g in parts[-1]] == expected
    assert [len(part[0].ids) for part in parts] == [9, 17, 22]


@pytest.mark.parametrize('mesh', ['one', pytest.param('fsdp2-seq2-tensor2', marks=pytest.mark.slow)], indirect=True)
def test_a_cache_that_grows_is_the_whole_forward(mesh, small_pieces):
    """Room for 8 tokens after the prompts, then for 24: parts of the stream end past the first, and with it."""
    prompts = prompts_of(2, 5, seed=1)
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = [greedy_by_forward(CFG, tuple(p), 18) for p in prompts]
    params, options = place(weights(CFG), mesh), {'max_new_tokens': 18, 'stop_ids': [CFG.vocab_size + 1]}
    for every, lengths in ((7, [7, 14, 18]), (9, [9, 18])):
        parts = list(stream(params, CFG, prompts, every=every, **options))
        assert [g.ids for g in parts[-1]] == expected and [len(p[0].ids) for p in parts] == lengths


@pytest.mark.parametrize(
    'mesh', [pytest.param('data8', marks=pytest.mark.slow), 'data2-tensor2-expert2'], indirect=True
)
def test_what_is_drawn_does_not_depend_on_the_mesh(mesh):
    prompts = prompts_of(3, 5, 2, 9, 4, 4, 1, 6)
    options = {'max_new_tokens': 8, 'stop_ids': [STOP], 'sampling': Sampling(1.0, 20, 0.9, 0.01), 'seed': 3}
    with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
        expected = generate(params_of(CFG), CFG, prompts, **options)
    assert generate(place(weights(CFG), mesh), CFG, prompts, **options) == expected


def test_rows_do_not_know_each_other():
    """The same prompt at the same index, other prompts and knobs beside it."""
    a, b, c, d = prompts_of(5, 9, 3, 60)
    knobs = [1.0, 0.7, 0.0, 1.0]
    one = draw([a, b, c, d], temperature=knobs)
    two = draw([d, b, a, c], temperature=[0.0, 0.7, 1.0, 1.0], top_p=[0.5, 1.0, 1.0, 1.0])
    assert one[1] == two[1]
    assert one[0] != two[2], 'another index draws otherwise'
    assert draw([a], temperature=[1.0]) == one[:1]


def draw(prompts, n=12, seed=0, stop_ids=(CFG.vocab_size + 1,), **knobs):
    return generate(
        params_of(CFG), CFG, prompts, max_new_tokens=n, stop_ids=list(stop_ids), sampling=Sampling(**knobs), seed=seed
    )


def test_a_seed_is_a_text():
    prompts = prompts_of(5, 9, 3, 60)
    first = draw(prompts, temperature=1.0)
    assert draw(prompts, temperature=1.0) == first
    other = draw(prompts, temperature=1.0, seed=1)
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))
    same_twice = draw([prompts[0]] * 4, temperature=1.0)
    assert len({tuple(g.ids) for g in same_twice}) == 4, 'equal prompts draw their own texts'


@pytest.mark.parametrize('penalty', [1.7, 0.6])
def test_what_was_there_already_is_less_likely(penalty):
    """transformers' repetition_penalty, step by step: positive logits of seen tokens divided, negative multiplied."""
    (prompt,), params = prompts_of(7, seed=3), params_of(CFG)
    text = list(prompt)
    while len(text) < 19:
        x_V = np.array(full_logits(params, CFG, np.array([text + [0] * (19 - len(text))]))[0, len(text) - 1])
        seen = sorted(set(text))
        x_V[seen] = np.where(x_V[seen] > 0, x_V[seen] / penalty, x_V[seen] * penalty)
        text.append(int(np.argmax(x_V)))
    sampling = Sampling(repetition_penalty=penalty)
    (got,) = generate(params, CFG, [prompt], max_new_tokens=12, stop_ids=[99], sampling=sampling)
    assert got.ids == text[7:] != greedy_by_forward(CFG, tuple(prompt), 12)


@pytest.mark.parametrize('sampling', [GREEDY, Sampling(1.3, repetition_penalty=1.2), Sampling(1.3, 9, 0.8)])
def test_a_seed_is_the_same_text_from_programs_compiled_ahead(sampling, one_device):
    """Those have a cache of another size, room for more stop ids, and take any sampling."""
    (prompt,) = prompts_of(70)
    options = {'max_new_tokens': 20, 'stop_ids': [STOP], 'sampling': sampling, 'seed': 5}
    (expected,) = generate(params_of(CFG), CFG, [prompt], **options)
    slots = module.fixed_slots(len(prompt), 20, context=256)
    params = module.lay_out(params_of(CFG), CFG)
    *_, (got,) = stream(
        params, CFG, [prompt], programs=(slots, module.Programs(*module.compiled(params, CFG, slots=slots))), **options
    )
    assert got == expected and len(got.ids) > 1


def test_greedy_is_the_limit_of_every_knob():
    prompts = prompts_of(5, 9, 3, 60)
    greedy = draw(prompts)
    assert draw(prompts, temperature=1.0, top_k=1) == greedy
    assert draw(prompts, temperature=1.0, top_p=1e-6) == greedy
    assert draw(prompts, temperature=1.0, min_p=1.0) == greedy
    assert draw(prompts, temperature=1e-4) == greedy
    assert draw(prompts, temperature=0.0, top_k=7, seed=5) == greedy


def test_a_stop_token_ends_its_row_alone():
    prompts = prompts_of(5, 9, 3, 60)
    whole = draw(prompts)
    stops = [whole[1].ids[4], whole[3].ids[7]]
    cut = draw(prompts, stop_ids=stops)
    for row, full in zip(cut, whole, strict=True):
        end = next((i for i, token in enumerate(full.ids) if token in stops), None)
        assert row.ids == full.ids[:end] and row.ended == (end is not None)
    assert cut[1].ended and cut[3].ended


def test_a_stream_is_the_generation_so_far():
    prompts = prompts_of(5, 9, 3, 60)
    options = {'max_new_tokens': 12, 'stop_ids': [CFG.vocab_size + 1], 'sampling': Sampling(1.0), 'seed': 2}
    whole = generate(params_of(CFG), CFG, prompts, **options)
    parts = list(stream(params_of(CFG), CFG, prompts, every=5, **options))
    assert [len(p[0].ids) for p in parts] == [5, 10, 12] and parts[-1] == whole
    for part in parts:
        assert all(g.ids == w.ids[: len(g.ids)] for g, w in zip(part, whole, strict=True))


@pytest.mark.parametrize('n', [1, 64, 65])
def test_as_many_tokens_as_asked(n):
    assert [len(g.ids) for g in draw(prompts_of(64, 1), n=n)] == [n, n]


@pytest.mark.parametrize(
    'wrong',
    [{'prompts': [[1], []]}, {'stop_ids': []}, {'max_new_tokens': 0}],
    ids=['empty-prompt', 'no-stop', 'no-token'],
)
def test_what_cannot_be_generated_is_refused(wrong):
    options = {'prompts': [[1]], 'stop_ids': [STOP], 'max_new_tokens': 1} | wrong
    with pytest.raises(ValueError, match='at least'):
        generate(params_of(CFG), CFG, **options)


# ---- rows that end ----


def drawn(prompts, mesh_params, n=24, temperature=0.9):
    """Responses of which most end early: a fifth of the ids are stop ids."""
    stops = list(range(0, CFG.vocab_size, 5))
    return module.draw(
        mesh_params, CFG, prompts, max_new_tokens=n, stop_ids=stops, temperature=temperature, seed=4
    )  # fmt: skip


@pytest.mark.parametrize('mesh', [pytest.param('one', marks=pytest.mark.slow), 'fsdp2-seq2-tensor2'], indirect=True)
def test_rows_that_go_on_draw_in_a_smaller_batch_what_they_would_have_drawn(mesh, monkeypatch):
    prompts, params = prompts_of(*range(1, 17)), place(weights(CFG), mesh)
    taken, take = [], module._taken
    monkeypatch.setattr(module, '_taken', lambda state, row_B: taken.append(len(row_B)) or take(state, row_B))
    monkeypatch.setattr(module, 'FEWEST', 99)
    expected = drawn(prompts, params)
    monkeypatch.setattr(module, 'FEWEST', 2)
    found = drawn(prompts, params)
    assert len(taken) > 1 and taken == sorted(taken, reverse=True)
    assert [(d.ids, d.ended) for d in found] == [(d.ids, d.ended) for d in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


@pytest.mark.slow
def test_rows_that_go_on_keep_their_own_knobs(monkeypatch):
    prompts, stops = prompts_of(*range(1, 9)), list(range(0, CFG.vocab_size, 5))
    knobs = {'temperature': [0.0, 2.0] * 4, 'top_k': [0, 5, 3, 0] * 2, 'repetition_penalty': [1.0, 1.3, 1.0, 0.8] * 2}
    expected = draw(prompts, n=24, stop_ids=stops, **knobs)
    monkeypatch.setattr(module, 'FEWEST', 1)
    assert draw(prompts, n=24, stop_ids=stops, **knobs) == expected


@pytest.mark.parametrize('mesh', [pytest.param('one', marks=pytest.mark.slow), 'fsdp2-seq2-tensor2'], indirect=True)
def test_a_prompt_of_many_rows_is_read_once(mesh, monkeypatch):
    a, b = prompts_of(5, 9)
    read, params, once = [], place(weights(CFG), mesh), module._once
    monkeypatch.setattr(module, '_once', lambda prompts: read.append(once(prompts)) or read[-1])
    found = drawn([a, a, a, b, b, b], params)
    assert len(read[0][0]) == 2
    drawn([a, b, a, a, b, b], params)
    assert len(read[1][0]) == (2 if mesh.size == 1 else 6), 'rows of a device begin with what it has read'
    monkeypatch.setattr(module, '_once', lambda prompts: (prompts, np.arange(len(prompts))))
    assert [d.ids for d in drawn([a, a, a, b, b, b], params)] == [d.ids for d in found]
    assert len({tuple(d.ids) for d in found}) > 2, 'equal prompts draw their own texts'


# ---- the filters ----


def kept(p_V, *, top_k=0, top_p=1.0, min_p=0.0):
    """The ids that the filters leave of a distribution."""
    x_BV = jnp.log(jnp.asarray([p_V], jnp.float32))
    knobs = (jnp.array([top_k]), jnp.array([top_p], jnp.float32), jnp.array([min_p], jnp.float32))
    return np.flatnonzero(np.isfinite(np.asarray(jax.jit(choice._filter)(x_BV, *knobs))[0])).tolist()


P = [0.05, 0.4, 0.1, 0.25, 0.15, 0.05]


@pytest.mark.parametrize(
    ('knobs', 'expected'),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({'top_k': 1}, [1]),
        ({'top_k': 3}, [1, 3, 4]),
        ({'top_k': 5}, [0, 1, 2, 3, 4]),  # ids 0 and 5 are equally likely: the lower stays
        ({'top_k': 99}, [0, 1, 2, 3, 4, 5]),
        ({'top_p': 0.39}, [1]),
        ({'top_p': 0.41}, [1, 3]),
        ({'top_p': 0.64}, [1, 3]),
        ({'top_p': 0.66}, [1, 3, 4]),
        ({'top_p': 0.0}, [1]),
        ({'min_p': 0.6}, [1, 3]),
        ({'min_p': 0.2}, [1, 2, 3, 4]),
        ({'min_p': 1.0}, [1]),
        ({'top_k': 2, 'top_p': 0.6}, [1]),  # of the two that are left, the first holds 0.4/0.65
        ({'top_k': 4, 'top_p': 0.9, 'min_p': 0.5}, [1, 3]),
    ],
)
def test_filters_keep_exactly(knobs, expected):
    assert kept(P, **knobs) == expected


def test_filters_that_are_off_keep_all_of_a_long_tail():
    """The sum of the likeliest rounds to 1 before the end."""
    assert kept([1e-9, 1.0, 1e-9, 1e-12], top_p=1.0) == [0, 1, 2, 3]


def test_equal_likeliest_keep_one_and_it_is_the_greedy_one():
    assert kept([0.1, 0.4, 0.4, 0.1], top_k=1) == [1]
    assert kept([0.1, 0.4, 0.4, 0.1], top_p=0.3) == [1]


# ---- the draw ----


def chi_square(temperature, knobs, of_temperature):
    """Pearson's statistic of many draws at a temperature against the distribution of another one."""
    n, x_V = 20_000, np.random.default_rng(0).normal(size=60).astype(np.float32)
    key_B, logits_BV = jax.random.split(jax.random.key(0), n), np.broadcast_to(x_V, (n, 60))
    sampling = Sampling(temperature, **knobs)[:4]
    ids_B, logp_B = jax.jit(functools.partial(sample, filtered=bool(knobs)))(logits_BV, key_B, sampling)
    kept = np.argsort(-x_V)[: knobs.get('top_k', 60)]
    p_V = np.zeros(60)
    p_V[kept] = np.exp(x_V[kept] / of_temperature)
    p_V /= p_V.sum()
    found_V = np.bincount(ids_B, minlength=60)
    assert not found_V[p_V == 0].any()
    if of_temperature == temperature:
        np.testing.assert_allclose(logp_B, np.log(p_V[ids_B]), atol=1e-6)
    return np.sum((found_V[kept] - n * p_V[kept]) ** 2 / (n * p_V[kept])), len(kept) - 1


@pytest.mark.parametrize('knobs', [{}, {'top_k': 20}], ids=['all', 'top-k'])
@pytest.mark.parametrize('temperature', [0.5, 1.0])
def test_what_is_drawn_has_the_tempered_frequencies_and_log_probs(temperature, knobs):
    found, freedom = chi_square(temperature, knobs, temperature)
    assert abs(found - freedom) < 4 * (2 * freedom) ** 0.5
    other, _ = chi_square(temperature, knobs, 1.2 * temperature)
    assert other - freedom > 8 * (2 * freedom) ** 0.5, 'and not those of another temperature'


@pytest.mark.parametrize('u', [0.0, 0.5, 1 - 2**-24])
def test_what_has_no_mass_is_not_drawn(u):
    """At both ends of the numbers that decide; where all is at one place, or nearly."""
    x_BV = np.full((4, 300), -np.inf, np.float32)
    x_BV[0, 17] = x_BV[1, 299] = x_BV[2, 0] = 3
    x_BV[3, [40, 41, 280]] = 0, -200, -60  # of which the second is 0 as a float32, and the third nearly
    ids_B, logp_B = jax.jit(choice._by_mass)(x_BV, np.ones(4, np.float32), np.full((4, 2), u, np.float32))
    assert ids_B[:3].tolist() == [17, 299, 0] and ids_B[3] in (40, 280) and np.all(logp_B[:3] == 0)


def test_numbers_that_round_up_find_the_last_that_has_mass():
    """The running sums need not end at the sum that they are compared with."""
    mass_BC = np.array([[0.5, 0.5, 0, 0], [0, 0, 0, 1e-30]], np.float32)
    assert jax.jit(choice._at_share)(mass_BC, np.array([1.0, 1.0], np.float32)).tolist() == [0, 3]
