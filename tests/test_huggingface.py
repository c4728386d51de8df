"""Hugging Face folders: each family's logits, round trips bit for bit, and folders that are damaged or hostile."""

import json
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import UsageError
from lm.evals import agreement
from lm.interop import families, huggingface, independent
from lm.interop.huggingface import open_folder, write_folder
from lm.interop.opened import Leaf, Opened
from lm.model import transformer

GOLDEN = Path(__file__).parent / 'golden' / 'families'
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
QUIET = lambda line: None


def golden(name: str):
    with np.load(GOLDEN / name / 'logits.npz') as file:
        return file['tokens'], file['logits']


def params_of(opened: Opened) -> dict:
    """The parameters, stacked; the vocabulary needs no padding in tests."""
    params: dict = {'layers': {}}
    for path, leaf in opened.leaves.items():
        found = np.stack([leaf.read(i) for i in range(leaf.layers)]) if leaf.layers else leaf.read(0)
        node = params['layers'] if leaf.layers else params
        node[path.rpartition('/')[2]] = jnp.asarray(found, jnp.float32)
    return params


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'scored'])
@pytest.mark.parametrize('scan', [False, True])
def test_the_logits_are_those_of_transformers(name, scan):
    tokens, wanted = golden(name)
    opened = open_folder(GOLDEN / name)
    cfg = transformer.ModelConfig(**opened.model, scan=scan, vocab_multiple=1)
    params = params_of(opened)
    found = transformer.logits(params, cfg, transformer.forward(params, cfg, jnp.asarray(tokens)))
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    row = agreement.logits_of(opened, tokens[0])
    np.testing.assert_allclose(row, wanted[0], atol=1e-4)


def test_every_family_is_among_them():
    made = {families.family_of(json.loads((GOLDEN / n / 'config.json').read_text()), n)[0].model_type for n in NAMES}
    assert made == {family.model_type for family in families.FAMILIES.values()}


def test_the_score_of_a_reward_model_is_that_of_transformers():
    tokens, wanted = golden('scored')
    opened = open_folder(GOLDEN / 'scored')
    assert opened.scored
    for row, score in zip(tokens, wanted, strict=True):
        assert agreement.scores(opened, row)[-1] == pytest.approx(float(score[0]), abs=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_out_and_in_again_is_the_same_bit_for_bit(name, tmp_path):
    """And the graph is exported under a family that is it exactly, most often the one it came from."""
    first = open_folder(GOLDEN / name)
    write_folder(first, tmp_path / 'out', say=QUIET)
    for again in (open_folder(tmp_path / 'out'), independent.open_folder(tmp_path / 'out')):
        assert dict(again.model) == dict(first.model) and set(again.leaves) == set(first.leaves)
        for path, leaf in first.leaves.items():
            for layer in range(leaf.layers or 1):
                np.testing.assert_array_equal(again.leaves[path].read(layer), leaf.read(layer), err_msg=path)
    theirs, ours = (huggingface._stored(folder) for folder in (GOLDEN / name, tmp_path / 'out'))
    for tensor in theirs:
        np.testing.assert_array_equal(huggingface.read(theirs[tensor]), huggingface.read(ours[tensor]), err_msg=tensor)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, 'SHARD', 20_000)
    first = open_folder(GOLDEN / 'llama')
    write_folder(first, tmp_path / 'out', say=QUIET)
    assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 2
    np.testing.assert_array_equal(
        agreement.logits_of(open_folder(tmp_path / 'out'), [1, 2, 3]), agreement.logits_of(first, [1, 2, 3])
    )


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_stays_as_it_is(tmp_path, dtype):
    whole = open_folder(GOLDEN / 'qwen3')
    cast = lambda leaf: Leaf(leaf.shape, np.dtype(dtype), leaf.layers, lambda i: leaf.read(i).astype(dtype))
    half = Opened('half', whole.model, {name: cast(leaf) for name, leaf in whole.leaves.items()}, {})
    write_folder(half, tmp_path / 'out', say=QUIET)
    for again in (open_folder(tmp_path / 'out'), independent.open_folder(tmp_path / 'out')):
        found = again.leaves['layers/wo_NHD']
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found.read(2), half.leaves['layers/wo_NHD'].read(2))


def test_the_old_form_of_config_json_says_the_same(tmp_path):
    """transformers 4 had rope_theta, rope_scaling and rope_local_base_freq where 5 has rope_parameters."""
    for name in ('llama3', 'gemma3', 'mistral'):
        config = json.loads((GOLDEN / name / 'config.json').read_text())
        family, _ = families.family_of(config, name)
        wanted = families.read_model(config, family, name)
        rope = config.pop('rope_parameters')
        whole = rope.get('full_attention', rope)
        config['rope_theta'] = whole.pop('rope_theta')
        if whole['rope_type'] != 'default':
            config['rope_scaling'] = {'type' if name == 'gemma3' else 'rope_type': whole.pop('rope_type'), **whole}
        if 'sliding_attention' in rope:
            config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
            del config['layer_types']
        assert families.read_model(config, family, name) == wanted


@pytest.mark.parametrize(
    ('name', 'change', 'wanted'),
    [
        ('llama', {'mlp_bias': True}, 'mlp_bias=True in config.json is not in our graph'),
        ('llama', {'attention_bias': True}, 'attention_bias=True'),
        ('llama', {'hidden_act': 'relu'}, "hidden_act='relu'"),
        ('llama', {'architectures': ['MixtralForCausalLM']}, 'MixtralForCausalLM is not one that we have: Llama, '),
        ('llama', {'architectures': None, 'auto_map': {'AutoModel': 'evil.Model'}}, 'None is not one that we have'),
        ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "of type 'yarn'"),
        ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': 'x'}}, "of type 'linear'"),
        ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
        ('llama', {'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config='),
        ('llama', {'hidden_size': 10**12}, 'model.dim in config.json is 1000000000000'),
        ('llama', {'num_attention_heads': '4'}, "model.heads in config.json is '4'"),
        ('llama', {'hidden_size': 64}, 'config.json makes it'),
        ('llama', {'num_hidden_layers': 4}, "has no tensor 'model.layers.3."),
        ('llama', {'num_hidden_layers': 2}, 'has 9 tensors that are not in our graph'),
    ],
)
def test_what_our_decoder_cannot_express_is_refused_by_its_key(tmp_path, name, change, wanted):
    folder = shutil.copytree(GOLDEN / name, tmp_path / 'folder')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(UsageError) as told:
        open_folder(folder)
    assert wanted in str(told.value) and '\n' not in str(told.value)


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        ({'qk_norm': True, 'logit_softcap': 3.0}, 'no architecture of Hugging Face is this graph; .*logit_softcap'),
        ({'residual_scale': 0.5, 'qk_norm': True}, 'residual_scale'),
        ({'pattern': 'global,nope', 'qkv_bias': True}, 'pattern'),
    ],
)
def test_a_graph_of_no_architecture_is_refused_with_the_reason(tmp_path, change, wanted):
    first = open_folder(GOLDEN / 'llama')
    with pytest.raises(UsageError, match=wanted):
        write_folder(Opened('it', {**first.model, **change}, first.leaves, {}), tmp_path / 'out', say=QUIET)
    assert not list(tmp_path.iterdir())


# ---- damaged and hostile folders ----


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / 'llama', tmp_path / 'folder')


def header_of(folder: Path) -> tuple[dict, bytes]:
    data = (folder / 'model.safetensors').read_bytes()
    length = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, header, data: bytes, *, length: int | None = None) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(content) if length is None else length
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', length) + content + data)


NORM = 'model.norm.weight'


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        ({'data_offsets': [10**9, 10**9 + 128]}, 'reaches over the end'),
        ({'data_offsets': [0, 128]}, 'overlap'),
        ({'data_offsets': [128, 0]}, 'has not -128 bytes'),
        ({'data_offsets': [-128, 0]}, 'no shape and place'),
        ({'data_offsets': [0]}, 'no shape and place'),
        ({'shape': [2**40, 2**40]}, 'has not 128 bytes'),
        ({'shape': [2**60]}, 'no shape and place'),
        ({'shape': [True]}, 'no shape and place'),
        ({'shape': 'x'}, 'no shape and place'),
        ({'dtype': 'F8_E4M3'}, 'is of type F8_E4M3; we read F32, F16, BF16'),
        ({'dtype': None}, 'is of type None'),
    ],
)
def test_a_tensor_that_cannot_be_is_one_line(folder, change, wanted):
    header, data = header_of(folder)
    write_header(folder, header | {NORM: header[NORM] | change}, data)
    with pytest.raises(UsageError) as told:
        open_folder(folder)
    assert wanted in str(told.value) and '\n' not in str(told.value)


@pytest.mark.parametrize(
    ('content', 'length', 'wanted'),
    [
        (b'{}', 2**62, 'its header of 4611686018427387904 bytes does not fit'),
        (b'{"a": ', None, 'its header is no JSON'),
        (b'[]', None, 'its header is no object'),
        (b'[' * 100_000, None, 'its header is no JSON'),
        (b'{"a": 5}', None, 'no shape and place'),
        (b'\xff\xfe', None, 'its header is no JSON'),
    ],
)
def test_a_header_that_cannot_be_is_one_line(folder, content, length, wanted):
    write_header(folder, content, b'', length=length)
    with pytest.raises(UsageError, match=wanted):
        open_folder(folder)


@pytest.mark.parametrize('size', [0, 5, 8, 100, 5000])
def test_a_file_that_is_cut_short_is_refused(folder, size):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:size])
    with pytest.raises(UsageError, match='damaged safetensors file'):
        open_folder(folder)


@pytest.mark.parametrize('shard', ['../model.safetensors', '/etc/passwd', 'a/b.safetensors', 'weights.bin', '..'])
def test_a_shard_that_leaves_the_folder_is_refused(folder, shard):
    (folder / 'model.safetensors').rename(folder.parent / 'model.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {NORM: shard}}))
    with pytest.raises(UsageError, match='which is no .safetensors file of the folder'):
        open_folder(folder)


def test_pickles_are_not_read(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(UsageError, match='pickles, which can run code; save them as safetensors'):
        open_folder(folder)


@pytest.mark.parametrize('content', ['', '{', '[]', '[' * 100_000])
def test_a_damaged_config_is_one_line(folder, content):
    (folder / 'config.json').write_text(content)
    with pytest.raises(UsageError, match='config.json is damaged'):
        open_folder(folder)
