"""Eight fake CPU devices, full-precision products, and a cache of the tests' own."""

import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '1'  # warnings are shown: a test reads what the partitioner warns of

import jax  # noqa: E402
import pytest  # noqa: E402

from lm import sharding  # noqa: E402
from lm.model.transformer import ModelConfig  # noqa: E402

jax.config.update('jax_default_matmul_precision', 'highest')
jax.config.update('jax_disable_most_optimizations', True)  # tests compile much and compute little

# The meshes that every layout-dependent property is tried on, by the sizes of their axes.
MESHES = {
    'one': {},
    'data8': {'data': 8},
    'fsdp8': {'fsdp': 8},
    'fsdp2-seq2-tensor2': {'fsdp': 2, 'seq': 2, 'tensor': 2},
    'data2-fsdp2-tensor2': {'data': 2, 'fsdp': 2, 'tensor': 2},
    'tensor4': {'tensor': 4},
    'seq4-tensor2': {'seq': 4, 'tensor': 2},
    'data2-tensor2-expert2': {'data': 2, 'tensor': 2, 'expert': 2},
}


@pytest.fixture(params=MESHES, ids=list(MESHES))
def mesh(request):
    """Each mesh in turn, entered."""
    shape = MESHES[request.param]
    size = 1
    for n in shape.values():
        size *= n
    with sharding.use_mesh(shape, jax.devices()[:size]) as entered:
        yield entered


@pytest.fixture
def one_device():
    """A mesh of one device, entered."""
    with sharding.use_mesh({}, jax.devices()[:1]) as entered:
        yield entered


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    """A tiny corpus and the commands that train on it, with a cache of the tests' own."""
    import running

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LM_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield running.make_lab(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='session')
def dialogues(lab, tmp_path_factory):
    """Conversations and pairs beside the corpus, and the stages that learn from them."""
    import dialogues

    return dialogues.make(lab, tmp_path_factory.mktemp('dialogues'))


@pytest.fixture
def tiny() -> ModelConfig:
    """A decoder small enough for a test and odd enough to show mistakes: grouped heads, a padded vocabulary."""
    return ModelConfig(vocab_size=250, vocab_multiple=64, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn_dim=64)


@pytest.fixture
def set_block(monkeypatch):
    """A function that sets how many queries a block of attention has."""
    from lm.model import causal_blocks

    def set_to(size):
        for name in ('LEAST_BLOCK', 'MOST_BLOCK'):
            monkeypatch.setattr(causal_blocks, name, size)

    return set_to
