"""What messages and records say beside a role and a content: it is followed, or counted by its key."""

import json

import pytest

from lm.data.records import Counts, content
from lm.data.sources import open_source


def read(tmp_path, kind, *rows, **how):
    path = tmp_path / 'a.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    counts = Counts()
    return list(open_source(str(path), kind, **how).read(counts)), counts


def asked(text='Hi', **more):
    return {'role': 'user', 'content': text, **more}


def said(text='Yes', **more):
    return {'role': 'assistant', 'content': text, **more}


def short(messages):
    return ' '.join(f'{m["role"][0]}:{m["content"]}' for m in messages)


CALL = {'id': 'c1', 'type': 'function', 'function': {'name': 'add', 'arguments': {'b': 2, 'a': 1}}}
AS_TEXT = CALL | {'function': {'name': 'add', 'arguments': '{"b": 2, "a": 1}'}}
TOOL = {'type': 'function', 'function': {'name': 'add', 'description': 'Adds.'}}

# What a message becomes, beside its role.
FOLLOWED = {
    'parts': (said([{'type': 'text', 'text': 'Ye'}, {'type': 'text', 'text': 's', 'image_url': None}]), {}),
    'one part': (said({'type': 'text', 'text': 'Yes'}), {}),
    'output parts': (said([{'type': 'output_text', 'text': 'Yes'}]), {}),
    'thoughts': (said(reasoning_content='Hm.'), {'reasoning_content': 'Hm.'}),
    'thoughts by other names': (said(thinking='Hm.', reasoning=None), {'reasoning_content': 'Hm.'}),
    'thoughts in parts': (
        said([{'type': 'thinking', 'thinking': 'Hm.'}, {'type': 'text', 'text': 'Yes'}]),
        {'reasoning_content': 'Hm.'},
    ),
    'no thoughts': (said(reasoning_content=' ', tool_calls=[], refusal=None, annotations=[]), {}),
    'name': (said(name='Ann'), {'name': 'Ann'}),
    'weight': (said(weight=1), {}),
    'calls': (said(tool_calls=[CALL]), {'tool_calls': [CALL]}),
    'calls as text': (said(tool_calls=json.dumps([AS_TEXT])), {'tool_calls': [CALL]}),
    'calls of a table': (
        said(tool_calls=[CALL | {'function': {'name': 'add', 'arguments': {'b': 2, 'a': 1, 'c': None}}}]),
        {'tool_calls': [CALL]},
    ),
}


@pytest.mark.parametrize('name', FOLLOWED)
def test_what_a_message_says_is_followed(tmp_path, name):
    message, expected = FOLLOWED[name]
    [record], counts = read(tmp_path, 'chat', {'messages': [asked(), message]}, strict=True)
    assert record['messages'][1] == said() | expected and not counts.unused and not counts.changed
    pair = {'prompt': 'Hi', 'chosen': [message], 'rejected': 'No'}
    [record], _ = read(tmp_path, 'pairs', pair, strict=True)
    assert record['chosen'] == [said() | expected]
    plain = {'prompt': 'Hi', 'chosen': 'Yes', 'rejected': 'No'}
    [other], _ = read(tmp_path, 'pairs', plain)
    assert (content(record) == content(other)) == (not expected), 'what differs in it is no duplicate'


@pytest.mark.parametrize('key', ['weight', 'train', 'loss_mask', 'loss'])
def test_an_answer_that_weighs_nothing_is_not_learned(tmp_path, key):
    rows = [
        {'messages': [asked('1'), said('2', **{key: 0}), asked('3'), said('4', **{key: True})]},
        {'messages': [asked('1'), said('2'), asked('3'), said('4', **{key: False})]},
        {'messages': [asked('1'), said('2', **{key: 0})]},
        {'messages': [asked('1'), said('2', **{key: 0.5})]},
    ]
    (mixed, cut), counts = read(tmp_path, 'chat', *rows)
    assert [m.get('train', True) for m in mixed['messages']] == [True, False, True, True]
    assert short(cut['messages']) == 'u:1 a:2' and counts.changed == {'trailing_answer': 1, 'trailing_user': 1}
    assert counts.dropped == {'no_learned_answer': 1, key: 1}
    assert counts.named == [f'{tmp_path}/a.jsonl:4: {key} of message 2 is 0.5, neither 0 nor 1']


def test_tools_have_their_turns(tmp_path):
    turns = [asked(), said('', tool_calls=[CALL]), {'role': 'tool', 'content': '3', 'tool_call_id': 'c1'}, said()]
    old = [
        asked(), said(None, function_call={'name': 'add', 'arguments': '{}'}),
        {'role': 'function', 'name': 'add', 'content': '3'}, said(),
    ]  # fmt: skip
    share = [
        {'from': 'human', 'value': 'Hi'}, {'from': 'function_call', 'value': '{"name": "add", "arguments": {}}'},
        {'from': 'observation', 'value': '3'}, {'from': 'gpt', 'value': 'Yes'},
    ]  # fmt: skip
    rows = [
        {'messages': turns, 'tools': [TOOL]},
        {'messages': old, 'functions': json.dumps([TOOL['function']])},
        {'conversations': share, 'tools': json.dumps([TOOL])},
        {'messages': turns[:-1]},
    ]
    records, counts = read(tmp_path, 'chat', *rows, strict=True)
    assert [short(r['messages']) for r in records] == ['u:Hi a: t:3 a:Yes'] * 3 + ['u:Hi a:']
    assert [r.get('tools') for r in records] == [[TOOL]] * 3 + [None] and counts.changed == {'trailing_tool': 1}
    assert records[0]['messages'][1]['tool_calls'] == [CALL] and records[0]['messages'][2]['tool_call_id'] == 'c1'
    for record in records[1:3]:
        assert record['messages'][1]['tool_calls'][0]['function'] == {'name': 'add', 'arguments': {}}
    assert list(json.loads(content(records[0]))[0][1]['tool_calls'][0]['function']['arguments']) == ['b', 'a']


HISTORY = {'instruction': 'And?', 'input': 'at night', 'history': [['Sky?', 'Blue.'], ['Sea?', 'Green.']]}


def test_what_was_said_before_stands_before(tmp_path):
    rows = [
        HISTORY | {'output': 'Black.', 'system': 'Be brief.'},
        HISTORY | {'output': 'Black.', 'history': []},
        {'prompt': 'And?', 'completion': 'Black.', 'history': [['Sky?', 'Blue.']], 'system_prompt': 'S'},
    ]
    records, _ = read(tmp_path, 'chat', *rows, strict=True)
    assert [short(r['messages']) for r in records] == [
        's:Be brief. u:Sky? a:Blue. u:Sea? a:Green. u:And?\n\nat night a:Black.',
        'u:And?\n\nat night a:Black.',
        's:S u:Sky? a:Blue. u:And? a:Black.',
    ]
    [pair], _ = read(tmp_path, 'pairs', HISTORY | {'chosen': 'Black.', 'rejected': 'Red.'}, strict=True)
    assert short(pair['prompt']) == 'u:Sky? a:Blue. u:Sea? a:Green. u:And?\n\nat night'
    assert read(tmp_path, 'chat', HISTORY | {'output': 'x', 'history': [['1', '2', '3']]})[1].dropped == {'history': 1}


def test_what_is_not_used_is_counted_by_its_key_with_its_first_place(tmp_path):
    rows = [
        {'messages': [asked(), said()], 'topic': 'x'},
        {'messages': [asked(toxic=False, language='en'), said(logprobs=[1])], 'chat_template_kwargs': {'a': 1}},
        {'messages': [asked(language='de', reasoning_content='?'), said('2')], 'weight': 0.3, 'scores': [1]},
        {'messages': [asked(), said('3')], 'weight': 0},
        {'messages': [asked(), said('4')], 'images': ['a.png']},
        {'messages': [asked(), said([{'type': 'image_url', 'image_url': 'x'}])]},
    ]
    records, counts = read(tmp_path, 'chat', *rows)
    place = f'{tmp_path}/a.jsonl'
    assert counts.unused == {
        'toxic': [1, f'{place}:2'], 'language': [2, f'{place}:2'], 'logprobs': [1, f'{place}:2'],
        'chat_template_kwargs': [1, f'{place}:2'], 'reasoning_content': [1, f'{place}:3'],
        'weight': [1, f'{place}:3'], 'scores': [1, f'{place}:3'],
    }  # fmt: skip
    assert len(records) == 3 and counts.dropped == {'weight_0': 1, 'images': 1, 'not_text': 1}
    assert counts.named[1] == f'{place}:6: message 2 has a content with a part of type image_url: only text is read'


@pytest.mark.parametrize(
    ('kind', 'row', 'says'),
    [
        ('pairs', {'prompt': 'q', 'chosen': 'a', 'rejected': None}, 'rejected is null'),
        ('pairs', {'prompt': 'q', 'chosen': None, 'rejected': None}, 'chosen and rejected are null'),
        ('pairs', {'prompt': None, 'chosen': 'a', 'rejected': 'b'}, 'there is no prompt, or it is null'),
        (
            'pairs',
            {'context': 'q', 'response1': 'a', 'response2': 'b', 'overall_preference': None},
            'preference is null',
        ),
        ('pairs', {'prompt': 'q', 'chosen': [said(None)], 'rejected': 'b'}, 'message 1 has no content, or a null'),
        ('chat', {'messages': None}, 'messages is null'),
        ('chat', {'messages': [asked(), None]}, 'message 2 is null'),
        ('chat', {'instruction': 'a', 'output': None}, 'output is null'),
    ],
)
def test_a_null_is_the_reason(tmp_path, kind, row, says):
    records, counts = read(tmp_path, kind, row)
    assert not records and len(counts.named) == 1 and says in counts.named[0]


@pytest.mark.parametrize(
    'row',
    [
        {'prompt': 'Hi', 'completion': 'No', 'label': False},
        {'prompt': 'Hi', 'completion': 'No', 'label': 'False'},
        {'messages': [asked(), said('No')], 'label': False},
        {'conversations': [asked(), said('No')], 'kto_tag': False},
        {'instruction': 'Hi', 'output': 'No', 'kto_tag': False},
    ],
)
def test_a_single_answer_with_a_label(tmp_path, row):
    [bad], _ = read(tmp_path, 'pairs', row, unpaired=True, strict=True)
    assert (short(bad['prompt']), bad['chosen'], short(bad['rejected'])) == ('u:Hi', [], 'a:No')
    key = 'kto_tag' if 'kto_tag' in row else 'label'
    [good], _ = read(tmp_path, 'pairs', row | {key: True}, unpaired=True, strict=True)
    assert (short(good['chosen']), good['rejected']) == ('a:No', [])
    assert read(tmp_path, 'pairs', row)[1].dropped == {'unpaired': 1}
    assert read(tmp_path, 'chat', row)[1].dropped == {'bad_answer': 1}, 'what is not wanted is not imitated'
