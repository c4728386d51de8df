"""An adapter in one file: factors that are trained over a model that is only read."""

import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from running import ROOT, all_devices, assert_same, measured, params, signal_at

from lm.errors import Preempted
from lm.model import seam
from lm.model.adapters import ADAPTERS, Adapter
from lm.runs import checkpoint, loading, rundir
from lm.stages import STAGES, grpo, sft


@struct.dataclass
class Scaled:
    """A weight times a factor for each of its last letter's places."""

    scale: jax.Array
    base: Any = None

    def over(self, base):
        return self.replace(base=base)

    def dims(self, parent):
        return {'scale': parent[-1]} | ({} if self.base is None else {'base': parent})

    def einsum(self, eq, x):
        return seam.einsum(eq, x, self.base) * seam.gather(self.scale, seam.parse(eq)[2][-1]).astype(x.dtype)

    def dense(self):
        return self.base * jnp.expand_dims(self.scale, tuple(range(self.scale.ndim - 1, self.base.ndim - 1)))


def init(key, base, settings):
    up = base['layers']['w_up_DF']
    return {'layers': {'w_up_DF': Scaled(jnp.ones((up.shape[0], up.shape[-1])))}}


def config_of(workdir):
    return rundir.read_config(str(workdir))


class Adapted(sft.Sft):
    """Fine-tuning of the factors alone."""

    adapter = 'scaled'


# ---- train, save, resume, chat, convert ----


@pytest.fixture
def adapted(dialogues, tmp_path, monkeypatch):
    """adapted(workdir, **settings) trains it, through the command."""
    monkeypatch.setitem(ADAPTERS, 'scaled', Adapter(init))
    monkeypatch.setitem(STAGES, 'adapted', sft.SPEC._replace(name='adapted', open=Adapted))
    file = tmp_path / 'adapted.py'
    file.write_text((ROOT / 'configs' / 'sft.py').read_text().replace('c.steps =', "c.stage = 'adapted'; c.steps ="))

    def train(workdir, **settings):
        return dialogues.train('sft', tmp_path / workdir, config=str(file), optim__lr=0.1, **settings)

    train.folder = tmp_path
    return train


def test_the_factors_are_trained_and_saved_and_the_base_is_not(adapted, dialogues):
    adapted('run')
    base, run = dialogues.run('pretrain'), adapted.folder / 'run'
    found, before = params(run), params(base)
    scale = found['layers'].pop('w_up_DF') / before['layers'].pop('w_up_DF')  # merged where it is used
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:, :1], scale.shape), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found, before)
    assert np.abs(scale - 1).max() > 0.01 and measured(run)[6, 'train/loss'] < measured(run)[1, 'train/loss']
    meta = checkpoint.read_meta(checkpoint.epath.Path(run) / 'checkpoints' / '6')
    trained = [key for key in meta['checksums'] if key.startswith("['trainable']")]
    assert trained == ["['trainable']['adapter']['layers']['w_up_DF'].scale"]
    assert checkpoint.leaf_names(trained[0]) == ('trainable', 'adapter', 'layers', 'w_up_DF', 'scale')
    parent = config_of(run)['parents']['base']
    assert parent == {'path': str(base), 'step': 4, 'digest': checkpoint.digest(params(base))}


def test_it_dies_and_goes_on_and_keeps_an_average(adapted, monkeypatch):
    adapted('whole', optim__ema=0.9)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 2, signal.SIGTERM)
        adapted('run', optim__ema=0.9)
    adapted('run', optim__ema=0.9)
    assert_same(adapted.folder / 'whole', adapted.folder / 'run')


def test_it_answers_is_measured_and_goes_on(adapted, dialogues, call, monkeypatch):
    adapted('run')
    run = adapted.folder / 'run'
    monkeypatch.chdir(dialogues.lab.folder)
    status, out, err = call('chat', run, '--prompt=the bucket', '--max_new_tokens=2', '--temperature=0')
    assert status == 0, err
    status, out, err = call('evaluate', run, '--rows=2', '--max_new_tokens=2', '--tasks=heldout')
    assert status == 0, err
    status, out, err = call('convert', run, adapted.folder / 'out')
    assert status == 0, err
    dialogues.train('sft', adapted.folder / 'new', init_from=str(run), steps=1)
    parent = config_of(adapted.folder / 'new')['parents']['policy']
    assert parent['path'] == str(run) and parent['digest'] != config_of(run)['parents']['base']['digest']


def test_another_base_is_refused(adapted, dialogues, monkeypatch):
    adapted('run')
    file = adapted.folder / 'run' / 'config.json'
    file.write_text(file.read_text().replace(config_of(file.parent)['parents']['base']['digest'], 'another'))
    with pytest.raises(Exception, match='has other weights than when this run began'), all_devices():
        loading.load(str(file.parent), warn=pytest.fail)


class Rewarded(grpo.Grpo):
    """Policy gradients of the factors alone."""

    adapter = 'scaled'


@pytest.mark.slow
@pytest.mark.parametrize('kl', ['reward', 'full'])
def test_the_reference_of_an_adapter_is_its_base(dialogues, tmp_path, monkeypatch, kl):
    """No second copy is held, and at first the policy is the reference."""
    monkeypatch.setitem(ADAPTERS, 'scaled', Adapter(init))
    monkeypatch.setitem(STAGES, 'rewarded', grpo.SPEC._replace(name='rewarded', open=Rewarded))
    file = tmp_path / 'rewarded.py'
    file.write_text((ROOT / 'configs' / 'grpo.py').read_text().replace('c.steps =', "c.stage = 'rewarded'; c.steps ="))
    dialogues.train(
        'grpo', tmp_path / 'run', config=str(file), init_from=str(dialogues.run('sft')), optim__lr=0.1,
        reward_from=str(dialogues.run('reward')), data__mixture='chats.jsonl', steps=4, batch_size=8, rl__prompts=2,
        rl__group=4, rl__max_new_tokens=8, rl__kl=kl, rl__beta=0.1, log__every=1, optim__warmup=0,
    )  # fmt: skip
    found = measured(tmp_path / 'run')
    assert found[1, 'rl/kl'] == 0 and found[4, 'rl/kl'] != 0
    assert set(config_of(tmp_path / 'run')['parents']) == {'base', 'reward'}
