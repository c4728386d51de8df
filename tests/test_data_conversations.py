"""Conversations and pairs: every format of the field, everything that can be wrong with a record, every address."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import conversations, defaults, mixtures, sources
from lm.data.records import Counts, content, split_content
from lm.data.sources import open_source
from lm.errors import UsageError


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('LM_DATA', str(tmp_path / 'local'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))


def jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b'\n'.join(lines) + b'\n')
    return str(path)


def read(name, kind, **how):
    counts = Counts()
    return list(open_source(str(name), kind, **how).read(counts)), counts


def short(messages):
    """'u:Hi a:Hello' of messages, to compare by eye."""
    return ' '.join(f'{m["role"][0]}:{m["content"]}' for m in messages)


def said(*texts, first='user'):
    """Messages in turn."""
    roles = ('user', 'assistant') if first == 'user' else ('assistant', 'user')
    return [{'role': roles[i % 2], 'content': text} for i, text in enumerate(texts)]


SYSTEM = {'role': 'system', 'content': 'Be brief.'}


# ---- formats ----

CHATS = {
    'messages': ({'messages': [SYSTEM, *said('Hi', 'Hello')]}, 's:Be brief. u:Hi a:Hello'),
    'several turns': ({'messages': said('1', '2', '3', '4')}, 'u:1 a:2 u:3 a:4'),
    'messages as JSON': ({'messages': json.dumps(said('Hi', 'Hello'))}, 'u:Hi a:Hello'),
    'messages first': ({'messages': said('Hi', 'Hello'), 'prompt': 'no', 'completion': 'no'}, 'u:Hi a:Hello'),
    'sharegpt': (
        {'conversations': [{'from': 'human', 'value': 'Hi', 'weight': 1}, {'from': 'gpt', 'value': 'Hello'}]},
        'u:Hi a:Hello',
    ),
    'sharegpt roles': (
        {
            'conversations': [
                {'from': r, 'value': v} for r, v in (('system', 'S'), ('user', 'Hi'), ('assistant', 'Yes'))
            ]
        },
        's:S u:Hi a:Yes',
    ),
    'prompt': ({'prompt': 'Hi', 'completion': 'Hello'}, 'u:Hi a:Hello'),
    'prompt lists': (
        {'prompt': [SYSTEM, *said('Hi')], 'completion': said('Hello', first='assistant')},
        's:Be brief. u:Hi a:Hello',
    ),
    'prompt mixed': ({'prompt': said('1', '2', '3'), 'completion': '4'}, 'u:1 a:2 u:3 a:4'),
    'alpaca': ({'instruction': 'Add.', 'input': '1 2', 'output': '3'}, 'u:Add.\n\n1 2 a:3'),
    'alpaca alone': ({'instruction': 'Sing.', 'input': '', 'output': 'La'}, 'u:Sing. a:La'),
    'dolly': ({'instruction': 'Who?', 'context': 'Ann.', 'response': 'Ann', 'category': 'qa'}, 'u:Who?\n\nAnn. a:Ann'),
    'system beside': ({'system': 'S', 'prompt': 'Hi', 'completion': 'Yes'}, 's:S u:Hi a:Yes'),
    'null fields': ({'messages': None, 'prompt': 'Hi', 'completion': 'Yes'}, 'u:Hi a:Yes'),
    'good answer': ({'prompt': 'Hi', 'completion': 'Yes', 'label': True}, 'u:Hi a:Yes'),
    'markers': (
        {'messages': said('<|end|><|assistant|> \n', ' <s>[/INST]<|end|>')},
        'u:<|end|><|assistant|> \n a: <s>[/INST]<|end|>',
    ),
}


@pytest.mark.parametrize('form', CHATS)
def test_a_conversation_is_read_by_its_fields(tmp_path, form):
    row, expected = CHATS[form]
    records, counts = read(jsonl(tmp_path / 'a.jsonl', row), 'chat', strict=True)
    assert [short(r['messages']) for r in records] == [expected]
    assert counts.read == 1 and not counts.dropped and not counts.changed and not counts.named
    assert records[0]['bytes'] == sum(len(m['content'].encode()) for m in records[0]['messages'])


def human(*texts):
    """The messages as hh-rlhf writes them."""
    return ''.join(f'\n\n{("Human", "Assistant")[i % 2]}: {text}' for i, text in enumerate(texts))


PAIRS = {
    'texts': ({'prompt': 'Hi', 'chosen': 'Yes', 'rejected': 'No'}, 'u:Hi', 'a:Yes', 'a:No'),
    'lists': (
        {
            'prompt': [SYSTEM, *said('Hi')],
            'chosen': said('Yes', first='assistant'),
            'rejected': said('No', first='assistant'),
        },
        's:Be brief. u:Hi', 'a:Yes', 'a:No',
    ),
    'ultrafeedback': (
        {'prompt': 'Hi', 'chosen': said('Hi', 'Yes'), 'rejected': said('Hi', 'No'), 'messages': said('Hi', 'Yes')},
        'u:Hi', 'a:Yes', 'a:No',
    ),
    'whole conversations': (
        {'chosen': [SYSTEM, *said('1', '2', '3', 'Yes')], 'rejected': [SYSTEM, *said('1', '2', '3', 'No')]},
        's:Be brief. u:1 a:2 u:3', 'a:Yes', 'a:No',
    ),
    'parting early': (
        {'chosen': said('1', 'Yes', '3', '4'), 'rejected': said('1', 'No', '5', '6')},
        'u:1', 'a:Yes u:3 a:4', 'a:No u:5 a:6',
    ),
    'parting at the user': (
        {'chosen': said('1', '2', '3', '4'), 'rejected': said('1', '2', '5', '6')},
        'u:1', 'a:2 u:3 a:4', 'a:2 u:5 a:6',
    ),
    'hh-rlhf': (
        {'chosen': human('1', '2\n\nmore', '3', 'Yes'), 'rejected': human('1', '2\n\nmore', '3', 'No')},
        'u:1 a:2\n\nmore u:3', 'a:Yes', 'a:No',
    ),
    'hh-rlhf prompt': (
        {'prompt': human('1', '2', '3') + '\n\nAssistant:', 'chosen': 'Yes', 'rejected': 'No'},
        'u:1 a:2 u:3', 'a:Yes', 'a:No',
    ),
    'single messages': (
        {
            'conversations': [{'from': 'human', 'value': 'Hi'}],
            'chosen': {'from': 'gpt', 'value': 'Yes'},
            'rejected': {'from': 'gpt', 'value': 'No'},
        },
        'u:Hi', 'a:Yes', 'a:No',
    ),
    'system beside': ({'system': 'S', 'prompt': 'Hi', 'chosen': 'Y', 'rejected': 'N'}, 's:S u:Hi', 'a:Y', 'a:N'),
    'markers': ({'prompt': '<|end|>', 'chosen': '<s>', 'rejected': '</s>'}, 'u:<|end|>', 'a:<s>', 'a:</s>'),
}  # fmt: skip


@pytest.mark.parametrize('form', PAIRS)
def test_a_pair_is_read_by_its_fields(tmp_path, form):
    row, *expected = PAIRS[form]
    records, counts = read(jsonl(tmp_path / 'a.jsonl', row), 'pairs', strict=True)
    [pair] = records
    assert [short(pair[side]) for side in ('prompt', 'chosen', 'rejected')] == expected
    assert pair['margin'] == 0 and pair['label'] == 1 and not counts.dropped and not counts.changed
    texts = [m['content'] for side in ('prompt', 'chosen', 'rejected') for m in pair[side]]
    assert pair['bytes'] == sum(len(text.encode()) for text in texts)


TEXTS = {'prompt': 'Hi', 'chosen': 'Yes', 'rejected': 'No'}
HELPSTEER = {'context': said('Hi'), 'response1': 'Yes', 'response2': 'No'}


@pytest.mark.parametrize(
    ('row', 'chosen', 'margin', 'label'),
    [
        (TEXTS | {'margin': 1.5}, 'a:Yes', 1.5, 1),
        (TEXTS | {'label': 0.75}, 'a:Yes', 0, 0.75),
        (TEXTS | {'label': 0.25}, 'a:No', 0, 0.75),
        (TEXTS | {'label': False}, 'a:No', 0, 1),
        (TEXTS | {'score_chosen': 8.5, 'score_rejected': 7}, 'a:Yes', 1.5, 1),
        (TEXTS | {'score_chosen': 8.5, 'score_rejected': 7, 'margin': 3}, 'a:Yes', 3, 1),
        (HELPSTEER | {'overall_preference': -2}, 'a:Yes', 2, 1),
        (HELPSTEER | {'overall_preference': 3}, 'a:No', 3, 1),
    ],
)
def test_how_much_better_the_chosen_one_is(tmp_path, row, chosen, margin, label):
    [pair], _ = read(jsonl(tmp_path / 'a.jsonl', row), 'pairs', strict=True)
    assert (short(pair['chosen']), pair['margin'], pair['label']) == (chosen, margin, label)
    assert {short(pair['chosen']), short(pair['rejected'])} == {'a:Yes', 'a:No'}


def test_single_answers_are_pairs_with_an_empty_side_for_who_asks(tmp_path):
    rows = [{'prompt': 'Hi', 'completion': 'Yes', 'label': True}, {'prompt': 'Hi', 'completion': 'No', 'label': False}]
    path = jsonl(tmp_path / 'a.jsonl', *rows)
    (good, bad), counts = read(path, 'pairs', unpaired=True)
    assert (short(good['chosen']), good['rejected'], good['label']) == ('a:Yes', [], 1)
    assert (bad['chosen'], short(bad['rejected']), bad['label']) == ([], 'a:No', 1)
    assert read(path, 'pairs', strict=True)[1].dropped == {'unpaired': 2}
    records, counts = read(path, 'chat', strict=True)
    assert [short(r['messages']) for r in records] == ['u:Hi a:Yes'] and counts.dropped == {'bad_answer': 1}


# ---- what can be wrong ----

BAD_CHATS = [
    (b'{"messages": [', 'malformed', 'is no JSON object'),
    (b'[1]', 'malformed', 'is no JSON object'),
    (b'{"messages": "\xff"}', 'not_utf8', 'is not UTF-8'),
    ({'messages': said('Hi', '\ud800')}, 'not_utf8', 'a content is not UTF-8'),
    ({'text': 'Hi', 'n': 1}, 'no_fields', 'has the fields text, n, but a conversation has messages; or conversations;'),
    ({}, 'no_fields', 'has the fields \\(none\\)'),
    ({'prompt': 'Hi', 'completion': None}, 'null', 'completion is null'),
    ({'messages': 'Hi'}, 'not_messages', 'messages is a text, and no list of messages'),
    ({'messages': 5}, 'not_messages', 'messages is no list of messages'),
    ({'messages': ['Hi', 'Hello']}, 'not_messages', 'messages is no list of messages'),
    ({'messages': {'role': 'user', 'content': 5}}, 'not_messages', 'messages is no list of messages'),
    ({f'f{i}': i for i in range(99)}, 'no_fields', 'has the fields f0, f1, .*, f11 and 87 more, but'),
    ({'\ud800': 1}, 'no_fields', 'has the fields [?], but'),
    ({'messages': [{'role': 'cat', 'content': 'x'}]}, 'unknown_role', "message 1 has the role 'cat', not system"),
    ({'messages': [{'content': 'x'}]}, 'unknown_role', 'message 1 has the role None'),
    ({'messages': [*said('Hi'), {'role': 'assistant', 'content': 5}]}, 'not_text', 'message 2 has a content'),
    ({'messages': [*said('Hi'), {'role': 'assistant'}]}, 'not_text', 'message 2 has no content, or a null'),
    ({'instruction': 'Hi', 'output': 5}, 'not_text', 'output is no text'),
    (
        {'messages': said('Hello', 'Hi', first='assistant')},
        'role_order',
        'message 1 is of role assistant after nothing',
    ),
    ({'messages': said('1') + said('2', '3')}, 'role_order', 'message 2 is of role user after user'),
    ({'messages': [*said('1', '2'), SYSTEM, *said('3', '4')]}, 'role_order', 'message 3 is of role system'),
    ({'messages': [SYSTEM, SYSTEM, *said('1', '2')]}, 'role_order', 'message 2 is of role system after system'),
    ({'messages': said('Hi', ' \n')}, 'empty_response', 'message 2, of role assistant, is empty'),
    ({'prompt': 'Hi', 'completion': ''}, 'empty_response', 'message 2, of role assistant, is empty'),
    ({'messages': said('', 'Hello')}, 'empty_prompt', 'message 1, of role user, is empty'),
    ({'messages': said('Hi')}, 'no_response', "no message is the assistant's"),
    ({'messages': []}, 'no_response', "no message is the assistant's"),
]
BAD_PAIRS = [
    ({'prompt': 'Hi', 'chosen': 'Yes'}, 'no_fields', 'has the fields prompt, chosen, but a pair has chosen, rejected;'),
    ({'chosen': 'Yes', 'rejected': 'No'}, 'empty_prompt', 'answers alone, and there is no prompt'),
    ({'prompt': '', 'chosen': 'Yes', 'rejected': 'No'}, 'empty_prompt', 'message 1, of role user, is empty'),
    ({'prompt': [SYSTEM], 'chosen': 'Yes', 'rejected': 'No'}, 'empty_prompt', 'there is no prompt'),
    ({'prompt': 'Hi', 'chosen': '', 'rejected': 'No'}, 'empty_response', 'message 2, of role assistant, is empty'),
    ({'prompt': 'Hi', 'chosen': 'Yes', 'rejected': ' '}, 'empty_response', 'message 2, of role assistant, is empty'),
    ({'chosen': said('1', '2'), 'rejected': said('1')}, 'empty_response', 'rejected has no messages'),
    ({'prompt': 'Hi', 'chosen': 'Yes', 'rejected': 'Yes'}, 'equal_sides', 'chosen and rejected are equal'),
    ({'chosen': said('1', '2'), 'rejected': said('1', '2')}, 'equal_sides', 'chosen and rejected are equal'),
    ({'chosen': said('1', '2'), 'rejected': said('3', '4')}, 'no_shared_prompt', 'do not begin with the same message'),
    ({'prompt': 'Hi', 'chosen': 5, 'rejected': 'No'}, 'not_messages', 'chosen is no list of messages'),
    ({'prompt': said('1', '2'), 'chosen': 'Yes', 'rejected': 'No'}, 'role_order', 'assistant after assistant'),
    (TEXTS | {'margin': 'wide'}, 'not_number', "margin is 'wide', no number"),
    (TEXTS | {'margin': -1}, 'margin', 'margin is -1, below 0'),
    (TEXTS | {'margin': 1e39}, 'margin', 'which float32 has no room for'),
    (TEXTS | {'score_chosen': 1e308, 'score_rejected': -1e308}, 'margin', 'margin is inf, which float32 has no room'),
    (HELPSTEER | {'overall_preference': 1e39}, 'margin', 'which float32 has no room for'),
    (TEXTS | {'label': 1.5}, 'label', 'label is 1.5, no probability'),
    (TEXTS | {'score_chosen': 1, 'score_rejected': 2}, 'scores', 'score_chosen is below score_rejected'),
]
BAD = [('chat', *bad) for bad in BAD_CHATS] + [('pairs', *bad) for bad in BAD_PAIRS]
GOOD = {'chat': {'messages': said('Hi', 'Hello')}, 'pairs': TEXTS}


@pytest.mark.parametrize(('kind', 'row', 'reason', 'says'), BAD, ids=[f'{b[0]}-{i}-{b[2]}' for i, b in enumerate(BAD)])
def test_a_malformed_record_is_named_and_left_out_or_fatal(tmp_path, kind, row, reason, says):
    path = jsonl(tmp_path / 'a.jsonl', GOOD[kind], row, GOOD[kind])
    records, counts = read(path, kind)
    assert len(records) == 2 and counts.read == 3 and counts.dropped == {reason: 1}
    [named] = counts.named
    assert named.startswith(f'{path}:2: ')
    with pytest.raises(UsageError, match=says) as e:
        read(path, kind, strict=True)
    assert str(e.value).startswith(named) and '\n' not in str(e.value) and 'data.strict=false' in str(e.value)


@pytest.mark.parametrize('row', [TEXTS | {'label': 0.5}, TEXTS | {'score_chosen': 7, 'score_rejected': 7},
                                 HELPSTEER | {'overall_preference': 0}])  # fmt: skip
def test_a_tie_teaches_nothing_and_is_no_mistake(tmp_path, row):
    records, counts = read(jsonl(tmp_path / 'a.jsonl', row), 'pairs', strict=True)
    assert not records and counts.dropped == {'tie': 1} and not counts.named


def test_what_is_changed_is_counted(tmp_path):
    rows = [
        {'messages': said('1', '2', '3')},
        {'messages': [SYSTEM | {'content': ' '}, *said('1', '2')]},
    ]
    dropped = {'messages': said('only', '', 'a user')}
    assert not read(jsonl(tmp_path / 'dropped.jsonl', dropped), 'chat')[1].changed
    records, counts = read(jsonl(tmp_path / 'a.jsonl', *rows), 'chat', strict=True)
    assert [short(r['messages']) for r in records] == ['u:1 a:2'] * 2 and not counts.dropped
    assert counts.changed == {'trailing_user': 1, 'empty_system': 1}
    pair = {'chosen': said('1', 'Yes', '3'), 'rejected': said('1', 'No')}
    [record], counts = read(jsonl(tmp_path / 'b.jsonl', pair), 'pairs', strict=True)
    assert short(record['chosen']) == 'a:Yes' and counts.changed == {'trailing_user': 1}


# ---- addresses ----


def test_ids_and_meta_come_from_the_record(tmp_path):
    row = GOOD['chat'] | {'id': 7, 'topic': 'x', 'tags': ['no'], 'score': 0.5}
    records, _ = read(jsonl(tmp_path / 'a.jsonl', row, GOOD['chat']), 'chat')
    assert [r['id'] for r in records] == ['7', 'a.jsonl:2']
    assert records[0]['meta'] == {'topic': 'x', 'score': 0.5} and records[0]['source'].endswith('a.jsonl')


def test_a_column_can_hold_the_conversation(tmp_path):
    path = jsonl(tmp_path / 'a.jsonl', {'talk': said('Hi', 'Hello'), 'messages': said('no', 'no')}, GOOD['chat'])
    records, counts = read(f'{path}#talk', 'chat')
    assert [short(r['messages']) for r in records] == ['u:Hi a:Hello'] and counts.dropped == {'null': 1}
    with pytest.raises(UsageError, match='pairs are told by their fields: leave out #talk'):
        open_source(f'{path}#talk', 'pairs')


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_parquet_files_folders_and_patterns(tmp_path):
    parquet(tmp_path / 'd' / 'sub' / 'a.parquet', [GOOD['chat'] | {'n': 1}, {'messages': said('x')}])
    jsonl(tmp_path / 'd' / 'b.jsonl', {'prompt': '1', 'completion': '2'})
    (tmp_path / 'd' / 'c.txt').write_text('text is no conversation')
    records, counts = read(tmp_path / 'd', 'chat')
    assert sorted(short(r['messages']) for r in records) == ['u:1 a:2', 'u:Hi a:Hello']
    assert counts.dropped == {'no_response': 1, '.txt': 1} and counts.named[0].endswith(
        "a.parquet:1: no message is the assistant's"
    )
    assert len(read(tmp_path / 'd' / '*.jsonl', 'chat')[0]) == 1
    with pytest.raises(UsageError, match='c.txt is plain text, and no table'):
        open_source(str(tmp_path / 'd' / '*'), 'chat')
    (tmp_path / 'e').mkdir()
    with pytest.raises(UsageError, match=r'holds no file that ends with .parquet .json'):
        open_source(str(tmp_path / 'e'), 'pairs')


def test_columns_without_a_format_are_one_line_before_anything_is_read(tmp_path):
    path = parquet(tmp_path / 'a.parquet', [{'text': 'Hi', 'n': 1}])
    for kind, says in (('chat', 'has the fields text, n, but a conversation'), ('pairs', 'but a pair has chosen')):
        with pytest.raises(UsageError, match=says):
            open_source(path, kind).check()
    with pytest.raises(UsageError, match="has no column 'talk': it has text, n"):
        open_source(f'{path}#talk', 'chat').check()


def test_a_text_that_is_not_utf8_spoils_its_own_row_of_a_parquet_file(tmp_path):
    values = pa.array([b'one', b'\xff', b'three'])
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({'prompt': text, 'completion': ['1', '2', '3']}), tmp_path / 'a.parquet')
    records, counts = read(tmp_path / 'a.parquet', 'chat')
    assert [short(r['messages']) for r in records] == ['u:one a:1', 'u:three a:3'] and counts.dropped == {'not_utf8': 1}


def test_prepared_tfds(tmp_path):
    import tensorflow_datasets as tfds

    class Talk(defaults.Builder, skip_registration=True):
        def _info(self):
            message = {'role': tfds.features.Text(), 'content': tfds.features.Text()}
            features = {'messages': tfds.features.Sequence(message), 'label': tfds.features.Scalar(np.int64)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    examples = [{'messages': said('Hi', 'Hello', 'How?', 'So'), 'label': 3}]
    Talk('talk', (), examples, data_dir=tmp_path / 'tfds', file_format='array_record').download_and_prepare()
    records, counts = read('tfds:talk', 'chat', strict=True)
    assert [short(r['messages']) for r in records] == ['u:Hi a:Hello u:How? a:So'] and counts.read == 1
    assert read('tfds:talk', 'pairs')[1].dropped == {'unpaired': 1}


def test_dolly_comes_from_tfds(tmp_path):
    example = {'instruction': 'Who?', 'context': '', 'response': 'Ann', 'category': 'qa'}
    options = {'data_dir': tmp_path / 'tfds', 'file_format': 'array_record'}
    with pytest.raises(UsageError, match='is not prepared in'):
        open_source('dolly', 'chat')
    defaults.Builder('databricks_dolly', tuple(example), [example], **options).download_and_prepare()
    [record], _ = read('dolly', 'chat', strict=True)
    assert short(record['messages']) == 'u:Who? a:Ann' and record['meta'] == {'category': 'qa'}


def datasets():
    return pytest.importorskip('datasets', reason="pip install -e '.[hub]'")


def test_a_dataset_of_the_hubs_library(tmp_path):
    library = datasets()
    rows = [GOOD['chat'] | {'topic': 'x'}, {'messages': said('x'), 'topic': 'y'}]
    library.Dataset.from_list(rows).save_to_disk(str(tmp_path / 'one'))
    name = f'hf:{tmp_path}/one'
    records, counts = read(name, 'chat')
    assert [(short(r['messages']), r['meta']) for r in records] == [('u:Hi a:Hello', {'topic': 'x'})]
    assert counts.named == [f"{name}:1: no message is the assistant's"]
    assert len(read(f'{name}#messages', 'chat')[0]) == 1
    with pytest.raises(UsageError, match='has the fields messages, topic, but a pair has chosen'):
        open_source(name, 'pairs')
    with pytest.raises(UsageError, match="has no column 'talk'"):
        open_source(f'{name}#talk', 'chat')


# Rows as the pages of the named datasets show them.
SHARE = [{'from': 'human', 'value': 'Hi', 'weight': None}, {'from': 'gpt', 'value': 'Hello', 'weight': None}]
ULTRA = {'prompt': 'Hi', 'prompt_id': 'p', 'chosen': said('Hi', 'Yes'), 'rejected': said('Hi', 'No'),
         'messages': said('Hi', 'Yes'), 'score_chosen': 8.0, 'score_rejected': 7.5}  # fmt: skip
ROWS = {
    'no_robots': {'prompt': 'Hi', 'prompt_id': 'p', 'messages': said('Hi', 'Hello'), 'category': 'Chat'},
    'openhermes': {'conversations': SHARE, 'system_prompt': None, 'category': 'x', 'idx': '1'},
    'smoltalk': {'messages': said('Hi', 'Hello'), 'source': 'x'},
    'tulu-3-sft': {'id': 'x', 'messages': said('Hi', 'Hello'), 'source': 'x'},
    'ultrachat': {'prompt': 'Hi', 'prompt_id': 'p', 'messages': said('Hi', 'Hello')},
    'helpsteer3': HELPSTEER | {'overall_preference': -1, 'domain': 'x', 'language': 'english'},
    'hh-rlhf': {'chosen': human('Hi', 'Yes'), 'rejected': human('Hi', 'No')},
    'tulu-3-pairs': {'id': 'x', 'prompt': 'Hi', 'chosen': said('Hi', 'Yes'), 'rejected': said('Hi', 'No')},
    'ultrafeedback-binarized': ULTRA,
}


def test_every_named_dataset_has_a_row_here():
    assert {*ROWS, 'dolly'} == {name for name, named in mixtures.NAMED.items() if named.kind != 'text'}


@pytest.mark.parametrize('name', ROWS)
def test_a_named_dataset_is_read_from_a_local_copy(tmp_path, name):
    library = datasets()
    kind = mixtures.NAMED[name].kind
    split = mixtures.NAMED[name].source.partition('@')[2]
    one, two = (library.Dataset.from_list([ROWS[name]] * n) for n in (1, 2))
    library.DatasetDict({split: one, 'other': two}).save_to_disk(str(tmp_path / 'local' / name))
    [record], _ = read(name, kind, strict=True)
    found = short(record['messages'] if kind == 'chat' else record['prompt'] + record['chosen'])
    assert found == ('u:Hi a:Hello' if kind == 'chat' else 'u:Hi a:Yes')


@pytest.mark.parametrize(
    ('name', 'kind', 'says'),
    [
        ('smoltalk', 'text', "'smoltalk' holds conversations, not text: name one of botocore, chitchat, c4"),
        ('botocore', 'chat', "'botocore' holds text, not conversations: name one of operations, smalltalk, dolly"),
        (
            'operations',
            'pairs',
            'holds conversations, not pairs of answers: name one of programmatic, ratings, decline',
        ),
        ('hh-rlhf', 'chat', 'holds pairs of answers, not conversations'),
        ('smaltalk', 'chat', "did you mean 'smalltalk'"),
        ('zzz', 'pairs', 'known: programmatic, ratings, decline, helpsteer3'),
        ('no/such.jsonl', 'chat', 'does not exist: give a .jsonl, .csv or .parquet file'),
    ],
)
def test_the_wrong_kind_is_one_line(name, kind, says):
    with pytest.raises(UsageError, match=says) as e:
        open_source(name, kind)
    assert '\n' not in str(e.value)


# ---- what a source is ----


def test_state_differs_where_the_records_do(tmp_path, monkeypatch):
    path = jsonl(tmp_path / 'a.jsonl', GOOD['chat'])
    state = open_source(path, 'chat').state
    assert open_source(path, 'chat', strict=True).state == state, 'who is told differs, not what is read'
    assert open_source(path, 'pairs').state != state != open_source(path).state
    assert open_source(path, 'pairs', unpaired=True).state != open_source(path, 'pairs').state
    monkeypatch.setattr(conversations, 'RECIPE', conversations.RECIPE + 1)
    assert open_source(path, 'chat').state != state


def test_content_tells_records_apart_and_pairs_are_split_by_their_prompt(tmp_path):
    [one], _ = read(jsonl(tmp_path / 'a.jsonl', TEXTS), 'pairs')
    [other], _ = read(jsonl(tmp_path / 'b.jsonl', TEXTS | {'rejected': 'Never', 'id': 'x'}), 'pairs')
    assert content(one) != content(other) and split_content(one) == split_content(other)
    assert content(one) == content(one | {'id': 'y', 'meta': {'a': 1}})
    [chat], _ = read(jsonl(tmp_path / 'c.jsonl', GOOD['chat']), 'chat')
    assert split_content(chat) == content(chat)
    [text], _ = read(jsonl(tmp_path / 'd.jsonl', {'text': 'zwölf'}), 'text')
    assert content(text) == 'zwölf'.encode()


def test_default_names_are_the_defaults():
    for kind in ('chat', 'pairs'):
        assert sources.DEFAULTS[kind] == tuple(n for n, d in defaults.DEFAULTS.items() if d.kind == kind)


TALKS = [said('Hi', 'Hello'), said('1 + 1?', '2'), said('Bye', 'See you')]


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('lines.jsonl', '\n'.join(map(json.dumps, TALKS))),
        ('lists.json', json.dumps(TALKS, indent=1)),
        ('one_line.json', json.dumps(TALKS)),
        ('mixed.json', json.dumps([{'messages': TALKS[0]}, *TALKS[1:]])),
    ],
)
def test_a_bare_list_of_messages_is_a_conversation(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    records, counts = read(tmp_path / name, 'chat', strict=True)
    assert [[m['content'] for m in r['messages']] for r in records] == [[m['content'] for m in t] for t in TALKS]
    assert counts.read == 3


def test_one_list_of_messages_is_one_conversation_and_a_list_of_records_is_none(tmp_path):
    (tmp_path / 'one.json').write_text(json.dumps(TALKS[0]))
    assert len(read(tmp_path / 'one.json', 'chat', strict=True)[0]) == 1
    letters = [{'from': 'Ann', 'text': 'Hello'}, {'from': 'Bob', 'text': 'Hi'}]
    (tmp_path / 'letters.json').write_text(json.dumps(letters))
    assert [r['text'] for r in read(tmp_path / 'letters.json', 'text')[0]] == ['Hello', 'Hi']


def test_the_first_three_of_each_reason_are_named(tmp_path):
    wrong = [{'messages': 'text'}] * 5 + [{'messages': said('')}] * 2 + [b'nonsense'] * 4
    _, counts = read(jsonl(tmp_path / 'a.jsonl', *wrong, GOOD['chat']), 'chat')
    assert counts.read == 12 and sum(counts.dropped.values()) == 11
    assert [int(problem.split(':')[1]) for problem in counts.named] == [1, 2, 3, 6, 7, 8, 9, 10]
