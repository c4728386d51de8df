"""The FLOPs by which MFU is computed are those that a stage's step multiplies, as XLA counts them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import running
from running import lines

from lm import config as configs
from lm.model import head
from lm.runs import execution, loading, rundir
from lm.stages import STAGES, distill, find, plan, runner
from lm.training import flops
from lm.training import step as training

SIZES = {
    'steps': 4, 'batch_size': 4, 'seq_len': 128, 'execution.attention': 'dense', 'optim.name': 'adamw',
    'model.vocab_size': 2048,
    'model.dim': 512, 'model.layers': 2, 'model.heads': 8, 'model.kv_heads': 4, 'model.head_dim': 64,
    'model.ffn_dim': 1024,
}  # fmt: skip
CASES = {
    'pretrain': {}, 'sft': {}, 'reward': {}, 'dpo': {}, 'dpo-live': {'reference': 'live'}, 'simpo': {'loss': 'simpo'},
    'kto': {'loss': 'kto'}, 'kto-live': {'loss': 'kto', 'reference': 'live'}, 'distill': {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_run_is_read(monkeypatch):
    """The runs that a stage names are plain weights of its own shapes."""
    monkeypatch.setattr(loading, 'abstract_parent', lambda run, cfg, role, merge: loading.abstract_params(cfg, role))
    monkeypatch.setattr(loading, 'abstract_in_use', lambda run, cfg: loading.abstract_params(cfg))


def step_of(name, **changes):
    """(the task, its step, not compiled, and what that takes) at sizes where products are nearly all."""
    given = {**SIZES, **CASES.get(name, {}), **changes, **({} if name == 'pretrain' else {'init_from': 'x'})}
    file = running.ROOT / 'configs' / f'{name if name in STAGES else "dpo"}.py'
    config, _ = configs.load(str(file), [(k, str(v)) for k, v in given.items()])
    config.execution.microbatch, config.execution.scan, cfg = config.batch_size, False, execution.model_config(config)
    task = find(config.stage).open(config, cfg)
    optimizer, rate = plan.make_optimizer(config)
    state = runner.abstract_state(task, optimizer)
    step = training.make_step(task.loss(), optimizer, clip=config.optim.clip, rate=rate)
    return task, step, (state, task.batch())


def test_the_flops_of_an_adapter_are_those_that_xla_counts(one_device, monkeypatch):
    """What is frozen has no gradient, the head and the embedding neither; nothing below the first layer asks for one,
    which is too little at any depth to be left out of ours."""
    monkeypatch.setattr(head, 'CHUNK_BYTES', {'cpu': 1 << 40})
    task, step, arguments = step_of('sft', **{'lora.rank': 16, 'lora.merge': True})
    cfg, (B, T) = task.cfg, arguments[1]['tokens_BT'].shape
    masked = 12 * cfg.layers * cfg.heads * cfg.head_dim * (T / 2) * B * T
    first = 2 * cfg.dim * (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim * B * T
    ours = task.cost().of(B * T, B * T)
    assert counted_by_xla(step, arguments) == pytest.approx(ours + masked - first, rel=0.01)
    whole = step_of('sft')[0].cost()
    assert task.cost().token < 0.75 * whole.token and task.cost().target == whole.target * 2 / 3


def counted_by_xla(step, arguments):
    return jax.jit(step).lower(*arguments).cost_analysis()['flops']


@pytest.mark.parametrize('name', CASES)
def test_a_stages_flops_are_those_that_xla_counts(name, one_device, monkeypatch):
    """Layers unrolled, the head in one chunk, no remat, no padding; dense attention multiplies what it then masks, and
    the head of `logp` makes its logits twice, of which the second time is not counted."""
    monkeypatch.setattr(head, 'CHUNK_BYTES', {'cpu': 1 << 40})
    monkeypatch.setattr(distill.Distill, 'teacher', property(lambda self: self.cfg))
    task, step, arguments = step_of(name)
    cfg, (B, T) = task.cfg, arguments[1]['tokens_BT'].shape
    ours = task.cost().of(B * T, B * T)
    forwards = task.cost().token / flops.cost(cfg, seq_len=T).token
    masked = forwards * 12 * cfg.layers * cfg.heads * cfg.head_dim * (T / 2) * B * T
    again = 2 * cfg.sizes['V'] * cfg.dim * B * T if task.config.stage == 'dpo' else 0
    assert counted_by_xla(step, arguments) == pytest.approx(ours + masked + again, rel=0.03)


def test_what_is_multiplied_besides_the_model_is_seen_by_this(one_device, monkeypatch):
    """A head that a stage has not would be out by more than the tolerance."""
    monkeypatch.setattr(head, 'CHUNK_BYTES', {'cpu': 1 << 40})
    task, step, arguments = step_of('reward')
    places = np.prod(arguments[1]['tokens_BT'].shape)
    assert flops.per_token(task.cfg, seq_len=1) * places > 1.03 * counted_by_xla(step, arguments)


def test_tokens_and_targets_of_a_step_are_those_that_are_not_padding():
    batch = {
        'segments_BT': jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]]),
        'weights_BT': jnp.array([[0, 1, 0.5, 0], [0.0] * 4]),
    }
    step = runner.counted(lambda state, batch: (state, {'loss': 1.0}))
    assert step(None, batch)[1] == {'loss': 1.0, 'tokens': 4, 'targets': 2}


def test_the_ceiling_of_a_cpu_is_the_best_that_was_seen(monkeypatch):
    """It is measured again now and then, and MFU is never above 1, whatever had the cores when it was measured."""
    now, found = [0.0], [50.0, 200.0, 100.0]
    monkeypatch.setattr(flops.time, 'monotonic', lambda: now[0])
    ceiling = flops.Ceiling(measure=lambda: found.pop(0))
    ceiling.refresh()
    assert ceiling.mfu(25.0) == 0.5
    ceiling.refresh()
    assert len(found) == 2 and ceiling.mfu(80.0) == 1.0 and ceiling.mfu(40.0) == 0.5
    for second, mfu in ((flops.AGAIN, 0.2), (2 * flops.AGAIN, 0.2)):
        now[0] = second
        ceiling.refresh()
        assert ceiling.mfu(40.0) == mfu
    assert not found and flops.Ceiling(100.0).mfu(150.0) == 1.5  # of a data sheet that is wrong one should hear


@pytest.mark.slow
@pytest.mark.parametrize('log_every', [4, 1])
def test_lines_say_when_and_after_how_many_tokens_and_a_resumed_run_counts_on(lab, tmp_path, log_every):
    workdir, settings = tmp_path / 'run', {'log__every': log_every, 'checkpoint__every': 3, 'eval__every': 6}
    lab.train(workdir, steps=3, optim__schedule='constant', **settings)
    assert lab.train(workdir, steps=6, optim__schedule='constant', **settings)['tokens'] == lines(workdir)[-1]['tokens']
    found = lines(workdir)
    assert [r['time'] for r in found] == sorted(r['time'] for r in found)
    tokens = {r['step']: r['tokens'] for r in found}
    assert 0.9 * 8 * 32 * 6 < tokens[6] <= 8 * 32 * 6  # padding at the ends of documents is not counted
    meta = json.loads((workdir / 'checkpoints' / '6' / 'meta' / 'metadata').read_text())
    assert meta['tokens'] == tokens[6]
    lab.train(tmp_path / 'whole', steps=6, optim__schedule='constant', **settings)
    assert {r['step']: r['tokens'] for r in lines(tmp_path / 'whole')}[6] == tokens[6]


@pytest.mark.parametrize(
    'stage', [pytest.param(s, marks=() if s == 'sft' else pytest.mark.slow) for s in ('sft', 'reward', 'dpo')]
)
def test_a_stage_counts_no_padding(dialogues, stage):
    """Conversations and pairs do not fill their rows."""
    workdir = dialogues.run(stage)
    saved = rundir.read_config(str(workdir))['config']
    last = lines(workdir)[-1]
    assert last['tokens'] > 0 and all(0 < r['perf/mfu'] <= 1 for r in lines(workdir) if 'perf/mfu' in r)
    if stage == 'sft':
        assert last['tokens'] < 0.99 * last['step'] * saved['batch_size'] * saved['seq_len']
