"""Sizes of rows lie beside the data: right for every length of a row, and known without reading a token."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stores import chat_store, masks, pair_store

from lm.data import cache, chats, pairs, store
from lm.data.chat_template import ChatTemplate
from lm.data.chats import ChatRows
from lm.data.prepare import prepare
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


def drawn(count, sides, draw):
    """Pairs of few different ids, so that responses begin alike, are alike, or one begins with another; some have no
    response."""
    some = lambda: [1, *draw.integers(1, 3, draw.integers(0, 9)).tolist()]
    found = []
    for _ in range(count):
        prompt = some()
        responses = [draw.integers(1, 3, draw.integers(0, 5)).tolist() for _ in range(sides)]
        found.append([(prompt + r, [False] * len(prompt) + [True] * len(r)) for r in responses])
    return found


@pytest.mark.parametrize('sides', [2, 3])
def test_a_pair_is_used_where_its_cut_sides_have_responses_that_differ(tmp_path, sides):
    said = drawn(200, sides, np.random.default_rng(sides))
    made = pair_store(tmp_path / 'p', said)
    for seq_len in range(1, 18):
        cut = [[(ids[:seq_len], trained[1:seq_len]) for ids, trained in pair] for pair in said]
        usable = [all(any(t) for _, t in pair) and pair[0][0] != pair[1][0] for pair in cut]
        long = [max(len(ids) for ids, _ in pair) > seq_len for pair in said]
        of = pairs.sizes(made, seq_len)
        assert of[:].tolist() == [sum(len(ids) for ids, _ in p) * u for p, u in zip(cut, usable, strict=True)]
        assert of.survey == (sum(usable), sum(u and c for u, c in zip(usable, long, strict=True)), of[:].max())
        assert of.first(7).tolist() == np.flatnonzero(usable)[:7].tolist()
    assert 0 < pairs.sizes(made, 6).survey.used < 200, 'the draw has both'


def test_a_conversation_is_used_where_a_target_within_a_row_is_learned(tmp_path):
    draw = np.random.default_rng(0)
    said = [(draw.integers(1, 99, len(m)).tolist(), [c == 'x' for c in m]) for m in [*masks(99, draw), 'x', 'x..', '.']]
    made = chat_store(tmp_path / 'c', said)
    for seq_len in (1, 4, 9, 60):
        of = ChatRows(made, seq_len, seed=0).sizes
        expected = [min(len(t) - 1, seq_len) * any(t[1 : seq_len + 1]) for _, t in said]
        assert of[:].tolist() == expected and of.left_out == expected.count(0)


def without_tokens(made):
    """The conversations of a store, of which the sizes alone can be read."""
    return dataclasses.replace(made, trained=None, tokens=None)


def test_no_token_is_read_to_know_the_rows(tmp_path):
    """And no size the next time."""
    draw = np.random.default_rng(1)
    made = pair_store(tmp_path / 'p', drawn(80, 2, draw))
    blind = dataclasses.replace(made, sequences=without_tokens(made.sequences))
    rows, expected = (pairs.in_order(s, seq_len=8) for s in (blind, made))
    assert len(rows) == len(expected) and rows.plan.order.tolist() == expected.plan.order.tolist()
    said = [(draw.integers(1, 99, len(m)).tolist(), [c == 'x' for c in m]) for m in masks(50, draw)]
    chat = chat_store(tmp_path / 'c', said)
    assert len(ChatRows(without_tokens(chat), 16, seed=0)) == len(ChatRows(chat, 16, seed=0))
    again = ChatRows(dataclasses.replace(without_tokens(chat), first=None), 16, seed=0)
    assert len(again) == len(ChatRows(chat, 16, seed=0))
    known = dataclasses.replace(pairs.sizes(made, 8), measure=lambda *part: pytest.fail('it was known'))
    assert known.survey == pairs.sizes(made, 8).survey


def test_other_data_of_the_same_size_have_sizes_of_their_own(tmp_path):
    draw = np.random.default_rng(2)
    one, two = (pair_store(tmp_path / name, drawn(60, 2, draw)) for name in 'ab')
    assert pairs.sizes(one, 8)[:].tolist() != pairs.sizes(two, 8)[:].tolist()
    for made in (one, two):
        used = np.flatnonzero(pairs.sizes(made, 8)[:]).tolist()
        assert sorted(pairs.in_order(made, seq_len=8).plan.order.tolist()) == used


def test_a_mapped_array_is_read_as_it_is(tmp_path):
    for shape in [(9,), (9, 2)]:
        whole = np.random.default_rng(0).integers(0, 99, shape).astype(np.uint32)
        np.save(tmp_path / 'x.npy', whole)
        mapped = np.load(tmp_path / 'x.npy', mmap_mode='r')
        for start, stop in [(0, 9), (2, 5), (4, 4), (7, 20)]:
            np.testing.assert_array_equal(store.read(mapped, start, stop), whole[start:stop])


def test_a_damaged_plan_is_named(tmp_path):
    made = pair_store(tmp_path / 'p', drawn(60, 2, np.random.default_rng(3)))
    pairs.in_order(made, seq_len=8)
    (order,) = (tmp_path / 'cache' / 'plans').glob('*/order.bin')
    order.write_bytes(order.read_bytes()[:-8] + b'\1' * 8)
    with pytest.raises(UsageError, match=rf'the plan of rows in {order.parent} is damaged .*: delete that folder'):
        pairs.in_order(made, seq_len=8)


def test_what_was_prepared_in_another_layout_is_prepared_again(tmp_path, monkeypatch):
    tokenizer = train_tokenizer((f'the {i} buckets of a role, yes or no' for i in range(99)), vocab_size=320)
    tokenizer.save(tmp_path / 'tokenizer')
    says = lambda i: {'prompt': f'{i}?', 'chosen': f'yes {i}', 'rejected': 'no'}
    (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(says(i)) + '\n' for i in range(20)))
    told = []
    options = {'mixture': str(tmp_path / 'p.jsonl'), 'vocab_size': 320, 'tokenizer': str(tmp_path / 'tokenizer')}
    options |= {'heldout': 0.2, 'progress': told.append}
    found = [prepare(**options, form=pairs.form(ChatTemplate())) for _ in range(2)]
    assert sum(line.startswith('encoding') for line in told) == 1
    monkeypatch.setattr(chats, 'LAYOUT', chats.LAYOUT + 1)
    found.append(prepare(**options, form=pairs.form(ChatTemplate())))
    assert sum(line.startswith('encoding') for line in told) == 2
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert len(list((cache.cache_dir() / 'prepared').iterdir())) == 2


# ---- the shape of a batch is a property of the data ----


def test_the_shape_of_a_batch_does_not_depend_on_the_steps(dialogues, tmp_path):
    """Through the command: as many places a step, and the first step is the same."""
    planned = lambda run: float(run.split(' parameters, ')[1].split(' tokens in')[0].replace(',', ''))
    dialogues.train('dpo', tmp_path / 'short', steps=1, eval__every=9)
    short, whole = tmp_path / 'short', dialogues.run('dpo')
    assert planned((short / 'log.txt').read_text()) == planned((whole / 'log.txt').read_text()) / 6
    first = [json.loads((run / 'metrics.jsonl').read_text().splitlines()[0]) for run in (short, whole)]
    for name in ('loss', 'preference', 'chosen_nll', 'grad_norm'):
        assert first[0][f'train/{name}'] == first[1][f'train/{name}']


# ---- ten million of them ----

OPEN = """
import json, sys, time
from lm.data import chats, pairs, store
from lm.data.prepare import Prepared, PreparedSource
from lm.data.store import checksums_of
from etils import epath
kind, folder = sys.argv[1], epath.Path(sys.argv[2])
options = {'vocab_size': 4096, 'pad_id': 0, 'checksums': json.loads((folder / 'sums.json').read_text())}
begun = time.process_time()
made = pairs.PairStore.open(folder, sides=2, **options) if kind == 'pairs' else chats.ChatStore.open(folder, **options)
source = PreparedSource('x', 1.0, made, made, {})
data = chats.WithReplay(Prepared(None, (source,), 'x'), None, None)
of = pairs if kind == 'pairs' else chats
of.check(source, seq_len=256)
mixture = of.mix(data, seq_len=256, seed=0, replay=0.0)
rows = mixture.rows_in_epoch()
seconds = time.process_time() - begun
# Not getrusage, which begins with the memory of the process that started this one.
peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024
mixture.row(rows // 2)
print(json.dumps({'seconds': seconds, 'megabytes': peak, 'rows': rows}))
"""


def generate(folder, kind, count, tokens):
    """A store of so many pairs or conversations of about so many tokens, its sizes as they would be and its tokens a
    hole in the file system."""
    folder.mkdir()
    draw, sides = np.random.default_rng(0), 2 if kind == 'pairs' else 1
    lengths = draw.integers(tokens // 2, tokens * 3 // 2, count * sides)
    np.save(folder / 'offsets.npy', np.concatenate([[0], np.cumsum(lengths)]))
    np.save(folder / 'first.npy', draw.integers(tokens // 4, tokens // 2, count * sides).astype(np.uint32))
    for name, size in (('tokens.bin', 2), ('trained.bin', 1)):
        with (folder / name).open('wb') as f:
            f.truncate(size * int(lengths.sum()))
    if kind == 'pairs':
        pairs.write_tables(folder, np.ones(2 * count), draw.integers(0, tokens // 2, count))
    small = [p.name for p in folder.iterdir() if p.suffix == '.npy']
    sums = store.checksums_of(folder, small) | {n: [(folder / n).stat().st_size] for n in ('tokens.bin', 'trained.bin')}
    (folder / 'sums.json').write_text(json.dumps(sums))


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'count', 'tokens'), [('pairs', 10_000_000, 60), ('chat', 5_000_000, 200)])
def test_ten_million_pairs_or_a_billion_tokens_are_open_at_once(tmp_path, kind, count, tokens):
    """The first time the rows are planned, too, in bounded memory; CPU seconds, since a machine may be busy."""
    generate(tmp_path / 'store', kind, count, tokens)
    command = [sys.executable, '-c', OPEN, kind, str(tmp_path / 'store')]
    run = lambda: subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    told = [json.loads(run().stdout) for _ in range(2)]
    assert told[0]['rows'] == told[1]['rows'] > 1_000_000
    assert told[1]['seconds'] < 3 and all(t['megabytes'] < 300 for t in told), told
