"""Distillation: its losses equal those of whole distributions in float64, and a student learns from its teacher."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from running import ROOT, assert_same, measured, params, signal_at, steps_saved
from test_head import temporaries

from lm import sharding
from lm.data import cache
from lm.errors import Preempted, UsageError
from lm.losses import distill as losses
from lm.model import head
from lm.model.head import Distillation, Teacher
from lm.runs import rundir, saved_config
from lm.stages import teacher

B, T, D, E, V, WORDS = 4, 16, 8, 16, 64, 50  # a padded vocabulary; the teacher is twice as wide


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of seven tokens, the last of them padded."""
    monkeypatch.setattr(head, '_chunks', lambda m, v: (-(-m // 7), 7))


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    student, teacher = (normal(B, T, D), normal(V, D)), (normal(B, T, E) / 2, normal(V, E))
    y_BT = rng.integers(0, WORDS, (B, T), dtype=np.int32)
    weights_BT = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return student, teacher, y_BT, weights_BT


# ---- against whole distributions, in float64 ----


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_probs(h, w, temperature=1.0, softcap=None):
    x = np.einsum('btd,vd->btv', np.float64(h), np.float64(w))[..., :WORDS]
    return log_softmax((x if softcap is None else softcap * np.tanh(x / softcap)) / temperature)


def kl(a, b):
    return np.sum(np.exp(a) * (a - b), -1)


def plain_divergence(p, q, kind, beta):
    if kind == 'jsd':
        m = np.log(beta * np.exp(p) + (1 - beta) * np.exp(q))
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if kind == 'forward' else kl(q, p)


def plain_loss(student, *, kind='forward', beta=None, temperature=1.0, alpha=1.0, z_coef=0.0, caps=(None, None)):
    _, teacher, y_BT, weights_BT = inputs()
    q, p = log_probs(*student, temperature, caps[0]), log_probs(*teacher, temperature, caps[1])
    x = np.einsum('btd,vd->btv', *map(np.float64, student))[..., :WORDS]
    x = x if caps[0] is None else caps[0] * np.tanh(x / caps[0])
    lse = np.log(np.exp(x).sum(-1))
    nll = lse - np.take_along_axis(x, y_BT[..., None], -1)[..., 0]
    loss = alpha * temperature**2 * plain_divergence(p, q, kind, beta) + (1 - alpha) * nll + z_coef * lse**2
    return np.sum(np.float64(weights_BT) * loss)


def whole(kind='forward', beta=None, temperature=1.0, alpha=1.0, z_coef=0.0, caps=(None, None), dims=('VD', 'VD')):
    """(student, teacher, targets, weights) -> (loss, parts)."""
    apart = functools.partial(losses.divergence, kind=kind, beta=beta)
    loss = Distillation(apart, alpha, temperature, z_coef)

    def fn(student, teacher, y_BT, weights_BT):
        known = Teacher((teacher[0],), teacher[1], dims[1], caps[1])
        return head.distill(*student, known, y_BT, weights_BT, loss, dims=dims[0], vocab_size=WORDS, softcap=caps[0])

    return fn


def ours(**options):
    """The same with the gradient by the student."""
    return jax.jit(jax.value_and_grad(whole(**options), has_aux=True))


CASES = {
    'forward': {},
    'reverse': {'kind': 'reverse'},
    'jsd': {'kind': 'jsd', 'beta': 0.3},
    'warm': {'temperature': 2.5, 'alpha': 0.6},
    'cold-reverse': {'kind': 'reverse', 'temperature': 0.5, 'alpha': 0.9, 'z_coef': 0.1},
    'warm-jsd': {'kind': 'jsd', 'beta': 0.8, 'temperature': 2.0, 'alpha': 0.3},
    'capped': {'caps': (2.0, 3.0), 'temperature': 2.0, 'alpha': 0.5, 'z_coef': 0.1},
    'none-of-it': {'alpha': 0.0},
}


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_those_of_whole_distributions(chunks, name):
    """The value in float64, the gradient by differences of that value."""
    student, teacher, y_BT, weights_BT = inputs()
    (value, parts), grads = ours(**CASES[name])(tuple(map(jnp.asarray, student)), teacher, y_BT, weights_BT)
    assert float(value) == pytest.approx(plain_loss(student, **CASES[name]), rel=2e-5)
    draw = np.random.default_rng(1)
    for _ in range(4):
        way = [draw.standard_normal(x.shape) for x in student]
        moved = [
            plain_loss([x + s * d for x, d in zip(student, way, strict=True)], **CASES[name]) for s in (1e-5, -1e-5)
        ]
        slope = sum(float(np.sum(np.float64(g) * d)) for g, d in zip(grads, way, strict=True))
        assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4, abs=1e-3)
    assert not np.any(grads[1][WORDS:])  # padding


def slope_of(loss, point, way):
    moved = lambda step: loss([x + step * d for x, d in zip(point, way, strict=True)])
    return (moved(1e-5) - moved(-1e-5)) / 2e-5


@functools.cache
def on_one_device():
    """(value, parts), gradients of a loss with all its parts."""
    with sharding.use_mesh({}, jax.devices()[:1]):
        student, *rest = inputs()
        return jax.device_get(ours(**WHOLE)(tuple(map(jnp.asarray, student)), *rest))


WHOLE = {'kind': 'jsd', 'beta': 0.3, 'temperature': 2.0, 'alpha': 0.6, 'z_coef': 0.1}


@pytest.mark.parametrize('mesh', ['one', 'fsdp2-seq2-tensor2', 'tensor4'], indirect=True)
@pytest.mark.parametrize('dims', [('VD', 'DV'), ('DV', 'VD')])
def test_the_mesh_and_the_layout_of_a_head_change_nothing(chunks, mesh, dims):
    student, teacher, y_BT, weights_BT = inputs()
    put = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))

    def placed(model, dims):
        w = model[1] if dims == 'VD' else model[1].T
        return put('BTD', model[0], sharding.activation_spec), put(dims, w, sharding.array_spec)

    rows = [put('BT', x, sharding.activation_spec) for x in (y_BT, weights_BT)]
    sums, (dh, dw) = ours(**WHOLE, dims=dims)(placed(student, dims[0]), placed(teacher, dims[1]), *rows)
    assert_close((sums, (dh, dw if dims[0] == 'VD' else np.asarray(dw).T)), on_one_device())


def test_the_teacher_has_no_gradient(chunks):
    student, teacher, y_BT, weights_BT = inputs()
    student, teacher = (tuple(map(jnp.asarray, model)) for model in (student, teacher))
    grads = jax.jit(jax.grad(lambda both: whole(**WHOLE)(*both, y_BT, weights_BT)[0]))((student, teacher))
    assert all(np.any(g) for g in grads[0]) and not any(np.any(g) for g in grads[1])


def test_places_that_weigh_nothing_are_left_out(chunks):
    """Two chunks' worth of places weigh something; the others hold no numbers."""
    (h_BTD, w_VD), (t_BTD, t_VD), y_BT, _ = inputs()
    y_BT, weights_BT = jnp.asarray(y_BT), np.zeros(B * T, np.float32)
    weights_BT[np.random.default_rng(1).permutation(B * T)[:14]] = 1
    weights_BT = jnp.asarray(weights_BT.reshape(B, T))
    loss = Distillation(functools.partial(losses.divergence, kind='forward'), 0.5)

    def fn(h_BTD, w_VD, t_BTD, sparse):
        known = Teacher((t_BTD,), jnp.asarray(t_VD))
        return head.distill(h_BTD, w_VD, known, y_BT, weights_BT, loss, vocab_size=WORDS, sparse=sparse)[0]

    step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)), static_argnums=3)
    holes = [jnp.where(weights_BT[..., None] > 0, x, jnp.nan) for x in (h_BTD, t_BTD)]
    expected = jax.device_get(step(jnp.asarray(h_BTD), jnp.asarray(w_VD), jnp.asarray(t_BTD), False))
    assert_close(step(holes[0], jnp.asarray(w_VD), holes[1], True), expected)


def test_the_sums_of_a_batch_are_those_of_its_parts():
    student, teacher, y_BT, weights_BT = inputs()

    def of(rows):
        some = lambda model: (jnp.asarray(model[0][rows]), jnp.asarray(model[1]))
        return ours(**WHOLE)(some(student), some(teacher), y_BT[rows], weights_BT[rows])

    (sums, (_, dw)), *parts = of(slice(B)), of(slice(0, B, 2)), of(slice(1, B, 2))
    added = jax.tree.map(jnp.add, *[(sums, grads[1]) for sums, grads in parts])
    assert_close((sums, dw), jax.device_get(added))


def test_memory_is_at_most_a_quarter_of_the_naive_heads():
    """4096 tokens and 131,072 words, gradients included."""
    tokens, words = 4096, 131_072
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    models = (shape(1, tokens, 32), shape(words, 32)), (shape(1, tokens, 64), shape(words, 64))
    rows = shape(1, tokens, dtype=jnp.int32), shape(1, tokens)

    def naive(student, teacher, y_BT, weights_BT):
        q, p = (jax.nn.log_softmax(jnp.einsum('BTD,VD->BTV', *model)) for model in (student, teacher))
        return jnp.sum(weights_BT[..., None] * jnp.exp(p) * (p - q))

    def ours(student, teacher, y_BT, weights_BT):
        known = Teacher((teacher[0],), teacher[1])
        return head.distill(*student, known, y_BT, weights_BT, loss, vocab_size=words)[0]

    loss = Distillation(functools.partial(losses.divergence, kind='forward'), 1.0)
    whole, chunked = (temporaries(jax.value_and_grad(f), *models, *rows) for f in (naive, ours))
    assert whole >= 4 * tokens * words, 'the naive heads hold their logits'
    assert chunked <= whole / 4, (chunked, whole)


# ---- divergences ----


def distributions():
    rng = np.random.default_rng(2)
    return (np.float32(log_softmax(rng.standard_normal((5, WORDS)))) for _ in range(2))


def value(log_p, log_q, kind, beta=None):
    return np.asarray(jax.jit(functools.partial(losses.divergence, kind=kind, beta=beta))(log_q, log_p)[0])


def test_the_jsd_goes_to_a_kl_at_each_end():
    """Divided by what it vanishes with."""
    p, q = distributions()
    small = 1e-4
    np.testing.assert_allclose(value(p, q, 'jsd', small) / small, value(p, q, 'forward'), rtol=0.02)
    np.testing.assert_allclose(value(p, q, 'jsd', 1 - small) / small, value(p, q, 'reverse'), rtol=0.02)
    np.testing.assert_allclose(value(p, q, 'jsd', 0.3), value(q, p, 'jsd', 0.7), rtol=1e-5)
    assert np.all(value(p, q, 'jsd', 0.5) <= np.log(2))
    assert np.all(value(p, q, 'forward') != value(p, q, 'reverse'))
    for beta in (None, 0.0, 1.0):
        with pytest.raises(ValueError, match='between 0 and 1'):
            losses.divergence(q, p, kind='jsd', beta=beta)


@pytest.mark.parametrize('kind', losses.KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    p, _ = distributions()
    beta = 0.5 if kind == 'jsd' else None
    found, grads = losses.divergence(p, p, kind=kind, beta=beta)
    np.testing.assert_allclose(found, 0, atol=1e-6)
    np.testing.assert_allclose(grads, 0, atol=1e-6)


# ---- a teacher's likeliest words ----


def asked(k, temperature=1.0, dims='VD', place=None):
    """(ids, log-probs, log of the tail) of the teacher, for the student's loss."""
    place = place or (lambda dims, x, spec: jnp.asarray(x))
    h_BTD, w_VD = inputs()[1]
    h_BTD = place('BTD', h_BTD, sharding.activation_spec)
    w = place(dims, w_VD if dims == 'VD' else w_VD.T, sharding.array_spec)
    options = {'temperature': temperature, 'dims': dims, 'vocab_size': WORDS, 'softcap': 3.0}
    return jax.jit(lambda h, w: head.top_k(h, w, k, **options))(h_BTD, w)


def of_top_k(temperature=1.0):
    loss = Distillation(losses.top_k_divergence, 0.6, temperature, 0.1)

    def fn(student, known, y_BT, weights_BT):
        return head.distill(*student, Teacher(known), y_BT, weights_BT, loss, vocab_size=WORDS)

    return jax.jit(jax.value_and_grad(fn, has_aux=True))


@pytest.mark.parametrize('mesh', ['one', 'fsdp2-seq2-tensor2', 'tensor4'], indirect=True)
def test_the_likeliest_words_are_the_teachers(chunks, mesh):
    place = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))
    ids, logp, tail = jax.device_get(asked(20, 2.0, 'DV', place))  # more than one device of four has of the words
    expected = log_probs(*inputs()[1], 2.0, 3.0)
    np.testing.assert_allclose(logp, -np.sort(-expected)[..., :20], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, -1), logp, rtol=1e-5)
    np.testing.assert_allclose(np.exp(tail), 1 - np.exp(np.float64(logp)).sum(-1), rtol=1e-4)


def test_all_words_are_the_whole_distribution(chunks):
    student, teacher, y_BT, weights_BT = inputs()
    student = tuple(map(jnp.asarray, student))
    full = ours(temperature=2.0, alpha=0.6, z_coef=0.1, caps=(None, 3.0))(student, teacher, y_BT, weights_BT)
    found = of_top_k(2.0)(student, asked(WORDS, 2.0), y_BT, weights_BT)
    assert_close(found, jax.device_get(full))


def plain_top_k(student, k, temperature):
    """In float64, of k + 1 classes."""
    _, teacher, y_BT, weights_BT = inputs()
    q, p = log_probs(*student, temperature), log_probs(*teacher, temperature, 3.0)
    ids = np.argsort(-p)[..., :k]

    def classes(x):
        some = np.take_along_axis(np.exp(x), ids, -1)
        return np.log(np.concatenate([some, 1 - some.sum(-1, keepdims=True)], -1))

    x = np.einsum('btd,vd->btv', *map(np.float64, student))[..., :WORDS]
    lse = np.log(np.exp(x).sum(-1))
    nll = lse - np.take_along_axis(x, y_BT[..., None], -1)[..., 0]
    loss = 0.6 * temperature**2 * kl(classes(p), classes(q)) + 0.4 * nll + 0.1 * lse**2
    return np.sum(np.float64(weights_BT) * loss)


@pytest.mark.parametrize('mesh', ['one', 'tensor4'], indirect=True)
def test_the_tail_is_one_class(chunks, mesh):
    student, _, y_BT, weights_BT = inputs()
    place = lambda d, x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec(d, x.shape)))
    placed = place('BTD', student[0], sharding.activation_spec), place('VD', student[1], sharding.array_spec)
    rows = [place('BT', x, sharding.activation_spec) for x in (y_BT, weights_BT)]
    (found, _), grads = jax.device_get(of_top_k(2.0)(placed, asked(5, 2.0, place=place), *rows))
    assert float(found) == pytest.approx(plain_top_k(student, 5, 2.0), rel=2e-5)
    way = [np.random.default_rng(3).standard_normal(x.shape) for x in student]
    slope = sum(float(np.sum(np.float64(g) * d)) for g, d in zip(grads, way, strict=True))
    expected = slope_of(functools.partial(plain_top_k, k=5, temperature=2.0), student, way)
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-3)


# ---- the stage ----

STUDENT = {
    'config': str(ROOT / 'configs' / 'distill.py'), 'model__dim': 16, 'model__heads': 2, 'model__kv_heads': 1,
    'model__ffn_dim': 32, 'model__vocab_size': None, 'execution__microbatch': 8,
}  # fmt: skip


@pytest.fixture
def distill(lab, trained, tmp_path):
    """distill(name, **settings) trains a student of `trained`, through the command."""

    def train(name, *words, **settings):
        workdir = tmp_path / name
        lab.train(workdir, *words, **STUDENT | {'teacher_from': str(trained)} | settings)
        return workdir

    return train


SPLIT = {'mesh__fsdp': 2, 'mesh__seq': 2, 'mesh__tensor': 2}


def config_of(workdir):
    return rundir.read_config(str(workdir))


def test_a_student_comes_nearer_to_its_teacher_and_resumes(distill, trained, monkeypatch):
    """It learns what its teacher did, where nothing else is named; bit for bit, though it was stopped."""
    options = {'distill__divergence': 'jsd', 'distill__temperature': 2.0, 'steps': 12, 'data__mixture': None}
    options |= {'data__heldout': None, 'optim__lr': 1e-2}
    run = distill('whole', **options)
    found = measured(run)
    assert found[12, 'train/divergence'] < 0.7 * found[1, 'train/divergence']
    assert found[12, 'eval/loss'] < found[6, 'eval/loss']
    for step in (1, 12):
        parts = {name: found[step, f'train/{name}'] for name in ('divergence', 'cross_entropy', 'z_loss')}
        whole = 0.9 * 4 * parts['divergence'] + 0.1 * parts['cross_entropy'] + parts['z_loss']
        assert found[step, 'train/loss'] == pytest.approx(whole, rel=1e-5)
    saved, theirs = config_of(run), config_of(trained)
    assert saved['parents'].keys() == {'teacher'} and saved['parents']['teacher']['path'] == str(trained)
    assert saved['data'] == theirs['data'] and saved['tokenizer'] == theirs['tokenizer']
    assert saved['config']['data']['heldout'] == 0.1 and saved_config.about(saved).output == 'text'
    assert params(run)['embed_VD'].shape == (params(trained)['embed_VD'].shape[0], 16)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 6, 15)
        distill('run', **options)
    assert 6 <= steps_saved(run.parent / 'run')[-1] < 12
    assert_same(run, distill('run', **options))


@pytest.mark.slow
@pytest.mark.parametrize('own', [{'distill__divergence': 'reverse'}, {'distill__top_k': 8}], ids=['live', 'asked'])
def test_microbatches_are_one_batch(distill, own):
    options = {'steps': 4} | own | SPLIT
    one, several = (measured(distill(f'{n}', execution__microbatch=n, **options)) for n in (8, 2))
    for key, x in several.items():
        if key[1].startswith('train/'):
            assert one[key] == pytest.approx(x, rel=2e-5, abs=1e-6), key


@pytest.mark.slow
def test_an_adapter_learns_from_a_teacher(distill, trained, lab, tmp_path):
    student = tmp_path / 'student'
    lab.train(student, steps=2, data__tokenizer=str(trained / 'tokenizer'))
    inherited = dict.fromkeys((name for name in STUDENT if name.startswith('model')), None) | lab.inherited
    run = distill('run', init_from=str(student), lora__rank=2, optim__lr=0.02, steps=24, **inherited)
    found, saved = measured(run), config_of(run)
    assert found[24, 'train/divergence'] < found[1, 'train/divergence']
    assert saved['parents'].keys() == {'base', 'teacher'} and saved_config.about(saved).adapter == 'lora'
    before, after = params(student), params(run)
    assert np.any(after['layers']['wq_DNH'] != before['layers']['wq_DNH'])
    np.testing.assert_array_equal(after['embed_VD'], before['embed_VD'])


def test_the_commands_know_it(lab, trained, tmp_path, call):
    """Of a teacher that is asked once, the step has no weights in memory."""
    options = STUDENT | {'teacher_from': str(trained)}
    for more, held in (({}, True), ({'distill__top_k': 8}, False)):
        status, _, err = call('main', *lab.argv(tmp_path / 'run', '--dry_run', **options | more))
        assert status == 0 and ('teacher     0.000 GiB' in err) == held, err
    assert not (tmp_path / 'run').exists()
    status, out, err = call('inspect', *lab.argv(None, '--rows=1', **options | {'data__mixture': None}))
    assert status == 0 and 'row 0: ' in out and 'one.jsonl' in out, err


def test_a_teacher_is_asked_once(distill, trained, monkeypatch, capsys):
    """All of its words teach as it does live, to the float16 of the cache."""
    words = config_of(trained)['config']['model']['vocab_size']
    options = {'distill__temperature': 2.0, 'steps': 6}
    live = measured(distill('live', **options))
    run = distill('asked', distill__top_k=words, **options)
    count = 6 * 8 * 32
    size = count * (4 * words + 4) + 6 * 8 * 8
    told = f'likeliest words of the teacher after {count:,} tokens, {words} each: {size:,} bytes'
    assert told in capsys.readouterr().err
    found = measured(run)
    for step in range(1, 7):
        assert found[step, 'train/loss'] == pytest.approx(live[step, 'train/loss'], rel=2e-3)
    monkeypatch.setattr(teacher, '_answers', lambda *args: pytest.fail('it is asked again'))
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        signal_at(patch, 3, 15)
        distill('again', distill__top_k=words, **options)
    assert_same(run, distill('again', distill__top_k=words, **options))
    assert config_of(run)['parents'] == config_of(run.parent / 'live')['parents']


@pytest.mark.slow
def test_a_cache_that_was_cut_short_is_refused(distill, trained):
    distill('one', distill__top_k=4, steps=1)
    for file in (cache.cache_dir() / 'teacher').glob('*/0-logp.npy'):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r'what the teacher said in .*teacher/\w+ is damaged .*: delete that folder'):
        distill('two', distill__top_k=4, steps=1)
    shutil.rmtree(cache.cache_dir() / 'teacher')


@pytest.fixture
def refused(lab, trained, tmp_path, call):
    """refused(words, **settings): the command ends with 2 and one line that has these words."""

    def check(words, **settings):
        argv = lab.argv(tmp_path / 'no', **STUDENT | {'teacher_from': str(trained)} | settings)
        status, out, err = call('main', *argv)
        told = [line for line in err.splitlines() if line]
        assert (status, out) == (2, '') and words in told[-1], (status, err)
        assert not (tmp_path / 'no').exists()

    return check


def test_what_makes_no_sense_is_refused_in_a_line(refused):
    refused('stage=distill learns from a teacher: set --config.teacher_from=DIR', teacher_from='none')
    refused('/nowhere is not a run', teacher_from='/nowhere')
    refused('distill.divergence=reverse needs a live teacher', distill__divergence='reverse', distill__top_k=4)
    refused('distill.divergence=jsd needs a live teacher', distill__divergence='jsd', distill__top_k=4)
    refused('distill.top_k=4096 is more than the vocabulary has', distill__top_k=4096)
    refused('distill.jsd_beta=0.5 does nothing with distill.divergence=forward', distill__jsd_beta=0.5)
    refused('distill.jsd_beta=1.0 must be between 0 and 1', distill__divergence='jsd', distill__jsd_beta=1)
    refused('distill.alpha=0.0 must be above 0 and at most 1', distill__alpha=0)
    refused('distill.temperature=0.0 must be from 0.01 to 100', distill__temperature=0)
    refused('lora.rank=2 trains factors over a run: set --config.init_from=DIR', lora__rank=2)
    refused('model.vocab_size=77 differs from', model__vocab_size=77)
    refused('which has 0.1: leave it out', data__mixture=None, data__heldout=0.3)


def test_a_teacher_of_other_words_is_refused(refused, lab, tmp_path):
    other = tmp_path / 'other'
    lab.train(other, steps=1, model__vocab_size=290)
    inherited = dict.fromkeys((name for name in STUDENT if name.startswith('model')), None) | lab.inherited
    refused(f'{other} has another tokenizer than the teacher', init_from=str(other), **inherited)
