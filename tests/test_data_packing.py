"""Rows and batches: every token predicted once, nothing across documents, order a pure function of (seed, i)."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm.data import store as store_module
from lm.data.packing import PackedRows, permute
from lm.data.pipeline import PERIOD, Mixture, batches, heldout_batches, mix, rows_in_epoch
from lm.data.prepare import Prepared, PreparedSource
from lm.data.store import TokenStore, checksums_of, token_dtype, write_store
from lm.errors import UsageError

BOS, EOS, PAD, FIRST = 1, 2, 0, 8
KEYS = ('tokens', 'targets', 'weights', 'segments', 'positions')


def _store(lengths):
    """Documents of the given lengths; token i of the stream is FIRST + i, so a row shows where it is from."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(FIRST, FIRST + offsets[-1], dtype=np.uint16)
    return TokenStore(tokens, offsets.astype(np.int64), PAD)


def _random_store(seed, documents=40, longest=30):
    return _store(np.random.default_rng(seed).integers(2, longest, documents))


STORES = [
    _store([5]),
    _store([2, 2, 2]),
    _store([8, 8, 8, 8]),
    _store([9, 8, 8, 8]),
    _random_store(0),
    _random_store(1, 7, 100),
]


@pytest.mark.parametrize('store', STORES)
@pytest.mark.parametrize('seq_len', [1, 3, 8, 64])
def test_every_token_but_bos_is_predicted_once_an_epoch_from_its_own_document(store, seq_len):
    rows = PackedRows(store, seq_len, seed=3)
    predicted = np.zeros(len(store), int)
    document = np.searchsorted(store.offsets, np.arange(len(store)), side='right')
    seen = set()
    for i in range(len(rows)):
        row = rows.row(i)
        start = int(row['tokens_T'][0]) - FIRST
        seen.add(start)
        for t in np.flatnonzero(row['weights_T']):
            assert row['tokens_T'][t] == store.tokens[start + t] and row['targets_T'][t] == store.tokens[start + t + 1]
            assert document[start + t] == document[start + t + 1], 'a target across documents'
            predicted[start + t + 1] += 1
    expected = np.ones(len(store), int)
    expected[store.offsets[:-1]] = 0
    np.testing.assert_array_equal(predicted, expected)
    assert seen == {r * seq_len for r in range(len(rows))}


@pytest.mark.parametrize('store', STORES)
@pytest.mark.parametrize('seq_len', [3, 8, 64])
def test_segments_and_positions_begin_anew_with_each_document(store, seq_len):
    rows = PackedRows(store, seq_len, seed=0, shuffle=False)
    for r in range(len(rows)):
        row, start = rows.row(r), r * seq_len
        real = min(seq_len, len(store) - 1 - start)
        document = np.searchsorted(store.offsets, np.arange(start, start + real), side='right')
        fragment = np.maximum(store.offsets[document - 1], start)
        np.testing.assert_array_equal(row['segments_T'][:real], document - document[0] + 1)
        np.testing.assert_array_equal(row['positions_T'][:real], np.arange(start, start + real) - fragment)
        np.testing.assert_array_equal(row['tokens_T'][:real], store.tokens[start : start + real])
        np.testing.assert_array_equal(row['targets_T'][:real], store.tokens[start + 1 : start + real + 1])
        for key in KEYS:
            assert not row[f'{key}_T'][real:].any() and row[f'{key}_T'].shape == (seq_len,)
            assert row[f'{key}_T'].dtype == (np.float32 if key == 'weights' else np.int32)
        assert real == seq_len or r == len(rows) - 1, 'only the last row is short'


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 17, 64, 1000, 1025])
def test_permutation_is_a_bijection_and_depends_on_the_key(n):
    images = [permute(i, n, b'a') for i in range(n)]
    assert sorted(images) == list(range(n))
    if n > 10:
        assert images != list(range(n)) and images != [permute(i, n, b'b') for i in range(n)]


def test_permutation_mixes():
    n = 4096
    images = np.array([permute(i, n, b'key') for i in range(n)])
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.06
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.06


def test_permutation_stays_as_published():
    assert [permute(i, 10, b'0:0') for i in range(10)] == GOLDEN, 'this reorders the data of every run there is'


GOLDEN = [2, 0, 3, 6, 5, 9, 8, 1, 7, 4]


def test_rows_are_pure_and_epochs_differ():
    store = _random_store(2)
    rows, again = PackedRows(store, 8, seed=1), PackedRows(store, 8, seed=1)
    n = len(rows)
    for i in (n + 3, 0, 5 * n, n - 1):
        _assert_same(rows.row(i), again.row(i))
    orders = [[_key(rows.row(e * n + i)) for i in range(n)] for e in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [_key(PackedRows(store, 8, seed=2).row(i)) for i in range(n)]
    assert [_key(PackedRows(store, 8, 1, shuffle=False).row(i)) for i in range(n)] != orders[0]


def _key(row):
    return tuple(row['tokens_T'].tolist())


def _assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def _prepared(weights=(0.7, 0.3), documents=(400, 200)):
    stores = [_random_store(i, n, 20) for i, n in enumerate(documents)]
    sources = tuple(
        PreparedSource(f's{i}', w, s, _random_store(9, 14, 20), {})
        for i, (w, s) in enumerate(zip(weights, stores, strict=True))
    )
    return Prepared(None, sources, 'x')  # type: ignore[arg-type]


def _take(n, **kwargs):
    arguments: dict[str, Any] = dict(batch_size=4, start=0, rows=None) | kwargs
    mixture = mix(_prepared(), seq_len=arguments.pop('seq_len', 16), seed=arguments.pop('seed', 5))
    return list(itertools.islice(batches(mixture, **arguments), n))


def test_any_batch_can_be_resumed_from():
    whole = _take(12)
    assert set(whole[0]) == {f'{key}_BT' for key in KEYS} and whole[0]['tokens_BT'].shape == (4, 16)
    for start in (1, 7, 11):
        for a, b in zip(whole[start:], _take(12 - start, start=start), strict=True):
            _assert_same(a, b)
    assert any(
        not np.array_equal(a['tokens_BT'], b['tokens_BT']) for a, b in zip(whole, _take(12, seed=6), strict=True)
    )


def test_hosts_together_read_the_batch_of_one():
    whole = _take(6)
    halves = [_take(6, rows=range(1)), _take(6, rows=range(1, 4))]
    for a, *parts in zip(whole, *halves, strict=True):
        _assert_same(a, {key: np.concatenate([part[key] for part in parts]) for key in a})


def test_batch_size_does_not_change_the_order_of_rows():
    four, two = _take(4, batch_size=4), _take(8, batch_size=2)
    for key in four[0]:
        np.testing.assert_array_equal(np.concatenate([b[key] for b in four]), np.concatenate([b[key] for b in two]))


@pytest.mark.parametrize('weights', [(0.7, 0.3), (1.0,), (0.2, 0.3, 0.5), (1e-9, 1.0), (1 / 3, 1 / 3, 1 / 3)])
def test_mixture_keeps_its_proportions_everywhere(weights):
    rows = tuple(PackedRows(_random_store(i), 8, 0) for i in range(len(weights)))
    mixture = Mixture(rows, weights)
    located = [mixture.locate(i) for i in range(2 * PERIOD)]
    assert int(mixture.shares.sum()) == PERIOD and mixture.shares.min() >= 1
    source = np.array([s for s, _ in located])
    for s, weight in enumerate(weights):
        ranks = [row for found, row in located if found == s]
        assert ranks == list(range(len(ranks))), 'each row of a source is asked for once, in turn'
        counts = np.cumsum(source == s)
        exact = weight / sum(weights) * np.arange(1, len(source) + 1)
        assert np.abs(counts - exact).max() <= len(weights) + 1


def test_epoch_ends_when_the_first_source_is_used_up():
    prepared = _prepared()
    mixture = mix(prepared, seq_len=16, seed=0)
    n = rows_in_epoch(prepared, 16)
    sizes = [len(rows) for rows in mixture.rows]
    assert all(row < sizes[s] for s, row in map(mixture.locate, range(n)))
    s, row = mixture.locate(n)
    assert row == sizes[s]


def test_heldout_is_read_in_order_and_filled_up():
    source = _prepared().sources[0]
    batches = list(heldout_batches(source, batch_size=4, seq_len=16))
    rows = PackedRows(source.heldout, 16, 0, shuffle=False)
    tokens = np.concatenate([b['tokens_BT'] for b in batches])
    assert len(rows) % 4, 'the example should need filling up'
    np.testing.assert_array_equal(tokens[: len(rows)], np.stack([rows.row(i)['tokens_T'] for i in range(len(rows))]))
    assert all(b['tokens_BT'].shape == (4, 16) for b in batches)
    for key in KEYS:
        assert not np.concatenate([b[f'{key}_BT'] for b in batches])[len(rows) :].any()
    predicted = sum(b['weights_BT'].sum() for b in batches)
    assert predicted == len(source.heldout) - source.heldout.documents
    few = list(heldout_batches(source, batch_size=4, seq_len=16, max_rows=3))
    assert len(few) == 1 and not few[0]['weights_BT'][3].any()
    np.testing.assert_array_equal(few[0]['tokens_BT'][:3], tokens[:3])


def test_bad_sizes_are_refused():
    for bad in ({'seq_len': 0}, {'batch_size': 0}):
        with pytest.raises(UsageError):
            _take(1, **bad)


@pytest.mark.parametrize('vocab_size', [300, 70_000])
def test_store_is_written_and_opened(tmp_path, vocab_size):
    ids = {'a': [10, 11], 'b': [], 'c': [vocab_size - 1]}
    encode = lambda texts, continued: [ids[t] for t in texts]
    special = {'bos_id': BOS, 'eos_id': EOS, 'adds_bos': True}
    tokenizer: Any = SimpleNamespace(vocab_size=vocab_size, encode_batch=encode, **special)
    written = write_store(tmp_path / 's', ids, tokenizer)
    checksums = checksums_of(tmp_path / 's')
    store = TokenStore.open(tmp_path / 's', vocab_size=vocab_size, pad_id=PAD, checksums=checksums)
    assert [store.document(i).tolist() for i in range(store.documents)] == [[BOS, *d, EOS] for d in ids.values()]
    assert written == len(store) == 9 and store.tokens.dtype == token_dtype(vocab_size)
    assert isinstance(store.tokens, np.memmap) and isinstance(store.offsets, np.memmap)
    (tmp_path / 's' / 'tokens.bin').write_bytes(b'\0\0')
    with pytest.raises(ValueError, match='tokens.bin has changed'):
        TokenStore.open(tmp_path / 's', vocab_size=vocab_size, pad_id=PAD, checksums=checksums)


def test_of_a_large_file_only_the_size_is_compared(tmp_path, monkeypatch):
    for name in ('tokens.bin', 'offsets.npy'):
        (tmp_path / name).write_bytes(b'some')
    checksums = checksums_of(tmp_path)
    (tmp_path / 'tokens.bin').write_bytes(b'same')
    with pytest.raises(ValueError, match='tokens.bin has changed'):
        store_module.verify(tmp_path, checksums)
    monkeypatch.setattr(store_module, '_VERIFIED_BYTES', 4)
    store_module.verify(tmp_path, checksums)
    (tmp_path / 'tokens.bin').write_bytes(b'longer')
    with pytest.raises(ValueError, match='tokens.bin has changed'):
        store_module.verify(tmp_path, checksums)


def test_a_row_reads_a_window_of_a_long_stream_and_no_more(tmp_path):
    """Ten million documents, never written: a sparse file stands for the tokens."""
    documents, length = 10_000_000, 1000
    with (tmp_path / 'tokens.bin').open('wb') as f:
        f.truncate(documents * length * 2)
    tokens = np.memmap(tmp_path / 'tokens.bin', np.uint16, mode='r')
    with (tmp_path / 'offsets.bin').open('wb') as f:
        np.arange(0, (documents + 1) * length, length, dtype=np.int64).tofile(f)
    store = TokenStore(tokens, np.memmap(tmp_path / 'offsets.bin', np.int64, mode='r'), PAD)
    row = PackedRows(store, 2048, seed=0).row(3_000_000)
    assert row['segments_T'].max() in (3, 4)
    assert row['weights_T'].sum() == 2048 - (row['positions_T'][1:] == 0).sum() - (row['positions_T'][-1] == length - 1)
