"""Pairs as batches: both sides side by side, each pair once, whoever asks and wherever one begins."""

import dataclasses
import json
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from stores import PAD, encoded, pair_store

from lm.data import pairs, pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.chats import WithReplay
from lm.data.pairs import SIDES, PairBatches
from lm.data.prepare import Prepared, PreparedSource, prepare
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError
from lm.model import parameters
from lm.sharding import use_mesh
from lm.stages import dpo, reward
from lm.stages import pairs as stage
from lm.training import step as training

SEQ_LEN = 16


def drawn(count, *, seed=0, sides=2, first=0, longest=9):
    """Pairs that share a prompt; every token says which pair and which side it is of."""
    draw, found = np.random.default_rng(seed), []
    for i in range(first, first + count):
        prompt = draw.integers(1, longest)
        found.append([encoded(i * sides + k, '.' * prompt + 'x' * draw.integers(1, longest)) for k in range(sides)])
    return found


def source(store, name='a', weight=1.0):
    return PreparedSource(name, weight, store, store, {})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def batches(stores, *, weights=(1.0,), batch_size=8, seed=0, reference=None):
    named = tuple(source(s, name, w) for s, name, w in zip(stores, 'ab', weights, strict=False))
    data = WithReplay(Prepared(None, named, 'x'), None, None)
    return PairBatches(pairs.mix(data, seq_len=SEQ_LEN, seed=seed, replay=0, reference=reference), batch_size)


def whole(found, i):
    return found.batch(i, range(found.rows))


def numbers_of(batch, sides=2):
    """[(row, slot, the pair's number)] by the tokens themselves; checks that a slot's sides are those of one pair."""
    found = []
    for row in range(len(batch['tokens_BT'])):
        sequence = batch['sequence_BT'][row]
        for slot in range(batch['weight_BP'].shape[1]):
            ids = [batch['tokens_BT'][row][sequence == slot * sides + k] for k in range(sides)]
            assert (batch['weight_BP'][row, slot] == 1) == all(map(len, ids)) == any(map(len, ids))
            if len(ids[0]):
                told = {(int(i) - 1) // 40 for side in ids for i in side}
                (number,) = {n // sides for n in told}
                assert told == {number * sides + k for k in range(sides)}
                found.append((row, slot, number))
    return found


# ---- a row ----


@pytest.mark.parametrize('sides', [2, 3])
def test_both_sides_of_a_pair_are_in_one_row_whole(tmp_path, sides):
    said = drawn(40, sides=sides)
    store = pair_store(tmp_path / 'p', said, [(0.5 + i / 80, i) for i in range(40)])
    found = batches([store])
    for i in range(5):
        batch = whole(found, i)
        assert batch['tokens_BT'].shape[1] == sides * SEQ_LEN
        for row, slot, number in numbers_of(batch, sides):
            for k, (ids, trained) in enumerate(said[number]):
                here = batch['sequence_BT'][row] == slot * sides + k
                n = min(len(ids), SEQ_LEN)
                got = {
                    name: batch[f'{name}_BT'][row][here].tolist() for name in ('tokens', 'weights', 'positions', 'last')
                }
                assert got['tokens'] == ids[:n] and got['positions'] == list(range(n))
                assert got['weights'] == [*map(float, trained[1:n]), 0.0]
                assert got['last'] == [0.0] * (n - 1) + [1.0]
                learned = batch['weights_BT'][row][here] > 0
                assert batch['targets_BT'][row][here][learned].tolist() == [
                    i for i, t in zip(ids[1:n], trained[1:n], strict=True) if t
                ]
                assert len(set(batch['segments_BT'][row][here])) == 1
                assert batch[f'length_{SIDES[k]}_BP'][row, slot] == sum(trained[1:n])
            assert batch['label_BP'][row, slot] == np.float32(0.5 + number / 80)
            assert batch['margin_BP'][row, slot] == number
        empty = batch['sequence_BT'] < 0
        for name in ('weights', 'last', 'segments', 'positions'):
            assert not batch[f'{name}_BT'][empty].any()
        assert (batch['tokens_BT'][empty] == PAD).all()


def test_the_references_log_probs_come_with_their_pair(tmp_path):
    stores = [pair_store(tmp_path / name, drawn(20, first=20 * k)) for k, name in enumerate('ab')]
    known = [np.arange(40, dtype=np.float32).reshape(20, 2) + 100 * k for k in range(2)]
    batch = whole(batches(stores, weights=(0.5, 0.5), reference=known), 1)
    for row, slot, number in numbers_of(batch):
        expected = known[number // 20][number % 20]
        assert [batch[f'reference_{s}_BP'][row, slot] for s in SIDES[:2]] == expected.tolist()


def test_the_third_side_is_the_response_to_the_prompt_before(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    tokenizer = train_tokenizer((f'the {i} buckets of a role, yes or no' for i in range(99)), vocab_size=320)
    tokenizer.save(tmp_path / 'tokenizer')
    say = lambda role, text: [{'role': role, 'content': text}]
    told = lambda i: {
        'prompt': say('user', f'{i}?'),
        'chosen': say('assistant', f'yes {i}'),
        'rejected': say('assistant', f'no {i}'),
    }
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(told(i)) + '\n' for i in range(20)))
    data = prepare(
        mixture=str(tmp_path / 'p.jsonl'), vocab_size=320, tokenizer=str(tmp_path / 'tokenizer'), heldout=0.2,
        progress=lambda line: None, form=pairs.form(ChatTemplate(), sides=3),
    )  # fmt: skip
    store, before = data.sources[0].train, None
    for i in range(store.pairs):
        said = [[tokenizer.decode(ids[t == k].tolist()) for k in (0, 1)] for ids, t in store.pair(i)]
        prompts, (chosen, rejected, other) = zip(*said, strict=True)
        assert len(set(prompts)) == 1
        number = chosen.removeprefix('yes ')
        assert rejected == f'no {number}' and prompts[0] == f'{number}?'
        assert other == (rejected if before is None else before), 'the first has no other'
        before = chosen


# ---- the order ----


def test_every_pair_of_an_epoch_comes_once(tmp_path):
    (rows,) = batches([pair_store(tmp_path / 'p', drawn(40))]).mixture.rows
    seen = [[n for _, _, n in numbers_of(pipeline.stack([rows.row(i)]))] for i in range(2 * len(rows))]
    epochs = [sum(seen[: len(rows)], []), sum(seen[len(rows) :], [])]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(range(40)) and epochs[0] != epochs[1]


def test_a_batch_is_a_pure_function_of_its_number(tmp_path):
    store = pair_store(tmp_path / 'p', drawn(40))
    ours, theirs = batches([store]), batches([store])
    for i in (3, 0, 4):
        expected = whole(ours, i)
        assert all(np.array_equal(x, expected[name]) for name, x in whole(theirs, i).items())
    assert numbers_of(whole(batches([store], seed=1), 0)) != numbers_of(whole(ours, 0))


def test_sources_are_mixed_by_weight(tmp_path):
    """A weight is a share of the pairs, though those of one source are longer and fewer share a row."""
    stores = [
        pair_store(tmp_path / name, drawn(90, first=90 * k, longest=4 + 4 * k), vocab_size=70_000)
        for k, name in enumerate('ab')
    ]
    found = batches(stores, weights=(0.75, 0.25), batch_size=64)
    seen = Counter(n // 90 for i in range(20) for _, _, n in numbers_of(whole(found, i)))
    assert seen[0] / seen.total() == pytest.approx(0.75, abs=0.03)
    assert seen.total() / 20 == pytest.approx(64, abs=4), 'a batch has so many pairs on average'


def test_what_cannot_be_compared_within_a_row_is_left_out(tmp_path):
    x = lambda number, mask: encoded(number, mask)
    same = [1, 2, 3, 4] * 5
    said = [
        [x(0, '..xx'), x(1, '..x')],
        [x(2, '.' * 16 + 'x'), x(3, '..x')],  # no chosen response within seq_len
        [x(4, '..x'), x(5, '.' * 16 + 'xx')],  # no rejected one
        [(same[:18] + [7], [False] * 3 + [True] * 16), (same[:18] + [8], [False] * 3 + [True] * 16)],  # equal once cut
        [x(8, '..' + 'x' * 30), x(9, '.' * 15 + 'xx')],  # both cut, and different
        [(same[:6], [False] * 3 + [True] * 3), (same[:5], [False] * 3 + [True] * 2)],  # one begins with the other
        [(same[:6], [False] * 3 + [True] * 3), (same[:6], [False] * 3 + [True] * 3)],  # equal
    ]
    store = pair_store(tmp_path / 'p', said)
    sizes = pairs.sizes(store, SEQ_LEN)
    assert sizes[:].tolist() == [7, 0, 0, 0, 32, 11, 0] and (sizes.cut, sizes.left_out) == (1, 4)
    rows = pairs.in_order(store, seq_len=SEQ_LEN)
    assert sorted(n for i in range(len(rows)) for n in rows.numbers(i).tolist()) == [0, 4, 5]
    pairs.check(source(store), seq_len=SEQ_LEN)
    with pytest.raises(UsageError, match='no training pair of a has two different responses within seq_len=2: set'):
        pairs.check(source(store), seq_len=2)


@pytest.mark.parametrize(('most', 'first'), [(19, 19), (30, 30), (99, 30), (None, 30)])
def test_pairs_in_order_are_the_first_ones_and_then_no_more(tmp_path, most, first):
    rows = pairs.in_order(pair_store(tmp_path / 'p', drawn(30)), seq_len=SEQ_LEN, most=most)
    batch = pipeline.stack([*(rows.row(i) for i in range(len(rows))), rows.empty])
    assert sorted(n for _, _, n in numbers_of(batch)) == [*range(first)]
    assert [n for _, _, n in numbers_of(batch)] == rows.plan.order.tolist()


# ---- the shape of a batch ----


def test_the_shape_of_a_batch_is_a_property_of_the_data(tmp_path):
    """As many rows as its pairs take on average, so that hardly a place is left over; places for the fullest row."""
    found = batches([pair_store(tmp_path / 'p', drawn(60, longest=5))])
    made = [whole(found, i) for i in range(20)]
    assert {batch['tokens_BT'].shape for batch in made} == {(found.rows, found.width)}
    assert max(batch['weight_BP'].sum(1).max() for batch in made) == found.slots
    assert np.mean([batch['weight_BP'].sum() for batch in made]) == pytest.approx(8, abs=2)
    assert np.mean([(batch['segments_BT'] > 0).mean() for batch in made]) > 0.9


def config(**more):
    own = SimpleNamespace(replay=0.0)
    return SimpleNamespace(
        seq_len=SEQ_LEN, batch_size=16, seed=0, steps=4, execution=SimpleNamespace(microbatch=None), data=own, **more
    )


def data_of(store):
    return stage.PairData(Prepared(None, (source(store),), 'x'), None, None)


@pytest.mark.parametrize(
    ('microbatch', 'mesh', 'parts'),
    [(16, {}, 1), (4, {}, 4), (8, {'data': 2, 'fsdp': 2}, 8), (16, {'fsdp': 8}, 8), (4, {'seq': 2, 'tensor': 2}, 4)],
)
def test_rows_are_shared_by_microbatches_and_devices(tmp_path, microbatch, mesh, parts):
    data, settings = data_of(pair_store(tmp_path / 'p', drawn(64))), config()
    settings.execution.microbatch = microbatch
    task: Any = reward.Reward(settings, None, data)
    with use_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values())))]):
        needed = task.batches().rows
        shapes = task.batch()
        rows = shapes['tokens_BT'].shape[0]
        assert rows % parts == 0 and needed <= rows < needed + parts
        made = task.source(2)(None, 2)
        assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
            n: (x.shape, x.dtype) for n, x in shapes.items()
        }
        expected = task.batches().batch(2, range(rows))
        assert all(np.array_equal(x, expected[name]) for name, x in jax.device_get(made).items())


def test_a_process_takes_its_rows_of_the_same_batch(tmp_path):
    found = batches([pair_store(tmp_path / 'p', drawn(40))])
    rows = found.rows + 1
    expected = found.batch(3, range(rows))
    for here in ([0, 2], [rows - 1], range(rows)):
        made = next(pipeline.prefetched(partial(found.batch, places=here), 3))
        assert all(np.array_equal(x, expected[name][list(here)]) for name, x in made.items())


# ---- microbatches ----


@pytest.mark.parametrize('loss', ['kto', *(pytest.param(name, marks=pytest.mark.slow) for name in ('dpo', 'ipo'))])
def test_microbatches_give_the_same_update(tmp_path, tiny, one_device, loss):
    draw, sides = np.random.default_rng(4), 3 if loss == 'kto' else 2
    said = [
        [(draw.integers(1, 250, n).tolist(), [False] * 2 + [True] * (n - 2)) for n in draw.integers(3, 9, sides)]
        for _ in range(16)
    ]
    store = pair_store(tmp_path / 'p', said, [(0.8, 0.0)] * 16)
    known = [draw.normal(-20, 1, (16, sides)).astype(np.float32)]
    found = batches([store], batch_size=16, reference=known)
    nothing = dict.fromkeys(('beta', 'margin', 'label_smoothing', 'lambda_d', 'lambda_u'))
    settings = ConfigDict({'data': {'replay': 0.0}, 'loss': loss, 'reference': 'cached', 'nll': 0.2, **nothing})
    tiny = dataclasses.replace(tiny, layers=1)
    optimizer = optax.sgd(1.0)
    params = parameters.init(jax.random.key(0), tiny)

    def updated(microbatches):
        batch = found.batch(0, range(-(-found.rows // microbatches) * microbatches))
        step = training.make_step(dpo.Dpo(settings, tiny).loss(), optimizer, clip=None, microbatches=microbatches)
        state, metrics = jax.jit(step)(training.create({'policy': params}, {}, optimizer, 0), batch)
        return jax.tree.map(lambda new, old: new - old, state.trainable['policy'], params), metrics

    (ours, told), (theirs, also_told) = updated(1), updated(3)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * largest, rtol=0), theirs, ours)
    assert told.keys() == also_told.keys() and {'preference', 'chosen_nll', 'reward_chosen', 'accuracy'} <= told.keys()
    assert {k: float(v) for k, v in also_told.items()} == pytest.approx(
        {k: float(v) for k, v in told.items()}, rel=1e-4, abs=1e-5
    )
