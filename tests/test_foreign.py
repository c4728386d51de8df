"""A Hugging Face folder or a GGUF file wherever a run is asked for: nothing is written of it."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from running import lines

from lm import sharding
from lm.errors import UsageError
from lm.interop import opening
from lm.interop.gguf.writer import write_gguf
from lm.interop.huggingface.folder import write_folder
from lm.runs import checkpoint, foreign, lazy_checkpoint, loading, rundir, saved_config


@pytest.fixture(scope='module')
def models(dialogues, tmp_path_factory):
    """{form: path} of the run of SFT, written as another's."""
    folder = tmp_path_factory.mktemp('models')
    opened = lazy_checkpoint.open_run(str(dialogues.run('sft')))
    write_folder(opened, folder / 'hf', say=lambda line: None)
    write_gguf(opened, folder / 'model.gguf', quantize='F32', say=lambda line: None)
    return {'huggingface': str(folder / 'hf'), 'gguf': str(folder / 'model.gguf')}


@pytest.fixture
def cached(monkeypatch):
    """What a process remembers of a path is forgotten: a test changes what lies there."""
    fresh = functools.cache(opening.open_model)
    monkeypatch.setattr(foreign, '_open', fresh)
    return fresh


@pytest.mark.parametrize('form', ['huggingface', 'gguf'])
def test_it_is_the_run_that_it_was_written_of(models, dialogues, form):
    run = str(dialogues.run('sft'))
    with sharding.use_mesh({'fsdp': 2, 'tensor': 4}):
        ours, theirs = (loading.load(path, warn=pytest.fail) for path in (run, models[form]))
    head, V = jax.device_get(theirs.params['embed_VD']), ours.cfg.vocab_size
    np.testing.assert_array_equal(head[:V], jax.device_get(ours.params['embed_VD'])[:V])
    assert not head[V:].any()
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(m.params['layers']) for m in (ours, theirs)))
    text = ' What does it do?'
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text) and theirs.about.output == 'answers'
    assert checkpoint.locate(models[form]) == theirs.step == 0


def test_its_digest_is_that_of_its_weights(models, tmp_path):
    """However they are read, and that of the run that is made of them, where both hold float32."""
    path = models['huggingface']
    lazy_checkpoint.write_run(opening.open_model(path, 'huggingface'), tmp_path / 'run')
    for mesh in ({'data': 8}, {'fsdp': 2, 'tensor': 4}):
        with sharding.use_mesh(mesh):
            cfg = loading.load(path, warn=pytest.fail).cfg
            _, parent = loading.weights(path, loading.abstract_params(cfg), warn=pytest.fail)
            assert parent.digest == lazy_checkpoint._parent(path).digest
            body = {k: v for k, v in loading.abstract_params(cfg).items() if k != 'head_DV'}
            assert loading.weights(path, body, warn=pytest.fail)[1] == parent
    assert lazy_checkpoint._parent(str(tmp_path / 'run')).digest == parent.digest


@pytest.mark.parametrize('form', ['huggingface', 'gguf'])
def test_a_stage_begins_with_it_and_goes_on_without_it(models, dialogues, tmp_path, form, cached):
    suffix = '.gguf' if form == 'gguf' else ''
    parent, run = tmp_path / f'parent{suffix}', tmp_path / 'run'
    (shutil.copy if suffix else shutil.copytree)(models[form], parent)
    start = {'init_from': str(parent), 'data__mixture': 'chats.jsonl', 'optim__schedule': 'constant'}
    dialogues.train('sft', run, steps=4, **start)
    told = saved_config.parents(rundir.read_config(str(run)))['policy']
    assert told == lazy_checkpoint._parent(str(parent))
    cached.cache_clear()
    shutil.rmtree(parent) if parent.is_dir() else parent.unlink()
    dialogues.train('sft', run, steps=6, **start)
    converted, straight = tmp_path / 'converted', tmp_path / 'straight'
    lazy_checkpoint.write_run(opening.open_model(models[form], form), converted)
    dialogues.train('sft', straight, steps=6, **start | {'init_from': str(converted)})
    losses = lambda run: {r['step']: r['train/loss'] for r in lines(run) if 'train/loss' in r}
    assert losses(run) == losses(straight)


def test_an_adapter_lies_over_it(models, dialogues, call, tmp_path, cached):
    parent, run = tmp_path / 'parent', tmp_path / 'run'
    shutil.copytree(models['huggingface'], parent)
    dialogues.train('sft', run, init_from=str(parent), lora__rank=2)
    status, out, err = call('convert', run, tmp_path / 'peft', '--format=peft')
    assert status == 0, err
    assert call('convert', tmp_path / 'peft', tmp_path / 'again', f'--base={parent}')[0] == 0
    answers = call('chat', run, tmp_path / 'again', '--prompt=Hello?', '--max_new_tokens=4', '--temperature=0')[1]
    _, first, second = (answer.partition('\n')[2] for answer in answers.split('--- '))
    assert first.strip() == second.strip()
    other = lazy_checkpoint.open_run(str(dialogues.run('pretrain')))
    shutil.rmtree(parent)
    write_folder(other, parent, say=lambda line: None)
    cached.cache_clear()
    for command in (('chat', run, '--prompt=Hello?'), ('convert', run, tmp_path / 'out')):
        status, _, err = call(*command)
        assert status == 2 and f'{parent} has other weights than when this run began' in err


def test_it_is_talked_to_and_measured(models, dialogues, call):
    status, out, err = call('chat', models['gguf'], '--prompt=Hello?', '--max_new_tokens=2')
    assert status == 0, err
    text = dialogues.lab.folder / 'one.jsonl'
    status, out, err = call('evaluate', models['huggingface'], '--tasks=heldout', f'--mixture={text}', '--rows=2')
    assert status == 0 and json.loads(out.splitlines()[-1]), err


def test_what_it_cannot_be_is_one_line(models, dialogues, call, tmp_path):
    path, bare = models['huggingface'], tmp_path / 'bare'
    shutil.copytree(path, bare)
    for name in ('tokenizer.json', 'tokenizer.model'):
        (bare / name).unlink(missing_ok=True)
    branch = dialogues.argv('sft', tmp_path / 'a', branch_from=path)
    for command, says in (
        (('chat', f'{path}@3', '--prompt=x'), f'{path} is no run and has no checkpoints: leave out @3'),
        (('main', *branch), f'{path} is no run and has no position to branch from: start with init_from'),
        (('chat', bare, '--raw', '--prompt=x'), f'{bare}: has no tokenizer: put its tokenizer.json'),
    ):
        status, _, err = call(*command)
        assert status == 2 and says in err
    newer = dataclasses.replace(opening.open_model(path, 'huggingface'), model={'nonesuch': 1})
    with pytest.raises(UsageError, match='has model.nonesuch, which this version does not know'):
        foreign.config_of(newer)
