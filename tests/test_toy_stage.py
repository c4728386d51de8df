"""A stage in one file: it rolls out from its own policy, learns from each batch twice, and ends itself."""

import signal
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from running import measured, one_object, params, signal_at, status

from lm import settings, sharding
from lm.data import chats, pipeline
from lm.errors import Preempted, RunError
from lm.runs import rundir, saved_config
from lm.sampling.choice import Sampling
from lm.sampling.generate import generate
from lm.stages import STAGES, language, sft
from lm.stages.spec import StageSpec, Task


@dataclass(frozen=True)
class Settings(settings.Sft):
    stage: str = settings.setting('toy', 'of lm.stages')
    enough: float = settings.setting(0.0, 'the accuracy at which it ends; 0: none', settings.PART)


class Imitate(Task):
    """Learns its own answers to questions, drawn anew every second step."""

    online = True

    def __post_init__(self):
        self.rows = {name: np.zeros(x.shape, x.dtype) for name, x in self.batch().items()}

    def epoch(self):
        return 8

    def loss(self):
        return language.next_token_loss(self.cfg, z_loss=0.0)

    def source(self, start):
        def source(state, i):
            if i % 2 == 0:
                self.rows = self.roll_out(state.models['policy'], i)
            return sharding.shard_batch(self.rows)

        return source

    def roll_out(self, policy, i):
        store, c, stops = self.data.own.sources[0].train, self.config, self.data.stop_ids
        asked = chats.questions(store, c.batch_size, longest=c.seq_len)
        prompts = [asked[j % len(asked)].prompt for j in range(c.batch_size)]
        drawn = generate(policy, self.cfg, prompts, max_new_tokens=8, stop_ids=stops, sampling=Sampling(1.0), seed=i)
        said = [([*p, *g.ids], [False] * len(p) + [True] * len(g.ids)) for p, g in zip(prompts, drawn, strict=True)]
        return pipeline.stack([chats.segments_row([tuple(map(np.array, one))], c.seq_len, 0) for one in said])

    def evaluate(self, state, step):
        return {'eval/rolled_out': float(np.sum(self.rows['weights_BT']))}

    def alarm(self, metrics):
        return 'it has learned enough' if metrics.get('accuracy', 0) > self.config.enough > 0 else None

    def state_dict(self):
        return self.rows

    def load(self, arrays):
        self.rows = dict(arrays)


TOY = StageSpec('toy', 'chat', 'answers', sft.prepare, Imitate, sft.check)


# ---- what the runner, the loop and the commands make of it ----


@pytest.fixture
def toy(dialogues, tmp_path, monkeypatch):
    """toy(workdir, **settings) trains it, through the command."""
    monkeypatch.setitem(STAGES, 'toy', TOY)
    dialogues.run('sft')
    file = tmp_path / 'toy.py'
    told = (
        'from lm import config',
        'from test_toy_stage import Settings',
        'get_config = lambda arg: config.base(Settings)',
    )
    file.write_text('\n'.join(told))
    own = {
        'config': str(file),
        'steps': 8,
        'init_from': str(dialogues.run('sft')),
        'data__replay': 0.0,
        'execution__microbatch': 8,
    }

    def train(workdir, **settings):
        return dialogues.train('sft', tmp_path / workdir, **own | settings)

    train.folder, train.own = tmp_path, own
    return train


def test_it_learns_from_what_it_rolls_out_twice_and_dies_and_goes_on(toy, monkeypatch):
    toy('whole')
    found = measured(toy.folder / 'whole')
    losses = [found[step, 'train/loss'] for step in range(1, 9)]
    assert all(second < first for first, second in zip(losses[::2], losses[1::2], strict=True)), losses
    assert found[8, 'eval/rolled_out'] > 8
    with monkeypatch.context() as patch, pytest.raises(Preempted):  # between the two steps of a batch
        signal_at(patch, 2, signal.SIGTERM)
        toy('run')
    assert status(toy.folder / 'run')['saved'] == 3
    toy('run')
    assert measured(toy.folder / 'run') == found
    jax.tree.map(np.testing.assert_array_equal, params(toy.folder / 'run'), params(toy.folder / 'whole'))


def test_what_it_keeps_is_in_the_checkpoint(toy, monkeypatch):
    """Without it the run goes on with a batch of nothing."""
    monkeypatch.setattr(Imitate, 'load', lambda self, arrays: None)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 2, signal.SIGTERM)
        toy('run')
    toy('run')
    assert {step for step, name in measured(toy.folder / 'run') if name == 'train/accuracy'} == {1, 2, 3, 5, 6, 7, 8}


def test_it_ends_with_a_reason(toy):
    with pytest.raises(RunError, match=r'it has learned enough: stopped at step \d'):
        toy('run', enough=1e-6)
    found = status(toy.folder / 'run')
    assert found['state'] == 'failed' and 'it has learned enough' in found['reason'] and found['saved'] is None


def test_an_alarm_at_the_end_is_no_end(toy, monkeypatch):
    """Nothing of the step is saved, so the same command comes to the same alarm."""
    monkeypatch.setattr(Imitate, 'alarm', lambda self, metrics: 'no' if 'eval/rolled_out' in metrics else None)
    for _ in range(2):
        with pytest.raises(RunError, match=r'no: stopped at step 3'):
            toy('run')
    assert status(toy.folder / 'run')['saved'] == 2


def test_what_is_set_before_the_loss_is_there_in_it(toy, monkeypatch):
    real = Imitate.loss
    monkeypatch.setattr(Imitate, 'precompute', lambda self, parents: setattr(self, 'known', 1) or {})
    monkeypatch.setattr(Imitate, 'loss', lambda self: self.known and real(self))
    toy('run', steps=1)
    assert (1, 'train/loss') in measured(toy.folder / 'run')


def test_a_branch_into_it_begins_what_it_keeps(toy, dialogues):
    text = {'data__pretraining': 'one.jsonl:0.7,two.jsonl:0.3', 'data__replay': 0.25}
    toy('run', init_from=None, branch_from=str(dialogues.run('sft')), **text)
    assert measured(toy.folder / 'run')[8, 'eval/rolled_out'] > 8


@pytest.mark.slow
def test_the_commands_know_it(toy, dialogues, call, monkeypatch):
    toy('run')
    run = toy.folder / 'run'
    assert saved_config.about(rundir.read_config(str(run))) == TOY.about
    monkeypatch.chdir(dialogues.lab.folder)
    status, out, _ = call('chat', run, '--prompt=the bucket', '--max_new_tokens=2')
    assert status == 0 and out
    status, out, err = call('evaluate', run, '--rows=4', '--max_new_tokens=2')
    assert status == 0 and one_object(out)['stage'] == 'toy' and 'eval/chats.jsonl/ended' in one_object(out), err
    words = [w for w in dialogues.argv('sft', None, **toy.own) if w.startswith('--config')]
    status, out, _ = call('inspect', '--rows=1', *words)
    assert status == 0 and 'row 0: ' in out and 'conversations' in out
