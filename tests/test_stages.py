"""The stages after pretraining, from a tiny run to the last metrics: what they measure, keep, refuse and find again."""

import contextlib
import gc
import json
import math
import random
import re
import shutil
from pathlib import Path

import dialogues as made
import jax
import numpy as np
import pytest
import running
from checks import refused
from etils import epath
from running import assert_same, measured, signal_at, status, steps_saved

from lm import config as configs
from lm import main as lm_main
from lm import presets
from lm.data import cache
from lm.errors import Preempted, UsageError
from lm.evals import preferences
from lm.losses.preference import LOSSES
from lm.runs import lineage, loading, reward_scale
from lm.stages import find, reference, runner
from lm.stages import pairs as pair_stage

LN2 = math.log(2)


@pytest.fixture
def call(dialogues, monkeypatch, call):
    """call(argv, command) -> (exit status, stdout, stderr), in the lab's folder."""
    monkeypatch.chdir(dialogues.lab.folder)
    return lambda argv, name='main': call(name, *argv)


def config_of(workdir: Path) -> dict:
    return json.loads((workdir / 'config.json').read_text())


def losses(workdir: Path, name: str = 'train/loss') -> list[float]:
    return [v for (_, k), v in sorted(measured(workdir).items()) if k == name]


def references() -> set[str]:
    folder = cache.cache_dir() / 'reference'
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


# ---- fine-tuning ----


def test_fine_tuning_learns_to_answer_and_measures_what_is_forgotten(dialogues):
    workdir = dialogues.run('sft')
    found = measured(workdir)
    assert found[6, 'eval/chats.jsonl/response_loss'] < found[3, 'eval/chats.jsonl/response_loss'] - 0.1
    for name in ('chats.jsonl/ended', 'chats.jsonl/f1', 'one.jsonl/bpb', 'two.jsonl/bpb', 'bpb'):
        assert math.isfinite(found[6, f'eval/{name}'])
    assert 'eval/chats.jsonl/bpb' not in {k for _, k in found}, 'an answer is no text of pretraining'
    saved = config_of(workdir)
    assert saved['config']['data']['pretraining'] == 'one.jsonl:0.7,two.jsonl:0.3'
    assert saved['config']['data']['replay'] == 0.25
    assert saved['parents']['policy']['path'] == str(dialogues.run('pretrain'))
    log = (workdir / 'log.txt').read_text()
    assert 'cut at 48 tokens ' in log and ', left out ' in log and '25% of all rows replay one.jsonl' in log
    assert (workdir / 'tokenizer' / 'chat_template.jinja').read_text()


@pytest.mark.slow
def test_replay_is_off_and_said_where_nothing_is_known_of_pretraining(dialogues, tmp_path):
    parent = shutil.copytree(dialogues.run('pretrain'), tmp_path / 'parent')
    saved = config_of(parent)
    saved['about'] |= {'data': 'chat'}  # as of a model from elsewhere
    (parent / 'config.json').write_text(json.dumps(saved))
    dialogues.train('sft', tmp_path / 'run', init_from=str(parent), steps=2)
    log = (tmp_path / 'run' / 'log.txt').read_text()
    assert 'no text of pretraining is known: none is replayed or measured; data.pretraining=MIXTURE names it' in log
    assert not any('bpb' in k for _, k in measured(tmp_path / 'run')) and 'replay one.jsonl' not in log
    dialogues.train('sft', tmp_path / 'named', init_from=str(parent), steps=2, data__pretraining='two.jsonl')
    assert (2, 'eval/two.jsonl/bpb') in measured(tmp_path / 'named')


@pytest.mark.slow
def test_a_template_goes_with_the_run_that_learned_it(dialogues, tmp_path):
    """And another template is other data, with another plan of rows."""
    parent = shutil.copytree(dialogues.run('pretrain'), tmp_path / 'parent')
    longer = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + ' so' + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    (parent / 'tokenizer' / 'chat_template.jinja').write_text(longer)
    dialogues.train('sft', tmp_path / 'run', init_from=str(parent), steps=2, eval__every=2)
    assert (tmp_path / 'run' / 'tokenizer' / 'chat_template.jinja').read_text() == longer
    assert config_of(tmp_path / 'run')['data'] != config_of(dialogues.run('sft'))['data']
    (tmp_path / 'run' / 'tokenizer' / 'chat_template.jinja').unlink()
    with pytest.raises(UsageError, match='was trained on other data'):
        dialogues.train('sft', tmp_path / 'run', init_from=str(parent), steps=3, eval__every=2)


# ---- reward models ----


def test_a_reward_model_keeps_the_scale_of_its_scores(dialogues):
    workdir = dialogues.run('reward')
    found = measured(workdir)
    assert found[6, 'train/bradley_terry'] < found[1, 'train/bradley_terry'] - 0.05
    names = 'accuracy margin log_loss calibration_error length_correlation longer_wins shorter_wins'
    assert all((6, f'eval/pairs.jsonl/{name}') in found for name in names.split())
    kept = json.loads((workdir / 'normalisation.json').read_text())
    assert list(kept) == ['3', '6'] and not (workdir / 'samples.jsonl').exists()
    assert found[6, 'eval/reward_mean'] == kept['6']['mean']
    scale = reward_scale.read(workdir, 6)
    with running.all_devices():
        model = loading.load(str(workdir), warn=pytest.fail)
        config, store = reread(dialogues, workdir)
        scores = preferences.scores(model.params, model.cfg, pair_stage.in_order(config, store, 4), store.pairs)
    scores = (scores[~np.isnan(scores[:, 0])] - scale.mean) / scale.std
    assert scores.shape == (4, 2) and scores.mean() == pytest.approx(0, abs=1e-5)
    around = scores - scores.mean(axis=1, keepdims=True)
    assert np.sqrt(np.mean(around**2)) == pytest.approx(1, rel=1e-5), 'around the mean of their own pair'


def reread(dialogues, workdir):
    """(the config of a run, its training pairs)."""
    argv = dialogues.argv('reward', workdir)
    flags, settings = lm_main.parse(argv)
    config, _ = configs.load(flags.config, settings)
    with contextlib.chdir(dialogues.lab.folder):
        lineage.inherit_model(
            config, find(config.stage).about, configs.chosen(flags.config, settings), epath.Path(workdir)
        )
        data = pair_stage.prepare(config, str(workdir / 'tokenizer'), lambda line: None)
    return config, data.own.sources[0].train


@pytest.mark.slow
def test_a_reward_model_goes_on_from_a_reward_model(dialogues, tmp_path):
    dialogues.train('reward', tmp_path / 'run', init_from=str(dialogues.run('reward')), optim__lr=1e-9)
    before, after = measured(dialogues.run('reward')), measured(tmp_path / 'run')
    for name in ('log_loss', 'margin'):
        key = (6, f'eval/pairs.jsonl/{name}')
        assert after[key] == pytest.approx(before[key], rel=1e-4), 'its scores are taken over'


# ---- preference optimisation ----


def test_preference_optimisation_begins_at_the_reference_and_prefers(dialogues):
    workdir = dialogues.run('dpo')
    found = measured(workdir)
    assert found[1, 'train/preference'] == pytest.approx(LN2, abs=1e-6)
    assert found[6, 'train/preference'] < LN2 - 0.05 and found[6, 'train/margin'] > 0.05
    assert found[1, 'train/loss'] == pytest.approx(LN2 + 0.1 * found[1, 'train/chosen_nll'], rel=1e-5)
    names = 'accuracy accuracy_per_token chosen_loss rejected_loss longer_wins ended f1 reference_chosen_loss'
    names += ' reference_rejected_loss reference_accuracy_per_token reference_ended reference_f1'
    assert all((6, f'eval/pairs.jsonl/{name}') in found for name in names.split())
    assert all((6, f'eval/{name}/bpb') in found for name in ('one.jsonl', 'two.jsonl'))
    assert found[3, 'eval/pairs.jsonl/reference_chosen_loss'] == found[6, 'eval/pairs.jsonl/reference_chosen_loss']
    assert len(config_of(workdir)['parents']['reference']['digest']) == 16


@pytest.mark.slow
def test_a_live_reference_says_what_the_cached_one_said(dialogues, tmp_path):
    dialogues.train('dpo', tmp_path / 'live', reference='live')
    live, cached = losses(tmp_path / 'live', 'train/preference'), losses(dialogues.run('dpo'), 'train/preference')
    assert live[0] == pytest.approx(LN2, abs=1e-6) and len(live) == 6
    np.testing.assert_allclose(live, cached, rtol=1e-4)


@pytest.mark.slow
def test_the_reference_is_asked_once_and_again_when_something_else_is_asked(dialogues, tmp_path, monkeypatch):
    dialogues.run('dpo')
    before, asked = references(), []
    real = preferences.of_pairs
    for name in ('of_training', 'measure'):
        real = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, name=name, real=real: asked.append(name) or real(*a))
    options = {'steps': 1, 'eval__every': 9}
    dialogues.train('dpo', tmp_path / 'again', **options)
    assert references() == before and asked == ['measure'], 'of the policy alone, at the end'

    def new(name, **settings):
        asked.clear()
        known = references()
        dialogues.train('dpo', tmp_path / name, **options, **settings)
        assert asked == ['of_training', 'measure', 'measure'] and len(references() - known) == 2, name

    records = made.pairs(40, random.Random(5))
    made.write(dialogues.lab.folder / 'other.jsonl', records)
    new('data', data__mixture='other.jsonl')
    new('weights', init_from=f'{dialogues.run("sft")}@4')
    new('length', seq_len=40)
    other = shutil.copytree(dialogues.run('sft'), tmp_path / 'sft')
    template = other / 'tokenizer' / 'chat_template.jinja'
    template.write_text(template.read_text() + '{# another #}')
    new('template', init_from=str(other))
    asked.clear()
    dialogues.train('dpo', tmp_path / 'kto', loss='kto', **options)
    assert asked == ['of_training', 'measure', 'measure'], 'of three sides'
    asked.clear()
    dialogues.train('dpo', tmp_path / 'rows', eval__rows=2, **options)
    assert asked == ['measure', 'measure'], 'the training pairs are known'


@pytest.mark.slow
@pytest.mark.parametrize('loss', LOSSES)
def test_every_loss_trains(dialogues, tmp_path, loss):
    """With microbatches, too: twice the devices' rows."""
    workdir = tmp_path / 'run'
    dialogues.train(
        'dpo', workdir, loss=loss, steps=2, batch_size=16, execution__microbatch=8, eval__every=2, nll='none'
    )
    found = measured(workdir)
    terms = {'dpo': LN2, 'cdpo': LN2, 'robust': LN2, 'ipo': 25.0, 'kto': 0.5}
    assert found[1, 'train/preference'] == pytest.approx(terms.get(loss, found[1, 'train/preference']), rel=1e-4)
    nll = 1.0 if loss == 'orpo' else 0.0
    assert found[1, 'train/loss'] == pytest.approx(
        found[1, 'train/preference'] + nll * found[1, 'train/chosen_nll'], rel=1e-5
    )
    assert found[2, 'train/loss'] != found[1, 'train/loss'] and found[2, 'train/skipped'] == 0
    assert ((1, 'train/z0') in found) == (loss == 'kto')


# ---- interrupted ----


@pytest.mark.parametrize('stage', [pytest.param(s, marks=() if s == 'dpo' else pytest.mark.slow) for s in made.STAGES])
def test_resumed_is_uninterrupted(dialogues, tmp_path, monkeypatch, stage):
    """Bit for bit, though the run that it started from is gone."""
    whole, workdir = dialogues.run(stage), tmp_path / 'run'
    source = dialogues.run('pretrain' if stage == 'sft' else 'sft')
    parent = shutil.copytree(source, tmp_path / 'parent')
    with monkeypatch.context() as patch:
        signal_at(patch, 3, 15)
        with pytest.raises(Preempted):
            dialogues.train(stage, workdir, init_from=str(parent))
    assert 3 <= steps_saved(workdir)[-1] < 6
    shutil.rmtree(parent)
    dialogues.train(stage, workdir, init_from=str(parent))
    assert status(workdir)['state'] == 'done'
    if stage == 'reward':
        assert measured(workdir) == measured(whole)
        assert (workdir / 'normalisation.json').read_text() == (whole / 'normalisation.json').read_text()
    else:
        assert_same(whole, workdir)


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(dialogues, tmp_path):
    """A process that dies right after step 5 was told, and lost what came after its last checkpoint."""
    die = (
        'import os, sys\nfrom lm import main\nfrom lm.training.recorder import Recorder\nreal = Recorder.metrics\n'
        'def metrics(self, at, values):\n    real(self, at, values)\n    if at >= 5: os.kill(os.getpid(), 9)\n'
        'Recorder.metrics = metrics\nos.chdir(sys.argv.pop())\nmain.train(sys.argv[1:])'
    )
    for stage in made.STAGES:
        whole, workdir = dialogues.run(stage), tmp_path / stage
        settings = dialogues.settings(stage)
        process = dialogues.lab.start(workdir, str(dialogues.lab.folder), devices=8, code=die, **settings)
        process.communicate()
        assert process.returncode == -9 and steps_saved(workdir)[-1] in (2, 4)
        dialogues.train(stage, workdir)
        assert measured(workdir) == measured(whole)


@pytest.fixture
def begun(dialogues, tmp_path, monkeypatch):
    """A run of dpo that was stopped at step 3 or 4, and the run that it started from, both to be spoilt."""
    parent = shutil.copytree(dialogues.run('sft'), tmp_path / 'parent')

    def begin(**settings):
        with monkeypatch.context() as patch:
            signal_at(patch, 3, 15)
            with pytest.raises(Preempted):
                dialogues.train('dpo', tmp_path / 'run', init_from=str(parent), **settings)
        return tmp_path / 'run', parent

    return begin


@pytest.mark.slow
def test_without_its_parent_and_the_cache_a_run_says_what_is_missing(dialogues, begun, tmp_path, monkeypatch):
    workdir, parent = begun()
    shutil.move(parent, tmp_path / 'away')
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(UsageError, match=r'parent is not a run.*has not all that this run needs of it: restore'):
        dialogues.train('dpo', workdir, init_from=str(parent))
    assert 'restore' in status(workdir)['reason']
    shutil.move(tmp_path / 'away', parent)
    dialogues.train('dpo', workdir, init_from=str(parent))
    np.testing.assert_allclose(losses(workdir), losses(dialogues.run('dpo')), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['cached', 'live'])
def test_a_parent_that_went_on_is_not_taken_for_the_reference(dialogues, begun, tmp_path, monkeypatch, how):
    workdir, parent = begun(reference=how)
    shutil.rmtree(parent / 'checkpoints' / '6')  # the newest is now another
    if how == 'cached':
        dialogues.train('dpo', workdir, init_from=str(parent), reference=how, steps=5)  # the cache has the right one
        monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(UsageError, match='parent has other weights than when this run began'):
        dialogues.train('dpo', workdir, init_from=str(parent), reference=how)


@pytest.mark.slow
def test_a_damaged_reference_is_one_line(dialogues, tmp_path):
    dialogues.run('dpo')
    for folder in (cache.cache_dir() / 'reference').iterdir():
        file = folder / '0.npy'
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r'reference/\w+ is damaged .*: delete that folder'):
        dialogues.train('dpo', tmp_path / 'run', steps=1)
    shutil.rmtree(cache.cache_dir() / 'reference')


# ---- dry runs ----


@pytest.mark.parametrize('stage', ['sft', 'reward', 'dpo', pytest.param('live', marks=pytest.mark.slow)])
def test_a_dry_run_of_a_stage(dialogues, call, tmp_path, stage):
    dialogues.run('sft')
    more, stage = ({'reference': 'live'}, 'dpo') if stage == 'live' else ({}, stage)
    argv = dialogues.argv(stage, tmp_path / 'run', '--dry_run', execution__microbatch=8, **more)
    gc.collect()  # what tests before this one left
    live = len(jax.live_arrays())
    code, out, err = call(argv)
    assert code == 0, err
    assert running.one_object(out)['tokens'] == 6 * 8 * 48 * (1 if stage == 'sft' else 2)
    for word in ('parameters', 'optimizer', 'temporaries', 'FLOPs', 'planned'):
        assert word in err
    assert ('reference   0.000 GiB' in err) == bool(more)
    assert len(jax.live_arrays()) == live and not (tmp_path / 'run').exists()


# ---- what is refused, in one line ----

BAD = [
    ('sft', {'init_from': 'none'}, 'stage=sft trains a model further: set --config.init_from=DIR'),
    ('reward', {'init_from': 'none'}, 'stage=reward begins with a model that answers: set --config.init_from=DIR'),
    (
        'dpo',
        {'init_from': 'none'},
        'compares with the run it starts from, and does not branch: set --config.init_from',
    ),
    ('sft', {'init_from': '/no/run'}, '/no/run is not a run: it does not exist'),
    ('sft', {'data__mixture': 'programmatic'}, "'programmatic' holds pairs of answers, not conversations"),
    ('dpo', {'data__mixture': 'operations'}, "'operations' holds conversations, not pairs of answers"),
    ('reward', {'data__mixture': 'botocore'}, "'botocore' holds text, not pairs of answers"),
    ('sft', {'seq_len': 8}, 'no training conversation of chats.jsonl has an answer within seq_len=8: set a longer'),
    ('dpo', {'seq_len': 8}, 'no training pair of pairs.jsonl has two different responses within seq_len=8: set a'),
    ('dpo', {'loss': 'dpoo'}, 'loss=dpoo (did you mean dpo?) is not one of dpo, cdpo, robust'),
    ('dpo', {'reference': 'x'}, 'reference=x is not one of cached, live'),
    ('dpo', {'reference': 'lve'}, 'reference=lve (did you mean live?) is not one of cached, live'),
    ('dpo', {'label_smoothing': 0.1}, "loss='dpo' takes beta alone; leave label_smoothing at none"),
    ('dpo', {'loss': 'cdpo', 'margin': 1.0}, "loss='cdpo' takes beta and label_smoothing alone; leave margin at none"),
    (
        'dpo',
        {'loss': 'robust', 'label_smoothing': 0.5},
        'label_smoothing=0.5: the part of labels that are wrong, below',
    ),
    ('dpo', {'beta': 0}, 'beta=0.0 must be positive and finite'),
    ('dpo', {'beta': 'nan'}, 'beta=nan must be positive and finite'),
    ('dpo', {'nll': -1}, 'nll=-1.0 must be at least 0 and finite'),
    ('reward', {'centring': -1}, 'centring=-1.0 must be at least 0 and finite'),
    ('reward', {'data__replay': 0.5}, 'data.replay=0.5: a reward model writes no text to forget, set it to 0'),
    (
        'reward',
        {'optim__batch_warmup': 2, 'batch_size': 16, 'execution__microbatch': 8},
        'a batch of pairs does not grow',
    ),
    ('sft', {'data__replay': 1.0}, 'data.replay=1.0 must be from 0 to 0.9'),
    ('sft', {'beta': 0.5}, 'beta is a setting of stage dpo: stage sft has no use for it'),
    ('reward', {'margin': 0.5}, 'margin is a setting of stage dpo: stage reward has no use for it'),
    ('dpo', {'margins': 0.5}, 'margins is a setting of stage reward: stage dpo has no use for it'),
    ('dpo', {'z_loss': 0.1}, 'z_loss is a setting of stage pretrain and sft'),
]


@pytest.mark.parametrize(('stage', 'settings', 'wanted'), BAD, ids=[f'{s}-{k}' for s, k, _ in BAD])
def test_a_mistake_is_one_line_before_anything_is_allocated(
    dialogues, call, tmp_path, monkeypatch, stage, settings, wanted
):
    dialogues.run('sft')
    for name in ('compile_step', 'start'):
        monkeypatch.setattr(runner, name, lambda *args: pytest.fail('this should have been seen before'))
    refused(call(dialogues.argv(stage, tmp_path / 'run', **settings)), wanted, None)
    assert not (tmp_path / 'run').exists()


def test_a_reward_model_does_not_learn_to_speak(dialogues, call, tmp_path):
    workdir, wanted = str(dialogues.run('reward')), 'is a reward model, which gives scores and has not learned to speak'
    for stage in ('sft', 'dpo'):
        refused(call(dialogues.argv(stage, tmp_path / 'run', init_from=workdir)), f'{workdir} {wanted}', None)


@pytest.mark.slow
def test_preferences_may_begin_with_a_pretrained_run(dialogues, tmp_path):
    dialogues.train('dpo', tmp_path / 'run', init_from=str(dialogues.run('pretrain')), steps=1, eval__every=1)
    assert measured(tmp_path / 'run')[1, 'train/preference'] == pytest.approx(LN2, abs=1e-6)


# ---- what lm.inspect shows ----


@pytest.fixture
def shown(dialogues, call):
    """shown(stage, words, settings) -> (exit status, stdout, stderr) of lm.inspect, the parent without weights."""
    return lambda stage, *words, **settings: call(dialogues.argv(stage, None, *words, **settings), 'inspect')


def test_inspect_shows_what_a_stage_learns_from(dialogues, shown, tmp_path):
    parent = shutil.copytree(dialogues.run('pretrain'), tmp_path / 'parent', ignore=lambda *_: ['checkpoints'])
    code, out, err = shown('sft', '--rows=8', init_from=str(parent))
    assert code == 0, err
    assert re.search(r'source +share +read +kept +held out +tokens +cut +left out\nchats.jsonl +100% +90 ', out)
    assert 'text of pretraining, 25% of all rows' in out and re.search(r'one.jsonl +70% +240 ', out)
    assert 'chats.jsonl: dropped none' in out and 'one.jsonl: dropped none' in out
    heads = re.findall(r'row \d: \d+ (conversations|documents), \d+ targets of 48', out)
    assert sorted(heads) == ['conversations'] * 6 + ['documents'] * 2
    for stage in ('reward', 'dpo'):
        code, out, err = shown(stage, '--rows=3', init_from=str(parent))
        assert code == 0, err
        assert re.search(r'pairs.jsonl +100% +120 +120 ', out)
        words = r'─ pair {}: pairs.jsonl, label 1, margin \d ─+\nprompt: <bos><\|user\|>.*\nchosen: .+\nrejected: .+\n'
        assert all(re.search(words.format(i), out) for i in range(3))


def test_inspect_refuses_in_one_line(dialogues, shown):
    refused(shown('sft', init_from='/no/run'), '/no/run is not a run: it does not exist')
    refused(shown('dpo', init_from='none'), 'stage=dpo trains a model further: set --config.init_from=DIR')


# ---- sizes by name ----


@pytest.mark.parametrize(
    ('path', 'parent', 'workdir', 'mixture'),
    [
        ('sft.py', 'runs/pretrain', 'runs/sft', 'operations:0.6,smalltalk:0.4'),
        ('sft.py:depth=6', 'runs/pretrain-depth6', 'runs/sft-depth6', 'operations:0.6,smalltalk:0.4'),
        ('reward.py', 'runs/sft', 'runs/reward', 'programmatic'),
        ('reward.py:ratings,depth=6', 'runs/sft-depth6', 'runs/reward-ratings-depth6', 'ratings'),
        ('dpo.py', 'runs/sft', 'runs/dpo', 'programmatic'),
        ('dpo.py:decline', 'runs/sft', 'runs/dpo-decline', 'decline'),
        ('dpo.py:decline,depth=6', 'runs/sft-depth6', 'runs/dpo-decline-depth6', 'decline'),
        ('sft.py:smollm2', 'runs/smollm2', 'runs/sft-smollm2', 'operations:0.6,smalltalk:0.4'),
        ('dpo.py:decline,smollm2', 'runs/sft-smollm2', 'runs/dpo-decline-smollm2', 'decline'),
    ],
)
def test_what_stands_after_the_colon_names_the_parent(path, parent, workdir, mixture):
    config, arg = configs.load(str(running.ROOT / 'configs' / path))
    assert config.init_from == parent and config.data.mixture == mixture
    assert f'runs/{presets.run_name(config.stage, arg)}' == workdir
    assert config.model.layers == (6 if 'depth=6' in path else 4)
    assert (config.optim.name == 'adamw') == ('smollm2' in path)


# ---- several processes ----


@pytest.mark.slow
def test_two_processes_train_what_one_trains(dialogues, tmp_path, monkeypatch):
    """With a cache that has nothing of the reference: both compute it together."""
    whole = dialogues.run('dpo')
    shutil.rmtree(cache.cache_dir() / 'reference')
    several = [f'--coordinator={running.coordinator()}', '--num_processes=2']
    go = 'import os, sys\nfrom lm import errors, main\nos.chdir(sys.argv.pop())\nerrors.leave(main.main())'
    folder = str(dialogues.lab.folder)
    started = [
        dialogues.lab.start(
            tmp_path / 'run', *several, f'--process_id={i}', folder, devices=4, code=go, **dialogues.settings('dpo')
        )
        for i in range(2)
    ]
    told = running.ended(started)
    assert [code for code, _, _ in told] == [0, 0], told
    running.assert_measured_alike(tmp_path / 'run', whole)
    assert config_of(tmp_path / 'run')['parents'] == config_of(whole)['parents']
