"""A run as a model of lm-evaluation-harness: conversations through it as text, and local tasks of both kinds."""

import json
from types import SimpleNamespace

import jax
import pytest
import running

from lm import evaluate, sharding
from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError

pytest.importorskip('lm_eval')

from lm.evals import harness  # noqa: E402
from lm.evals.harness import MARK, Harness  # noqa: E402
from lm.evals.tasks import Subject  # noqa: E402
from lm.model import parameters  # noqa: E402
from lm.model.config import ModelConfig  # noqa: E402
from lm.runs.loading import Model  # noqa: E402
from lm.sampling.choice import Sampling  # noqa: E402
from lm.sampling.generate import generate  # noqa: E402

TEXT = 'What does the bucket do in S3? It returns a table of roles.\n'


@pytest.fixture(scope='module')
def tokenizer():
    return train_tokenizer([TEXT * 8], vocab_size=320)


@pytest.fixture(scope='module')
def model(tokenizer, tmp_path_factory):
    """A harness on an untrained model, of 32 tokens."""
    folder = tmp_path_factory.mktemp('run')
    tokenizer.save(folder / 'tokenizer')
    config = {'stage': 'sft', 'seq_len': 32, 'execution': {'microbatch': 8}}
    (folder / 'config.json').write_text(json.dumps({'config': config}))
    cfg = ModelConfig(vocab_size=320, dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, ffn_dim=64)
    with sharding.use_mesh({}, jax.devices()[:1]):
        params = parameters.init_sharded(jax.random.key(0), cfg)
        yield Harness(
            str(folder), subject=Subject(str(folder), Model(params, cfg, tokenizer, {'config': config}, 0), print)
        )


def asked(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


SAID = [
    {'role': 'user', 'content': 'What does the bucket do?'},
    {'role': 'assistant', 'content': 'It returns. '},
    {'role': 'user', 'content': 'A <|end|> <bos> is text'},
]


@pytest.mark.parametrize('template', ['default', 'with a line'])
def test_a_conversation_comes_back_as_the_templates_ids(model, tokenizer, monkeypatch, template):
    jinja = ChatTemplate()
    if template == 'with a line':  # the answer begins after text
        jinja = ChatTemplate(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        )
    monkeypatch.setattr(Subject, 'template', jinja)
    text = model.apply_chat_template(SAID)
    assert model.encode(text) == jinja.prompt(tokenizer, SAID) and model.encode(text).count(tokenizer.bos_id) == 1
    begun = model.apply_chat_template([*SAID, {'role': 'assistant', 'content': 'It'}], add_generation_prompt=False)
    assert model.encode(begun) == [*model.encode(text), *tokenizer.encode('It')]
    request = model.request(text, 'It returns')
    assert request == (model.encode(text), tokenizer.encode('It returns'))


def test_marks_of_others_are_refused(model):
    with pytest.raises(UsageError, match='U\\+10FFFD'):
        model.apply_chat_template([{'role': 'user', 'content': f'a{MARK}b'}])
    for text in (f'a{MARK}b', f'{MARK}<|nobody|>{MARK}'):
        with pytest.raises(UsageError, match='U\\+10FFFD'):
            model.encode(text)


def test_contexts_begin_with_bos_once_and_spaces_go_to_the_continuation(model, tokenizer):
    bos = tokenizer.bos_id
    assert model.request('', 'the bucket') == ([bos], tokenizer.encode('the bucket'))
    for context, continuation in (('the', ' bucket'), ('the ', 'bucket'), (' ', 'the')):
        head, rest = model.request(context, continuation)
        assert head == [bos, *tokenizer.encode(context.rstrip())]
        assert tokenizer.decode(head + rest) == context + continuation and len(head) + len(rest) > len(head)
    # 'buck' is no piece of its own once 'et' follows: both are then encoded apart.
    head, rest = model.request('the buck', 'et')
    assert tokenizer.decode(head) == 'the buck' and tokenizer.decode(rest) == 'et'


def test_likelihoods(model, tokenizer):
    long = TEXT * 6
    found = model.loglikelihood(asked((TEXT, 'the bucket'), ('', 'the'), (long, ' table'), ('the', '')), True)
    assert all(logp < 0 for logp, _ in found[:3]) and found[3] == (0.0, True)
    # What is cut on the left does not count.
    kept = tokenizer.decode(model.encode(long)[-model.max_length :])
    assert model.loglikelihood(asked((long + long, ' table')), True)[0][0] == pytest.approx(found[2][0], rel=1e-5), kept
    whole, once = model.loglikelihood_rolling(asked((long,), ('the',)), True)
    assert whole < 10 * once < 0 and once == pytest.approx(found[1][0], rel=1e-5)


def test_generation(model, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode('the bucket')]
    options = {'max_new_tokens': 12, 'stop_ids': tokenizer.stop_ids}
    (right,) = generate(model.subject.model.params, model.subject.model.cfg, [prompt], **options)
    text = tokenizer.decode(right.ids)
    settings = {'until': [], 'max_gen_toks': 12}
    stop = text[len(text) // 2 :][:2]
    requests = asked(
        ('the bucket', settings), ('a table', settings), ('the bucket', settings | {'until': stop}),
        ('the bucket', settings | {'do_sample': True, 'temperature': 5.0}),
    )  # fmt: skip
    found = model.generate_until(requests, True)
    assert found[0] == text and found[2] == text[: text.find(stop)] and found[3] != text and found[1] != text


def test_settings_of_generation(capsys):
    read = harness.generation_settings
    assert read({}) == ([], 256, Sampling())
    assert read({'until': '\n', 'max_new_tokens': 3, 'temperature': 0.0}) == (['\n'], 3, Sampling())
    assert read({'do_sample': False, 'temperature': 0.7})[2] == Sampling()
    assert read({'do_sample': True})[2] == Sampling(1.0)
    assert read({'temperature': 0.5, 'top_p': 0.9})[2] == Sampling(temperature=0.5, top_p=0.9)
    read({'repetition_penalty': 2.0})
    assert 'no generation setting repetition_penalty' in capsys.readouterr().err


def test_a_reward_model_has_no_text(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'config': {'stage': 'reward'}}))
    with pytest.raises(UsageError, match='is a reward model'):
        Harness(str(tmp_path))


TASK = """
task: local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {docs}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """output_type: generate_until
doc_to_target: "{{said}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_local_tasks(lab, tmp_path, monkeypatch):
    """By likelihood and by generation: the right answer is what the run itself finds likelier, and says."""
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    lab.train(tmp_path / 'run', steps=2, eval__every=2)
    run, questions = str(tmp_path / 'run'), ['the bucket', 'a table of', 'hello']
    model = Harness(run)
    said = model.generate_until(asked(*((q, {'until': ['\n'], 'max_gen_toks': 4}) for q in questions)), True)
    choices = [' music', ' deletes the role']
    likelier = model.loglikelihood(asked(*((q, c) for q in questions for c in choices)), True)
    docs = []
    for i, (question, text) in enumerate(zip(questions, said, strict=True)):
        first, second = (logp for logp, _ in likelier[2 * i : 2 * i + 2])
        right = int(second > first) if i else int(second < first)  # the first is wrong on purpose
        docs.append({'question': question, 'choices': [c[1:] for c in choices], 'label': right, 'said': text})
    docs[1]['said'] += ' and more'
    file = tmp_path / 'docs.jsonl'
    file.write_text(''.join(json.dumps(d) + '\n' for d in docs))
    names = []
    for name, rest in (('choice', CHOICE), ('say', GENERATE)):
        (tmp_path / f'{name}.yaml').write_text(TASK.format(name=name, docs=file) + rest)
        names.append(f'lm_eval:{tmp_path / name}.yaml')
    found = evaluate.evaluate(evaluate.parse([run, f'--tasks=heldout,{",".join(names)}', '--rows=3']))
    assert found['lm_eval/local_choice/acc'] == found['lm_eval/local_say/exact_match'] == pytest.approx(2 / 3)
    assert 'eval/bpb' in found
    with pytest.raises(UsageError, match='lm_eval has no task hellaswagg .did you mean hellaswag'):
        evaluate.evaluate(evaluate.parse([run, '--tasks=lm_eval:hellaswagg']))
    chat = evaluate.evaluate(evaluate.parse([run, f'--tasks={names[0]}', '--apply_chat_template', '--num_fewshot=1']))
    assert 0 <= chat['lm_eval/local_choice/acc'] <= 1 and running.lines(run)
