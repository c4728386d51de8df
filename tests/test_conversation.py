"""A conversation: what the model is shown of it. Its answers are written here, not drawn."""

from types import SimpleNamespace

import pytest

from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import train_tokenizer
from lm.runs.loading import Model
from lm.sampling import conversation
from lm.sampling.conversation import Talker, answer, fitting, forget
from lm.sampling.generate import Generation

SYSTEM = {'role': 'system', 'content': 'Be brief.'}


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer((f'the {i} buckets of a role, and its tables' for i in range(99)), vocab_size=320)


@pytest.fixture
def talk(tokenizer, monkeypatch):
    """talk(talker, text, answer) -> (what the model was shown, what ends its answer, what was warned of)."""
    found, warned = [], []

    def stream(params, cfg, prompts, *, stop_ids, **options):
        found[:] = [prompts[0], stop_ids]
        ids = tokenizer.encode(found_answer[0])
        for n in range(1, len(ids) + 1):
            yield [Generation(ids[:n], n == len(ids))]

    found_answer = ['']
    monkeypatch.setattr(conversation, 'stream', stream)

    def run(talker, text, says):
        found_answer[0] = says
        warned.clear()
        assert ''.join(answer(talker, text, warn=warned.append, max_new_tokens=8)) == says
        return found[0], found[1], list(warned)

    return run


def talker(tokenizer, *turns, template=None, seq_len=64):
    model = Model(
        params=None,
        cfg=SimpleNamespace(context=None),
        tokenizer=tokenizer,
        saved={'config': {'seq_len': seq_len}},
        step=0,
    )
    return Talker('run', model, template, list(turns))


def test_what_was_said_is_shown_again(tokenizer, talk):
    one = talker(tokenizer, SYSTEM, template=ChatTemplate(), seq_len=512)
    ids, stops, warned = talk(one, 'Who?', 'a rôle 😀')
    first = [SYSTEM, {'role': 'user', 'content': 'Who?'}]
    assert ids == ChatTemplate().prompt(tokenizer, first) and stops == ChatTemplate().stop_ids(tokenizer) and not warned
    ids, _, _ = talk(one, 'And?', '')
    second = [*first, {'role': 'assistant', 'content': 'a rôle 😀'}, {'role': 'user', 'content': 'And?'}]
    assert ids == ChatTemplate().prompt(tokenizer, second)
    forget(one)
    assert talk(one, 'Who?', '')[0] == ChatTemplate().prompt(tokenizer, first)


def test_a_run_that_continues_text_remembers_nothing(tokenizer, talk):
    one = talker(tokenizer, SYSTEM)
    for _ in range(2):
        ids, stops, _ = talk(one, 'the bucket', ' of')
        assert ids == [tokenizer.bos_id, *tokenizer.encode('the bucket')] and stops == tokenizer.stop_ids


def test_the_oldest_turns_are_left_out(tokenizer):
    turns = [SYSTEM]
    for i in range(3):
        turns += [{'role': 'user', 'content': f'question {i}'}, {'role': 'assistant', 'content': f'answer {i}'}]
    turns.append({'role': 'user', 'content': 'last'})
    prompt = lambda *kept: ChatTemplate().prompt(tokenizer, kept)
    whole = len(prompt(*turns))
    assert fitting(ChatTemplate(), tokenizer, turns, room=whole) == (prompt(*turns), 0)
    assert fitting(ChatTemplate(), tokenizer, turns, room=whole - 1) == (prompt(SYSTEM, *turns[3:]), 2)
    assert fitting(ChatTemplate(), tokenizer, turns, room=1) == (prompt(SYSTEM, turns[-1]), 6), 'the question stays'
    assert fitting(ChatTemplate(), tokenizer, turns[1:], room=1) == (prompt(turns[-1]), 6)


def test_a_conversation_that_grows_too_long_is_said_once(tokenizer, talk):
    one = talker(tokenizer, template=ChatTemplate(), seq_len=32)
    warnings = [talk(one, 'what is it', 'a role')[2] for _ in range(6)]
    assert sum(map(len, warnings)) == 1 and not warnings[0]
    assert 'the oldest turns are left out' in sum(warnings, [])[0]
    ids, _, _ = talk(one, 'what is it', 'a role')
    assert len(ids) <= 24, 'there is room for the answer'
    another = talker(tokenizer, template=ChatTemplate(), seq_len=32)
    assert 'expect little' in talk(another, 'what ' * 40, 'a role')[2][0]
