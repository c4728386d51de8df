"""The accelerators' kernels: which one a device gets, and that each equals the dense twin."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_twin import assert_same, both, jitted

from lm import sharding
from lm.errors import UsageError
from lm.model import attention_kernels as kernels
from lm.model import parameters, transformer
from lm.model.attention import BACKENDS, attention, dense_attention

H100 = kernels.Device('cuda', 'NVIDIA H100', 9.0)
A100 = kernels.Device('cuda', 'NVIDIA A100', 8.0)
T4 = kernels.Device('cuda', 'Tesla T4', 7.5)
TPU = kernels.Device('tpu', 'TPU v5 lite')
CPU = kernels.Device('cpu', 'cpu')
AMD = kernels.Device('rocm', 'AMD Instinct MI300X')
MODEL = {'dtype': 'bfloat16', 'head_dim': 64, 'softcap': None}


# ---- the choice ----


@pytest.mark.parametrize(
    ('device', 'changes', 'name', 'why'),
    [
        (CPU, {}, 'blocks', 'cpu'),
        (AMD, {}, 'blocks', 'AMD Instinct MI300X'),
        (TPU, {}, 'splash', 'TPU v5 lite'),
        (TPU, {'softcap': 50.0, 'dtype': 'float32'}, 'splash', 'TPU v5 lite'),
        (H100, {}, 'cudnn', 'NVIDIA H100'),
        (H100, {'head_dim': 256}, 'cudnn', 'NVIDIA H100'),
        (A100, {'head_dim': 256}, 'blocks', 'cudnn takes heads of a multiple of 8 up to 128, model.head_dim is 256'),
        (H100, {'head_dim': 36}, 'blocks', 'cudnn takes heads of a multiple of 8 up to 256, model.head_dim is 36'),
        (H100, {'softcap': 50.0}, 'blocks', 'cudnn has no soft-cap, model.attn_softcap is 50.0'),
        (H100, {'dtype': 'float32'}, 'blocks', 'cudnn computes in bfloat16, execution.dtype is float32'),
        (T4, {}, 'blocks', 'cudnn needs compute capability 8.0 (Ampere), Tesla T4 has 7.5'),
    ],
)
def test_the_platform_decides_and_says_why(device, changes, name, why):
    assert kernels.choose(device, **MODEL | changes) == (name, why)


def test_what_is_asked_for_is_what_one_gets():
    assert tuple(BACKENDS) == kernels.NAMES
    for device in (CPU, TPU, H100):
        assert kernels.choose(device, **MODEL, asked='dense').name == 'dense'
    assert kernels.choose(H100, **MODEL, asked='cudnn').name == 'cudnn'


@pytest.mark.parametrize(
    ('asked', 'device', 'changes', 'message'),
    [
        ('cudnn', CPU, {}, 'attention=cudnn needs an NVIDIA GPU, this is cpu: '),
        ('cudnn', AMD, {}, 'attention=cudnn needs an NVIDIA GPU, this is rocm: '),
        ('splash', H100, {}, 'attention=splash needs a TPU, this is cuda: '),
        ('cudnn', H100, {'softcap': 50.0}, 'attention=cudnn has no soft-cap'),
        ('flash', CPU, {}, 'attention=flash is not one of blocks, dense, cudnn, splash'),
    ],
)
def test_what_cannot_be_had_is_said(asked, device, changes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        kernels.choose(device, **MODEL | changes, asked=asked)


def test_this_device_is_described():
    assert kernels.this_device() == CPU


# ---- the kernels ----


def inputs(B, T, N, K, H=8, packed=True, seed=0):
    """Queries, keys, values, a cotangent, and segments, by their dims."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    segments_BT = np.cumsum(rng.random((B, T)) < 5 / T, axis=1, dtype=np.int32)
    return [2 * rng.standard_normal(s, np.float32) for s in shapes], {'segments_BT': segments_BT} if packed else {}


def on_mesh(mesh, args, arrays, **static):
    """Attention's output and gradients under a mesh."""
    put = lambda dims, x: jax.device_put(x, jax.NamedSharding(mesh, sharding.activation_spec(dims, x.shape)))
    placed = [put(dims, x) for dims, x in zip(('BTNH', 'BTKH', 'BTKH', 'BTNH'), args, strict=True)]
    return jitted(attention, *placed, static=static, **{name: put('BT', x) for name, x in arrays.items()})


def check(backend, shape, T, *, N=4, K=2, B=2, packed=True, **options):
    """A backend under a mesh, or none, against the twin on one device."""
    args, arrays = inputs(B, T, N, K, packed=packed)
    expected = jitted(dense_attention, *args, static=options, **arrays)
    if shape is None:
        assert_same(jitted(attention, *args, static={'backend': backend, **options}, **arrays), expected)
        return
    n = int(np.prod(list(shape.values()), initial=1))
    with sharding.use_mesh(shape, jax.devices()[:n]) as mesh:
        assert_same(on_mesh(mesh, args, arrays, backend=backend, **options), expected)


CONTEXT = [{'fsdp': 2, 'seq': 2, 'tensor': 2}, {'seq': 4, 'tensor': 2}]


@pytest.fixture
def interpreted(monkeypatch):
    """The splash kernel on CPU, in blocks of 128, so that a short sequence has several."""
    monkeypatch.setattr(kernels, 'INTERPRET', True)
    monkeypatch.setattr(kernels, 'SPLASH_BLOCKS', (128,))


@pytest.mark.parametrize(
    ('shape', 'T', 'options'),
    [
        pytest.param(None, 384, {}, marks=pytest.mark.slow),
        (None, 200, {'window': 70, 'softcap': 1.5}),
        pytest.param({}, 130, {'N': 6, 'window': 2}, marks=pytest.mark.slow),
        ({'fsdp': 2, 'tensor': 2}, 128, {'K': 1}),  # heads that do not divide are repeated
        (CONTEXT[0], 256, {'packed': False}),
        pytest.param(CONTEXT[0], 256, {'window': 150, 'softcap': 1.5}, marks=pytest.mark.slow),
        pytest.param(CONTEXT[1], 512, {'B': 1}, marks=pytest.mark.slow),
        (CONTEXT[1], 1024, {'B': 1, 'N': 3, 'K': 1, 'window': 200}),  # three heads leave tensor to the sequence
    ],
)
def test_splash_equals_the_twin(interpreted, shape, T, options):
    check('splash', shape, T, **options)


def test_parts_that_splash_cannot_have_are_refused(interpreted):
    with pytest.raises(UsageError, match=r'attention=splash: 128 tokens in 2 parts are 64 each, not a multiple of 128'):
        check('splash', {'seq': 2}, 128)


@pytest.mark.parametrize('shape', [None, *CONTEXT])
def test_dense_is_a_backend(shape):
    check('dense', shape, 16, window=7)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """What is asked of cuDNN is done by XLA's implementation of the same call; the calls' options are kept."""
    calls, real = [], jax.nn.dot_product_attention

    def call(*args, implementation, **options):
        assert implementation == 'cudnn'
        calls.append(options)
        return real(*args, implementation='xla', **options)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', call)
    return calls


@pytest.mark.parametrize(
    ('shape', 'T', 'options'),
    [
        (None, 16, {'packed': False}),
        (None, 15, {'packed': False, 'window': 5}),
        ({}, 13, {'window': 5}),
        ({'fsdp': 2, 'tensor': 2}, 16, {'K': 1}),
        (CONTEXT[0], 14, {'window': 9}),
        (CONTEXT[1], 16, {'packed': False}),
    ],
)
def test_what_is_asked_of_cudnn_is_attention(cudnn_by_xla, shape, T, options):
    check('cudnn', shape, T, **options)
    masked = options.get('packed', True) or 'seq' in (shape or {})
    assert all(('mask' in call) == masked for call in cudnn_by_xla), 'a mask costs memory: only where it is needed'
    sides = [n for call in cudnn_by_xla if masked for n in call['mask'].shape[2:]]
    assert not any(n % 2 for n in sides), "the kernel's backward pass refuses odd sides"


@pytest.mark.parametrize(('packed', 'window'), [(False, None), (False, 7), (True, 7)])
@pytest.mark.parametrize('shape', [{}, {'fsdp': 2, 'tensor': 2}])
def test_the_program_for_a_gpu_calls_cudnn(monkeypatch, shape, packed, window):
    """Lowered here for CUDA; what finds the version of cuDNN asks a GPU, so it is told."""
    inner = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
    monkeypatch.setattr(inner, 'check_cudnn_version', lambda: 91_000)

    def loss(q, k, v, segments_BT):
        out = attention(q, k, v, segments_BT=segments_BT, window=window, backend='cudnn')
        return jnp.sum(out.astype(jnp.float32))

    with sharding.use_mesh(shape, jax.devices()[: 4 if shape else 1]) as mesh:
        q, k = (abstract(mesh, 'BTNH', (2, 64, n, 16)) for n in (4, 2))
        segments_BT = abstract(mesh, 'BT', (2, 64), jnp.int32) if packed else None
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, segments_BT)
        text = traced.lower(lowering_platforms=('cuda',)).as_text().replace(r'\22', '"')
    kind = 'ScaleBias' if packed else ''
    assert set(re.findall(r'__cudnn\$(\w+)', text)) == {f'fmha{kind}Softmax', f'fmha{kind}SoftmaxBackward'}
    assert set(re.findall(r'mask_type\W+(\w+)', text)) == {'CAUSAL'}
    reach = window if window and not packed else 0  # a mask has the window in it
    assert set(re.findall(r'sliding_window_length\W+(\d+)', text)) == {str(reach)}


@pytest.mark.parametrize(
    ('backend', 'shape', 'remat'),
    [
        pytest.param(*case, marks=() if len(case[1]) == 2 * (case[2] == 'dots') else pytest.mark.slow)
        for case in itertools.product(('cudnn', 'splash'), ({}, {'fsdp': 2, 'tensor': 2}), ('dots', 'names'))
    ],
)
def test_a_layer_that_is_computed_again_does_not_run_the_kernel_again(tiny, monkeypatch, backend, shape, remat):
    """Once forward, and what the backward pass of each kernel takes: one call of cuDNN's, two of splash's."""
    inner = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
    monkeypatch.setattr(inner, 'check_cudnn_version', lambda: 91_000)
    cfg = dataclasses.replace(tiny, scan=True, remat=remat, attention=backend, dtype='bfloat16')
    tokens_BT = jnp.zeros((2, 128), jnp.int32)
    loss = lambda p: jnp.sum(transformer.forward(p, cfg, tokens_BT)[0].astype(jnp.float32))
    with sharding.use_mesh(shape, jax.devices()[: 4 if shape else 1]):
        params = parameters.init_sharded(jax.random.key(0), cfg)
        traced = jax.jit(jax.grad(loss)).trace(params)
        text = traced.lower(lowering_platforms=('cuda' if backend == 'cudnn' else 'tpu',)).as_text()
    calls = re.findall(r'custom_call @(__cudnn\$fmha|tpu_custom_call)', text)
    assert len(calls) == {'cudnn': 2, 'splash': 3}[backend], calls


def worst_on_gpu(T=260, B=2, N=8, K=2, H=64):
    """Run in a process that sees the GPU: {case: the largest difference of the kernel's output or a gradient from the
    twin's, relative to the twin's largest}, in bfloat16."""
    worst = {}
    for packed, window in ((False, None), (False, 100), (True, None), (True, 100)):
        (q, k, v, g), arrays = inputs(B, T, N, K, H, packed=packed)
        args = [jnp.asarray(x, jnp.bfloat16) for x in (q / 4, k / 4, v, g)]
        run = lambda fn, args, options: jax.device_get(jax.jit(lambda a: both(fn, *a, **options))(args))
        got = run(attention, args, arrays | {'window': window, 'backend': 'cudnn'})
        exact = run(dense_attention, [x.astype(jnp.float32) for x in args], arrays | {'window': window})
        ratio = lambda a, b: float(np.max(np.abs(np.asarray(a, np.float32) - b)) / np.max(np.abs(b)))
        worst[f'packed={packed}, window={window}'] = max(jax.tree.leaves(jax.tree.map(ratio, got, exact)))
    return worst


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('nvidia-smi') is None, reason='there is no NVIDIA GPU')
def test_cudnn_equals_the_twin_on_a_gpu():
    """In a process of its own: this one was told to see CPUs alone."""
    worst = in_a_process('worst_on_gpu')
    assert len(worst) == 4 and max(worst.values()) < 0.02, worst


def compiled_for_a_tpu():
    """Run in a process that has libtpu: what the compiler makes of a split sequence, forward and backward."""
    from jax.experimental import topologies

    def loss(q, k, v, segments_BT):
        options = {'segments_BT': segments_BT, 'window': 300, 'softcap': 30.0, 'backend': 'splash'}
        return jnp.sum(attention(q, k, v, **options).astype(jnp.float32))

    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4').devices
    with sharding.use_mesh({'fsdp': 2, 'seq': 2, 'tensor': 2}, devices) as mesh:
        q, k = (abstract(mesh, 'BTNH', (2, 1024, n, 64)) for n in (4, 2))
        segments_BT = abstract(mesh, 'BT', (2, 1024), jnp.int32)
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k, segments_BT)
        text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
    return {'kernels': len(re.findall('custom_call_target="tpu_custom_call"', text))}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu, the compiler, is not installed')
def test_splash_compiles_for_a_tpu():
    """Without the machine. Forward, and backward for queries and for keys and values."""
    machine = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost'}
    assert in_a_process('compiled_for_a_tpu', JAX_PLATFORMS='cpu', **machine) == {'kernels': 3}


def abstract(mesh, dims, shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, sharding.activation_spec(dims, shape)))


def in_a_process(name, **env):
    """What a function of this file returns in a process that is not told, as this one is, to see CPUs alone."""
    code = f'import json, test_attention_kernels as t; print(json.dumps(t.{name}()))'
    folder = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')} | env
    env['PYTHONPATH'] = os.pathsep.join([str(folder), str(folder.parent)])
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
