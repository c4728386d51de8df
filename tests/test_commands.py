"""The commands: what they print, with which status they leave, and that bad input costs one line."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import running
from checks import refused

from lm import chat, inspect
from lm.runs import checkpoint, execution
from lm.sampling import conversation
from lm.sampling.choice import Sampling
from lm.stages import find, language, runner

COMMANDS = ('main', 'chat', 'evaluate', 'inspect')


@pytest.fixture
def nothing_allocated(monkeypatch):
    """Makes an error of compiling a step or beginning a state."""

    def no(*args, **options):
        pytest.fail('this should have been seen before')

    for module, name in ((runner, 'compile_step'), (runner, 'start'), (checkpoint, 'Writer')):
        monkeypatch.setattr(module, name, no)


# ---- what they print ----


@pytest.mark.parametrize('name', COMMANDS)
def test_help(call, name):
    status, out, err = call(name, '--help')
    assert status == 0 and f'python -m lm.{name}' in out and not err


@pytest.mark.parametrize(
    ('name', 'words'),
    [('main', []), ('main', ['--config=x.py', '--wat']), ('chat', []), ('chat', ['run', '--top_k=x']), ('evaluate', []),
     ('inspect', []), ('inspect', ['--config=x.py', '--rows=x'])],
)  # fmt: skip
def test_flags_that_do_not_exist_or_are_missing(call, name, words):
    refused(call(name, *words), 'whole number' if any(word.endswith('=x') for word in words) else '--help lists')


def test_two_steps_of_the_main_command(call, lab, tmp_path):
    status, out, _ = call('main', *lab.argv(tmp_path / 'run', steps=2))
    assert status == 0
    assert running.one_object(out)['step'] == 2
    assert {'train/loss', 'eval/loss', 'eval/bpb', 'perf/tokens_per_s', 'perf/mfu', 'perf/goodput'} <= set(
        running.one_object(out)
    )


@pytest.mark.slow
def test_as_a_person_types_it(lab, tmp_path):
    """In processes of their own: the status, one line on stderr, one object on stdout; the run of a whole."""
    process = lab.start(tmp_path / 'run', steps=2, devices=8)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert running.one_object(out)['step'] == 2 and 'Traceback' not in err
    process = lab.start(tmp_path / 'other', optim__lrr=1)
    assert process.communicate() == ('', 'lm: unknown setting optim.lrr (did you mean optim.lr?)\n')
    assert process.returncode == 2


def test_the_default_workdir(call, lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdirs = []
    monkeypatch.setattr(runner, 'run', lambda spec, config, workdir, **options: workdirs.append(workdir) or {})
    for arg in ('', ':124m', ':depth=12,steps=500'):
        assert call('main', f'--config={running.CONFIG}{arg}')[0] == 0
    assert [str(w.relative_to(tmp_path)) for w in workdirs] == [
        'runs/pretrain',
        'runs/pretrain-124m',
        'runs/pretrain-depth12-steps500',
    ]


def test_chat_continues_text(call, trained, tmp_path):
    words = ('--raw', '--prompt', 'the bucket', '--max_new_tokens=5', '--temperature=0')
    status, out, err = call('chat', trained, *words)
    assert status == 0 and out.startswith('the bucket') and out.endswith('\n') and not err
    assert call('chat', f'{trained}@4', *words)[0] == 0
    shutil.copytree(trained, tmp_path / 'twin')
    status, both, _ = call('chat', trained, tmp_path / 'twin', *words)
    assert both == f'--- {trained}\n{out}--- {tmp_path / "twin"}\n{out}'


def test_chat_continues_nothing(call, trained):
    words = ('--raw', '--prompt', '', '--max_new_tokens=5', '--temperature=1e-4', '--top_k=1e0')
    status, out, err = call('chat', trained, *words)
    assert status == 0 and out.endswith('\n') and not err


@pytest.fixture(scope='module')
def stages(trained, tmp_path_factory) -> dict[str, Path]:
    """The same weights as of three stages, by what config.json says: what chat goes by."""
    folder, found = tmp_path_factory.mktemp('stages'), {'pretrain': trained}
    for stage in ('sft', 'reward'):
        found[stage] = shutil.copytree(trained, folder / stage)
        saved = json.loads((trained / 'config.json').read_text())
        saved['config']['stage'], saved['about'] = stage, find(stage).about._asdict()
        (found[stage] / 'config.json').write_text(json.dumps(saved))
    return found


def test_chat_answers(call, stages):
    words = ('--prompt=the bucket', '--max_new_tokens=5', '--temperature=0')
    status, out, err = call('chat', stages['sft'], *words)
    assert status == 0 and not err and 'the bucket' not in out.partition('\n')[0] and out.endswith('\n')
    assert call('chat', stages['sft'], *words, '--system=returns')[1] != out, 'it is told what the system says'
    status, both, _ = call('chat', stages['pretrain'], stages['sft'], *words)
    continued = call('chat', stages['pretrain'], '--raw', *words)[1]
    assert status == 0 and both == (
        f'> the bucket\n--- {stages["pretrain"]} (only pretrained: it continues the text)\n{continued}'
        f'--- {stages["sft"]}\n{out}'
    )
    raw = call('chat', stages['sft'], '--raw', *words)[1]
    assert raw == continued


def test_chat_remembers(call, stages, monkeypatch):
    """Until it is told to begin anew."""
    lines = ['the bucket', 'the bucket', '/reset', 'the bucket']
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines) + '\n'))
    asked = []
    stream = conversation.stream
    monkeypatch.setattr(
        conversation,
        'stream',
        lambda params, cfg, ids, **options: asked.append(ids) or stream(params, cfg, ids, **options),
    )
    status, out, err = call('chat', stages['sft'], '--max_new_tokens=2', '--temperature=0')
    assert status == 0 and not err and out
    (first,), (second,), (third,) = asked
    assert second[: len(first)] == first and len(second) > len(first) and third == first


def test_chat_refuses_what_cannot_answer(call, stages):
    refused(call('chat', stages['sft'], stages['reward'], '--prompt=x'), 'is a reward model')
    refused(call('chat', stages['reward'], '--raw', '--prompt=x'), 'is a reward model')
    refused(call('chat', stages['sft'], '--raw', '--system=y', '--prompt=x'), '--system is for conversations')
    refused(call('chat', stages['sft'], '--system=\udcff', '--prompt=x'), '--system is not valid UTF-8')
    template = stages['sft'] / 'tokenizer' / 'chat_template.jinja'
    template.write_text("{{ raise_exception('not today') }}")
    refused(call('chat', stages['sft'], '--prompt=x'), 'the chat template refuses this conversation: not today')
    template.unlink()


def test_a_run_whose_name_has_an_at_sign(call, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'a@b')
    words = ('--raw', '--prompt=the', '--max_new_tokens=2')
    for run in (tmp_path / 'a@b', tmp_path / 'a@b@4'):
        assert call('chat', run, *words)[0] == 0


@pytest.mark.parametrize('name', ['chat', pytest.param('inspect', marks=pytest.mark.slow)])
def test_a_reader_that_leaves_is_no_error(lab, trained, name):
    """As in `… | head -0`, in a process of its own."""
    words = {'chat': [str(trained), '--raw', '--prompt=the'], 'inspect': [*lab.argv(None), '--rows=50']}[name]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, '-m', f'lm.{name}', *words]
    with open(write, 'w') as closed:
        process = subprocess.run(command, stdout=closed, stderr=-1, text=True, cwd=running.ROOT, timeout=60)
    assert process.returncode == 0 and 'Error' not in process.stderr and 'Traceback' not in process.stderr


def test_evaluate_measures_as_training_did(call, trained):
    status, out, _ = call('evaluate', trained, '--rows=8e0')
    found = running.one_object(out)
    assert status == 0 and found['step'] == 12
    assert found['eval/loss'] == pytest.approx(running.measured(trained)[12, 'eval/loss'], rel=1e-5)
    status, out, _ = call('evaluate', f'{trained}@8', '--rows=8')
    assert running.one_object(out)['step'] == 8 and running.one_object(out)['eval/loss'] > found['eval/loss']


def test_evaluate_on_other_text(call, trained, lab):
    status, out, _ = call('evaluate', trained, f'--mixture={lab.folder / "two.jsonl"}')
    assert status == 0 and f'eval/{lab.folder / "two.jsonl"}/bpb' in running.one_object(out)


@pytest.mark.slow
def test_evaluate_does_without_the_parents_tokenizer(call, trained, lab, tmp_path):
    parent, child = tmp_path / 'parent', tmp_path / 'child'
    shutil.copytree(trained, parent)
    lab.train(child, init_from=str(parent), **lab.inherited)
    shutil.rmtree(parent)
    assert call('evaluate', child, '--rows=8')[0] == 0


def test_inspect_shows_rows(call, lab):
    status, out, _ = call('inspect', *lab.argv(None), '--rows=1')
    assert status == 0 and 'row 0' in out and 'dropped' in out


def test_inspect_shows_names_and_numbers_whole(call, lab, tmp_path, monkeypatch):
    """At 80 columns; what looks like markup in a name is a part of it."""
    monkeypatch.setenv('COLUMNS', '80')
    mine = tmp_path / '[a]' / '[red]x.jsonl'
    mine.parent.mkdir()
    shutil.copy(lab.folder / 'one.jsonl', mine)
    status, out, err = call('inspect', *lab.argv(None, data__mixture=mine), '--rows=0')
    assert status == 0 and f'{mine}: dropped ' in out and f'reading {mine}' in err
    counts = {'read': 4_067_512, 'kept': 4_067_512, 'heldout_documents': 81_350, 'train_tokens': 1_234_567_890}
    counts |= {
        'train_bytes': 4_234_567_890,
        'dropped': {'duplicate': 1_234_567, 'too short': 7},
        'changed': 0,
        'unused': {},
    }
    prepared = SimpleNamespace(sources=[SimpleNamespace(name='n/[a-c]*.jsonl', weight=0.7, counts=counts)])
    with (console := inspect.Screen(width=80)).capture() as captured:
        console.print(inspect.counts(prepared))
    for word in ('4,067,512', '81,350', '1,234,567,890'):
        assert word in captured.get()
    assert '[a-c]' in captured.get()
    assert inspect.dropped(prepared) == ['n/[a-c]*.jsonl: dropped duplicate 1,234,567, too short 7']


def test_inspect_takes_the_parents_model(call, lab, trained, tmp_path):
    words = lab.argv(None, init_from=str(trained), **lab.inherited)
    status, _, err = call('inspect', *words, '--rows=1')
    assert status == 0, err
    refused(call('inspect', *lab.argv(None, init_from=str(trained), model__dim=64)), 'model.dim=64 differs from')


# ---- a dry run ----


def test_a_dry_run_says_what_it_would_take(call, lab, tmp_path):
    gc.collect()  # what other tests have left
    live = len(jax.live_arrays())
    status, out, err = call('main', *lab.argv(tmp_path / 'run', '--dry_run'))
    gc.collect()
    assert status == 0
    assert running.one_object(out) | {'flops_per_step': 0} == {
        'dry_run': True,
        'flops_per_step': 0,
        'tokens': 12 * 8 * 32,
    }
    for word in ('parameters', 'optimizer', 'temporaries', 'in all', 'FLOPs', 'mesh', 'tokens      3,072 planned'):
        assert word in err
    assert 'attention   blocks (cpu)' in err
    assert len(jax.live_arrays()) == live and not (tmp_path / 'run').exists()


def test_a_dry_run_counts_a_devices_share(call, lab, monkeypatch):
    """Two float32 moments are twice the parameters, and each of eight devices holds an eighth of them."""
    sizes = dict.fromkeys(('argument', 'temp', 'output', 'alias'), 0)
    memory = SimpleNamespace(**{f'{name}_size_in_bytes': size for name, size in sizes.items()})
    monkeypatch.setattr(runner, 'compile_step', lambda *args: SimpleNamespace(memory_analysis=lambda: memory))

    def figures(**settings):
        err = call('main', *lab.argv(None, '--dry_run', model__dim=256, model__ffn_dim=4096, **settings))[2]
        words = [line.split() for line in err.splitlines() if ' GiB per device' in line]
        return {name: float(number) for name, number, *_ in words if name in ('parameters', 'optimizer')}

    split, whole = figures(), figures(mesh__data=8)
    assert whole['parameters'] > 0.02
    assert whole['optimizer'] == pytest.approx(2 * whole['parameters'], rel=0.05)
    assert split['optimizer'] == pytest.approx(whole['optimizer'] / 8, rel=0.2)


def test_a_dry_run_that_does_not_fit(call, lab, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, 'memory_limit', lambda device: 1000)
    status, out, err = call('main', *lab.argv(tmp_path / 'run', '--dry_run'))
    assert status == 1 and not out and err.splitlines()[-1].startswith('lm: does not fit: ')
    assert not (tmp_path / 'run').exists()


def test_a_dry_run_of_an_epoch_cannot_count(call, lab):
    status, _, err = call('main', *lab.argv(None, '--dry_run', steps='none'))
    assert status == 2 and 'set --config.steps' in err


# ---- bad input ----

BAD_SETTINGS = [
    ({'optim.lrr': 1}, 'unknown setting optim.lrr (did you mean optim.lr?)'),
    ({'steps': 'many'}, 'steps=many: must be a whole number or none'),
    ({'model.heads': 3}, 'model.heads=3 is not a multiple of model.kv_heads=2'),
    ({'model.head_dim': 7}, 'model.head_dim=7 is odd'),
    ({'execution__remat': 'some'}, 'execution.remat=some (did you mean none?) is not one of auto, none'),
    ({'execution__attention': 'cudnn'}, 'execution.attention=cudnn needs an NVIDIA GPU, this is cpu: '),
    ({'stage': 'pretrian'}, 'stage=pretrian (did you mean pretrain?)'),
    ({'mesh.data': 3}, 'mesh data=3, fsdp=-1 does not divide 8 devices'),
    ({'mesh.data': 4, 'mesh.fsdp': 1}, 'this job has 8: make them divide'),
    ({'mesh.expert': 2}, 'mesh.expert=2: no parameter has experts'),
    ({'mesh.data': -1}, 'at most one is -1'),
    ({'mesh.data': 0}, 'sizes at least 1'),
    ({'batch_size': 6}, 'batch_size=6 is not a multiple of mesh.data × mesh.fsdp=8'),
    ({'execution__microbatch': 4}, 'execution.microbatch=4 is not a multiple of mesh.data × mesh.fsdp=8'),
    ({'mesh.seq': 8, 'seq_len': 12}, 'seq_len=12 is not a multiple of mesh.seq=8'),
    ({'mesh.tensor': 8}, 'model.heads=4 is not a multiple of mesh.tensor=8'),
    ({'optim.schedule': 'cosin'}, 'optim.schedule=cosin (did you mean cosine?) is not one of'),
    ({'data.mixture': '/no/such.jsonl'}, '/no/such.jsonl'),
    ({'data.mixture': ''}, 'the data mixture is empty'),
    ({'data.mixture': 'botocoree'}, 'botocoree'),
    ({'data.tokenizer': '/no/tokenizer'}, 'no tokenizer at /no/tokenizer'),
    ({'eval.prompts': '/no/prompts.jsonl'}, 'no prompts at /no/prompts.jsonl'),
    ({'init_from': '/no/run'}, '/no/run is not a run: it does not exist'),
    ({'steps': 3e9}, 'steps=3000000000 must be from 1 to 2147483647'),
    ({'branch_from': '/no/run@3'}, '/no/run is not a run: it does not exist'),
]


@pytest.mark.usefixtures('nothing_allocated')
@pytest.mark.parametrize(
    ('settings', 'wanted'), BAD_SETTINGS, ids=['{}={}'.format(*next(iter(s.items()))) for s, _ in BAD_SETTINGS]
)
def test_a_bad_setting_is_one_line(call, lab, tmp_path, settings, wanted):
    given = {k.replace('.', '__'): v for k, v in settings.items()}
    refused(call('main', *lab.argv(tmp_path / 'run', **given)), wanted)
    assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('nothing_allocated')
def test_data_that_cannot_be_trained_on(call, lab, tmp_path):
    empty = tmp_path / 'empty.jsonl'
    empty.write_text('')
    refused(call('main', *lab.argv(tmp_path / 'run', data__mixture=empty)), 'has no documents', ('reading',))
    one = tmp_path / 'one.txt'
    one.write_text('one')
    refused(call('main', *lab.argv(tmp_path / 'run', data__mixture=one)), 'too short to hold out its end', ('reading',))
    assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('nothing_allocated')
def test_a_tokenizer_that_does_not_fit(call, lab, trained, tmp_path):
    words = lab.argv(tmp_path / 'run', data__tokenizer=trained / 'tokenizer', model__vocab_size=290)
    refused(call('main', *words), 'has 300 ids and the model 290')
    assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('nothing_allocated')
def test_prompts_that_are_none(call, lab, tmp_path):
    prompts = tmp_path / 'prompts.jsonl'
    for text, wanted in (
        ('', 'has no prompt in it'),
        ('{"id": 1}\n', 'is not an object with exactly id'),
        ('hello\n', 'is not an object'),
    ):
        prompts.write_text(text)
        refused(call('main', *lab.argv(tmp_path / 'run', eval__prompts=prompts)), wanted)
    assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('nothing_allocated')
def test_a_workdir_that_is_not_this_run(call, lab, trained, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob('*')}
    refused(call('main', *lab.argv(trained, seed=1)), f'{trained} holds another run: seed (0 there, 1 now)')
    many = {'seed': 1, 'z_loss': 0, 'seq_len': 16, 'optim__lr': 1, 'optim__b1': 0, 'optim__b2': 0.5}
    refused(call('main', *lab.argv(trained, **many)), 'and 2 more; name another --workdir')
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob('*')}
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    refused(call('main', *lab.argv(tmp_path / 'a')), f'{tmp_path / "a"} holds files that are not a run')
    (tmp_path / 'file').write_text('')
    refused(call('main', *lab.argv(tmp_path / 'file')), f'{tmp_path / "file"} is a file')
    for text, wanted in (
        ('{"architectures": []}', 'is of another'),
        ('{', 'is damaged'),
        ('[]', 'is of another'),
    ):
        (tmp_path / 'a' / 'config.json').write_text(text)
        refused(call('main', *lab.argv(tmp_path / 'a')), wanted)
    (tmp_path / 'a' / 'config.json').write_bytes(b'\xff\xfe')
    refused(call('main', *lab.argv(tmp_path / 'a')), 'is damaged')


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        ({'about': []}, 'is damaged'), ({'about': None}, 'is damaged'), ({'about': {}}, 'is damaged'),
        ({'about': {'data': 'text', 'output': 'text', 'voice': 'low'}}, 'about.voice, which this version'),
        ({'about': {'data': 'text', 'output': 'sing'}}, 'which this version does not know'),
        ({'about': {'data': 'text', 'output': ['x']}}, 'which this version does not know'),
        ({'about': {'data': 'text', 'output': 'text', 'adapter': 'new'}}, 'has an adapter (new)'),
        ({'parents': 'x'}, 'is damaged'), ({'parents': {'reference': 'x'}}, 'is damaged'),
        ({'parents': {'reference': {'path': 'x'}}}, 'is damaged'), ({'config.optim': 3}, 'config.optim'),
        ({'config.data': []}, 'config.data'), ({'config.model': {'layers': '1'}}, 'config.model.layers=1 must be'),
        ({'config.model': {'foo': 1}}, 'has model.foo'),
        ({'config.execution': {'dtype': 'float8'}}, 'config.execution.dtype=float8 is not one of'),
        ({'config.execution': 3}, 'config.execution'),
        ({'config.precision': None}, 'config.precision'),
        ({'config.execution': 5, 'config.microbatch': 4}, 'config.execution'),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_json_of_another_form_is_one_line(call, lab, trained, tmp_path, change, wanted):
    saved = json.loads((trained / 'config.json').read_text())
    for key, value in change.items():
        group, _, name = key.rpartition('.')
        (saved[group] if group else saved)[name] = value
    shutil.copytree(trained, tmp_path / 'run')
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
    for words in (
        ['chat', tmp_path / 'run', '--raw', '--prompt=x'], ['evaluate', tmp_path / 'run'],
        ['convert', tmp_path / 'run', tmp_path / 'out'], ['main', *lab.argv(tmp_path / 'run')],
    ):  # fmt: skip
        refused(call(*words), wanted, None)


@pytest.mark.usefixtures('nothing_allocated')
def test_a_workdir_that_cannot_be_written(call, lab, tmp_path, monkeypatch):
    """Seen before the data are read, and nothing is left behind."""
    monkeypatch.setattr(language, 'prepare', lambda **options: pytest.fail('this should have been seen before'))
    (tmp_path / 'file').write_text('')
    for workdir in ('/proc/lm-run', tmp_path / 'file' / 'run', tmp_path / 'new' / ('x' * 300)):
        refused(call('main', *lab.argv(workdir)), f'{workdir} cannot be written')
    assert [p.name for p in tmp_path.iterdir()] == ['file']
    refused(
        call('main', *lab.argv(tmp_path / 'a' / 'b', init_from='/no/run')), '/no/run is not a run: it does not exist'
    )
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_sources_that_changed_under_a_run(call, lab, tmp_path):
    mine = tmp_path / 'mine.jsonl'
    mine.write_text((lab.folder / 'one.jsonl').read_text())
    workdir = tmp_path / 'run'
    assert call('main', *lab.argv(workdir, data__mixture=mine, steps=1))[0] == 0
    with mine.open('a') as f:
        f.write(json.dumps({'text': 'one more'}) + '\n')
    answer = call('main', *lab.argv(workdir, data__mixture=mine))
    refused(answer, f'{workdir} was trained on other data', ('reading', 'training', 'encoding'))


def test_tokens_are_drawn_by_the_flags_then_by_the_models_own_settings():
    drawn = lambda own, *words: chat.sampling(chat.parse(['run', *words]), own)
    of = lambda **settings: {'generation_config.json': json.dumps(settings).encode()}
    assert drawn({}) == Sampling(temperature=0.7)
    assert drawn(of(temperature=0.2, top_p=0.9, top_k=20), '--top_p=0.5') == Sampling(0.2, 20, 0.5)
    assert drawn(of(do_sample=True, top_p=0.9)) == Sampling(1.0, 50, 0.9)
    assert drawn(of(do_sample=False, temperature=0.9, top_p=0.6)) == Sampling(0.0, 0, 0.6)
    assert drawn(of(do_sample=False)) == Sampling() == drawn(of(temperature=0.2), '--temperature=0')
    assert drawn(of(do_sample=False, top_p=0.9), '--temperature=1') == Sampling(1.0, 0, 0.9)
    odd = of(temperature=-1, top_p='x', top_k=None, min_p=True, eos_token_id=[2])
    assert drawn(odd) == Sampling(temperature=0.7), 'what makes no sense is left out'


def test_chat_and_evaluate_refuse(call, trained, tmp_path):
    refused(call('chat', tmp_path, '--raw', '--prompt=x'), f'{tmp_path} is not a run')
    refused(call('chat', tmp_path / 'no', '--raw', '--prompt=x'), 'is not a run')
    refused(call('chat', trained, '--prompt=x'), 'add --raw')
    refused(call('chat', f'{trained}@last', '--raw', '--prompt=x'), f'{trained} has no checkpoint last')
    refused(call('chat', trained, '--raw', '--prompt=\udcff'), 'the prompt is not valid UTF-8')
    refused(call('chat', f'{trained}@5', '--raw', '--prompt=x'), f'{trained} has no checkpoint 5 (it has: 4, 8, 12)')
    for flag in (
        '--max_new_tokens=0', '--max_new_tokens=1e7', '--temperature=-1', '--temperature=inf', '--temperature=nan',
        '--temperature=1e-9', '--top_k=-1', '--top_k=3e9', '--top_p=0', '--min_p=2', '--seed=-1', '--seed=1e20',
    ):  # fmt: skip
        refused(call('chat', trained, '--raw', '--prompt=x', flag), flag.partition('=')[0])
    refused(call('evaluate', tmp_path, '--tasks=heldout'), f'{tmp_path} is not a run')
    refused(call('evaluate', f'{trained}@5', '--tasks=heldout'), 'has no checkpoint 5')
    refused(call('evaluate', trained, '--tasks=heldoutt'), '--tasks=heldoutt (did you mean heldout?)')
    refused(call('evaluate', trained, '--tasks=heldout', '--rows=0'), '--rows=0 must be at least 1')
    refused(call('evaluate', trained, '--tasks=heldout', '--mixture=/no/such.jsonl'), '/no/such.jsonl')
    refused(call('inspect', f'--config={running.CONFIG}', '--rows=-1'), '--rows=-1')
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    shutil.copy(trained / 'config.json', tmp_path / 'run')
    refused(call('chat', tmp_path / 'run', '--raw', '--prompt=x'), 'has no checkpoint: train or convert it first')


def test_a_run_that_has_lost_its_tokenizer(call, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'tokenizer')
    status, out, err = call('chat', tmp_path / 'run', '--raw', '--prompt=x')
    assert status in (1, 2) and not out and len(err.splitlines()) == 1 and 'tokenizer' in err


def test_out_of_memory_is_one_line(call, lab, tmp_path, monkeypatch):
    def compile_step(*args):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore\nlines')

    monkeypatch.setattr(runner, 'compile_step', compile_step)
    status, _, err = call('main', *lab.argv(tmp_path / 'run'))
    assert status == 1 and err.splitlines()[-1].startswith('lm: out of memory (RESOURCE_EXHAUSTED')


def test_our_own_mistakes_keep_their_traceback(call, lab, tmp_path, monkeypatch):
    def compile_step(*args):
        raise RuntimeError('a mistake')

    monkeypatch.setattr(runner, 'compile_step', compile_step)
    status, _, err = call('main', *lab.argv(tmp_path / 'run'))
    assert status == 1 and 'Traceback' in err and err.endswith('RuntimeError: a mistake\n')
    assert running.status(tmp_path / 'run')['state'] == 'failed'


def test_the_compile_cache_is_on(lab, tmp_path):
    """In a process of its own: this one has its cache since the first command that it ran."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COMPILATION')}
    env |= {'LM_CACHE': str(tmp_path / 'cache'), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    code = 'from lm import runtime; runtime.setup(); import jax; jax.jit(lambda x: x + 1)(1)'
    subprocess.run([sys.executable, '-c', code], env=env, cwd=running.ROOT, check=True, timeout=60)
    assert list((tmp_path / 'cache' / 'xla').iterdir())


@pytest.mark.parametrize('platform', [pytest.param('cuda', marks=pytest.mark.slow), 'nonesuch'])
def test_a_platform_that_this_machine_lacks_is_one_line(lab, tmp_path, platform):
    if (platform, jax.default_backend()) == ('cuda', 'gpu'):
        pytest.skip('this machine has it')
    env = os.environ | {'JAX_PLATFORMS': platform}
    command = [sys.executable, '-m', 'lm.main', *lab.argv(tmp_path / 'run')]
    done = subprocess.run(command, env=env, cwd=running.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not (tmp_path / 'run').exists()
    assert done.stderr.splitlines()[-1].startswith(f'lm: JAX_PLATFORMS={platform} cannot be had here (')
    assert 'Traceback' not in done.stderr
