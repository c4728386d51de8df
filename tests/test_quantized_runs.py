"""Runs whose weights are quantized: made of whatever there is, talked to, evaluated, trained over and taken out."""

import json

import jax
import numpy as np
import pytest
from checks import refused
from running import all_devices, measured, params

from lm.model import adapters, quantized, seam, transformer
from lm.runs import checkpoint, lazy_checkpoint, loading

LORA = {'lora__rank': 4, 'optim__lr': 1e-2}


@pytest.fixture(scope='module')
def lying(dialogues, tmp_path_factory):
    """The pretrained run in 4 bits, which nobody may change."""
    run = tmp_path_factory.mktemp('lying') / 'run'
    with all_devices():
        opened = lazy_checkpoint.open_run(str(dialogues.run('pretrain')))
        lazy_checkpoint.write_run(opened, run, quantize='int4:32')
    return run


def config_of(run):
    return json.loads((run / 'config.json').read_text())


@pytest.mark.parametrize('kind', ['int8', 'int4:32', pytest.param('nf4:32', marks=pytest.mark.slow)])
def test_a_run_is_made_and_told(kind, dialogues, tmp_path, call, monkeypatch):
    """Its bytes beside those of other kinds before it begins, its KL after; it loads as codes that are those of
    `quantize`, and opens as the same numbers."""
    monkeypatch.chdir(dialogues.lab.folder)
    source, run = dialogues.run('pretrain'), tmp_path / 'run'
    status, out, err = call('convert', source, run, f'--quantize={kind}')
    assert status == 0, err
    told = json.loads(out)
    assert told['form'] == 'run' and told['quantize'] == kind and 0 < told['kl'] < 0.1
    assert f'bfloat16 0.1 MB, {kind} ' in err
    assert config_of(run)['about']['quantized'] == kind
    with all_devices():
        found = loading.load(str(run), warn=pytest.fail)
        expected = jax.jit(lambda p: quantized.quantized(p, kind))(params(source))
        same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        jax.tree.map(same, found.params['layers'], expected['layers'])
        opened = lazy_checkpoint.open_run(str(run))
        dense = jax.device_get(jax.jit(adapters.merged)(found.params))
        np.testing.assert_array_equal(opened.leaves['layers/wo_NHD'].read(1), dense['layers']['wo_NHD'][1])


def test_it_is_used_as_it_lies(lying, dialogues, call, monkeypatch):
    monkeypatch.chdir(dialogues.lab.folder)
    status, out, err = call('chat', lying, '--raw', '--prompt=the bucket', '--max_new_tokens=4', '--temperature=0')
    assert status == 0 and out.strip(), err
    status, out, err = call('evaluate', lying, '--rows=2', '--tasks=heldout', '--mixture=one.jsonl')
    assert status == 0, err


def test_an_adapter_is_trained_over_it(lying, dialogues, tmp_path, call, monkeypatch):
    """QLoRA: the codes stay as they are and are not saved again; used over the codes, and merged into what they say."""
    monkeypatch.chdir(dialogues.lab.folder)
    run = tmp_path / 'run'
    dialogues.train('sft', run, init_from=str(lying), **LORA)
    seen, meta = measured(run), checkpoint.read_meta(checkpoint.epath.Path(run) / 'checkpoints' / '6')
    assert seen[6, 'train/loss'] < seen[1, 'train/loss']
    arrays = {checkpoint.leaf_names(key)[-1] for key in meta['checksums'] if key.startswith("['trainable']")}
    assert arrays == {'a', 'b'}
    with all_devices():
        beside = loading.load(str(run), warn=pytest.fail)
        base = beside.params['layers']['wq_DNH'].base
        assert isinstance(base, quantized.Quantized) and base.codes.dtype == np.uint8
        tokens_BT = np.random.default_rng(0).integers(0, beside.cfg.vocab_size, (8, 16), dtype=np.int32)
        logits = lambda p: transformer.logits(p, beside.cfg, transformer.forward(p, beside.cfg, tokens_BT)[0])
        expected = np.asarray(jax.jit(logits)(beside.params))
        merged = lazy_checkpoint.load(lazy_checkpoint.open_run(str(run)))
        np.testing.assert_allclose(jax.jit(logits)(merged.params), expected, atol=2e-5)
    options = ('--prompt=the bucket', '--max_new_tokens=4', '--temperature=0')
    status, out, err = call('chat', run, '--base', *options)
    assert status == 0 and f'{run} without its adapter' in out, err
    for words in ((tmp_path / 'hf',), (tmp_path / 'peft', '--format=peft')):
        status, out, err = call('convert', run, *words)
        assert status == 0, err


@pytest.mark.slow
def test_what_is_trained_whole_begins_dense(lying, dialogues, tmp_path):
    dialogues.train('sft', tmp_path / 'run', init_from=str(lying), steps=1)
    leaves = jax.tree.leaves(params(tmp_path / 'run'), is_leaf=lambda w: isinstance(w, seam.Weight))
    assert not any(isinstance(w, seam.Weight) for w in leaves)
    assert config_of(tmp_path / 'run')['about']['quantized'] is None


@pytest.mark.parametrize(
    'words, wanted',
    [
        (('DST', '--quantize=nf4'), 'nf4: groups of 64 do not divide the 32 inputs of a matrix: take nf4:32'),
        (('DST', '--quantize=int4:48'), 'int4:48: groups are of 32, 64, 128: write int4:64'),
        (('DST.gguf', '--quantize=int8'), '--quantize=int8 is for runs'),
        (('DST', '--quantize=Q4_0', '--format=run'), 'Q4_0 is no way to quantize a run: one of int8, int4, nf4'),
        (('DST', '--quantize=nf4', '--format=huggingface'), '--quantize=nf4 is for GGUF files and runs'),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(words, wanted, dialogues, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call('convert', dialogues.run('pretrain'), *words), wanted, None)
    assert not list(tmp_path.iterdir())


def test_codes_that_changed_are_not_the_base(lying, dialogues, tmp_path, call):
    """A base in other bits is another base; a kind that we do not know is refused."""
    saved = config_of(lying)
    saved['about']['quantized'] = 'nf3'
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'config.json').write_text(json.dumps(saved))
    refused(call('chat', other, '--prompt=a'), 'quantized as nf3, which this version does not know', None)
