"""Adapters of peft: ours say what peft says of its own files, and what cannot be expressed is refused by name."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import refused
from running import params

from lm.errors import UsageError
from lm.interop import peft, placed
from lm.interop.huggingface import safetensors_file as file
from lm.interop.huggingface.folder import open_folder
from lm.model import sequences, transformer
from lm.model.config import ModelConfig
from lm.runs import loading

GOLDEN = Path(__file__).parent / 'golden'
# The model under each, as tests/golden/make_peft.py has them.
BASES = {
    path.parent.name: json.loads(path.read_text())['base_model_name_or_path']
    for path in sorted((GOLDEN / 'peft').glob('*/adapter_config.json'))
}
QUIET = lambda line: None


def base_of(name):
    return open_folder(GOLDEN / 'families' / BASES[name])


def says(opened, tokens):
    """Logits, or the scores of a reward model at the last token."""
    cfg = ModelConfig(**opened.model)
    model = placed.arrays(opened, loading.abstract_params(cfg, 'reward' if opened.scored else 'policy'))
    hidden, _ = transformer.forward(model, cfg, tokens)
    if opened.scored:
        return np.asarray(sequences.token_scores(model, hidden))[:, -1:]
    return np.asarray(transformer.logits(model, cfg, hidden))


@pytest.mark.parametrize('name', BASES)
def test_a_model_says_what_it_says_with_peft(one_device, name, tmp_path):
    base = base_of(name)
    with np.load(GOLDEN / 'peft' / name / 'logits.npz') as golden:
        tokens, expected = golden['tokens'].astype(np.int32), golden['logits']
        assert np.abs(golden['base'] - expected).max() > 0.05  # what changes nothing would be found
    adapter = peft.open_adapter(GOLDEN / 'peft' / name, base)
    assert not adapter.notes
    np.testing.assert_allclose(says(adapter.over(base), tokens), expected, atol=2e-5)
    peft.write_adapter(adapter, base, tmp_path / 'out', say=QUIET)
    again = peft.open_adapter(tmp_path / 'out', base)
    np.testing.assert_allclose(says(again.over(base), tokens), expected, atol=2e-5)


def test_names_with_an_adapter_in_them_and_without_a_prefix_are_the_same(one_device, tmp_path):
    base, tensors = base_of('plain'), tensors_of('plain')
    for i, renamed in enumerate(
        (
            lambda name: name.replace('.weight', '.default.weight'),
            lambda name: name.removeprefix('base_model.model.'),
        )
    ):
        folder = written(tmp_path / str(i), 'plain', {renamed(name): x for name, x in tensors.items()})
        found = peft.open_adapter(folder, base)
        for path, stack in peft.open_adapter(GOLDEN / 'peft' / 'plain', base).stacks.items():
            for layer in range(stack.layers):
                jax.tree.map(np.testing.assert_array_equal, found.stacks[path].read(layer), stack.read(layer))


# ---- runs ----


def test_a_run_goes_out_and_comes_back(dialogues, tmp_path, call, monkeypatch):
    """Ranks that differ, PiSSA's start as a plain adapter of twice the rank, and training goes on from what came."""
    monkeypatch.chdir(dialogues.lab.folder)
    run, base = tmp_path / 'run', dialogues.run('pretrain')
    options = {'lora__rank': 4, 'lora__targets': 'wq,wv:2,w_down', 'lora__start': 'pissa', 'lora__scale': 'rs'}
    dialogues.train('sft', run, steps=3, optim__lr=1e-2, **options)
    assert call('convert', run, tmp_path / 'out', '--format=peft')[0] == 0
    told = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
    assert (told['r'], told['rank_pattern'], told['use_rslora']) == (8, {'v_proj': 4}, False)
    assert told['base_model_name_or_path'] == str(base)
    status, out, err = call('convert', tmp_path / 'out', tmp_path / 'back', f'--base={base}')
    assert status == 0, err
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(same, params(tmp_path / 'back')['layers'], params(run)['layers'])
    dialogues.train('sft', tmp_path / 'more', init_from=str(tmp_path / 'back'), steps=1)
    assert call('chat', tmp_path / 'back', '--base', '--raw', '--prompt=the', '--max_new_tokens=2')[0] == 0
    refused(call('convert', tmp_path / 'out', tmp_path / 'x'), f'is an adapter over {base}: name the run', None)
    refused(call('convert', base, tmp_path / 'x', '--format=peft'), 'is no adapter', None)
    refused(call('convert', base, tmp_path / 'x', f'--base={base}'), 'is none: leave it out', None)


# ---- what cannot be ----


def tensors_of(name):
    found = file.read_header(GOLDEN / 'peft' / name / peft.WEIGHTS)
    return {name: file.read(info) for name, info in found.items()}


def written(folder, name, tensors, **changed):
    """A folder of peft's with other tensors and settings."""
    shutil.copytree(GOLDEN / 'peft' / name, folder)
    content = file.header({name: ('F32', x.shape) for name, x in tensors.items()})
    content += b''.join(np.ascontiguousarray(x, np.float32).tobytes() for x in tensors.values())
    (folder / peft.WEIGHTS).write_bytes(content)
    config = folder / peft.CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    return folder


def first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


def without(end):
    return lambda x: {k: v for k, v in x.items() if k != first(x, end)}


def changed(end, by):
    return lambda x: x | {(name := first(x, end)): by(x[name])}


@pytest.mark.parametrize(
    'tensors, settings, wanted',
    [
        (without('lora_B.weight'), {}, "lacks a factor 'b' beside it"),
        (lambda x: {k: v for k, v in x.items() if '.2.' not in k}, {}, 'target_modules names model.layers.2.'),
        (lambda x: {}, {}, 'has no factors'),
        (lambda x: {k.replace('layers.2', 'layers.7'): v for k, v in x.items()}, {}, 'is of no matrix of'),
        (lambda x: x | {'base_model.model.lm_head.lora_A.weight': np.ones((2, 32))}, {}, 'is of no matrix of'),
        (changed('lora_A.weight', lambda x: x[:, :-1]), {}, 'makes it (2, '),
        (changed('lora_A.weight', lambda x: x[:1]), {}, 'makes it ('),
        (lambda x: x, {'r': 3}, 'has a rank of 2, and adapter_config.json says 3'),
        (lambda x: x, {'lora_alpha': 0}, 'lora_alpha=0: an adapter that is multiplied by 0 changes nothing'),
        (lambda x: x, {'lora_alpha': 'six'}, 'lora_alpha="six" is no number'),
        (lambda x: x, {'peft_type': 'IA3'}, 'peft_type=IA3: LORA is read'),
        (lambda x: x, {'init_lora_weights': 'pissa_niter_4'}, 'changed the base: save it with'),
        (lambda x: x, {'modules_to_save': ['lm_head']}, 'modules_to_save=["lm_head"]: only the score'),
        (lambda x: x, {'bias': 'all'}, 'bias="all" has no place'),
        (lambda x: x, {'use_dora': True}, "lacks a factor 'magnitude' beside it"),
        (lambda x: x, {'target_parameters': ['experts']}, 'target_parameters=["experts"] has no place'),
        (lambda x: x, {'alpha_pattern': {'(q+_)+proj': 1}}, 'repeats what repeats'),
        (lambda x: x, {'alpha_pattern': {'[': 1}}, 'is no expression'),
        (lambda x: x, {'alpha_pattern': [1]}, 'alpha_pattern is no table of numbers'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, tensors, settings, wanted):
    folder = written(tmp_path / 'x', 'plain', tensors(tensors_of('plain')), **settings)
    with pytest.raises(UsageError) as error:
        peft.open_adapter(folder, base_of('plain'))
    assert wanted in str(error.value) and '\n' not in str(error.value)


def test_what_is_no_number_is_refused_as_it_is_read(tmp_path):
    tensors = changed('lora_A.weight', lambda x: np.full_like(x, np.nan))(tensors_of('plain'))
    found = peft.open_adapter(written(tmp_path / 'x', 'plain', tensors), base_of('plain'))
    with pytest.raises(UsageError, match='holds values that are no numbers'):
        [stack.read(i) for stack in found.stacks.values() for i in range(stack.layers)]


def test_what_is_doubtful_is_said(tmp_path):
    folder = written(
        tmp_path / 'x', 'plain', tensors_of('plain'), alpha_pattern={'q_proj': 4, 'self_attn.q_proj': 8}, novel=1
    )
    notes = ' '.join(peft.open_adapter(folder, base_of('plain')).notes)
    assert 'q_proj and self_attn.q_proj of alpha_pattern are of one module' in notes
    assert 'novel in adapter_config.json is not known' in notes


def test_another_model_is_refused():
    with pytest.raises(UsageError, match='is of no matrix of|makes it'):
        peft.open_adapter(GOLDEN / 'peft' / 'plain', open_folder(GOLDEN / 'families' / 'gemma3'))
