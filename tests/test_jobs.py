"""Jobs make data in a run's directory: best-of-n and rejection sampling, whole or killed in the middle."""

import contextlib
import hashlib
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import running
from dialogues import message, write
from running import lines, signal_at, status

from lm import config as configs
from lm import main as lm_main
from lm.data import prompt_sets
from lm.data.heldout import is_heldout
from lm.data.records import Counts, split_content
from lm.data.sources import open_source
from lm.data.store import digest
from lm.errors import Preempted, RunError, UsageError
from lm.jobs import generate

CONFIG = str(running.ROOT / 'configs' / 'generate.py')
OWN = {'data.mixture': 'chats.jsonl', 'prompts': 6, 'n': 8, 'batch_size': 16, 'max_new_tokens': 16}
MADE = ('prompts.jsonl', 'scores.jsonl', 'answers.jsonl')


def few_letters(prompts, responses):
    """The shorter the better; the empty one best of all."""
    return [-float(len(r)) for r in responses]


@pytest.fixture
def job(dialogues, tmp_path):
    """job(workdir, **settings) does it, through the command."""

    def do(workdir='made', **settings):
        own = OWN | {'init_from': str(dialogues.run('sft')), 'reward_from': str(dialogues.run('reward'))}
        given = own | {k.replace('__', '.'): v for k, v in settings.items()}
        words = [
            f'--config={CONFIG}',
            f'--workdir={tmp_path / workdir}',
            *(f'--config.{k}={v}' for k, v in given.items()),
        ]
        with contextlib.chdir(dialogues.lab.folder):
            return lm_main.train(words)

    return do


def made(workdir):
    """The files of a job by their digests, and its measures without times."""
    of = {name: hashlib.sha256((workdir / name).read_bytes()).hexdigest() for name in MADE}
    return of, [{k: v for k, v in line.items() if k not in ('time', 'perf/tokens_per_s')} for line in lines(workdir)]


# ---- what is kept ----


def settings(**more):
    config, _ = configs.load(CONFIG, [(k, str(v)) for k, v in more.items()])
    return config


@pytest.mark.parametrize(
    ('given', 'score', 'wanted'),
    [
        ({}, [1.0, 3.0, 2.0, 3.0], [(1, 1)]),  # of equals the first
        ({'keep': 'rejection', 'threshold': 2.0}, [1.0, 3.0, 2.0, 0.0], [(1, 1), (2, 2)]),
        ({'keep': 'rejection', 'threshold': 9.0}, [1.0, 3.0, 2.0, 0.0], []),
    ],
)
def test_what_scores_highest_is_kept(given, score, wanted):
    found = generate.kept(settings(**given), ['a', 'b', 'c', 'd'], np.array(score), np.ones(4, bool))
    assert list(found) == wanted


def test_what_did_not_end_or_says_nothing_is_not_kept_and_the_same_words_once():
    of = lambda answers, ended: list(
        generate.kept(settings(keep='rejection', threshold=0), answers, np.array([3.0, 2.0, 1.0]), np.array(ended))
    )
    assert of(['a', 'b', 'c'], [False, True, True]) == [(1, 2), (2, 3)]
    assert of([' ', 'b', 'b'], [True] * 3) == [(1, 2)]
    assert list(generate.kept(settings(), ['a', 'b'], np.array([2.0, 1.0]), np.array([False, True]))) == [(1, 2)]


def test_only_the_drawn_answer_is_to_be_learned():
    said = [message('user', 'a'), message('assistant', 'b'), message('user', 'c'), message('assistant', 'd')]
    found = generate.record_of({'messages': said, 'source': 'x'}, 'e', score=1.0)
    assert found['messages'] == [said[0], said[1] | {'train': False}, said[2], message('assistant', 'e')]
    assert found['score'] == 1.0 and 'train' not in said[1]


# ---- what is asked ----


def choose(mixture, **options):
    given = {'count': 12, 'seed': 0, 'heldout': 0.2, 'strict': False, 'usable': lambda chat: True, 'say': pytest.fail}
    return prompt_sets.choose(mixture, **(given | options))


def chats(path, count, *, word):
    return write(path, [
        {'messages': [message('user', f'{word} {i}?'), message('assistant', f'{word} {i // 2 * 2}')]}
        for i in range(count)
    ])  # fmt: skip


def test_prompts_are_chosen_by_the_seed_none_held_out_and_none_twice(tmp_path):
    file = chats(tmp_path / 'a.jsonl', 60, word='one')
    records = list(open_source(str(file), 'chat').read(Counts()))
    held = [r for r in records if is_heldout(digest(split_content(r)), 0.2)]
    asked_again = next(r for r in records if r not in held)['messages'][0]
    lines_of = [json.loads(line) for line in file.read_text().splitlines()]
    write(file, [*lines_of, *({'messages': [asked_again, message('assistant', f'x{i}')]} for i in range(6))])
    found = choose(str(file))
    assert found == choose(str(file)) != choose(str(file), seed=1)
    everything = choose(str(file), count=1000)
    prompts = [chat['messages'][0]['content'] for chat in everything]
    assert len(set(prompts)) == len(prompts) and found == everything[:12]
    assert held and len(everything) == 60 - len(held)
    assert not [r for r in held if r in everything]


def test_sources_give_prompts_by_weight_and_one_that_has_too_few_all_of_its_own(tmp_path):
    a, b = chats(tmp_path / 'a.jsonl', 60, word='one'), chats(tmp_path / 'b.jsonl', 60, word='two')
    count = lambda found: sum(chat['source'] == str(a) for chat in found)
    assert count(choose(f'{a}:3,{b}:1')) == 9 and 4 <= count(choose(f'{a},{b}')) <= 8
    few = chats(tmp_path / 'few.jsonl', 4, word='three')
    found = choose(f'{a}:1,{few}:1', heldout=1e-9)
    assert len(found) == 12 and count(found) == 8
    with pytest.raises(UsageError, match='has no prompt that can be asked'):
        choose(str(a), usable=lambda chat: False)


# ---- going on ----


def test_files_are_cut_back_to_whole_batches_that_agree(tmp_path):
    scores = [{'prompt_id': i, 'kept': int(i != 3), 'scores': [0.5]} for i in range(6)]
    answers = [{'prompt_id': i, 'text': 'Ω'} for i in range(6) if i != 3]

    def left(total=8, size=2):
        for name in ('scores', 'answers'):
            (tmp_path / f'{name}.jsonl').touch()
        found = generate.resumed(tmp_path, total, size)
        assert lines(tmp_path, 'scores.jsonl') == found == scores[: len(found)]
        assert lines(tmp_path, 'answers.jsonl') == [a for a in answers if a['prompt_id'] < len(found)]
        return len(found)

    def given(scores=scores, answers=answers, tail=''):
        for name, values in (('scores', scores), ('answers', answers)):
            (tmp_path / f'{name}.jsonl').write_text(''.join(map(generate._line, values)) + tail)

    assert left() == 0  # there are none
    given()
    whole = (tmp_path / 'answers.jsonl').read_bytes()
    assert left() == 6 and (tmp_path / 'answers.jsonl').read_bytes() == whole
    assert left(total=6, size=4) == 6 and left(size=4) == 4
    given(answers=answers[:-1])
    assert left() == 4
    given(scores=scores[:3])
    assert left() == 2
    given(tail='{"prompt_id": 6, "ke')
    assert left() == 6
    given(scores=[*scores[:2], *scores[3:]])
    assert left() == 2


@pytest.mark.slow
def test_it_is_stopped_and_killed_and_ends_as_if_it_had_not(job, tmp_path, monkeypatch):
    whole = job('whole')
    assert whole['prompts'] == 6 and whole['answers'] == 48 and 2 < whole['kept'] <= 6
    for line in lines(tmp_path / 'whole', 'scores.jsonl'):
        of_ended = [x for x, ended in zip(line['scores'], line['ended'], strict=True) if ended]
        assert line['kept_scores'] == ([max(of_ended)] if of_ended else [])
    assert status(tmp_path / 'whole')['state'] == 'done'
    with monkeypatch.context() as patch, pytest.raises(Preempted, match='saved after 2 of 6 prompts, SIGTERM'):
        signal_at(patch, 2, signal.SIGTERM)
        job()
    assert status(tmp_path / 'made')['state'] == 'preempted' and len(lines(tmp_path / 'made', 'scores.jsonl')) == 2
    assert job() == whole and made(tmp_path / 'made') == made(tmp_path / 'whole')
    for name in ('answers.jsonl', 'scores.jsonl'):  # as a kill leaves it: the middle of a batch is written
        file = tmp_path / 'made' / name
        file.write_bytes(file.read_bytes()[:-40])
        assert job() == whole and made(tmp_path / 'made') == made(tmp_path / 'whole')
    log = (tmp_path / 'made' / 'log.txt').read_text()
    assert 'resumed after 4 of 6 prompts' in log and '6 prompts × 8 answers: mean score' in log


@pytest.mark.slow
def test_a_function_scores_and_fine_tuning_reads_what_is_kept(job, dialogues, tmp_path):
    found = job(reward_from='none', reward__fn='test_jobs:few_letters', keep='rejection', threshold=-30, prompts=24)
    assert found['kept_score'] >= -30
    answers = lines(tmp_path / 'made', 'answers.jsonl')
    assert len(answers) == found['kept'] > 2
    for answer in answers:
        assert answer['score'] == -len(answer['messages'][-1]['content']) >= -30 and 1 <= answer['rank'] <= answer['n']
    mixture, sft = str(tmp_path / 'made' / 'answers.jsonl'), str(dialogues.run('sft'))
    dialogues.train('sft', tmp_path / 'tuned', data__mixture=mixture, init_from=sft, steps=2, eval__every=2)
    log = (tmp_path / 'tuned' / 'log.txt').read_text()
    assert f'read {len(answers)}, dropped nothing' in log and 'not used' not in log


@pytest.mark.slow
def test_other_weights_or_settings_do_not_go_on(job, dialogues, tmp_path):
    job(prompts=2)
    with pytest.raises(UsageError, match=r'holds another run: n \(8 there, 4 now\)'):
        job(prompts=2, n=4)
    with pytest.raises(UsageError, match='has other weights than when this run began'):
        config = json.loads((tmp_path / 'made' / 'config.json').read_text())
        config['parents']['policy']['digest'] = 'f00'
        (tmp_path / 'made' / 'config.json').write_text(json.dumps(config))
        job(prompts=2)
    (tmp_path / 'made' / 'scores.jsonl').unlink()
    job(prompts=2, n=4)  # nothing was lost


@pytest.mark.slow
def test_a_function_that_fails_leaves_a_line_and_begins_again(job, tmp_path):
    with pytest.raises(RunError, match='reward.fn=test_online:nan gave nan for an answer to'):
        job(reward_from='none', reward__fn='test_online:nan')
    assert 'gave nan' in status(tmp_path / 'made')['reason']
    assert job()['prompts'] == 6


@pytest.mark.parametrize(
    ('given', 'wanted'),
    [
        ({'n': 1}, 'n=1: keep=best_of_n compares answers'),
        ({'n': 3}, 'batch_size=16 is not a multiple of n=3'),
        ({'keep': 'rejection'}, 'keep=rejection keeps answers from a score on: set --config.threshold'),
        ({'threshold': 1}, 'threshold=1.0 is of keep=rejection'),
        ({'keep': 'best'}, 'keep=best (did you mean best_of_n?)'),
        ({'reward_from': 'none'}, 'needs a reward'),
        ({'init_from': 'none'}, 'asks a run that answers'),
        ({'max_new_tokens': 48}, 'leaves no room for a prompt'),
        ({'reward__fn': 'short'}, 'must be package.module:function'),
        ({'reward__normalise': 'true'}, 'reward.normalise is by what is scored at once'),
        ({'reward__weights': 'fm:1'}, "reward.weights=fm:1: 'fm' is not one of model"),
        ({'optim__lr': 1}, 'stage generate has no use for it'),
        ({'data__tokenizer': 'there'}, 'answers are in that of init_from'),
        ({'steps': 1}, 'stage generate has no use for it'),
    ],
)
def test_settings_that_cannot_be_are_refused(job, given, wanted, tmp_path):
    with pytest.raises(UsageError) as refused:
        job(**given)
    assert wanted in str(refused.value) and not (tmp_path / 'made').exists()


def test_a_model_that_cannot_do_its_part_is_refused(job, dialogues):
    with pytest.raises(UsageError, match='is a reward model, which has not learned to speak'):
        job(init_from=str(dialogues.run('reward')))
    with pytest.raises(UsageError, match='is no reward model: name a run that gives scores'):
        job(reward_from=str(dialogues.run('sft')))


@pytest.mark.parametrize('command', ['chat', 'evaluate'])
def test_its_directory_is_no_model(call, tmp_path, command):
    (tmp_path / 'config.json').write_text('{"job": "generate", "config": {"stage": "generate"}}')
    code, _, err = call(command, tmp_path, *(['--prompt=x'] if command == 'chat' else []))
    assert code == 2 and f'{tmp_path} is no model: the job generate made what is there' in err


def test_inspect_shows_what_it_asks(call, dialogues, monkeypatch):
    monkeypatch.chdir(dialogues.lab.folder)
    words = [f'--config.{k}={v}' for k, v in (OWN | {'init_from': dialogues.run('sft')}).items()]
    code, out, err = call('inspect', f'--config={CONFIG}', *words, '--rows=2')
    assert code == 0 and 'prompt 1: chats.jsonl' in out and 'user: ' in out, err


def test_no_step_is_compiled(call, tmp_path):
    code, _, err = call('main', f'--config={CONFIG}', '--dry_run', f'--workdir={tmp_path / "made"}')
    assert code == 2 and 'compiles the step of a stage' in err and not Path(tmp_path / 'made').exists()
