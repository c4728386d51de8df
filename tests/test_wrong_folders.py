"""Where a folder or file is not what is needed, the reason is what it is, and what to do."""

import sys

import folders
import pytest

pytest.importorskip('safetensors', reason="pip install 'lm[convert]'")

from lm import chat, convert  # noqa: E402
from lm import main as lm_main  # noqa: E402


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(command, *words) -> the line that it ends with."""

    def call(command, *words):
        monkeypatch.setattr(sys, 'argv', ['lm', *map(str, words)])
        capsys.readouterr()
        assert command.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def adapter(folder):
    folder.mkdir(parents=True)
    (folder / 'adapter_config.json').write_text('{"peft_type": "LORA", "r": 8}')
    return folder


def test_an_adapters_folder(tmp_path, refused, lab):
    folder = adapter(tmp_path / 'a')
    assert 'is an adapter over None: name the run of that' in refused(convert, folder, tmp_path / 'out')
    says = f'is an adapter of peft: python -m lm.convert {folder} DST --base=RUN makes a run of it'
    assert says in refused(chat, folder, '--raw', '--prompt=x')
    given = lab.argv(tmp_path / 'x', config='configs/sft.py', **lab.inherited | {'init_from': folder})
    assert says in refused(lm_main, *given)


@pytest.mark.parametrize(
    ('rename', 'says'),
    [
        (lambda name: f'_orig_mod.{name}', "its tensors begin with '_orig_mod.': save the model that is wrapped in it"),
        (lambda name: f'module.{name}', "its tensors begin with 'module.'"),
        (lambda name: f'base_model.model.{name}', 'holds a model with an adapter in it'),
        (lambda name: name.removeprefix('model.'), "its tensors lack the beginning 'model.': save the ForCausalLM"),
    ],
)
def test_tensors_by_other_names(tmp_path, refused, rename, says):
    tensors = {rename(name): x for name, x in folders.weights('llama', 260).items()}
    folder = folders.make(tmp_path / 'hf', tensors=tensors)
    assert says in refused(convert, folder, tmp_path / 'out')


def test_a_model_of_another_form_that_is_damaged(tmp_path, refused):
    (tmp_path / 'model.gguf').write_bytes(b'GGUF')
    assert f'{tmp_path}/model.gguf: a damaged GGUF file' in refused(
        chat, tmp_path / 'model.gguf', '--raw', '--prompt=x'
    )


def test_a_folder_around_or_in_a_model(tmp_path, refused):
    run = tmp_path / 'runs' / 'one'
    (run / 'checkpoints' / '4').mkdir(parents=True)
    (run / 'config.json').write_text('{"config": {}}')
    for inside in (run / 'checkpoints', run / 'checkpoints' / '4'):
        assert f'is a part of the run {run}: name that' in refused(convert, inside, tmp_path / 'out')
    assert f'holds some: name one of them ({run})' in refused(chat, tmp_path / 'runs', '--raw', '--prompt=x')
    folders.make(tmp_path / 'trainer' / 'checkpoint-4')
    assert 'trainer/checkpoint-4)' in refused(convert, tmp_path / 'trainer', tmp_path / 'out')
    folders.make(tmp_path / 'models--a--b' / 'snapshots' / '0f')
    assert 'snapshots/0f)' in refused(convert, tmp_path / 'models--a--b', tmp_path / 'out')
    for name in ('a.gguf', 'b.gguf'):
        (tmp_path / 'several').mkdir(exist_ok=True)
        (tmp_path / 'several' / name).write_bytes(b'GGUF')
    assert 'several/a.gguf' in refused(convert, tmp_path / 'several', tmp_path / 'out')


def test_weights_without_what_they_are_of(tmp_path, refused):
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'model.safetensors').write_bytes(b'')
    assert 'has weights, and no config.json that says of which model' in refused(
        convert, tmp_path / 'w', tmp_path / 'o'
    )


@pytest.mark.parametrize('key', ['quantization_config', 'quantization'])
def test_quantized_weights(tmp_path, refused, key):
    folder = folders.make(tmp_path / 'hf', **{key: {'quant_method': 'awq', 'bits': 4}})
    assert f"{key}='awq': its weights are quantized, get those that are not" in refused(convert, folder, tmp_path / 'o')


def test_a_gguf_file_that_is_no_model(tmp_path, refused):
    gguf = pytest.importorskip('gguf')
    writer = gguf.GGUFWriter(str(tmp_path / 'a.gguf'), 'llama')
    writer.add_string('general.type', 'adapter')
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    says = 'is an adapter over a model of the architecture llama: name the run of that with --base=RUN'
    assert says in refused(convert, tmp_path / 'a.gguf', tmp_path / 'out')
