"""KTO on single answers, good or bad: from a file to the loss."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from dialogues import write
from running import ROOT
from stores import PAD, pair_store

from lm import inspect
from lm.data import pairs, pipeline
from lm.data.tokenizer import train_tokenizer
from lm.errors import UsageError
from lm.evals import preferences
from lm.losses import preference
from lm.losses.objective import normalised
from lm.losses.preference import Pairs, Response

NONE = ([], [])
PROMPT, GOOD, BAD, OTHER = [1, 2], [3, 4, 5], [6, 7], [8]


def side(*answer):
    return [*PROMPT, *answer], [False] * len(PROMPT) + [True] * len(answer)


SIDES = [[side(*GOOD), NONE, side(*OTHER)], [NONE, side(*BAD), side(*GOOD)], [side(*GOOD), side(*BAD), side(*OTHER)]]


def test_a_single_answer_is_a_pair_with_one_side(tmp_path, monkeypatch):
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    store = pair_store(tmp_path / 'store', SIDES)
    sizes = pairs.sizes(store, 16)
    assert sizes[:].tolist() == [8, 9, 12] and sizes.left_out == 0
    assert [store.answers(s) for s in range(3)] == [2, 2, 3]
    rows = pairs.in_order(store, seq_len=16)
    batch = pipeline.stack([rows.row(i) for i in range(len(rows))])
    of = lambda name: sorted(batch[f'length_{name}_BP'][batch['weight_BP'] > 0].tolist())
    assert (of('chosen'), of('rejected'), of('mismatched')) == ([0, 3, 3], [0, 2, 2], [1, 1, 3])
    tokens, sequence, last = (batch[f'{name}_BT'].ravel() for name in ('tokens', 'sequence', 'last'))
    kept = [tuple(tokens[sequence == s].tolist()) for s in range(9)]
    assert len(rows) == 1 and sorted(kept) == sorted(tuple(ids) for pair in SIDES for ids, _ in pair)
    assert last.sum() == 7 and all(tokens[last > 0] != PAD), 'no place is the last of a side that there is not'


def test_the_loss_is_the_mean_over_answers():
    """λ_D·(1 − σ(β(r − z0))) of good ones, λ_U·(1 − σ(β(z0 − r))) of bad ones: a pair is two of them."""
    ratio = np.float32([[2.0, 0], [0, -1.0], [0.5, 0.7], [9, 9]])
    length = np.float32([[3, 0], [0, 2], [3, 2], [1, 1]])
    weight = jnp.float32([1, 1, 1, 0])
    made = lambda s: Response(jnp.float32(ratio[:, s]), jnp.float32(length[:, s]), jnp.zeros(4))
    both, settings = Pairs(made(0), made(1), jnp.ones(4)), {'beta': 0.3, 'lambda_d': 1.2, 'lambda_u': 1.5}
    terms, measured = preference.sums('kto', both, weight, settings=settings, z0=jnp.float32(0.4))
    weights = preference.weights('kto', weight, both.chosen.length, both.rejected.length)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    good = [1.2 * (1 - sigmoid(0.3 * (r - 0.4))) for r in (2.0, 0.5)]
    bad = [1.5 * (1 - sigmoid(0.3 * (0.4 - r))) for r in (-1.0, 0.7)]
    found = {name: float(normalised(total, weights[name])) for name, total in (terms | measured).items()}
    assert found['preference'] == pytest.approx(np.mean(good + bad), rel=1e-6)
    assert found['reward_chosen'] == pytest.approx(0.3 * 1.25) and found['reward_rejected'] == pytest.approx(
        0.3 * -0.15
    )
    assert found['accuracy'] == 3 / 4, 'of the four, the bad one of the pair is above the baseline'
    assert found['z0'] == pytest.approx(0.4) and 'margin' not in found


def test_accuracy_of_single_answers_is_that_of_all_good_ones_against_all_bad_ones():
    size = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    value = np.array([[2.0, 0], [1.0, 0], [0, 1.0], [0, 0.0]])
    assert preferences.ranked(value, size, np.ones(4)) == pytest.approx((2 + 1.5) / 4)
    assert preferences.ranked(value[:2], size[:2], np.ones(2)) is None
    assert preferences.ranked(value, np.ones((4, 2)), np.ones(4)) == preferences.wins(
        value[:, 0] - value[:, 1], np.ones(4)
    )


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The words of a command that reads single answers with our own tokenizer."""
    monkeypatch.setenv('LM_CACHE', str(tmp_path / 'cache'))
    tokenizer = train_tokenizer((f'Say {i}. yes no' for i in range(99)), vocab_size=288)
    tokenizer.save(tmp_path / 'tokenizer')
    rows = [{'prompt': f'Say {i}.', 'completion': 'yes' if i % 3 else 'no', 'label': bool(i % 3)} for i in range(30)]
    options = {
        'init_from': 'none', 'data.tokenizer': tmp_path / 'tokenizer', 'data.pretraining': '', 'seq_len': 64,
        'model.vocab_size': 288, 'data.mixture': write(tmp_path / 'k.jsonl', rows), 'data.heldout': 0.2,
    }  # fmt: skip
    return [f'--config={ROOT}/configs/dpo.py', *(f'--config.{key}={value}' for key, value in options.items())]


def test_single_answers_reach_kto_and_other_losses_say_what_they_want(command, capsys):
    inspect.show(*inspect.parse([*command, '--rows=24', '--config.loss=kto']))
    out = capsys.readouterr().out
    assert 'dropped none' in out and 'rejected: no<|end|>' in out and 'chosen: yes<|end|>' in out
    assert 'rejected: \n' in out and 'chosen: \n' in out and 'mismatched: ' in out
    with pytest.raises(UsageError, match='dropped: unpaired 30.*: single answers .* stage=dpo with loss=kto'):
        inspect.show(*inspect.parse(command))


@pytest.mark.slow
def test_a_run_of_single_answers_is_trained_and_measured(dialogues, tmp_path, capsys):
    rows = [{'prompt': f'Say {i}.', 'completion': 'yes' if i % 3 else 'no', 'label': bool(i % 3)} for i in range(40)]
    own = write(tmp_path / 'k.jsonl', rows)
    options = {'loss': 'kto', 'data__mixture': str(own), 'data__heldout': 0.3, 'lambda_d': 1.5, 'steps': 2}
    options |= {'init_from': str(dialogues.run('pretrain')), 'eval__every': 2}
    found = dialogues.train('dpo', tmp_path / 'run', **options)
    assert 0 < found['train/preference'] < 1.5 and f'eval/{own}/accuracy' in found
    said = (tmp_path / 'run' / 'log.txt').read_text()
    assert 'kto: ' in said and 'its authors advise 1 to 1.33, as with lambda_u=' in said
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['config']['lambda_d'] == 1.5


@pytest.mark.slow
def test_of_what_no_answer_is_nothing_is_measured(dialogues, tmp_path):
    rows = [{'prompt': f'Say {i}.', 'completion': 'no', 'label': False} for i in range(40)]
    options = {'loss': 'kto', 'data__mixture': str(write(tmp_path / 'k.jsonl', rows)), 'steps': 2, 'eval__every': 2}
    found = dialogues.train('dpo', tmp_path / 'run', init_from=str(dialogues.run('pretrain')), **options)
    assert 'train/reward_rejected' in found and 'train/logp_rejected' in found
    assert not {'train/reward_chosen', 'train/logp_chosen', 'train/chosen_nll'} & found.keys()
