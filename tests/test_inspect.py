"""What lm.inspect shows of a row, on rows made by hand."""

import numpy as np
import pytest

from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import train_tokenizer
from lm.inspect import pair_texts, row_text


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer((f'the {i} buckets of a role, and its tables' for i in range(99)), vocab_size=320)


def row_of(*conversations, T, whole):
    """A row as it is packed: a place for each token that has a next one, or one for the last too (`whole`)."""
    columns = []
    for segment, (ids, trained) in enumerate(conversations, 1):
        places = [(i, t, float(w), segment) for i, t, w in zip(ids, ids[1:], trained[1:], strict=False)]
        columns += [*places, (ids[-1], 0, 0.0, segment)] if whole else places
    columns += [(0, 0, 0.0, 0)] * (T - len(columns))
    names = ('tokens_T', 'targets_T', 'weights_T', 'segments_T')
    return {name: np.array(column) for name, column in zip(names, zip(*columns, strict=True), strict=True)}


def styled(text):
    """[(text, style)] in order."""
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


@pytest.mark.parametrize('whole', [False, True], ids=['without the last token', 'with it'])
def test_what_is_learned_of_conversations(tokenizer, whole):
    say = lambda *texts: [{'role': r, 'content': c} for r, c in zip(('user', 'assistant') * 2, texts, strict=False)]
    encode = lambda *texts: ChatTemplate().encode(tokenizer, say(*texts))
    row = row_of(encode('Who?', 'a role', 'é', 'the <|end|>'), encode('b', 'c'), T=80, whole=whole)
    found = [
        (words, style) for words, style in styled(row_text(row, tokenizer, conversations=True)) if '·' not in words
    ]
    assert ''.join(words for words, _ in found) == (
        '<bos><|user|>Who?<|end|><|assistant|>a role<|end|><|user|>é<|end|><|assistant|>the <|end|><|end|>'
        '<bos><|user|>b<|end|><|assistant|>c<|end|>'
    )
    assert [(w, s) for w, s in found if s != 'dim'] == [
        ('a role', 'bold cyan'), ('<|end|>', 'bold cyan'), ('the <|end|>', 'bold cyan'), ('<|end|>', 'bold cyan'),
        ('c', 'bold yellow'), ('<|end|>', 'bold yellow'),
    ]  # fmt: skip


def test_what_is_not_learned_of_texts(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode('the role'), tokenizer.eos_id]
    row = row_of((ids, [True] * len(ids)), (ids, [True] * len(ids)), T=2 * len(ids) + 3, whole=True)
    expected = [('<bos>', ''), ('the role', ''), ('<eos>', ' strike')]
    assert styled(row_text(row, tokenizer)) == [
        *((words, f'cyan{strike}') for words, strike in expected),
        *((words, f'yellow{strike}') for words, strike in expected), ('···', 'bright_black'),
    ]  # fmt: skip


def test_a_pair_is_its_prompt_and_what_differs(tokenizer):
    say = lambda text: [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': text}]
    sides = [tuple(map(np.array, ChatTemplate().encode(tokenizer, say(text)))) for text in ('a role', 'its é tables')]
    sides.append((sides[0][0][:-1], sides[0][1][:-1]))  # cut
    prompt, *responses = pair_texts(sides, tokenizer)
    assert prompt.plain == '<bos><|user|>Who?<|end|><|assistant|>' and {style for _, style in styled(prompt)} == {'dim'}
    assert [r.plain for r in responses] == ['a role<|end|>', 'its é tables<|end|>', 'a role']
    assert all(style == 'bold cyan' for r in responses for _, style in styled(r))
