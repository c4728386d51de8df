"""Runs that are adapters: each stage trains one, and it is used, resumed, merged and built on like any run."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest
from checks import refused
from running import all_devices, assert_same, measured, params, signal_at

from lm import config
from lm.errors import Preempted
from lm.model import transformer
from lm.runs import checkpoint, execution, lazy_checkpoint, loading, rundir

LORA = {'lora__rank': 4, 'optim__lr': 1e-2}
ONLINE = {
    'steps': 4, 'batch_size': 8, 'data__mixture': 'chats.jsonl', 'rl__prompts': 4, 'rl__group': 4,
    'rl__max_new_tokens': 8, 'log__every': 1, 'eval__every': 4, 'optim__warmup': 0,
}  # fmt: skip


def config_of(workdir):
    return json.loads((workdir / 'config.json').read_text())


def saved_names(workdir):
    """Of the newest checkpoint's weights and moments: their names on the way from the role."""
    newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())
    meta = checkpoint.read_meta(checkpoint.epath.Path(workdir) / 'checkpoints' / str(newest))
    return [checkpoint.leaf_names(key) for key in meta['checksums']]


@pytest.fixture(scope='module')
def tuned(dialogues, tmp_path_factory):
    """A fine-tuned adapter, which nobody may change."""
    workdir = tmp_path_factory.mktemp('tuned') / 'run'
    dialogues.train('sft', workdir, **LORA)
    return workdir


def test_only_the_factors_are_trained_and_saved(tuned, dialogues):
    base, names = params(dialogues.run('pretrain')), saved_names(tuned)
    assert {name[1] for name in names if name[0] == 'trainable'} == {'adapter'}
    arrays = [name[2:] for name in names if name[0] == 'trainable']
    assert len(arrays) == 2 * 7 and {name[-1] for name in arrays} == {'a', 'b'}
    moments = [name for name in names if name[0] == 'opt' and 'moments' in name]
    assert len(moments) == 2 * len(arrays) and all('adapter' in name for name in moments)
    found, seen = params(tuned), measured(tuned)
    for name, w in base['layers'].items():
        moved = np.abs(found['layers'][name] - w).max()
        assert (moved > 1e-4) == name.startswith('w'), name
    np.testing.assert_array_equal(found['embed_VD'], base['embed_VD'])
    assert seen[6, 'train/loss'] < seen[1, 'train/loss']
    told = config_of(tuned)
    assert told['about']['adapter'] == 'lora' and told['parents'] == {
        'base': {'path': str(dialogues.run('pretrain')), 'step': 4, 'digest': checkpoint.digest(base)}
    }
    text = (tuned / 'log.txt').read_text()
    assert ' parameters under ' in text and ' of an adapter, which alone are trained' in text


@pytest.mark.slow
def test_a_run_that_dies_ends_as_one_that_did_not(tuned, dialogues, tmp_path, monkeypatch):
    options = LORA | {'lora__dropout': 0.1, 'lora__plus': 4.0, 'lora__start': 'pissa', 'lora__dora': True}
    dialogues.train('sft', tmp_path / 'whole', **options)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 2, signal.SIGTERM)
        dialogues.train('sft', tmp_path / 'run', **options)
    dialogues.train('sft', tmp_path / 'run', **options)
    assert_same(tmp_path / 'whole', tmp_path / 'run')
    names = {name[-1] for name in saved_names(tmp_path / 'run') if name[0] == 'trainable'}
    assert names == {'a', 'b', 'start_a', 'start_b', 'magnitude'}


def test_merged_it_says_what_the_adapter_says(tuned, dialogues, tmp_path, call, monkeypatch):
    """The factors beside the matrices, merged as they are loaded, and as they are converted."""
    monkeypatch.chdir(dialogues.lab.folder)
    with all_devices():
        saved = rundir.read_config(str(tuned))
        cfg = execution.model_config(saved['config'], training=False)
        beside, _ = loading.weights(
            str(tuned), loading.abstract_parent(str(tuned), cfg, 'policy', merge=False), warn=pytest.fail
        )
        tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 16), dtype=np.int32)
        logits = jax.jit(lambda p: transformer.logits(p, cfg, transformer.forward(p, cfg, tokens_BT)[0]))
        expected = np.asarray(logits(beside))
        np.testing.assert_allclose(logits(loading.load(str(tuned), warn=pytest.fail).params), expected, atol=1e-5)
        opened = lazy_checkpoint.open_run(str(tuned))
        np.testing.assert_allclose(logits(lazy_checkpoint.load(opened).params), expected, atol=1e-5)
    for words in ((tmp_path / 'hf',), (tmp_path / 'merged', '--format=run'), (tmp_path / 'q.gguf', '--quantize=Q8_0')):
        status, out, err = call('convert', tuned, *words)
        assert status == 0, err
    merged, found = params(tmp_path / 'merged')['layers'], params(tuned)['layers']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, found)


def test_it_is_talked_to_beside_its_base(tuned, dialogues, call, monkeypatch):
    monkeypatch.chdir(dialogues.lab.folder)
    options = ('--prompt=the bucket', '--max_new_tokens=4', '--temperature=0')
    status, both, err = call('chat', tuned, '--base', *options)
    assert status == 0, err
    status, alone, err = call('chat', tuned, *options)
    assert status == 0 and f'{tuned} without its adapter' in both and alone.strip() in both, err
    status, base, err = call('chat', dialogues.run('pretrain'), '--raw', *options)
    refused(call('chat', dialogues.run('sft'), '--base', *options), 'is none: leave it out', None)
    status, out, err = call('evaluate', tuned, '--rows=2', '--max_new_tokens=2', '--tasks=heldout')
    assert status == 0, err


@pytest.mark.parametrize(
    'merge', [pytest.param(False, id='beneath'), pytest.param(True, id='merged', marks=pytest.mark.slow)]
)
def test_an_adapter_is_built_on(tuned, dialogues, tmp_path, merge):
    """A second adapter over the first begins with what that says, and leaves it as it is."""
    run = tmp_path / 'run'
    dialogues.train('sft', run, init_from=str(tuned), lora__merge=merge, steps=2, **LORA)
    parent = config_of(run)['parents']['base']
    assert parent['path'] == str(tuned)
    first, second = params(tuned), params(run)
    moved = {name: float(np.abs(second['layers'][name] - w).max()) for name, w in first['layers'].items()}
    assert all((x > 1e-5) == name.startswith('w') for name, x in moved.items()), moved
    arrays = [name for name in saved_names(run) if name[0] == 'trainable']
    assert len(arrays) == 2 * 7  # the first one is not saved again
    dialogues.train('sft', tmp_path / 'full', init_from=str(run), steps=1)
    assert {name[1] for name in saved_names(tmp_path / 'full') if name[0] == 'trainable'} == {'policy'}


@pytest.mark.parametrize('reference', ['cached', pytest.param('live', marks=pytest.mark.slow)])
def test_the_reference_of_dpo_is_the_model_without_its_adapter(dialogues, tmp_path, reference):
    run = tmp_path / 'run'
    dialogues.train('dpo', run, reference=reference, **LORA)
    assert 'policy' not in config_of(run)['parents'] and config_of(run)['parents']['base']['path'].endswith('sft')
    assert measured(run)[1, 'train/loss'] != measured(run)[4, 'train/loss']
    first = [x for (step, name), x in measured(run).items() if step == 1 and name == 'train/margin']
    assert all(abs(x) < 1e-5 for x in first)  # nobody has moved yet


def test_a_reward_model_trains_its_score_beside_the_adapter(dialogues, tmp_path, call):
    run = tmp_path / 'run'
    dialogues.train('reward', run, **LORA)
    names = {name[1:3] for name in saved_names(run) if name[0] == 'trainable'}
    assert names == {('reward_adapter', 'layers'), ('reward_adapter', 'score_D'), ('reward_adapter', 'bias_score')}
    again = tmp_path / 'again'
    dialogues.train('reward', again, init_from=str(run), steps=1, optim__lr=1e-12, lora__rank=4)
    first, second = params(run), params(again)
    np.testing.assert_allclose(second['score_D'], first['score_D'], atol=1e-6)
    np.testing.assert_allclose(second['layers']['wq_DNH'], first['layers']['wq_DNH'], atol=1e-6)
    status, out, err = call('convert', run, tmp_path / 'hf')
    assert status == 0, err


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['full', 'adapter'])
def test_ppo_trains_a_policy_and_a_critic_of_factors(dialogues, tmp_path, kind):
    """The critic's are over the reward model, which is in memory once."""
    reward = dialogues.run('reward')
    if kind == 'adapter':
        reward = tmp_path / 'reward'
        dialogues.train('reward', reward, **LORA)
    run = tmp_path / 'run'
    own = {'rl__group': 2, 'rl__prompts': 8, 'critic__warmup': 0, 'steps': 6}
    init = str(dialogues.run('sft'))
    dialogues.train('ppo', run, init_from=init, reward_from=str(reward), **(ONLINE | own | LORA))
    names = {name[1] for name in saved_names(run) if name[0] == 'trainable'}
    assert names == {'adapter', 'critic_adapter'}
    assert measured(run)[1, 'rl/kl'] == pytest.approx(0, abs=1e-5) and measured(run)[6, 'rl/kl'] != 0
    assert set(config_of(run)['parents']) == {'base', 'reward'}


@pytest.mark.slow
def test_grpo_trains_factors_without_a_second_model(dialogues, tmp_path):
    run = tmp_path / 'run'
    options = {'init_from': str(dialogues.run('sft')), 'reward_from': str(dialogues.run('reward')), 'rl__beta': 0.1}
    dialogues.train('grpo', run, rl__kl='full', **options, **ONLINE, **LORA)
    found = measured(run)
    assert found[1, 'rl/kl'] == pytest.approx(0, abs=1e-5) and found[4, 'rl/kl'] != 0
    assert set(config_of(run)['parents']) == {'base', 'reward'}


# ---- what cannot be ----


def test_what_does_not_fit_is_refused_in_a_line(tuned, dialogues, tmp_path, call, monkeypatch):
    monkeypatch.chdir(dialogues.lab.folder)
    train = lambda **settings: call('main', *dialogues.argv('sft', tmp_path / 'x', **settings))
    refused(train(lora__rank=33), 'a rank of 33 is more than wq has (32): set at most 32', None)
    refused(train(lora__rank=4, lora__targets='q_proj'), 'q_proj is not one of wq, wk', None)
    refused(train(lora__rank=4, lora__alpha=0), 'lora.alpha', None)
    refused(train(lora__alpha=8), 'lora.alpha=8.0 does nothing without lora.rank', None)
    assert not (tmp_path / 'x').exists()


def test_another_base_or_none_is_refused(tuned, dialogues, tmp_path, call, monkeypatch):
    monkeypatch.chdir(dialogues.lab.folder)
    run, base = tmp_path / 'run', tmp_path / 'base'
    shutil.copytree(tuned, run)
    shutil.copytree(dialogues.run('pretrain'), base)
    file = run / 'config.json'
    file.write_text(file.read_text().replace(str(dialogues.run('pretrain')), str(base)))
    options = ('--prompt=the bucket', '--max_new_tokens=2')
    assert call('chat', run, *options)[0] == 0
    shutil.move(base, tmp_path / 'away')
    refused(call('chat', run, *options), f'{base} is not a run', None)
    refused(call('convert', run, tmp_path / 'out'), f'{base} is not a run', None)
    shutil.copytree(tuned, base)  # the same shapes, other weights
    refused(call('chat', run, *options), f'{base} has other weights than when this run began', None)
    refused(call('convert', run, tmp_path / 'out'), f'{base} has other weights than when this run began', None)


def test_every_stage_after_pretraining_has_an_adapter():
    found = {kind.__name__ for kind in config._kinds() if 'lora.rank' in config.fields_of(kind)}
    assert found >= {'Sft', 'Reward', 'Dpo', 'Grpo', 'Ppo'} and 'Pretrain' not in found
