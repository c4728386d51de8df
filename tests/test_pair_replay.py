"""Pairs with pretraining's text beside them: the text is learned as in pretraining, the pairs as without it."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from running import lines, measured
from stores import PAD, pair_store

from lm.data import pairs, pipeline
from lm.data.chats import WithReplay
from lm.data.packing import PackedRows
from lm.data.pairs import PairRows, TextRows
from lm.data.prepare import Prepared, PreparedSource
from lm.data.store import TokenStore
from lm.model import parameters
from lm.stages import dpo, language

SEQ_LEN = 16
SETTINGS = {'loss': 'dpo', 'reference': 'cached', 'nll': 0.2} | dict.fromkeys(
    ('beta', 'margin', 'label_smoothing', 'lambda_d', 'lambda_u')
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def mixture(folder, *, replay, sides=2):
    """Pairs, and a text of documents of five to forty tokens, of which each is another."""
    draw = np.random.default_rng(0)
    said = [
        [(draw.integers(1, 240, n).tolist(), [False] * 2 + [True] * (n - 2)) for n in draw.integers(3, 9, sides)]
        for _ in range(60)
    ]
    lengths = draw.integers(5, 40, 30)
    text = TokenStore(
        draw.integers(1, 240, lengths.sum()).astype(np.uint16), np.concatenate([[0], lengths.cumsum()]), PAD
    )
    store = pair_store(folder, said)
    source = lambda name, s: PreparedSource(name, 1.0, s, s, {})
    own, texts = (Prepared(None, (source(n, s),), n) for n, s in (('pairs', store), ('text', text)))
    known = [np.zeros((60, sides), np.float32)]
    return pairs.mix(WithReplay(own, texts, None), seq_len=SEQ_LEN, seed=0, replay=replay, reference=known)


def test_the_text_is_all_there_no_row_of_it_longer_than_seq_len(tmp_path):
    """Three sides make a row three times seq_len wide: it has room for three rows of text."""
    of_pairs, text = mixture(tmp_path / 'p', replay=0.5, sides=3).rows
    assert isinstance(of_pairs, PairRows) and isinstance(text, TextRows) and of_pairs.width > SEQ_LEN
    plain, seen = PackedRows(text.store, text.text.seq_len, text.text.seed), []
    assert text.text.seq_len <= SEQ_LEN and len(text) == len(plain) // (of_pairs.width // plain.seq_len) > 3
    for i in range(len(text)):
        row = text.row(i)
        assert {n: (x.shape, x.dtype) for n, x in row.items()} == {
            n: (x.shape, x.dtype) for n, x in of_pairs.row(0).items()
        }
        assert (row['sequence_T'] == -1).all() and not row['weight_P'].any() and not row['last_T'].any()
        for segment in set(row['segments_T'].tolist()) - {0}:
            places = np.flatnonzero(row['segments_T'] == segment)
            assert row['positions_T'][places].tolist() == list(range(len(places))) and len(places) <= SEQ_LEN
            seen += row['tokens_T'][places][row['weights_T'][places] > 0].tolist()
    expected = [plain.row(i) for i in range(len(text) * (of_pairs.width // plain.seq_len))]
    assert sorted(seen) == sorted(np.concatenate([r['tokens_T'][r['weights_T'] > 0] for r in expected]).tolist())


def test_pairs_and_text_do_not_see_each_other_in_the_loss(tmp_path, tiny, one_device):
    """A batch of both has the sums of its pairs without text, and of its text without pairs."""
    mixed = mixture(tmp_path / 'p', replay=0.4)
    rows = [(mixed.locate(i)[0], mixed.row(i)) for i in range(10)]
    assert {source for source, _ in rows} == {0, 1}
    batch = pipeline.stack([row for _, row in rows])
    of_pairs, of_text = (pipeline.stack([row for source, row in rows if source == k]) for k in range(2))
    params, key = parameters.init(jax.random.key(0), tiny), jax.random.key(0)
    loss = lambda replay: dpo.Dpo(ConfigDict(SETTINGS | {'data': {'replay': replay}}), tiny).loss()
    found, _ = jax.jit(loss(0.4).terms)({'policy': params}, batch, key)
    alone, _ = jax.jit(loss(0.0).terms)({'policy': params}, of_pairs, key)
    plain = language.next_token_loss(tiny, z_loss=0.0)
    text, _ = jax.jit(plain.terms)({'policy': params}, of_text, key)
    assert found['replay'] == pytest.approx(float(text['loss']), rel=1e-5)
    assert {k: float(found[k]) for k in alone} == pytest.approx({k: float(v) for k, v in alone.items()}, rel=1e-5)
    weights = loss(0.4).denominators(batch)
    assert weights['replay'] == plain.denominators(of_text)['loss'] > 0
    assert {k: float(v) for k, v in loss(0.0).denominators(of_pairs).items()} == {
        k: float(v) for k, v in weights.items() if k != 'replay'
    }
    assert loss(0.4).coefs.keys() - loss(0.0).coefs.keys() == {'replay'}


@pytest.mark.slow
def test_replay_forgets_less(dialogues, tmp_path):
    """Through the command, at a rate that forgets; the pairs a step stay as many."""
    options = {'steps': 8, 'eval__every': 8, 'optim__lr': 0.02, 'nll': 1.0}
    dialogues.train('dpo', tmp_path / 'without', **options)
    dialogues.train('dpo', tmp_path / 'with', data__replay=0.5, **options)
    without, beside = (measured(tmp_path / name) for name in ('without', 'with'))
    assert beside[8, 'eval/bpb'] < without[8, 'eval/bpb'] - 0.1
    assert beside[8, 'train/replay'] < beside[1, 'train/replay'] and (1, 'train/replay') not in without
    assert '50% of all rows replay one.jsonl' in (tmp_path / 'with' / 'log.txt').read_text()
    assert 'replay' not in (tmp_path / 'without' / 'log.txt').read_text()
    first = lines(tmp_path / 'with')[0]
    assert first['train/loss'] == pytest.approx(
        first['train/preference'] + first['train/chosen_nll'] + dpo.REPLAY * first['train/replay'], rel=1e-5
    )
