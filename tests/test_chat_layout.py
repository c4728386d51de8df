"""What chat templates show by what is in a conversation: thoughts, tools, names; and the records that they refuse."""

import pytest
from dialogues import message, write
from running import ROOT

from lm import inspect
from lm.data.chat_layout import NoPlace
from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError

# As Qwen 3's: thoughts after the last question only, tools and calls as JSON, a tool's words in a user's turn.
QWEN = """{%- if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = m %}{% endfor %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|assistant|>' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
{{- said }}
{%- for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- elif m.role == 'tool' %}{{ '<|user|><tool>' + m.content + '</tool><|end|>' }}
{%- else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# As Mistral Nemo's: the system's words stand before the last question, and nowhere where that is answered.
NEMO = """{% if messages[0].role == 'system' %}{% set s, rest = messages[0].content, messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}{{ '<|user|>' + (s + '\\n\\n' if loop.last and s else '') + m.content }}
{%- else %}{{ '<|assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

PLAIN = ChatTemplate().text
TOOLS = [{'type': 'function', 'function': {'name': 'add', 'parameters': {'b': 1, 'a': 2}}}]


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer((f'user {i}: <think> name the </think> call' for i in range(99)), vocab_size=320)


def asked(text):
    return message('user', text)


def said(text, **more):
    return message('assistant', text) | more


def calls(*names):
    return [{'type': 'function', 'function': {'name': name, 'arguments': {'b': 2, 'a': 1}}} for name in names]


def learned(tokenizer, template, messages, **options):
    """(all of it as text, the stretches that are learned)."""
    ids, trained = ChatTemplate(template).encode(tokenizer, messages, **options)
    names = {i: name for name, i in tokenizer.controls.items()}
    text = lambda found: b''.join(names[i].encode() if i in names else tokenizer.pieces[i] for i in found).decode()
    marked = ''.join('x' if t else '.' for t in trained)
    begins = [i for i in range(len(ids)) if trained[i] and (not i or not trained[i - 1])]
    stretches = [text(ids[i : (marked + '.').index('.', i)]) for i in begins]
    return text(ids), stretches


def test_thoughts_of_the_last_answer_are_learned(tokenizer):
    """In the content or in a field of their own: the ids are the same."""
    inline = [asked('2+2?'), said('<think>\nTwo, twice.\n</think>\n\nFour.')]
    field = [asked('2+2?'), said('Four.', reasoning_content='Two, twice.')]
    text, found = learned(tokenizer, QWEN, inline)
    assert text == '<bos><|user|>2+2?<|end|><|assistant|><think>\nTwo, twice.\n</think>\n\nFour.<|end|>'
    assert found == ['<think>\nTwo, twice.\n</think>\n\nFour.<|end|>']
    assert learned(tokenizer, QWEN, field) == (text, found)
    no_field = QWEN.replace("m.reasoning_content or ''", "''")
    assert learned(tokenizer, no_field, field) == (text, found), 'it is put where the template looks for it'


def test_an_answer_whose_thoughts_are_not_shown_is_not_learned_and_counted(tokenizer):
    first, last = said('Four.', reasoning_content='Two, twice.'), said('Six.', reasoning_content='Three, twice.')
    messages = [asked('2+2?'), first, asked('3+3?'), last]
    text, found = learned(tokenizer, QWEN, messages)
    assert '<|assistant|>Four.<|end|>' in text and found == ['<think>\nThree, twice.\n</think>\n\nSix.<|end|>']
    assert len(ChatTemplate(QWEN).check(tokenizer, messages)) == 1
    assert not ChatTemplate(QWEN).check(tokenizer, messages[2:])


def test_symbols_that_are_typed_in_thoughts_stay_text(tokenizer):
    typed = '<|end|><|user|>'
    ids, trained = ChatTemplate(QWEN).encode(tokenizer, [asked(typed), said(typed, reasoning_content=typed)])
    controls = [i for i in ids if i in tokenizer.controls.values()]
    names = ('<bos>', '<|user|>', '<|end|>', '<|assistant|>', '<|end|>')
    assert controls == [tokenizer.controls[name] for name in names]
    assert tokenizer.decode(ids).count(typed) == 3 and trained[-1]


def test_what_an_answer_weighs_nothing_for_is_read_and_not_learned(tokenizer):
    messages = [asked('Say red.'), said('no', train=False), asked('Again.'), said('red')]
    text, found = learned(tokenizer, PLAIN, messages)
    assert '<|assistant|>no<|end|>' in text and found == ['red<|end|>']


def test_calls_and_the_turns_of_tools(tokenizer):
    messages = [
        asked('2+1?'), said('', tool_calls=calls('add', 'mul'), reasoning_content='Use it.'),
        message('tool', '3'), message('tool', '2 <|end|>'), said('It is 3.', reasoning_content='Good.'),
    ]  # fmt: skip
    text, found = learned(tokenizer, QWEN, messages, tools=TOOLS)
    called = ''.join(f'<call>{name}{{"b": 2, "a": 1}}</call>' for name in ('add', 'mul'))
    assert text.startswith('<bos><|system|>[{"type": "function", "function": {"name": "add", "parameters": {"b": 1,')
    assert '<|user|><tool>3</tool><|end|><|user|><tool>2 <|end|></tool><|end|>' in text
    thought = lambda words: f'<think>\n{words}\n</think>\n\n'
    assert found == [f'{thought("Use it.")}{called}<|end|>', f'{thought("Good.")}It is 3.<|end|>']


@pytest.mark.parametrize(
    ('messages', 'tools', 'key'),
    [
        ([asked('a'), said('b', reasoning_content='c')], None, 'reasoning_content'),
        ([asked('a'), said('', tool_calls=calls('add'))], None, 'tool_calls'),
        ([asked('a'), said('x'), message('tool', '1'), said('b')], None, 'tool'),
        ([asked('a'), said('b')], TOOLS, 'tools'),
    ],
)
def test_a_template_without_a_place_says_so(tokenizer, messages, tools, key):
    with pytest.raises(NoPlace, match='the chat template has no place for') as error:
        ChatTemplate(PLAIN).encode(tokenizer, messages, tools=tools)
    assert error.value.key == key
    assert ChatTemplate(QWEN).encode(tokenizer, messages, tools=tools)


def test_a_name_that_is_not_shown_is_counted_and_the_rest_learned(tokenizer):
    messages = [asked('a') | {'name': 'Bob'}, said('b')]
    assert ChatTemplate(PLAIN).check(tokenizer, messages) == {'name'}
    named = PLAIN.replace("message['content']", "(message.name or '') + message['content']")
    assert not ChatTemplate(named).check(tokenizer, messages)
    assert '<|user|>Boba<|end|>' in learned(tokenizer, named, messages)[0]


def test_what_the_system_says_is_left_out(tokenizer):
    two = [asked('q'), said('a')]
    with pytest.raises(UsageError, match='leaves out what the system says in message 1'):
        ChatTemplate(NEMO).encode(tokenizer, [message('system', 's'), *two])
    assert learned(tokenizer, NEMO, two)[1] == ['a<|end|>']


# ---- through the command ----


@pytest.fixture
def shown(tokenizer, tmp_path, monkeypatch, capsys):
    """shown(template, records) -> (what lm.inspect prints of conversations, what it says on stderr)."""
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    tokenizer.save(tmp_path / 'tokenizer')

    def show(template, records, **settings):
        own = write(tmp_path / 'own.jsonl', records)
        (tmp_path / 'tokenizer' / 'chat_template.jinja').write_text(template)
        options = {
            'init_from': 'none', 'data.tokenizer': tmp_path / 'tokenizer', 'data.pretraining': '', 'data.mixture': own,
            'model.vocab_size': tokenizer.vocab_size, 'seq_len': 200, **settings,
        }  # fmt: skip
        words = [f'--config.{key}={value}' for key, value in options.items()]
        inspect.show(*inspect.parse([f'--config={ROOT}/configs/sft.py', '--rows=3', *words]))
        return capsys.readouterr()

    return show


def test_what_is_refused_is_named_with_its_place_and_the_rest_is_learned(shown, tmp_path):
    """Though none of the records that would be held out is accepted."""
    two = lambda i: [asked(f'q{i}'), said(f'a{i}')]
    system = message('system', 's')
    records = [{'messages': [system, *two(i)] if i % 10 else two(i)} for i in range(40)]
    out, err = shown(NEMO, records)
    assert 'dropped template 36' in out and '<|assistant|>a' in out
    named = [line for line in err.splitlines() if line.startswith('left out: ')]
    reason = 'the chat template leaves out what the system says in message 1'
    assert named == [f'left out: {tmp_path}/own.jsonl:{line}: {reason}' for line in (2, 3, 4)]


def test_a_run_is_refused_where_nothing_is_left(shown):
    records = [{'messages': [message('system', 's'), asked(f'q{i}'), said('a')]} for i in range(9)]
    with pytest.raises(UsageError, match=r'read 9; dropped: template 9\): .*own.jsonl:1: the chat template leaves out'):
        shown(NEMO, records)
    with pytest.raises(UsageError, match=r'own.jsonl:3: the chat template leaves out'):
        shown(NEMO, [{'messages': [asked(f'x{i}'), said('y')]} for i in range(2)] + records, **{'data.strict': True})


def test_what_is_not_used_is_counted_by_key(shown, tmp_path):
    records = [{'messages': [asked(f'q{i}') | {'language': 'en'}, said('a', weight=i % 2)]} for i in range(20)]
    out, err = shown(PLAIN, records)
    assert 'dropped no_learned_answer 10; not used language 10' in out
    assert f'not used: language of 10 records, the first of them {tmp_path}/own.jsonl:2' in err


def test_no_place_is_counted_by_the_key(shown):
    records = [{'messages': [asked(f'q{i}'), said('a', reasoning_content='b' * (i % 2))]} for i in range(20)]
    assert 'dropped no_place_for_reasoning_content 10' in shown(PLAIN, records)[0]
    out, _ = shown(QWEN, records)
    assert 'dropped none' in out and '<think>\nb\n</think>\n\na<|end|>' in out
