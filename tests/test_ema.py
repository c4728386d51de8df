"""The average of the weights: kept, saved, evaluated with, loaded and handed on; the raw ones go on training."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import running
from running import measured

from lm import evaluate
from lm.errors import UsageError
from lm.runs import checkpoint, execution, loading, rundir
from lm.training import step as training

SHORT = {'steps': 6, 'checkpoint__every': 3}


@pytest.fixture(scope='module')
def averaging(lab, tmp_path_factory):
    """A run that keeps an average."""
    workdir = tmp_path_factory.mktemp('averaging') / 'run'
    lab.train(workdir, optim__ema=0.99, **SHORT)
    return workdir


def saved(workdir, item='trainable'):
    """One item of a run's newest checkpoint."""
    with running.all_devices():
        abstract = {
            'policy': loading.abstract_params(execution.model_config(rundir.read_config(str(workdir))['config']))
        }
        return jax.device_get(checkpoint.find(str(workdir), {item: abstract}, warn=pytest.fail)[1][item]['policy'])


def loaded(workdir):
    with running.all_devices():
        return jax.device_get(loading.load(str(workdir), warn=pytest.fail).params)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_the_average_forgets_where_it_began():
    """Decays of 1/10, 2/11, 3/12, … up to the one asked for; of constant weights it is the weights."""
    ema, weights = {'w': jnp.array([100.0])}, [1.0, 2.0, 4.0, 8.0]
    expected = 100.0
    for i, w in enumerate(weights):
        ema = training.averaged(ema, {'w': jnp.array([w])}, jnp.int32(i), decay=0.2)
        decay = min(0.2, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * w
        assert float(ema['w'][0]) == pytest.approx(expected, rel=1e-5)
    late = training.averaged({'w': jnp.array([0.0])}, {'w': jnp.array([1.0])}, jnp.int32(10**6), decay=0.999)
    assert float(late['w'][0]) == pytest.approx(0.001, rel=1e-3)


def test_a_step_that_is_not_finite_leaves_the_average_finite():
    loss = training.Loss(
        lambda models, batch, key: ({'fit': jnp.sum(models['policy'] * batch['x_B'])}, {}),
        lambda batch: {'fit': 1.0},
        {'fit': 1.0},
    )
    step = jax.jit(training.make_step(loss, optax.sgd(0.1), clip=None, ema=0.9))
    state = training.create({'policy': jnp.ones(2)}, {}, optax.sgd(0.1), 0, ema=True)
    state, metrics = step(state, {'x_B': jnp.array([1.0, jnp.nan])})
    assert metrics['skipped'] == 1 and same(state.ema, {'policy': np.ones(2)})
    state, _ = step(state, {'x_B': jnp.ones(2)})
    np.testing.assert_allclose(state.ema['policy'], 1 - 0.1 * (1 - 2 / 11), rtol=1e-6)


def test_the_average_is_what_is_evaluated_and_loaded(lab, averaging):
    assert same(loaded(averaging), saved(averaging, 'ema')) and not same(loaded(averaging), saved(averaging))
    again = evaluate.evaluate(evaluate.parse([str(averaging), '--rows', '8']))
    assert again['eval/loss'] == pytest.approx(measured(averaging)[6, 'eval/loss'], rel=1e-5)


@pytest.mark.slow
def test_training_does_not_look_at_the_average_and_resumes_with_it(lab, averaging, tmp_path):
    lab.train(tmp_path / 'plain', **SHORT)
    assert same(saved(tmp_path / 'plain'), saved(averaging))
    shutil.copytree(averaging, tmp_path / 'resumed')
    shutil.rmtree(tmp_path / 'resumed' / 'checkpoints' / '6')
    lab.train(tmp_path / 'resumed', optim__ema=0.99, **SHORT)
    assert measured(tmp_path / 'resumed') == measured(averaging)
    assert same(loaded(tmp_path / 'resumed'), loaded(averaging))
    # A branch of a run without an average begins one with its weights; of one with, goes on with that.
    for parent in (tmp_path / 'plain', averaging):
        child = tmp_path / f'branch-{parent.name}'
        lab.train(child, **(SHORT | lab.inherited), branch_from=f'{parent}@3', optim__ema=0.99)
        assert same(saved(child), saved(averaging))
        assert same(loaded(child), loaded(averaging)) == (parent == averaging)


def test_what_starts_from_the_run_takes_the_average(lab, averaging, tmp_path):
    lab.train(tmp_path / 'run', init_from=str(averaging), **(SHORT | lab.inherited), optim__lr=1e-30)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded(tmp_path / 'run'), loaded(averaging))


def test_a_branch_with_another_optimizer_is_refused(lab, averaging, tmp_path):
    with pytest.raises(UsageError, match='has the state of optim.name=adamw: set it so, or start with init_from'):
        lab.train(tmp_path / 'run', branch_from=str(averaging), **(SHORT | lab.inherited), optim__name='muon')
