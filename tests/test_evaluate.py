"""lm.evaluate over the stages: one table, the same questions for every run, and a reward model's score of an answer."""

import functools
import json
import random
import shutil
import sys

import numpy as np
import pytest
import running
from etils import epath

from lm.data import pairs
from lm.data.chat_template import ChatTemplate
from lm.data.prepare import prepare
from lm.errors import UsageError
from lm.evals import preferences, tasks
from lm.runs import loading, reward_scale, rundir
from lm.stages import find

CONFIGS = running.ROOT / 'configs'
STAGES = ('pretrain', 'sft', 'reward', 'dpo')
# One microbatch: none is timed.
SHORT = {
    'steps': 2,
    'execution__microbatch': 8,
    'optim__warmup': 1,
    'eval__every': 2,
    'eval__rows': 4,
    'checkpoint__every': 2,
}


def write(path, records):
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return str(path)


@pytest.fixture(scope='module')
def chain(lab, trained, tmp_path_factory):
    """A run of each stage, and what they learn from: `chats` and `pairs`, made of one pretrained run to save time."""
    folder, draw = tmp_path_factory.mktemp('chain'), random.Random(1)
    said = lambda: ' '.join(draw.choices(running.WORDS, k=draw.randint(2, 6)))
    chat = write(folder / 'chat.jsonl', ({'prompt': f'{said()} {i}', 'completion': said()} for i in range(60)))
    sides = lambda i: {'prompt': f'{said()} {i}', 'chosen': said(), 'rejected': said() + ' no'}
    pair = write(folder / 'pairs.jsonl', map(sides, range(60)))
    shutil.copytree(trained, folder / 'pretrain')
    train(lab, folder / 'reward', folder / 'pretrain', pair)
    for stage, mixture in (('sft', chat), ('dpo', pair)):
        saved = rundir.read_config(str(folder / 'pretrain'))
        saved['config'] |= {'stage': stage, 'init_from': str(folder / 'pretrain')}
        saved['about'] = find(stage).about._asdict()
        saved['config']['data'] |= {'mixture': mixture, 'pretraining': lab.mixture}
        parent = rundir.read_config(str(folder / 'reward'))['parents']['reward']
        saved['parents'] = {'policy': parent} | ({'reference': parent} if stage == 'dpo' else {})
        copy(folder / 'pretrain', folder / stage, saved)
    return {name: str(folder / name) for name in STAGES} | {'chats': chat, 'pairs': pair}


def train(lab, workdir, parent, mixture):
    settings = SHORT | {'init_from': str(parent), 'data__mixture': mixture} | lab.inherited
    lab.train(workdir, config=str(CONFIGS / f'{workdir.name}.py'), **settings)


def copy(run, to, saved):
    """The same weights under other settings."""
    to.mkdir()
    for name in ('checkpoints', 'tokenizer'):
        (to / name).symlink_to(f'{run}/{name}')
    (to / 'config.json').write_text(json.dumps(saved))


@pytest.fixture
def call(call):
    """call(*words) -> (exit status, stdout, stderr) of lm.evaluate."""
    return functools.partial(call, 'evaluate')


def test_stages_are_rows(call, chain, lab):
    words = [f'--{name}={chain[name]}' for name in ('chats', 'pairs')]
    status, out, err = call(*(chain[s] for s in STAGES), *words, '--rows=4', '--max_new_tokens=4')
    rows = {row['stage']: row for row in running.one_object(out)['runs']}
    assert status == 0 and {s: row['step'] for s, row in rows.items()} == dict.fromkeys(STAGES, 12) | {'reward': 2}
    chat, pair, one = chain['chats'], chain['pairs'], lab.folder / 'one.jsonl'
    asked = {f'eval/{chat}/ended', f'eval/{chat}/f1', f'eval/{pair}/accuracy_per_token', f'eval/{one}/bpb', 'eval/bpb'}
    for stage in ('pretrain', 'sft', 'dpo'):
        assert asked <= set(rows[stage]) and (f'eval/{pair}/accuracy' in rows[stage]) == (stage == 'dpo')
        assert rows[stage][f'eval/{pair}/longer_wins'] == rows['reward'][f'eval/{pair}/longer_wins'], 'the same pairs'
    assert {f'eval/{pair}/{k}' for k in ('accuracy', 'calibration_error', 'length_correlation')} <= set(rows['reward'])
    assert not asked & set(rows['reward'])
    assert rows['dpo'][f'eval/{pair}/accuracy'] == 0.5, 'it is its reference'
    assert rows['dpo'][f'eval/{chat}/f1'] == rows['pretrain'][f'eval/{chat}/f1']
    measured_there = running.measured(chain['reward'])[2, f'eval/{pair}/log_loss']
    assert rows['reward'][f'eval/{pair}/log_loss'] == pytest.approx(measured_there, rel=1e-5)
    table = [line.split() for line in err.splitlines()]
    assert ['chat.jsonl', 'pairs.jsonl', 'one.jsonl', 'two.jsonl'] in table
    numbers = next(cells for cells in table if cells[:1] == [chain['reward']])
    assert numbers[1:] == ['2', f'{rows["reward"][f"eval/{pair}/accuracy"]:.3f}']
    left_out = [line for line in err.splitlines() if line.startswith('left out')]  # a line of progress may name answers
    assert 'left out refusals: no run read' in err and not any('answers' in line for line in left_out)


def test_runs_on_their_own_data_are_asked_about_those(call, chain):
    status, out, err = call(chain['sft'], '--rows=2', '--max_new_tokens=2')
    found = running.one_object(out)
    assert status == 0 and f'eval/{chain["chats"]}/ended' in found and 'eval/bpb' in found
    assert 'left out preferences, refusals: no run read the default data' in err and '--pairs' in err
    status, out, err = call(chain['pretrain'], '--rows=2', '--tasks=heldout')
    assert set(running.one_object(out)) >= {'run', 'step', 'eval/bpb'} and 'left out' not in err


def test_an_implicit_reward_needs_its_reference(call, chain, tmp_path):
    saved = rundir.read_config(chain['dpo'])
    saved['parents']['reference']['path'] = str(tmp_path / 'gone')
    copy(chain['dpo'], tmp_path / 'dpo', saved)
    status, out, err = call(tmp_path / 'dpo', '--tasks=preferences', f'--pairs={chain["pairs"]}', '--rows=2')
    found = running.one_object(out)
    assert status == 0 and f'eval/{chain["pairs"]}/accuracy_per_token' in found
    assert f'eval/{chain["pairs"]}/accuracy' not in found and 'no implicit rewards without its reference' in err
    saved['parents']['reference'] |= {'path': chain['sft'], 'digest': 'of other weights'}
    copy(chain['dpo'], tmp_path / 'other', saved)
    status, out, err = call(tmp_path / 'other', '--tasks=preferences', f'--pairs={chain["pairs"]}', '--rows=2')
    assert status == 0 and f'eval/{chain["pairs"]}/accuracy' not in running.one_object(out)
    assert 'has other weights than when this run began' in err


def test_what_a_run_has_no_room_for_is_left_out_and_said(call, chain, tmp_path):
    prompts = ['word ' * 300 + str(i) for i in range(8)]
    chats = write(tmp_path / 'chats.jsonl', ({'prompt': p, 'completion': 'yes'} for p in prompts))
    sides = write(tmp_path / 'pairs.jsonl', ({'prompt': p, 'chosen': 'yes', 'rejected': 'no'} for p in prompts))
    status, out, err = call(chain['sft'], '--tasks=answers,preferences', f'--chats={chats}', f'--pairs={sides}')
    assert status == 0 and not [key for key in running.one_object(out) if key.startswith('eval/')], err
    assert f'left out {chats}: no held-out answer ends' in err
    assert f'left out {sides}: no held-out pair has two different responses' in err


@pytest.mark.slow
def test_rows_are_what_the_stages_measured(call, chain, lab, tmp_path):
    chat, pair, one = chain['chats'], chain['pairs'], lab.folder / 'one.jsonl'
    train(lab, tmp_path / 'sft', chain['pretrain'], chat)
    train(lab, tmp_path / 'dpo', tmp_path / 'sft', pair)
    words = (f'--chats={chat}', f'--pairs={pair}', '--rows=4', '--max_new_tokens=4')
    status, out, _ = call(tmp_path / 'sft', tmp_path / 'dpo', *words)
    sft, dpo = running.one_object(out)['runs']
    assert status == 0
    for row, keys in (
        (sft, (f'{chat}/f1', f'{chat}/ended', f'{one}/bpb', 'bpb')),
        (dpo, (f'{pair}/accuracy_per_token', f'{pair}/accuracy', f'{pair}/reference_chosen_loss', f'{one}/bpb')),
    ):
        there = running.measured(row['run'])
        for key in keys:
            assert row[f'eval/{key}'] == pytest.approx(there[2, f'eval/{key}'], rel=1e-5), key


# ---- which tasks, on what ----


def settings(stage, mixture, pretraining=None):
    return {'config': {'stage': stage, 'data': {'mixture': mixture, 'pretraining': pretraining}}}


TEXT = 'botocore:0.5,chitchat:0.5'


@pytest.mark.parametrize(
    ('saved', 'expected'),
    [
        ([settings('pretrain', TEXT)], ('operations,smalltalk', 'programmatic', 'decline')),
        ([settings('sft', 'operations:0.6,smalltalk:0.4', TEXT)], ('operations,smalltalk', 'programmatic', 'decline')),
        ([settings('dpo', 'decline', TEXT)], ('operations,smalltalk', 'programmatic', 'decline')),
        ([settings('sft', 'mine.jsonl', TEXT)], ('mine.jsonl', 'programmatic', 'decline')),
        ([settings('dpo', 'mine.jsonl', TEXT)], ('operations,smalltalk', 'mine.jsonl', 'decline')),
        ([settings('sft', 'mine.jsonl', 'text.jsonl')], ('mine.jsonl', None, None)),
        ([settings('sft', 'mine.jsonl', TEXT), settings('sft', 'smalltalk', TEXT)],
         ('operations,smalltalk', 'programmatic', 'decline')),
    ],
)  # fmt: skip
def test_the_data_are_the_default_ones_or_the_runs_own(monkeypatch, saved, expected):
    monkeypatch.setattr(tasks, 'open_source', lambda name, kind: None)
    told = []
    found = tasks.plan(None, {str(i): s for i, s in enumerate(saved)}, {}, told.append)
    assert tuple(found.get(name) for name in ('answers', 'preferences', 'refusals')) == expected
    assert found['heldout'] is None and len(told) == (None in expected)


def test_a_package_that_is_not_installed_is_one_line(monkeypatch):
    def missing(name, kind):
        if name in ('botocore', 'operations', 'programmatic', 'decline'):
            raise UsageError(f"{name!r} is read from botocore: pip install -e '.[corpus]'")

    monkeypatch.setattr(tasks, 'open_source', missing)
    told, saved = [], {'run': settings('sft', 'operations', 'text.jsonl')}
    assert tasks.plan(None, saved, {}, told.append) == {'heldout': None}
    assert len(told) == 3 and all(line.startswith('left out ') and 'pip install' in line for line in told)
    with pytest.raises(UsageError, match='pip install'):
        tasks.plan(['answers'], saved, {}, told.append)
    with pytest.raises(UsageError, match='pip install'):
        tasks.plan(None, {'run': settings('pretrain', 'botocore')}, {}, told.append)


# ---- the score of an answer ----


def test_the_score_is_that_of_training_on_its_scale(call, chain, lab):
    status, out, err = call(chain['reward'], '--score', 'the bucket', 'returns a table')
    found = running.one_object(out)
    scale = reward_scale.read(epath.Path(chain['reward']), 2)
    assert status == 0 and not err and not found['cut']
    assert found['score'] == pytest.approx((found['raw'] - scale.mean) / scale.std)
    # The same answer among pairs, as evaluation reads them.
    with running.all_devices():
        model = loading.load(chain['reward'], warn=print)
        folder = rundir.tokenizer_folder(chain['reward'])
        form = pairs.form(ChatTemplate.load(folder, model.tokenizer))
        records = [{'prompt': p, 'chosen': 'returns a table', 'rejected': 'no'} for p in ('the bucket', 'a role')]
        path = write(lab.folder / 'score.jsonl', records)
        options = {'vocab_size': 300, 'tokenizer': folder, 'heldout': 0.5, 'progress': print}
        (source,) = prepare(mixture=path, form=form, **options).sources
        store = source.train if source.train.pairs == 1 else source.heldout
        scores = {}
        for store in (source.train, source.heldout):
            batches = preferences.in_order(store, seq_len=32, batch_size=8)
            measured = preferences.scores(model.params, model.cfg, batches, store.pairs)
            prompts = [model.tokenizer.decode(store.pair(i)[0][0]) for i in range(store.pairs)]
            scores |= dict(zip(prompts, measured[:, 0].tolist(), strict=True))
    (expected,) = [value for text, value in scores.items() if text.startswith('the bucket')]
    assert found['raw'] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_long_answer_is_cut_as_in_training(call, chain):
    long = ' '.join(['returns a table'] * 40)
    status, out, err = call(chain['reward'], '--score', 'the bucket', long)
    found = running.one_object(out)
    assert status == 0 and found['cut'] and found['tokens'] == 32 and 'first 32 tokens are scored' in err
    _, again, _ = call(chain['reward'], '--score', 'the bucket', long + ' and more')
    assert running.one_object(again)['raw'] == found['raw'] and np.isfinite(found['score'])


def test_what_cannot_be_asked(call, chain, monkeypatch):
    def refused(*words, says):
        status, out, err = call(*words)
        assert status == 2 and not out and says in err.splitlines()[-1] and 'Traceback' not in err, err

    reward, sft = chain['reward'], chain['sft']
    refused(sft, '--score', 'x', 'y', says='is no reward model (stage=sft)')
    refused(reward, '--score', ' ', 'y', says='the prompt is empty')
    refused(reward, '--score', 'x', '', says='the answer is empty')
    refused(reward, '--score', 'x', '\udcff', says='--score: the answer is not valid UTF-8')
    refused(reward, '--score', 'bucket ' * 60, 'y', says='the prompt alone fills the 32 tokens')
    refused(reward, sft, '--score', 'x', 'y', says='name one run')
    refused(reward, '--score', 'x', says='expected 2 arguments')
    refused(reward, '--tasks=answers,heldout', says='is a reward model, which gives scores: --tasks=preferences')
    refused(sft, '--tasks=answer', says='--tasks=answer (did you mean answers?)')
    refused(sft, '--max_new_tokens=0', says='--max_new_tokens=0')
    refused(sft, '--tasks=refusals', says='no run read the default data')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'lm_eval', None)
        refused(sft, '--tasks=heldout,lm_eval:hellaswag', says="needs the package lm-eval: pip install -e '.[eval]'")
    refused(sft, '--tasks=heldout', '--mixture=/no/such.jsonl', says='/no/such.jsonl')
