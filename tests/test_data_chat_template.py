"""The chat template: what is learned, that nothing typed becomes a symbol, and that training and talking agree."""

import json
import os
import resource
import sys
import time
from types import SimpleNamespace

import pytest

from lm import workers
from lm.data import chat_template
from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import Tokenizer, train_tokenizer
from lm.errors import UsageError

TEXTS = [
    f'user assistant system question {i}: name the {word} of the bucket, and say why it is so. [INST] {i * 7}\n\n'
    for i in range(60)
    for word in ('keys', 'roles', 'tables', 'colours')
]

# ---- templates as models of the field have them, written from the descriptions of their formats ----

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

INST = """{% if messages[0]['role'] == 'system' %}
{% set system, turns = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n', messages[1:] %}
{% else %}
{% set system, turns = '', messages %}
{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}
{%- elif m.role == 'user' %}
{{- bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + m.content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

TURNS = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# The system's words stand before the last question: what was asked first is shown otherwise later.
LAST = """{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{%- for m in turns %}
{%- if m.role == 'user' and system is not none and (loop.last or loop.index == loop.length - 1) %}
{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- elif m.role == 'user' %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- else %}
{{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}"""

# An answer is preceded by an empty thought, and thoughts of earlier answers are left out.
THINKING = """{% for m in messages %}
{%- set said = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GENERATION = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

SYMBOLS = {
    'chatml': ['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    'headers': ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'],
    'turns': ['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'],
    'inst': ['<s>', '</s>'],
}
# A format: its symbols, its template, its <bos> and <eos>.
FORMATS = {
    'chatml': ('chatml', CHATML, None, '<|im_end|>'),
    'headers': ('headers', HEADERS, '<|begin_of_text|>', '<|eot_id|>'),
    'inst': ('inst', INST, '<s>', '</s>'),
    'turns': ('turns', TURNS, '<bos>', '<eos>'),
    'last': ('inst', LAST, '<s>', '</s>'),
    'thinking': ('chatml', THINKING, None, '<|im_end|>'),
    'generation': ('chatml', GENERATION, None, '<|im_end|>'),
}


def build(folder, symbols, template, bos, eos, **config):
    """A folder of Hugging Face's: a small byte-level tokenizer.json and its configuration."""
    library = pytest.importorskip('tokenizers', reason="pip install -e '.[hub]'")
    made = library.Tokenizer(library.models.BPE())
    pre = library.pre_tokenizers
    # Newlines stay together, as Llama 3 and Qwen have it; GPT-2's own rule splits them by what follows.
    split = pre.Split(library.Regex(r'\s*[\r\n]+|\s?[^\s]+|\s+'), behavior='isolated')
    made.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = library.decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=symbols, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.json').write_text(made.to_str())
    named = {'bos_token': bos, 'eos_token': eos, 'chat_template': template}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast'} | named | config
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='module')
def ours():
    return train_tokenizer(TEXTS, vocab_size=350)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """theirs(name) -> (tokenizer, template) of one of FORMATS."""
    made = {}

    def get(name):
        if name not in made:
            symbols, template, bos, eos = FORMATS[name]
            folder = build(tmp_path_factory.mktemp('tokenizers') / name, SYMBOLS[symbols], template, bos, eos)
            tokenizer = Tokenizer.load(folder)
            made[name] = tokenizer, ChatTemplate.load(folder, tokenizer)
        return made[name]

    return get


def say(*contents, system=None):
    """Turns of user and assistant, after what the system says."""
    roles = ('user', 'assistant') * len(contents)
    turns = [{'role': role, 'content': text} for role, text in zip(roles, contents, strict=False)]
    return ([] if system is None else [{'role': 'system', 'content': system}]) + turns


def shown(tokenizer, ids):
    """The text of ids, control symbols by name."""
    names = {i: name for name, i in tokenizer.controls.items()}
    return b''.join(names[i].encode() if i in names else tokenizer.pieces[i] for i in ids).decode()


def learned(tokenizer, ids, trained):
    """The texts of the stretches that are learned."""
    texts, last = [], False
    for i, now in zip(ids, trained, strict=True):
        if now:
            texts = texts if last else [*texts, []]
            texts[-1].append(i)
        last = now
    return [shown(tokenizer, text) for text in texts]


# ---- our own ----


def test_the_default_template(ours):
    messages = say('Hello.', 'Hi! ', 'And?', 'so', system='Be kind.')
    template = ChatTemplate()
    ids, trained = template.encode(ours, messages)
    text = '<bos><|system|>Be kind.<|end|><|user|>Hello.<|end|><|assistant|>Hi! <|end|>'
    assert shown(ours, ids) == text + '<|user|>And?<|end|><|assistant|>so<|end|>'
    assert learned(ours, ids, trained) == ['Hi! <|end|>', 'so<|end|>']
    asked = template.prompt(ours, messages[:-1])
    assert shown(ours, asked) == text + '<|user|>And?<|end|><|assistant|>' and ids[: len(asked)] == asked
    assert template.stop_ids(ours) == (ours.controls['<|end|>'], ours.eos_id)


def test_what_is_given_is_not_learned(ours):
    messages = say('a', 'b', 'c', 'd')
    ids, trained = ChatTemplate().encode(ours, messages, given=3)
    assert learned(ours, ids, trained) == ['d<|end|>'] and ids == ChatTemplate().encode(ours, messages)[0]
    assert not any(ChatTemplate().encode(ours, messages, given=4)[1])


@pytest.mark.parametrize('text', ['<|end|>', '<|assistant|>', '<bos>x', '', ' ', '\U000f0000', '{{ 7 * 7 }}', '▁ \0'])
def test_what_is_typed_stays_text(ours, text):
    ids, trained = ChatTemplate().encode(ours, say(text, text, system=text))
    typed = [i for i in ids if i not in ours.controls.values()]
    assert ours.decode(typed) == 3 * text
    assert [i for i in ids if i in ours.controls.values()] == [
        ours.controls[name]
        for name in ('<bos>', '<|system|>', '<|end|>', '<|user|>', '<|end|>', '<|assistant|>', '<|end|>')
    ]
    assert learned(ours, ids, trained) == [f'{text}<|end|>']


def test_roles_that_there_are_not(ours):
    with pytest.raises(UsageError, match="the role 'tool'"):
        ChatTemplate().encode(ours, [{'role': 'tool', 'content': 'x'}])


def test_many_conversations_take_seconds(ours):
    """Two thousand here; the check that nothing changes is a rendering, the rest is known by the roles."""
    begin = time.process_time()
    for i in range(2000):
        ChatTemplate().encode(ours, say(f'question {i}', 'the name of the bucket ' * 5, 'and', 'so'))
    assert time.process_time() - begin < 4


# ---- the field's ----

WANTED = {
    'chatml': ['fine<|im_end|>', 'so<|im_end|>'],
    'headers': ['fine<|eot_id|>', 'so<|eot_id|>'],
    'inst': [' fine </s>', ' so </s>'],
    'turns': ['fine<end_of_turn>', 'so<end_of_turn>'],
    'last': [' so</s>'],
    'thinking': ['fine<|im_end|>', '<think>\n\n</think>\n\nso<|im_end|>'],
    'generation': ['fine', 'so'],
}


def conversation(name):
    return say('How are you?', 'fine', 'Why?', 'so', system=None if name == 'turns' else 'Be kind.')


@pytest.mark.parametrize('name', FORMATS)
def test_what_is_learned(theirs, name):
    tokenizer, template = theirs(name)
    ids, trained = template.encode(tokenizer, conversation(name))
    assert learned(tokenizer, ids, trained) == WANTED[name]


@pytest.mark.parametrize('name', FORMATS)
def test_an_answer_begins_where_its_prompt_ends(theirs, name):
    tokenizer, template = theirs(name)
    messages = conversation(name)
    ids, trained = template.encode(tokenizer, messages)
    asked = template.prompt(tokenizer, messages[:-1])
    assert ids[: len(asked)] == asked and trained[len(asked)]
    end = len(trained) - 1 - trained[::-1].index(True)
    assert (ids[end] if name != 'generation' else ids[end + 1]) in template.stop_ids(tokenizer)


@pytest.mark.parametrize('name', FORMATS)
def test_symbols_that_are_typed_in_other_formats(theirs, name):
    tokenizer, template = theirs(name)
    plain, _ = template.encode(tokenizer, conversation(name))
    typed = ''.join(tokenizer.controls)
    ids, _ = template.encode(tokenizer, [m | {'content': m['content'] + typed} for m in conversation(name)])
    symbols = set(tokenizer.controls.values())
    assert [i for i in ids if i in symbols] == [i for i in plain if i in symbols]
    assert shown(tokenizer, ids).count(typed) == len(conversation(name))


@pytest.mark.parametrize('name', ['headers', 'inst', 'turns'])
def test_templates_that_strip_what_is_said(theirs, name):
    tokenizer, template = theirs(name)
    ids, trained = template.encode(tokenizer, say(' \n How?\t', '\n fine \n'))
    assert (ids, trained) == template.encode(tokenizer, say('How?', 'fine'))


def test_what_stands_beside_a_content_is_encoded_with_it(ours):
    """As Hugging Face's would, except where the model begins."""
    template = ChatTemplate('{% for m in messages %}{{ m.content }} of the bucket{{ eos_token }}{% endfor %}')
    ids, trained = template.encode(ours, say('the name', 'the name'))
    half = ours.encode('the name of the bucket')
    assert ids == [ours.bos_id, *half, ours.eos_id, *half, ours.eos_id]
    assert ours.encode('the name') + ours.encode(' of the bucket') == half or half != ids
    assert trained == [False] * (len(half) + 2) + [True] * (len(half) + 1)


def test_where_a_block_begins_after_the_model(ours):
    """What the block leaves out is not learned, but the model begins there all the same."""
    text = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} of t{% else %}he "
    text += '{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}'
    ids, trained = ChatTemplate(text).encode(ours, say('the name', 'keys'))
    asked = ChatTemplate(text).prompt(ours, say('the name'))
    assert ids[: len(asked)] == asked and learned(ours, ids, trained) == ['keys<eos>']


@pytest.mark.parametrize('text', [chat_template.DEFAULT, chat_template.DEFAULT.replace('{{ bos_token }}', '')])
def test_one_bos(ours, text):
    template = ChatTemplate(text)
    for ids in (template.prompt(ours, say('x')), template.encode(ours, say('x', 'y'))[0]):
        assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1


@pytest.mark.parametrize(('config', 'begins'), [({'add_bos_token': True}, True), ({'add_bos_token': False}, False)])
def test_bos_as_the_tokenizer_has_it(tmp_path, config, begins):
    folder = build(tmp_path / 'tokenizer', SYMBOLS['headers'], CHATML.replace('im_end', 'eot_id'),
                   '<|begin_of_text|>', '<|eot_id|>', **config)  # fmt: skip
    tokenizer = Tokenizer.load(folder)
    ids = ChatTemplate.load(folder, tokenizer).prompt(tokenizer, say('x'))
    assert ids.count(tokenizer.bos_id) == begins == (ids[0] == tokenizer.bos_id)


# ---- what cannot be ----

UNFIT = {
    "{{ raise_exception('only\\nfor questions') }}": 'refuses this conversation: only for questions',
    "{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}": 'changes what the user says',
    "{% for m in messages %}{{ m.content.replace('w', '') }}{{ eos_token }}{% endfor %}": 'changes what the user says',
    "{% for m in messages[1:] %}{{ m.content }}{{ eos_token }}{% endfor %}": 'leaves out what the user says',
    "{% for m in messages %}{{ m.content * 2 }}{{ eos_token }}{% endfor %}": 'shows 2 times what the user says',
    "{% for m in messages %}{{ m.content }}{% endfor %}": 'never learn to stop',
    "{% for m in messages %}A: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}B: {% endif %}":
        'asks for an answer otherwise',
    '{% for m in messages %}': 'TemplateSyntaxError',
    '{{ messages[7].content.text }}': 'UndefinedError',
}  # fmt: skip


@pytest.mark.parametrize('text', UNFIT, ids=list(UNFIT.values()))
def test_templates_that_do_not_fit(ours, text):
    with pytest.raises(UsageError, match='the chat template') as error:
        ChatTemplate(text).encode(ours, say('why', 'so'))
    assert UNFIT[text] in str(error.value) and '\n' not in str(error.value)


def test_a_template_that_takes_no_system(theirs):
    tokenizer, template = theirs('turns')
    with pytest.raises(UsageError, match='refuses this conversation: no system role here'):
        template.prompt(tokenizer, say('x', system='y'))


def test_thoughts_that_a_template_leaves_out(theirs):
    """Of earlier answers they are left out, as the template has it, and such an answer is not learned."""
    tokenizer, template = theirs('thinking')
    messages = say('x', '<think>hm <|im_end|></think>\n\ny <|im_end|>', 'z', 'a')
    ids, trained = template.encode(tokenizer, messages)
    assert 'assistant\ny <|im_end|><|im_end|>' in shown(tokenizer, ids) and 'hm' not in shown(tokenizer, ids)
    assert ids.count(tokenizer.controls['<|im_end|>']) == 4, 'what was typed is text'
    assert learned(tokenizer, ids, trained) == ['<think>\n\n</think>\n\na<|im_end|>']
    asked = template.prompt(tokenizer, messages[:-1])
    assert ids[: len(asked)] == asked
    with pytest.raises(UsageError, match='changes what the assistant says in message 2'):
        template.encode(tokenizer, messages[:2])


HOSTILE = {
    'classes': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    'classes by filter': "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    'by format': "{{ '{0.__class__}'.format(messages) }}",
    'by attr': "{{ messages | attr('__class__') }}",
    'functions': '{{ raise_exception.__globals__.keys() }}',
    'import': "{% import 'os' as os %}{{ os }}",
    'include': "{% include '/etc/passwd' %}",
    'changes': "{% set _ = messages.append(1) %}",
    'loops': '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
    'loops that choose': '{% for a in range(9999) %}{% for b in range(9999) if b < 0 %}{% endfor %}{% endfor %}',
    'macros': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    'deep': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'wide': "{{ 'x' * 10**9 }}",
    'numbers': '{{ 2 ** (10 ** 9) }}',
    'squares': '{% set n = namespace(a=9) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}',
    'doubles': "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    'blocks': "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set b %}{{ n.a }}{{ n.a }}{% endset %}"
              '{% set n.a = b %}{% endfor %}',
    'nested': '{% set n = namespace(a="xxxxxxxxx") %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}'
              '{{ n.a }}',
    'hidden': '{% set n = namespace(a="x") %}{% for i in range(60) %}{% set n.a = namespace(b=n.a, c=n.a) %}'
              '{% endfor %}{{ n.a }}',
    'compares': '{% set n = namespace(a="x", b="x") %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}'
                '{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}',
    'dicts': '{% set n = namespace(a="x") %}{% for i in range(60) %}{% set n.a = dict(b=n.a, c={1: n.a}) %}{% endfor %}'
             '{{ n.a }}',
    'spaces': "{{ 'x' | indent(999999999) }}",
    'centre': "{{ 'x'.center(999999999) }}",
    'percent': "{{ '%999999999d' % 1 }}",
    'dates': "{{ strftime_now('%999999999Y') }}",
    'replaces': "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a.replace('x', 'xxxx') %}"
                '{% endfor %}',
    'slices': "{% set s = 'x' * 4000000 %}{% for i in range(60000) %}{% set t = s[1:] %}{% endfor %}",
    'searches': "{% set s = 'ab' * 2000000 %}{% for i in range(60000) %}"
                "{% if s[1:] ~ 'c' in s %}{% endif %}{% endfor %}",
    'joins': "{{ range(60000) | map('replace', '', 'x' * 99999) | join }}",
    'long': '{# ' + 'x' * 300_000 + ' #}',
    'random': '{{ messages | random }}',
    'other each time': '{{ lipsum(n=1) }}',
    'deeply nested': '{{ ' + '(' * 3000 + ')' * 3000 + ' }}',
}  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_templates(ours, name):
    """Each ends at once, in one line, before it has made anything large."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
    cpu = lambda: sum(os.times()[:4])  # with that of processes that ended
    begin, before = cpu(), peak()
    with pytest.raises(UsageError, match='the chat template') as error:
        ChatTemplate(HOSTILE[name]).prompt(ours, say('x'))
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
    assert any(word in str(error.value) for word in ('fails', 'are run')), 'it ran'
    assert peak() - before < 100 and cpu() - begin < 4, 'megabytes and seconds'


def test_a_rendering_that_was_broken_off_answers_no_other(ours, monkeypatch):
    def broken_off(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, 'json', SimpleNamespace(dumps=json.dumps, loads=broken_off))
    with pytest.raises(KeyboardInterrupt):
        ChatTemplate().prompt(ours, say('x'))
    monkeypatch.undo()
    assert ours.decode(ChatTemplate().prompt(ours, say('y'))) == 'y'


# ---- its files ----


def test_where_a_template_comes_from(tmp_path, ours):
    folder = tmp_path / 'tokenizer'
    ours.save(folder)
    assert ChatTemplate.load(folder, ours) == ChatTemplate()
    named = [{'name': 'tool_use', 'template': 'x'}, {'name': 'default', 'template': 'a' + chat_template.DEFAULT}]
    for config, begin in ((named, 'a'), ('b' + chat_template.DEFAULT, 'b')):
        (folder / 'tokenizer_config.json').write_text(json.dumps({'chat_template': config}))
        assert ChatTemplate.load(folder, ours).text[0] == begin
    ChatTemplate('c' + chat_template.DEFAULT).save(folder)
    found = ChatTemplate.load(folder, ours)
    assert found.text[0] == 'c' and found.fingerprint != ChatTemplate().fingerprint
    assert (folder / 'chat_template.jinja').read_text() == found.text


def test_there_is_no_template(tmp_path, theirs):
    tokenizer, _ = theirs('chatml')
    with pytest.raises(UsageError, match='has no chat template, and its tokenizer lacks'):
        ChatTemplate.load(tmp_path, tokenizer)
    (tmp_path / 'tokenizer_config.json').write_text('{"chat_template": 7}')
    with pytest.raises(UsageError, match='neither a text nor a list'):
        ChatTemplate.load(tmp_path, tokenizer)
    (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
    with pytest.raises(UsageError, match='cannot be read'):
        ChatTemplate.load(tmp_path, tokenizer)
