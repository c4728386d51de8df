"""Conversations as rows: what is learned of them, and that sharing a row changes nothing."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from stores import PAD, chat_store, encoded, masks

from lm.data import chats, pipeline
from lm.data.chat_template import ChatTemplate
from lm.data.chats import ChatRows, WithReplay
from lm.data.prepare import Prepared, PreparedSource, prepare
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError
from lm.model import parameters
from lm.stages import language

T = 32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def found():
    late = ['.' * 33 + 'x', '....', '.' * 32 + 'xx']  # two of them have no answer within a row
    return [encoded(i, mask) for i, mask in enumerate([*masks(300, np.random.default_rng(0)), *late])]


@pytest.fixture
def rows(tmp_path, found):
    return ChatRows(chat_store(tmp_path / 'chats', found), T, seed=3)


def segments(row):
    """{segment: its places}."""
    return {s: np.flatnonzero(row['segments_T'] == s) for s in sorted(set(row['segments_T'].tolist()) - {0})}


def number_of(row, places):
    return (int(row['tokens_T'][places[0]]) - 1) // 40


def expected(ids, trained):
    """What a conversation has in a row: tokens, targets, weights."""
    n = min(len(ids) - 1, T)
    return ids[:n], ids[1 : n + 1], [float(t) for t in trained[1 : n + 1]]


# ---- rows ----


def test_each_conversation_is_in_one_row_of_an_epoch_as_it_is(rows, found):
    seen = Counter()
    for i in range(len(rows)):
        row = rows.row(i)
        assert sum(map(len, segments(row).values())) == np.count_nonzero(row['segments_T'])
        for places in segments(row).values():
            number = number_of(row, places)
            seen[number] += 1
            got = tuple(row[name][places].tolist() for name in ('tokens_T', 'targets_T', 'weights_T'))
            assert got == tuple(map(list, expected(*found[number])))
            assert row['positions_T'][places].tolist() == list(range(len(places)))
        empty = row['segments_T'] == 0
        assert not row['weights_T'][empty].any() and (row['tokens_T'][empty] == PAD).all()
    learned = [i for i, conversation in enumerate(found) if any(expected(*conversation)[2])]
    assert seen == Counter(learned) and len(learned) == len(found) - 2


def test_what_is_cut_and_left_out_is_counted(tmp_path):
    cut, fits, late, none = '.' * 10 + 'x' * 40, '.' * 10 + 'x' * 23, '.' * 33 + 'x' * 5, '.....'
    masks_ = [cut, fits, late, none, '.' * 32 + 'x' * 9, '...xx']
    rows = ChatRows(chat_store(tmp_path / 'chats', [encoded(i, m, step=60) for i, m in enumerate(masks_)]), T, seed=0)
    assert rows.sizes[:].tolist() == [32, 32, 0, 0, 32, 4]
    assert (rows.sizes.cut, rows.sizes.left_out) == (2, 2) and len(rows) == 4
    weights = sorted(int(rows.row(i)['weights_T'].sum()) for i in range(4))
    assert weights == [1, 2, 23, 23], 'of the one whose 33rd token is the first of its answer, that is the one target'


def test_rows_are_a_pure_function_of_the_seed_and_the_number(rows, tmp_path):
    again = ChatRows(rows.store, T, seed=3)
    order = [5, 0, len(rows) + 2, 5, 1]
    ours = [rows.row(i) for i in sorted(order)]
    theirs = {i: again.row(i) for i in order}
    for i, row in zip(sorted(order), ours, strict=True):
        assert all(np.array_equal(row[k], theirs[i][k]) for k in row)
    shown = lambda rows, start: [rows.row(start + i)['tokens_T'].tobytes() for i in range(len(rows))]
    first, second, other = shown(rows, 0), shown(rows, len(rows)), shown(ChatRows(rows.store, T, seed=4), 0)
    assert sorted(first) == sorted(second) == sorted(other)
    assert first != second and first != other and second != other


def test_the_held_out_rows_come_in_order(rows):
    plain = ChatRows(rows.store, T, seed=3, shuffle=False)
    firsts = [number_of(row, segments(row)[1]) for row in map(plain.row, range(len(plain)))]
    assert firsts == [int(plain.plan[r][0]) for r in range(len(plain))]


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer((f'the {i} buckets of a role, and its tables' for i in range(99)), vocab_size=320)


def test_what_is_learned_is_what_the_assistant_says_and_its_end(tmp_path, tokenizer):
    tokenizer.save(tmp_path / 'tokenizer')
    say = lambda i: [
        {'role': 'system', 'content': 'a role'}, {'role': 'user', 'content': f'{i} buckets?'},
        {'role': 'assistant', 'content': f'the {i} <|end|>'}, {'role': 'user', 'content': 'and its tables'},
        {'role': 'assistant', 'content': f'its {i} tables'},
    ]  # fmt: skip
    (tmp_path / 'chats.jsonl').write_text(''.join(json.dumps({'messages': say(i)}) + '\n' for i in range(20)))
    data = prepare(
        mixture=str(tmp_path / 'chats.jsonl'), vocab_size=320, tokenizer=str(tmp_path / 'tokenizer'), heldout=0.2,
        progress=lambda line: None, form=chats.form(ChatTemplate()),
    )  # fmt: skip
    seen = Counter()
    for part in ('train', 'heldout'):
        rows = chats.chat_rows(data.sources[0], part, seq_len=200)
        for row in map(rows.row, range(len(rows))):
            for places in segments(row).values():
                learned = row['targets_T'][places][row['weights_T'][places] > 0].tolist()
                end = tokenizer.controls['<|end|>']
                ends = [k for k, target in enumerate(learned) if target == end]
                assert len(ends) == 2 and ends[-1] == len(learned) - 1
                first, second = learned[: ends[0]], learned[ends[0] + 1 : -1]
                seen[tokenizer.decode(first), tokenizer.decode(second)] += 1
    assert seen == Counter((f'the {i} <|end|>', f'its {i} tables') for i in range(20))


def test_strict_names_the_line_though_the_data_were_prepared_before(tmp_path, tokenizer):
    tokenizer.save(tmp_path / 'tokenizer')
    says = lambda i: {'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'its role'}]}
    file, good = tmp_path / 'mine.jsonl', [json.dumps(says(i)) for i in range(12)]
    file.write_text('\n'.join([*good[:4], '{"messages": "nothing"}', *good[4:]]) + '\n')
    options = {'mixture': str(file), 'vocab_size': 320, 'tokenizer': str(tmp_path / 'tokenizer'), 'heldout': 0.2}
    options |= {'progress': lambda line: None, 'form': chats.form(ChatTemplate())}
    for _ in range(2):
        with pytest.raises(UsageError, match=rf'{file}:5: .*: repair it, or set data.strict=false'):
            prepare(**options, strict=True)
        assert prepare(**options).sources[0].counts['kept'] == 12


def test_what_the_template_refuses_is_not_kept(tmp_path, tokenizer):
    tokenizer.save(tmp_path / 'tokenizer')
    says = lambda i: [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'its role'}]
    told = lambda i: {'messages': [*([{'role': 'system', 'content': 'a'}] if i % 4 == 0 else []), *says(i)]}
    (tmp_path / 'mine.jsonl').write_text(''.join(json.dumps(told(i)) + '\n' for i in range(40)))
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + ChatTemplate().text
    data = prepare(
        mixture=str(tmp_path / 'mine.jsonl'), vocab_size=320, tokenizer=str(tmp_path / 'tokenizer'), heldout=0.2,
        progress=lambda line: None, form=chats.form(ChatTemplate(picky)),
    )  # fmt: skip
    (s,) = data.sources
    assert (s.counts['read'], s.counts['kept'], s.counts['dropped']) == (40, 30, {'template': 10})
    assert s.counts['train_documents'] == s.train.documents == 30 - s.heldout.documents
    assert s.counts['heldout_documents'] == s.heldout.documents


# ---- packed is unpacked ----


def test_a_packed_row_is_its_conversations_one_by_one(tmp_path, tiny, one_device):
    """Loss and gradient, to rounding; without segments they would see each other."""
    draw = np.random.default_rng(1)
    found = [(draw.integers(1, 250, len(m)).tolist(), [c == 'x' for c in m]) for m in masks(8, draw, longest=6)]
    rows = ChatRows(chat_store(tmp_path / 'chats', found), T, seed=0)
    packed = pipeline.stack([rows.row(i) for i in range(len(rows))])
    alone = pipeline.stack([chats.segments_row([c], T, PAD) for c in found])
    assert len(packed['tokens_BT']) < len(found)
    tiny = dataclasses.replace(tiny, layers=1)
    params = parameters.init(jax.random.key(0), tiny)
    loss = language.next_token_loss(tiny, z_loss=1e-2)
    total = lambda p, batch: loss.terms({'policy': p}, batch, jax.random.key(0))[0]['loss']
    ours, theirs = (jax.jit(jax.value_and_grad(total))(params, batch) for batch in (packed, alone))
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(theirs[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-5), ours, theirs)
    assert packed['weights_BT'].sum() == alone['weights_BT'].sum() == sum(sum(t[1:]) for _, t in found)


# ---- several sources, and text beside them ----


def source(name, weight, store):
    return PreparedSource(name, weight, store, store, {})


def test_text_takes_the_share_of_rows_that_it_is_to_have(tmp_path, tokenizer, found):
    one, two = (chat_store(tmp_path / name, found[:50]) for name in ('one', 'two'))
    own = Prepared(tokenizer, (source('one', 0.6, one), source('two', 0.4, two)), 'own')
    text = Prepared(tokenizer, (source('a', 0.5, one), source('b', 0.5, one)), 'text')
    shares = lambda replay, text: chats.mix(WithReplay(own, text, ChatTemplate()), seq_len=T, seed=0, replay=replay)
    mixture = shares(0.25, text)
    np.testing.assert_allclose(mixture.shares / pipeline.PERIOD, [0.45, 0.3, 0.125, 0.125], atol=1e-3)
    first = [mixture.locate(i)[0] for i in range(40)]
    assert Counter(first) == {0: 18, 1: 12, 2: 5, 3: 5}, 'evenly from the start'
    assert len(shares(0.0, text).rows) == len(shares(0.25, None).rows) == 2


def test_a_source_without_an_answer_in_a_row_is_named(tmp_path, tokenizer, found):
    good, late = chat_store(tmp_path / 'a', found), chat_store(tmp_path / 'b', [encoded(0, '.' * 33 + 'x')])
    chats.check(source('a', 1.0, good), seq_len=T)
    with pytest.raises(UsageError, match='no held-out conversation of b has an answer within seq_len=32: set a longer'):
        chats.check(PreparedSource('b', 1.0, good, late, {}), seq_len=T)


def test_questions_are_the_last_answers_that_fit(tmp_path):
    said = [
        encoded(0, '..xx..xxx'),
        encoded(1, '..xx' + '.' * 9 + 'xx'),
        encoded(2, '.' * 12 + 'x'),
        encoded(3, 'xx..'),
    ]
    asked = chats.questions(chat_store(tmp_path / 'chats', said), 9, longest=10)
    assert [(q.prompt, q.answer) for q in asked] == [
        (said[0][0][:6], said[0][0][6:9]), (said[1][0][:2], said[1][0][2:4]),
    ]  # fmt: skip
    assert len(chats.questions(chat_store(tmp_path / 'again', said), 1, longest=10)) == 1
