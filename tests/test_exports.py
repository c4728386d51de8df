"""An exported folder says what is true of the run: its ends, its template, its ids, whatever the model it began with
said."""

import json

import folders
import pytest

pytest.importorskip('tokenizers', reason="pip install 'lm[convert]'")
pytest.importorskip('safetensors', reason="pip install 'lm[convert]'")

from safetensors.numpy import load_file, save_file  # noqa: E402

from lm import convert  # noqa: E402
from lm import main as lm_main  # noqa: E402
from lm.errors import UsageError  # noqa: E402
from lm.interop.huggingface.folder import open_folder  # noqa: E402
from lm.interop.tokenizers import pre_tokenizers  # noqa: E402

END, TURN_END = 257, 259  # of a text, and of a turn


def there_and_back(folder, **options):
    """(a folder, what a run of it is exported as)."""
    made = folders.make(folder / 'hf', **options)
    for src, dst in (('hf', 'run'), ('run', 'out')):
        convert.convert(convert.parse([str(folder / src), str(folder / dst), '--tokens=16']))
    return made, folder / 'out'


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.slow
def test_a_tuned_model_stops_where_its_template_ends(tmp_path, lab):
    """The base model ends texts alone; transformers stops by generation_config.json alone."""
    base = {'eos_token': '<|endoftext|>'}
    folders.make(
        tmp_path / 'hf', settings=base, generation={'eos_token_id': END, 'max_new_tokens': 9, 'do_sample': True}
    )
    convert.convert(convert.parse([str(tmp_path / 'hf'), str(tmp_path / 'run'), '--tokens=16']))
    turns = [{'role': 'user', 'content': 'Say it.'}, {'role': 'assistant', 'content': 'it'}]
    lines = [json.dumps({'messages': [*turns, {'role': 'user', 'content': f'{i}?'}, turns[1]]}) for i in range(40)]
    (tmp_path / 'c.jsonl').write_text('\n'.join(lines))
    settings = {
        'init_from': tmp_path / 'run', 'data__mixture': tmp_path / 'c.jsonl', 'data__replay': 0, 'steps': 1,
        'seq_len': 64, 'eval__max_new_tokens': 2, 'eval__rows': 2,
    }  # fmt: skip
    lm_main.train(lab.argv(tmp_path / 'sft', config='configs/sft.py', **lab.inherited | settings))
    convert.convert(convert.parse([str(tmp_path / 'sft'), str(tmp_path / 'out'), '--tokens=16']))
    generation = read(tmp_path / 'out', 'generation_config.json')
    assert set(generation['eos_token_id']) == set(read(tmp_path / 'out', 'config.json')['eos_token_id'])
    assert set(generation['eos_token_id']) == {END, TURN_END}
    assert (generation['max_new_tokens'], generation['do_sample']) == (9, True)


def test_an_end_that_only_the_template_has_is_named(tmp_path):
    spec = folders.byte_level(symbols=('<|endoftext|>', '<|im_start|>', '<done>'))
    template = folders.CHATML.replace('<|im_end|>', '<done>')
    _, out = there_and_back(tmp_path, spec=spec, template=template, settings={'eos_token': '<|endoftext|>'})
    for name in ('generation_config.json', 'config.json'):
        assert set(read(out, name)['eos_token_id']) == {END, TURN_END}


def test_no_class_that_reads_the_file_otherwise_is_named(tmp_path):
    """transformers 5 puts a pre-tokenizer of its own into a LlamaTokenizer and a GPT2Tokenizer."""
    settings = {'tokenizer_class': 'LlamaTokenizerFast', 'bos_token': '<s>', 'eos_token': '</s>', 'add_bos_token': True}
    settings['auto_map'] = {'AutoTokenizer': ['tokenization_own.OwnTokenizer', None]}
    template = '{% for m in messages %}{{ m.content }}</s>{% endfor %}'
    made, out = there_and_back(tmp_path, rows=300, spec=folders.sentencepiece(), settings=settings, template=template)
    config, spec = read(out, 'tokenizer_config.json'), read(out, 'tokenizer.json')
    assert config['tokenizer_class'] == 'PreTrainedTokenizerFast' and 'auto_map' not in config
    assert (config['bos_token'], config['chat_template']) == ('<s>', template)
    single = spec['post_processor']['single']  # the configuration has said it, which transformers 5 does not read
    assert single[0]['SpecialToken']['id'] == '<s>'
    assert spec | {'post_processor': None} == read(made, 'tokenizer.json')


def test_what_only_continues_text_has_no_template(tmp_path, lab):
    folders.make(tmp_path / 'hf')
    convert.convert(convert.parse([str(tmp_path / 'hf'), str(tmp_path / 'run'), '--tokens=16']))
    config = read(tmp_path / 'run', 'config.json')
    config['about'] = {'data': 'text', 'output': 'text'}  # pretrained further
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
    convert.convert(convert.parse([str(tmp_path / 'run'), str(tmp_path / 'out'), '--tokens=16']))
    assert not (tmp_path / 'out' / 'chat_template.jinja').exists()
    assert 'chat_template' not in read(tmp_path / 'out', 'tokenizer_config.json')


# ---- architectures beside which a tokenizer is replaced ----


def qwen():
    return folders.byte_level() | {'pre_tokenizer': pre_tokenizers.to_json(pre_tokenizers.way('qwen2'))}


@pytest.mark.parametrize(
    ('spec', 'kept'), [(qwen(), True), (folders.byte_level(), False), (folders.sentencepiece(), False)]
)
def test_a_graph_of_qwen2_is_a_llama_where_its_tokenizer_would_be_replaced(tmp_path, spec, kept):
    end = '<|im_end|>' if '<|im_end|>' in json.dumps(spec) else '</s>'
    made, out = there_and_back(tmp_path, kind='qwen2', rows=300, spec=spec, settings={'eos_token': end}, template=None)
    config = read(out, 'config.json')
    before, after = (load_file(folder / 'model.safetensors') for folder in (made, out))
    assert config['model_type'] == ('qwen2' if kept else 'llama')
    assert config.get('attention_bias') is (None if kept else True)
    zeros = [name for name in after if name.endswith('o_proj.bias')]
    assert len(zeros) == (0 if kept else 2) and not any(after.pop(name).any() for name in zeros)
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_a_llama_with_a_bias_of_its_output_is_refused(tmp_path):
    _, out = there_and_back(tmp_path, kind='qwen2')
    tensors = load_file(out / 'model.safetensors')
    tensors['model.layers.1.self_attn.o_proj.bias'][3] = 1e-3
    save_file(tensors, str(out / 'model.safetensors'))
    with pytest.raises(UsageError, match=r"layers.1.self_attn.o_proj.bias' is not zero"):
        open_folder(out)


def test_a_graph_that_is_no_llama_is_refused_with_its_reason(tmp_path):
    window = {'use_sliding_window': True, 'sliding_window': 16, 'max_window_layers': 1}
    folders.make(tmp_path / 'hf', 'qwen2', **window)
    convert.convert(convert.parse([str(tmp_path / 'hf'), str(tmp_path / 'run'), '--tokens=16']))
    says = 'transformers splits the texts of qwen2 in a way of its own.*model.pattern=global,local'
    with pytest.raises(UsageError, match=says):
        convert.convert(convert.parse([str(tmp_path / 'run'), str(tmp_path / 'out'), '--tokens=16']))
