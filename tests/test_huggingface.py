"""Hugging Face folders: each family's logits, round trips bit for bit, and folders that are damaged or hostile."""

import dataclasses
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lm import files
from lm.errors import RunError, UsageError
from lm.evals import agreement
from lm.interop import independent
from lm.interop.huggingface import families, family_config, safetensors_file
from lm.interop.huggingface import folder as huggingface
from lm.interop.huggingface.folder import open_folder, write_folder
from lm.interop.opened import Leaf, Opened
from lm.interop.tokenizers import conversion as tokenizers
from lm.interop.tokenizers import files as tokenizer_files
from lm.model import transformer
from lm.model.config import ModelConfig
from lm.runs import lazy_checkpoint

GOLDEN = Path(__file__).parent / 'golden' / 'families'
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
QUIET = lambda line: None


def golden(name: str):
    with np.load(GOLDEN / name / 'logits.npz') as file:
        return file['tokens'], file['logits']


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / name / 'config.json').read_text())


def params_of(opened: Opened) -> dict:
    """The parameters, stacked; the vocabulary needs no padding in tests."""
    params: dict = {'layers': {}}
    for path, leaf in opened.leaves.items():
        found = np.stack([leaf.read(i) for i in range(leaf.layers)]) if leaf.layers else leaf.read(0)
        node = params['layers'] if leaf.layers else params
        node[path.rpartition('/')[2]] = jnp.asarray(found, jnp.float32)
    return params


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'scored'])
@pytest.mark.parametrize('scan', [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_logits_are_those_of_transformers(name, scan):
    tokens, wanted = golden(name)
    opened = open_folder(GOLDEN / name)
    cfg = ModelConfig(**opened.model, scan=scan, vocab_multiple=1)
    params = params_of(opened)
    found = transformer.logits(params, cfg, transformer.forward(params, cfg, jnp.asarray(tokens))[0])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    row = agreement.logits_of(opened, tokens[0])
    np.testing.assert_allclose(row, wanted[0], atol=1e-4)


def test_every_family_is_among_them():
    made = {family_config.describe(config_of(n), n).family.model_type for n in NAMES}
    assert made == {family.model_type for family in families.FAMILIES}


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
    theirs, ours = (
        safetensors_file.read_header(folder / 'model.safetensors') for folder in (GOLDEN / name, tmp_path / 'out')
    )
    for tensor in theirs:
        np.testing.assert_array_equal(
            safetensors_file.read(theirs[tensor]), safetensors_file.read(ours[tensor]), err_msg=tensor
        )


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
        config = config_of(name)
        wanted = family_config.describe(config, name).model
        rope = config.pop('rope_parameters')
        whole = rope.get('full_attention', rope)
        config['rope_theta'] = whole.pop('rope_theta')
        if whole['rope_type'] != 'default':
            config['rope_scaling'] = {'type' if name == 'gemma3' else 'rope_type': whole.pop('rope_type'), **whole}
        if 'sliding_attention' in rope:
            config['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
            del config['layer_types']
        assert family_config.describe(config, name).model == wanted


@pytest.mark.parametrize(
    ('name', 'change', 'wanted'),
    [
        ('llama', {'mlp_bias': True}, 'config.json: mlp_bias=True is not in our graph'),
        ('llama', {'attention_bias': True}, "has no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ('llama', {'hidden_act': 'relu'}, "hidden_act='relu'"),
        ('llama', {'architectures': ['MixtralForCausalLM']}, "'MixtralForCausalLM' is not one that we have: Llama, "),
        ('llama', {'architectures': None, 'auto_map': {'AutoModel': 'evil.Model'}}, 'None is not one that we have'),
        ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_type='yarn' is not in our graph"),
        ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': 'x'}}, "factor='x' is not a positive"),
        ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
        ('llama', {'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config='),
        ('llama', {'hidden_size': 10**12}, 'hidden_size=1000000000000 is not a whole number'),
        ('llama', {'num_attention_heads': '4'}, "num_attention_heads='4' is not a whole number"),
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
        ({'data_offsets': [10**9, 10**9 + 128]}, 'overlaps another, or there is a gap'),
        ({'data_offsets': [0, 128]}, 'overlaps another'),
        ({'data_offsets': [128, 0]}, 'has -128 bytes; its shape makes it 128'),
        ({'data_offsets': [-128, 0]}, 'has no proper shape and place'),
        ({'data_offsets': [0]}, 'has no proper shape and place'),
        ({'shape': [2**40, 2**40]}, 'has 128 bytes; its shape makes it'),
        ({'shape': [2**60]}, 'has 128 bytes; its shape makes it'),
        ({'shape': [True]}, 'has no proper shape and place'),
        ({'shape': 'x'}, 'has no proper shape and place'),
        ({'dtype': 'F8_E4M3'}, 'has 128 bytes; its shape makes it 32'),
        ({'dtype': None}, 'is of the type None'),
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
        (b'{}', 2**62, 'a header of 4611686018427387904 bytes in'),
        (b'{"a": ', None, 'its header is damaged'),
        (b'[]', None, 'its header is damaged'),
        (b'[' * 100_000, None, 'its header is damaged'),
        (b'{"a": 5}', None, 'is of the type None'),
        (b'\xff\xfe', None, 'its header is damaged'),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', None, 'its header is damaged .a name twice'),
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
    with pytest.raises(UsageError, match='no whole safetensors file|is cut short'):
        open_folder(folder)


@pytest.mark.parametrize('shard', ['../model.safetensors', '/etc/passwd', 'a/b.safetensors', 'weights.bin', '..'])
def test_a_shard_that_leaves_the_folder_is_refused(folder, shard):
    (folder / 'model.safetensors').rename(folder.parent / 'model.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {NORM: shard}}))
    with pytest.raises(UsageError, match='is not the name of a file in the folder'):
        open_folder(folder)


def test_pickles_are_not_read(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(UsageError, match='has pickled weights alone, which run code'):
        open_folder(folder)


@pytest.mark.parametrize('content', ['', '{', '[]', '[' * 100_000])
def test_a_damaged_config_is_one_line(folder, content):
    (folder / 'config.json').write_text(content)
    with pytest.raises(UsageError, match='config.json is damaged'):
        open_folder(folder)


# ---- what a config.json leaves out or hides ----


def model_of(name: str, change: dict) -> dict:
    config = json.loads((GOLDEN / name / 'config.json').read_text())
    config = {key: value for key, value in (config | change).items() if value != 'absent'}
    return family_config.describe(config, name).model


def test_what_is_absent_is_what_transformers_takes():
    bare = {'rope_parameters': 'absent', 'layer_types': 'absent'}
    gemma = model_of('gemma3', {**bare, 'num_hidden_layers': 7})
    assert (gemma['rope_theta'], gemma['rope_theta_local'], gemma['window']) == (1e6, 1e4, 7)
    assert model_of('smollm3', bare)['rope_theta'] == 2e6
    assert model_of('llama', bare)['rope_theta'] == 1e4
    for name in ('qwen2', 'qwen3'):
        assert model_of(name, {**bare, 'use_sliding_window': 'absent', 'sliding_window': 7})['window'] is None


def test_local_layers_alone_keep_a_theta_of_their_own():
    """A Gemma 3 of fewer layers than its pattern has no global one."""
    few = {'num_hidden_layers': 3, 'layer_types': ['sliding_attention'] * 3}
    model = model_of('gemma3', few)
    assert (model['pattern'], model['window'], model['rope_theta_local']) == ('local', 7, 100.0)
    assert family_config.choose(model, scored=False)[0].causal == 'Gemma3ForCausalLM'


def test_scaling_is_kept_to_the_last_digit():
    rope = {'rope_type': 'llama3', 'factor': 1.1, 'low_freq_factor': 1, 'high_freq_factor': 4.0}
    scaled = {**rope, 'rope_theta': 1e4, 'original_max_position_embeddings': 1_048_576}
    model = model_of('llama', {'rope_parameters': scaled})
    assert model['rope_scaling'] == 'llama3,factor=1.1,low=1,high=4,original=1048576'


LINEAR = {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 1e4}


@pytest.mark.parametrize(
    ('name', 'change', 'wanted'),
    [
        (
            'gemma2',
            {'rope_parameters': LINEAR},
            'rope_scaling of layers with a sliding window beside',
        ),  # which transformers scales, too
        ('llama', {'num_hidden_layers': 2**30}, 'is more than 4096'),
        ('llama', {'rope_parameters': {**LINEAR, 'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
        ('llama', {'rope_parameters': [1]}, 'no object'),
        ('llama', {'rope_parameters': 'absent', 'rope_scaling': 'x'}, 'no object'),
        ('llama', {'rope_parameters': {'rope_theta': 'x'}}, "rope_theta='x' is not a positive number"),
        ('llama', {'rope_parameters': {'rope_theta': float('nan')}}, 'rope_theta=nan is not a positive'),
        ('mistral', {'sliding_window': '7'}, "sliding_window='7' is not a whole"),
        ('mistral', {'sliding_window': 0}, 'sliding_window=0 is not a whole'),
    ],
)
def test_values_that_cannot_be_are_one_line(name, change, wanted):
    with pytest.raises(UsageError) as told:
        model_of(name, change)
    assert wanted in str(told.value) and '\n' not in str(told.value)


def test_each_class_of_each_family_is_known_by_its_name():
    """Gemma3ForSequenceClassification reads images, too, and Granite has no such class."""
    classes = {family.model_type: (family.causal, family.scored) for family in families.FAMILIES}
    assert classes['gemma3_text'] == ('Gemma3ForCausalLM', 'Gemma3TextForSequenceClassification')
    assert classes['granite'] == ('GraniteForCausalLM', None)
    for name in NAMES:
        told = family_config.describe(config_of(name), name)
        own = config_of(name)['architectures'][0]
        assert (told.family.scored if told.scored else told.family.causal) == own


def test_a_key_that_is_absent_and_one_that_is_null_are_not_the_same():
    """Gemma 2 has its soft-caps where the file has no key, and none where it has null; Mistral has its window so."""
    caps = ('attn_logit_softcapping', 'final_logit_softcapping')
    for told, wanted in (('absent', (50.0, 30.0)), (None, (None, None))):
        model = model_of('gemma2', dict.fromkeys(caps, told))
        assert (model['attn_softcap'], model['logit_softcap']) == wanted
        assert model_of('mistral', {'sliding_window': told})['window'] == (4096 if told else None)
    assert model_of('gemma3', {'attn_logit_softcapping': 9.0})['attn_softcap'] is None  # which transformers ignores
    assert model_of('qwen3', {'head_dim': 'absent'})['head_dim'] == 128
    assert model_of('llama', {'head_dim': 'absent'})['head_dim'] == 8
    assert model_of('gemma', {'hidden_act': 'gelu'})['activation'] == 'gelu'  # as its first files have it


@pytest.mark.parametrize(
    ('name', 'change', 'wanted'),
    [
        (
            'smollm3',
            {'use_sliding_window': True, 'sliding_window': 7, 'layer_types': 'absent'},
            'no_rope_layers with a',
        ),
        ('smollm3', {'no_rope_layers': [1, 0]}, 'is not a 0 or 1 for each of 6 layers'),
        ('gemma3', {'layer_types': ['full_attention']}, 'is not 7 of full_attention and sliding_attention'),
        ('qwen3', {'layer_types': ['linear_attention'] * 3}, 'is not 3 of full_attention and sliding_attention'),
        ('llama', {'layer_types': ['sliding_attention'] * 3}, 'there is no sliding_window in use'),
        ('qwen2', {'use_sliding_window': 1}, 'use_sliding_window=1 is neither true nor false'),
        (
            'mistral',
            {'layer_types': ['full_attention', *['sliding_attention'] * 2]},
            'of more than one kind are not of',
        ),
        ('qwen2', {'rope_parameters': {'full_attention': LINEAR, 'sliding_attention': {}}}, 'that differ by the type'),
        ('llama', {'is_causal': False}, 'is_causal=False is not in our graph'),
        ('llama', {'clip_qkv': 8.0}, 'clip_qkv=8.0 is not in our graph'),
        ('gemma3', {'use_bidirectional_attention': True}, 'use_bidirectional_attention=True'),
        ('scored', {'id2label': {'0': 'a', '1': 'b'}}, 'num_labels=2'),
        ('scored', {'id2label': 'absent'}, 'num_labels=2'),
        ('llama', {'tie_word_embeddings': 'yes'}, "tie_word_embeddings='yes' is neither true nor false"),
        ('llama', {'rms_norm_eps': -1}, 'rms_norm_eps=-1 is not a positive number'),
        ('llama', {'vocab_size': 'absent'}, 'has no vocab_size'),
        ('llama', {'vocab_size': True}, 'vocab_size=True is not a whole number'),
    ],
)
def test_a_graph_that_would_be_read_as_another_is_refused(name, change, wanted):
    with pytest.raises(UsageError) as told:
        model_of(name, change)
    assert wanted in str(told.value) and '\n' not in str(told.value)


def test_layers_of_kinds_by_number_are_a_pattern():
    sliding = {'use_sliding_window': True, 'sliding_window': 7, 'max_window_layers': 1, 'layer_types': 'absent'}
    model = model_of('qwen2', sliding)
    assert (model['pattern'], model['window']) == ('global,local,local', 7)
    assert family_config.choose(model, scored=False)[1]['layer_types'].count('sliding_attention') == 2
    assert (
        model_of('smollm3', {'no_rope_layers': 'absent', 'no_rope_layer_interval': 3})['pattern']
        == 'global,global,nope'
    )


def test_a_graph_is_what_its_layers_do_however_the_settings_say_it():
    plain = open_folder(GOLDEN / 'llama').model
    wanted = {
        'Llama': [{'pattern': 'global,global'}, {'pattern': 'global', 'window': 5}, {'embed_scale': 1.0},
                  {'query_scale': 8**-0.5}, {'activation': 'gelu'}, {'rope_theta_local': 7.0}],
        'Mistral': [{'window': 5}, {'pattern': 'local,local', 'window': 5}, {'dim': 34}],
        'Granite': [{'query_scale': 0.5}, {'logit_scale': 0.3}],
        'SmolLM3': [{'pattern': 'nope'}],
        'Qwen2': [{'qkv_bias': True, 'pattern': 'local,global', 'window': 5}],
    }  # fmt: skip
    for name, changes in wanted.items():
        for change in changes:
            assert family_config.choose(plain | change, scored=False)[0].causal == f'{name}ForCausalLM', change
    local = {'pattern': 'local', 'window': 5, 'rope_scaling': 'linear,factor=2'}  # which local layers do not have
    assert family_config.choose(plain | local, scored=False)[0].causal == 'MistralForCausalLM'
    assert family_config.choose(plain | local, scored=False)[1]['rope_scaling'] is None
    assert 'max_position_embeddings' not in family_config.choose(plain | {'context': None}, scored=False)[1]
    with pytest.raises(UsageError, match='no architecture'):
        family_config.choose(plain | {'query_scale': 0.5}, scored=True)  # Granite has no class for scores
    assert family_config.choose(plain | {'logit_scale': 0.3}, scored=True)[0].model_type == 'llama'  # no score has it


def test_activations_are_written_by_the_names_that_they_came_with(tmp_path):
    """One formula has several names, whose sums differ in the last digit."""
    for name in ('llama', 'gemma', 'gemma2'):
        write_folder(open_folder(GOLDEN / name), tmp_path / name, say=QUIET)
        key = 'hidden_activation' if name == 'gemma2' else 'hidden_act'
        assert json.loads((tmp_path / name / 'config.json').read_text())[key] == config_of(name)[key]


# ---- what is stored beside ----


def rewritten(folder: Path, change) -> Path:
    """The folder with other tensors: change({name: array}) -> {name: array}."""
    infos = safetensors_file.read_header(folder / 'model.safetensors')
    tensors = change({name: safetensors_file.read(info) for name, info in infos.items()})
    header = safetensors_file.header(
        {name: (safetensors_file.kind_of(x.dtype), x.shape) for name, x in tensors.items()}
    )
    (folder / 'model.safetensors').write_bytes(header + b''.join(x.tobytes() for x in tensors.values()))
    return folder


def test_a_tied_head_that_is_stored_counts_if_it_is_another(tmp_path):
    """As it does for transformers 5: what config.json says is then wrong."""
    embed, head = 'model.embed_tokens.weight', 'lm_head.weight'
    same = shutil.copytree(GOLDEN / 'qwen2', tmp_path / 'same')
    opened = open_folder(rewritten(same, lambda tensors: tensors | {head: tensors[embed]}))
    assert opened.model['tied'] and 'head_DV' not in opened.leaves
    other = shutil.copytree(GOLDEN / 'qwen2', tmp_path / 'other')
    opened = open_folder(rewritten(other, lambda tensors: tensors | {head: tensors[embed] + np.float32(1)}))
    assert not opened.model['tied'] and 'lm_head.weight differs' in opened.notes[0]
    np.testing.assert_array_equal(opened.leaves['head_DV'].read(0), opened.leaves['embed_VD'].read(0).T + np.float32(1))
    write_folder(opened, tmp_path / 'out', say=QUIET)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['tie_word_embeddings'] is False


def test_copies_of_constants_are_left_out(folder):
    name = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    rewritten(folder, lambda tensors: tensors | {name: np.ones(4, np.float32)})
    assert set(open_folder(folder).leaves) == set(open_folder(GOLDEN / 'llama').leaves)


@pytest.mark.parametrize('form', ['language_model.model.', 'model.language_model.'])
def test_of_a_model_that_reads_images_the_text_model_is_taken(tmp_path, form):
    text = config_of('gemma3')
    folder = shutil.copytree(GOLDEN / 'gemma3', tmp_path / 'folder')
    config = {'architectures': ['Gemma3ForConditionalGeneration'], 'text_config': text, 'vision_config': {}}
    (folder / 'config.json').write_text(json.dumps(config))
    turn = lambda name: form + name.removeprefix('model.')
    rewritten(folder, lambda tensors: {turn(n): x for n, x in tensors.items()} | {'vision_tower.x': np.ones(3, 'f4')})
    for opened in (open_folder(folder), independent.open_folder(folder)):
        assert (
            opened.model == open_folder(GOLDEN / 'gemma3').model and 'what reads images was left out' in opened.notes[0]
        )
        np.testing.assert_allclose(
            agreement.logits_of(opened, golden('gemma3')[0][0]), golden('gemma3')[1][0], atol=1e-4
        )


def test_a_score_without_a_head_and_with_a_bias(tmp_path):
    first = open_folder(GOLDEN / 'scored')
    assert first.model['tied'] and 'head_DV' not in first.leaves and first.leaves['bias_score'].read(0) == 0
    bias = Leaf((), np.dtype(np.float32), None, lambda layer: np.float32(0.1))
    head = Leaf((32, 96), np.dtype(np.float32), None, lambda layer: np.ones((32, 96), np.float32))
    said = []
    biased = Opened(
        'it', {**first.model, 'tied': False}, {**first.leaves, 'bias_score': bias, 'head_DV': head}, {}, True
    )
    write_folder(biased, tmp_path / 'out', say=said.append)
    assert open_folder(tmp_path / 'out').leaves['bias_score'].read(0) == np.float32(0.1)
    assert 'bias of 0.1, which transformers does not add' in said[1] and 'head of the language model' in said[2]
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(config | {'reward_bias': 'x'}))
    with pytest.raises(UsageError, match="reward_bias='x' is not a number"):
        open_folder(tmp_path / 'out')


# ---- writing ----


def test_writing_holds_a_piece_and_not_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr('lm.interop.graph.ROWS', 2**14)
    monkeypatch.setattr(files, 'STREAM_CHUNK', 2**16)
    first = open_folder(GOLDEN / 'llama')
    model = {**first.model, 'vocab_size': 2**16}
    wide = lambda shape: Leaf(shape, np.dtype(np.float32), None, lambda layer: np.broadcast_to(np.float32(1), shape))
    leaves = {**first.leaves, 'embed_VD': wide((2**16, 32)), 'head_DV': wide((32, 2**16))}
    tracemalloc.start()
    write_folder(Opened('wide', model, leaves, {}), tmp_path / 'out', say=QUIET)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / 'out' / 'model.safetensors').stat().st_size > 2 * 2**23 and peak < 2**21


def test_a_folder_that_could_not_be_written_leaves_nothing(tmp_path):
    first = open_folder(GOLDEN / 'llama')

    def fails(layer):
        raise OSError(28, 'No space left on device')

    leaves = {**first.leaves, 'layers/wo_NHD': first.leaves['layers/wo_NHD']._replace(read=fails)}
    with pytest.raises(RunError, match='No space left on device'):
        write_folder(Opened('it', first.model, leaves, {}), tmp_path / 'out', say=QUIET)
    assert not list(tmp_path.iterdir())
    (tmp_path / 'out').mkdir()
    with pytest.raises(UsageError, match='exists: name a new folder'):
        write_folder(first, tmp_path / 'out', say=QUIET)


@pytest.mark.parametrize('stage', ['sft', 'reward'])
def test_a_runs_symbols_are_named(dialogues, tmp_path, stage):
    first = lazy_checkpoint.open_run(str(dialogues.run(stage)))
    write_folder(first, tmp_path / 'out', say=QUIET)
    config, ends = (json.loads((tmp_path / 'out' / n).read_text()) for n in ('config.json', 'generation_config.json'))
    ids = {'bos_token_id': 1, 'pad_token_id': 0, 'eos_token_id': [2, 7]}
    assert {key: config[key] for key in ids} == ids and ends['eos_token_id'] == [2, 7]
    assert config['model_type'] == 'qwen3' and config['max_position_embeddings'] == first.model['context']


def test_ids_of_symbols_that_are_unknown_are_null(tmp_path):
    """Else transformers takes the family's own, 128004 in SmolLM 3, beyond this vocabulary."""
    write_folder(open_folder(GOLDEN / 'smollm3'), tmp_path / 'out', say=QUIET)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert [config[key] for key in tokenizer_files.IDS] == [None, None, None]


def test_padding_that_ends_an_answer_is_not_named_with_a_reward_model(dialogues, tmp_path):
    """transformers reads the score at the last token that is not padding, which would be the one before the end."""
    first = lazy_checkpoint.open_run(str(dialogues.run('reward')))
    files_of_it = tokenizers.to_huggingface(first.tokenizer, context=None)
    named, other = b'"pad_token": "<pad>"', b'"pad_token": "<eos>"'
    files_of_it = {name: content.replace(named, other) for name, content in files_of_it.items()}
    said = []
    write_folder(dataclasses.replace(first, tokenizer=files_of_it), tmp_path / 'out', say=said.append)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pad_token_id'] is None
    assert any('no padding of its own' in text for text in said)


def test_a_file_without_an_end_is_not_read_whole(folder):
    (folder / 'chat_template.jinja').symlink_to('/dev/zero')
    with pytest.raises(UsageError, match='has more than'):
        open_folder(folder)
