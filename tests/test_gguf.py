"""Models as GGUF files: what is written is read back bit for bit, by `gguf` as it should be, and by llama.cpp alike."""

import dataclasses
import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plain_decoder
import pytest

from lm import files
from lm.errors import RunError, UsageError
from lm.interop import graph, independent
from lm.interop.adapter import OpenedAdapter, Stack
from lm.interop.gguf import adapter as gguf_adapter
from lm.interop.gguf import arch as gguf_arch
from lm.interop.gguf import file as gguf_file
from lm.interop.gguf import reader as gguf_in
from lm.interop.gguf import writer as gguf_out
from lm.interop.opened import Leaf, Opened
from lm.interop.tokenizers import conversion as tokenizers
from lm.interop.tokenizers import files as tokenizer_files
from lm.model import transformer
from lm.model.config import ModelConfig
from lm.model.layers import RopeScaling
from lm.model.lora import Lora
from lm.model.parameters import row as row_of

EOS = 2  # of the vocabulary made by hand
VOCAB = 320  # not a multiple of what tables are padded to
SIZES = {
    'vocab_size': VOCAB, 'dim': 64, 'layers': 3, 'heads': 4, 'kv_heads': 2, 'head_dim': 32, 'ffn_dim': 96,
    'rope_theta': 1e4, 'norm_eps': 1e-5, 'tied': True, 'context': 128,
}  # fmt: skip
GEMMA = {
    'norms': 'both', 'norm_plus_one': True, 'activation': 'gelu', 'embed_scale': 8.0, 'query_scale': 32**-0.5,
    'window': 5,
}  # fmt: skip
MODELS = {
    'llama': {'tied': False},
    'llama-linear': {'rope_scaling': 'linear,factor=4'},
    'llama-llama3': {'rope_scaling': 'llama3,factor=8,low=1,high=4,original=64', 'rope_theta': 5e5},
    'qwen2': {'qkv_bias': True, 'tied': False, 'head_dim': 16},
    'qwen3': {'qk_norm': True},
    'gemma2': GEMMA | {'pattern': 'local,global', 'attn_softcap': 50.0, 'logit_softcap': 30.0},
    'gemma3': GEMMA
    | {'pattern': ','.join(['local'] * 5 + ['global']), 'qk_norm': True, 'layers': 7}
    | {'rope_theta': 1e6, 'rope_theta_local': 3e4, 'rope_scaling': 'linear,factor=8'},
}


def vocabulary(vocab_size):
    """tokenizer.* keys of a SentencePiece vocabulary made by hand; each piece is whole characters, which llama.cpp puts
    no two of together."""
    tokens = ['<unk>', '<s>', '</s>', '<0x0A>', *(f'w{i}' for i in range(vocab_size - 4))]
    types = [2, 3, 3, 6] + [1] * (vocab_size - 4)
    return {
        'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': types,
        'tokenizer.ggml.scores': [-float(i) for i in range(vocab_size)],
    }  # fmt: skip


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    """A tokenizer that needs no files; `test_tokenizers` has the real ones."""
    monkeypatch.setattr(tokenizers, 'to_gguf', lambda found, vocab_size: vocabulary(vocab_size))
    monkeypatch.setattr(tokenizers, 'from_gguf', lambda metadata: {})
    monkeypatch.setattr(tokenizers, 'unlike_llama_cpp', lambda files: [])
    monkeypatch.setattr(tokenizer_files, 'fitted', lambda files, rows: (files, ()))


def arrays(model, dtype, seed=0):
    """Random parameters by leaf, steep, so that greedy choices are far from ties; norms are whole 1/256th, to which 1
    is added and taken away without rounding."""
    arch, draw = gguf_arch.ARCHS[gguf_out.choose(model)[0]], np.random.default_rng(seed)
    top = gguf_arch.TOP | ({} if model['tied'] else gguf_arch.HEAD)
    found = {}
    for leaf in [*top, *arch.layer]:
        shape, stored = graph.shapes(leaf, model)
        lead = (model['layers'],) if leaf.startswith('layers/') else ()
        if 'norm' in leaf:
            mean = 0 if model.get('norm_plus_one') else 1
            found[leaf] = (draw.integers(-64, 64, lead + shape) / 256 + mean).astype(dtype)
        else:
            scale = 0.3 / (model['embed_scale'] or 1) if leaf == 'embed_VD' else 3 * stored[-1] ** -0.5
            found[leaf] = (draw.normal(size=lead + shape) * scale).astype(dtype)
    return found


def opened(name='llama', dtype=np.float32, **more):
    """A random model in memory, and its parameters."""
    model = graph.PLAIN | SIZES | MODELS[name] | more
    found = arrays(model, dtype)
    leaves = {
        leaf: Leaf(x.shape[1:], x.dtype, len(x), lambda i, x=x: x[i])
        if leaf.startswith('layers/')
        else Leaf(x.shape, x.dtype, None, lambda i, x=x: x)
        for leaf, x in found.items()
    }
    return Opened(f'runs/{name}', model, leaves, {}), found


def write(folder, name='llama', dtype=np.float32, quantize='F32', **more):
    path = folder / 'model.gguf'
    model, found = opened(name, dtype, **more)
    gguf_out.write_gguf(model, path, quantize=quantize, say=lambda text: None)
    return path, model, found


# ---- round trips ----


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize(
    'kind, dtype', [('F32', np.float32), ('F16', np.float16), ('BF16', ml_dtypes.bfloat16), ('F32', ml_dtypes.bfloat16)]
)
def test_written_and_read_back_is_the_same_bit_for_bit(name, kind, dtype, tmp_path):
    path, model, found = write(tmp_path, name, dtype, kind)
    back = gguf_in.open_gguf(path)
    assert dict(back.model) == dict(model.model) and set(back.leaves) == set(found)
    for leaf, want in found.items():
        read = back.leaves[leaf]
        got = np.stack([read.read(i) for i in range(read.layers)]) if read.layers else read.read(0)
        assert got.dtype == read.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32), err_msg=leaf)
        matrix = 'norm' not in leaf and 'bias' not in leaf
        assert read.dtype == (graph.DTYPES[kind] if matrix else np.float32)


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', pytest.param('Q4_K_M', marks=pytest.mark.slow)])
def test_independent_reader_finds_the_same_in_few_rows_at_a_time(kind, tmp_path, monkeypatch):
    more = {'dim': 256, 'ffn_dim': 256} if kind == 'Q4_K_M' else {}
    path, _, found = write(tmp_path, 'llama', quantize=kind, **more)
    monkeypatch.setattr(independent, 'CHUNK', 1200)  # a few rows, and a rest
    ours, theirs = gguf_in.open_gguf(path), independent.open_gguf(path)
    for leaf in found:
        a, b = ours.leaves[leaf], theirs.leaves[leaf]
        assert (a.shape, a.dtype, a.layers) == (b.shape, b.dtype, b.layers)
        for layer in range(a.layers or 1):
            np.testing.assert_array_equal(a.read(layer), b.read(layer), err_msg=leaf)


@pytest.mark.parametrize('name', MODELS)
def test_package_reads_what_the_architecture_is_to_have(name, tmp_path):
    path, model, found = write(tmp_path, name, quantize='BF16')
    arch, reader = name.partition('-')[0], gguf.GGUFReader(path)
    known = gguf.MODEL_TENSORS[{v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]]
    names = {gguf.TENSOR_NAMES[t] for t in known}
    for t in reader.tensors:
        base = t.name.rpartition('.')[0]
        assert '.'.join(['blk', '{bid}', base.split('.')[2]] if base.startswith('blk.') else [base]) in names
        assert t.data_offset % gguf_out.ALIGNMENT == 0
    assert reader.get_field('general.architecture').contents() == arch
    assert reader.get_field(f'{arch}.block_count').contents() == model.model['layers']
    assert reader.get_field('tokenizer.ggml.tokens').contents()[3] == '<0x0A>'


def test_tensors_that_end_anywhere_and_layers_of_several_kinds(tmp_path):
    path, _, found = write(tmp_path, 'qwen3', head_dim=6)  # 24 bytes a norm
    up = found['layers/w_up_DF'].astype(np.float16)
    mixed = rewritten(path, drop=['blk.1.ffn_up.weight'], tensors={'blk.1.ffn_up.weight': up[1].T.copy()})
    for back in (gguf_in.open_gguf(path), gguf_in.open_gguf(mixed)):
        assert back.leaves['layers/w_up_DF'].dtype == np.float32
        np.testing.assert_array_equal(back.leaves['layers/k_norm_H'].read(2), found['layers/k_norm_H'][2])
    assert back.leaves['layers/w_up_DF'].read(1).dtype == np.float32
    np.testing.assert_array_equal(back.leaves['layers/w_up_DF'].read(1), up[1].astype(np.float32))


def test_rows_of_llama_are_interleaved_and_norms_of_gemma_have_their_one(tmp_path):
    path, _, found = write(tmp_path, 'llama')
    by_name = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    q_ND = found['layers/wq_DNH'][1].reshape(64, -1).T  # [out, in], halves
    want = q_ND.reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(128, 64)  # as llama.cpp's converter puts it
    np.testing.assert_array_equal(by_name['blk.1.attn_q.weight'], want)
    np.testing.assert_array_equal(by_name['blk.1.attn_v.weight'], found['layers/wv_DKH'][1].reshape(64, -1).T)
    path, _, found = write(tmp_path, 'gemma3')
    by_name = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(by_name['blk.2.attn_q_norm.weight'], found['layers/q_norm_H'][2] + 1)
    np.testing.assert_array_equal(by_name['output_norm.weight'], found['final_norm_D'] + 1)


def test_q8_0_is_close_and_what_has_no_blocks_is_f16(tmp_path):
    path, _, found = write(tmp_path, quantize='Q8_0', ffn_dim=80)
    back, kinds = gguf_in.open_gguf(path), {k: t.kind for k, t in gguf_file.read_header(path).tensors.items()}
    assert kinds['blk.0.ffn_down.weight'] == 'F16' and kinds['blk.0.attn_norm.weight'] == 'F32'
    assert kinds['blk.0.attn_q.weight'] == kinds['token_embd.weight'] == kinds['output.weight'] == 'Q8_0'
    for leaf in ('layers/wq_DNH', 'layers/w_down_FD', 'layers/w_up_DF'):
        got, want = back.leaves[leaf].read(1), found[leaf][1]
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.006 * want.std()


# ---- architectures ----


def test_architecture_is_the_first_that_is_the_graph():
    for name, more in MODELS.items():
        assert gguf_out.choose(graph.PLAIN | SIZES | more)[0] == name.partition('-')[0]
    wide = {'layers': 46, 'query_scale': (64 // 4) ** -0.5}  # Gemma 2 27B is known by its depth
    assert gguf_out.choose(SIZES | MODELS['gemma2'] | wide)[0] == 'gemma2'
    inside = {'window': 128}  # local layers that see all of the context
    assert gguf_out.choose(SIZES | inside)[0] == 'llama'


@pytest.mark.parametrize(
    'more, why',
    [
        ({'window': 64}, 'llama is but for model.window=64 (llama: None)'),
        ({'qk_norm': True, 'qkv_bias': True, 'head_dim': 16}, 'qwen2 is but for model.qk_norm=True (qwen2: False)'),
        ({'qkv_bias': True}, 'llama is but for model.qkv_bias=True'),  # qwen2's heads are as wide as the model
        ({'qk_norm_joint': True}, 'model.qk_norm_joint=True'),
        ({'norms': 'post'}, 'model.norms=post (llama: pre)'),
        ({'pattern': 'global,nope'}, 'llama is but for model.pattern=global,nope (llama has other kinds of layer)'),
        ({'query_scale': 0.5}, 'model.query_scale=0.5'),
        ({'embed_scale': 2.0}, 'model.embed_scale=2.0'),
        ({'residual_scale': 0.22}, 'model.residual_scale=0.22'),
        ({'logit_softcap': 30.0}, 'model.logit_softcap=30.0'),
        (
            {'qk_norm': True} | {'rope_scaling': 'llama3,factor=8,low=1,high=4,original=64'},
            'llama is but for model.qk_norm=True',
        ),
        (MODELS['gemma2'] | {'tied': False}, 'gemma2 is but for model.tied=False'),
        (MODELS['gemma2'] | {'attn_softcap': None}, 'gemma2 is but for model.attn_softcap=None (gemma2: 50.0)'),
        (MODELS['gemma3'] | {'pattern': 'local,global'}, 'gemma3 is but for model.pattern'),
        (MODELS['gemma3'] | {'window': None, 'pattern': None}, 'gemma3 is but for model.window=None'),
    ],
)
def test_graph_that_no_architecture_is_is_refused_with_the_reason(more, why):
    with pytest.raises(UsageError, match='no architecture of GGUF is this graph') as caught:
        gguf_out.choose(SIZES | more)
    assert why in str(caught.value)


def test_what_has_no_gguf_form_is_refused_before_anything_is_written(tmp_path):
    model, _ = opened()
    for wrong, quantize in ((dataclasses.replace(model, scored=True), 'F32'), (model, 'Q3_K_L')):
        with pytest.raises(UsageError):
            gguf_out.write_gguf(wrong, tmp_path / 'x.gguf', quantize=quantize, say=lambda text: None)
    assert not list(tmp_path.iterdir())


# ---- files of others ----


def rewritten(path, *, drop=(), tensors=(), **changed):
    """The file again, through `gguf`, with other metadata and tensors; keys without 'ARCHITECTURE.'."""
    reader = gguf.GGUFReader(path)
    arch = reader.get_field('general.architecture').contents()
    writer = gguf.GGUFWriter(path.with_suffix('.other'), changed.pop('architecture', arch))
    values = {k: f.contents() for k, f in reader.fields.items() if k.startswith(f'{arch}.')}
    for key, value in changed.items():
        values[('' if key.startswith('split') else f'{arch}.') + key.replace('__', '.')] = value
    for key, value in values.items():
        gguf_out.add_value(writer, key, value)
    kept = {t.name: np.array(t.data) for t in reader.tensors if t.name not in drop}
    for name, data in (kept | dict(tensors)).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_suffix('.other')


LLAMA3 = gguf_arch.llama3_factors('llama3,factor=8,low=1,high=4,original=8192', theta=1e4, head_dim=32)


@pytest.mark.parametrize(
    'changes, why',
    [
        ({'architecture': 'mamba'}, "'mamba' is not one of llama, qwen2"),
        ({'expert_count': 8}, 'llama.expert_count=8 is not in our graph'),
        ({'rope__scaling__type': 'yarn'}, "'yarn' is not in our graph"),
        ({'rope__dimension_count': 16}, 'rope.dimension_count is not the head dim 32'),
        ({'attention__value_length': 64}, 'attention.value_length is not the head dim'),
        ({'attention__head_count': 0}, 'attention.head_count=0 is not a whole number'),
        ({'attention__head_count_kv': 3}, 'do not fit together'),
        ({'attention__head_count_kv': [2, 2, 1]}, 'head_count_kv=[2, 2, 1] is not a whole number'),
        ({'attention__layer_norm_rms_epsilon': 0.0}, 'is not a positive number'),
        ({'block_count': 2**31 - 1}, 'block_count=2147483647 is more than its 30 tensors'),
        ({'block_count': 4}, "no tensor 'blk.3.attn_norm.weight'"),
        ({'embedding_length': 65}, 'its metadata make it'),
        ({'block_count': 2}, 'tensors that are not in our graph (blk.2.'),
        ({'drop': ['blk.1.ffn_up.weight']}, "no tensor 'blk.1.ffn_up.weight'"),
        ({'drop': ['token_embd.weight']}, "no tensor 'token_embd.weight'"),
        ({'tensors': {'blk.0.attn_output.bias': np.zeros(64, np.float32)}}, '1 tensors that are not'),
        ({'tensors': {'rope_freqs.weight': np.linspace(1, 9, 16).astype(np.float32)}}, 'is no llama3 scaling'),
        ({'split__count': 3}, 'is one of 3 parts: put them together first'),
        (
            {'tensors': {'rope_freqs.weight': LLAMA3}, 'rope__scaling__type': 'linear', 'rope__scaling__factor': 2.0},
            'has linear scaling of rotary positions and rope_freqs.weight',
        ),
        ({'tensors': {'rope_freqs.weight': np.ones(8, np.float32)}}, 'is not one number a pair of 32'),
        # a factor counts without its type, under its older name too, and there is none in rope_freqs besides
        ({'tensors': {'rope_freqs.weight': LLAMA3}, 'rope__scaling__factor': 2.0}, 'has linear scaling'),
        ({'tensors': {'rope_freqs.weight': LLAMA3}, 'rope__scale_linear': 2.0}, 'has linear scaling'),
    ],
)
def test_file_that_is_not_our_graph_is_one_line(changes, why, tmp_path):
    path, _, _ = write(tmp_path)
    with pytest.raises(UsageError) as caught:
        gguf_in.open_gguf(rewritten(path, **changes))
    assert why in str(caught.value) and 'model.other' in str(caught.value) and '\n' not in str(caught.value)


def test_factors_of_positions_in_an_architecture_that_has_none_are_refused(tmp_path):
    path, _, _ = write(tmp_path, 'qwen3')
    with pytest.raises(UsageError, match=r'has rope_freqs\.weight, which its architecture does not use'):
        gguf_in.open_gguf(rewritten(path, tensors={'rope_freqs.weight': LLAMA3}))


@pytest.mark.parametrize('key', ['rope__scaling__factor', 'rope__scale_linear'])
def test_a_factor_without_its_type_is_linear(key, tmp_path):
    """As llama.cpp reads it."""
    path, _, _ = write(tmp_path)
    assert gguf_in.open_gguf(rewritten(path, **{key: 4.0})).model['rope_scaling'] == 'linear,factor=4'


def test_scaling_that_we_could_not_read_back_is_not_written(tmp_path):
    for odd in ('high=2,original=8192', 'high=4,original=8191'):
        with pytest.raises(UsageError, match='rope_scaling'):
            write(tmp_path, rope_scaling=f'llama3,factor=8,low=1,{odd}')
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_say_what_it_reads_at_once(tmp_path):
    """llama.cpp does not open a file without a context's length."""
    said = []
    model, _ = opened(context=None)
    gguf_out.write_gguf(model, tmp_path / 'model.gguf', quantize='F32', say=said.append)
    assert gguf_in.open_gguf(tmp_path / 'model.gguf').model['context'] == 2048 and 'context_length is 2048' in said[0]


def test_files_of_older_converters_are_read(tmp_path):
    path, _, found = write(tmp_path)
    arch = {'attention__head_count_kv': [2, 2, 2], 'attention__sliding_window': 64, 'context_length': 128}
    more = {f'blk.{i}.attn_rot_embd.weight': np.zeros(16, np.float32) for i in range(3)}
    back = gguf_in.open_gguf(rewritten(path, tensors=more, **arch))
    assert back.model['kv_heads'] == 2 and back.model['window'] == 64
    np.testing.assert_array_equal(back.leaves['layers/wq_DNH'].read(2), found['layers/wq_DNH'][2])


@pytest.mark.parametrize(
    'scaling', ['llama3,factor=32,low=1,high=4,original=8192', MODELS['llama-llama3']['rope_scaling']]
)
def test_llama3_scaling_is_found_in_its_factors(scaling):
    options = {'theta': 5e5, 'head_dim': 64}
    factors = gguf_arch.llama3_factors(scaling, **options)
    assert factors[0] == 1 and np.isclose(factors[-1], RopeScaling.parse(scaling).factor)
    assert gguf_arch.llama3_scaling(factors, where='', **options) == scaling
    assert gguf_arch.llama3_scaling(np.ones(32, np.float32), where='', **options) is None


# ---- writing ----


def test_writing_holds_a_few_rows_and_not_the_model(tmp_path):
    path = tmp_path / 'big.gguf'
    model, _ = opened(dim=512, head_dim=128, ffn_dim=2048, layers=4)
    tracemalloc.start()
    try:
        gguf_out.write_gguf(model, path, quantize='F32', say=lambda text: None)
        assert tracemalloc.get_traced_memory()[1] < 45e6 < 60e6 < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_writing_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, model, _ = write(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(files, 'STREAM_CHUNK', 1000)
    count, whole = [], files._write

    def full(*args):
        count.append(1)
        if len(count) > 20:
            raise OSError(28, 'No space left on device')
        whole(*args)

    monkeypatch.setattr(files, '_write', full)
    with pytest.raises(RunError, match='model.gguf cannot be written'):
        gguf_out.write_gguf(model, path, quantize='F32', say=lambda text: None)
    assert [p.name for p in tmp_path.iterdir()] == ['model.gguf'] and path.read_bytes() == before


def test_numbers_too_large_for_f16_are_one_line(tmp_path):
    model, found = opened()
    found['layers/w_up_DF'][1, 3, 4] = 1e6
    with pytest.raises(RunError, match='blk.1.ffn_up.weight has numbers above 65504'):
        gguf_out.write_gguf(model, tmp_path / 'x.gguf', quantize='F16', say=lambda text: None)


# ---- llama.cpp ----


def parameters(model, found):
    """(the decoder's shape, its parameters with the vocabulary's padding)."""
    cfg = ModelConfig(**model)
    rows = cfg.sizes['V'] - model['vocab_size']
    params = {'layers': {}}
    for leaf, x in found.items():
        x = np.pad(x, ((0, rows), (0, 0))) if leaf == 'embed_VD' else x
        x = np.pad(x, ((0, 0), (0, rows))) if leaf == 'head_DV' else x
        place, _, name = leaf.rpartition('/')
        (params[place] if place else params)[name] = jnp.asarray(x)
    return cfg, params


def our_logits(params, cfg, tokens):
    """The decoder's own logits [T, V] of a row of tokens."""
    h, _ = jax.jit(transformer.forward, static_argnums=1)(params, cfg, jnp.asarray([tokens]))
    return np.asarray(transformer.logits(params, cfg, h))[0]


def llama_cpp(path, prompt, count, adapter=None):
    """(ids, log-probs) of a greedy continuation by llama.cpp, in float32; with an adapter's file beside the model."""
    xllamacpp = pytest.importorskip('xllamacpp')
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 128, 1, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = params.fit_params = False
    params.verbosity = 0
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    request = {
        'prompt': prompt, 'n_predict': count, 'temperature': 0, 'n_probs': 1, 'ignore_eos': True, 'cache_prompt': False,
    }  # fmt: skip
    answer = xllamacpp.Server(params).handle_completions(request)
    steps = answer['choices'][0]['logprobs']['content']
    return [s['id'] for s in steps], np.array([s['logprob'] for s in steps])


def greedy(logits):
    """(ids, log-probs of them) of rows of logits, the end of a text left out, as `llama_cpp` is asked to."""
    logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    logits = np.where(np.arange(logits.shape[-1]) == EOS, -np.inf, logits)
    first, second = np.sort(logits, -1)[:, -1], np.sort(logits, -1)[:, -2]
    assert np.min(first - second) > 2e-3  # no ties
    return logits.argmax(-1).tolist(), np.take_along_axis(logp, logits.argmax(-1)[:, None], -1)[:, 0]


@pytest.mark.parametrize('name', MODELS)
def test_llama_cpp_says_the_same(name, tmp_path):
    pytest.importorskip('xllamacpp')
    path, model, found = write(tmp_path, name)
    prompt = np.random.default_rng(1).integers(4, VOCAB, 24).tolist()
    ids, logp = llama_cpp(path, prompt, 16)
    assert len(set(ids)) > 4  # no loop of one token
    cfg, params = parameters(model.model, found)
    for function in (plain_decoder.logits, our_logits):
        said, expected = greedy(function(params, cfg, np.array(prompt + ids))[len(prompt) - 1 : -1])
        assert said == ids
        np.testing.assert_allclose(logp, expected, atol=1e-3)  # llama.cpp's GELU is a table of float16


# ---- adapters ----


def adapted(model, *, scale=2.0, names=('wq_DNH', 'wk_DKH', 'wo_NHD', 'w_down_FD')):
    """An adapter of drawn factors over a model, of ranks that differ."""
    draw = np.random.default_rng(3)

    def stack(name, rank):
        shape, n = model.leaf(f'layers/{name}').shape, len(row_of(name).contracted)
        made = [
            Lora(
                *(0.2 * draw.standard_normal(x).astype(np.float32) for x in ((*shape[:n], rank), (rank, *shape[n:]))),
                row_of(name).contracted, scale,
            )
            for _ in range(model.model['layers'])
        ]  # fmt: skip
        return Stack(len(made), made.__getitem__)

    return OpenedAdapter('drawn', 'base', {f'layers/{n}': stack(n, 2 + i % 2) for i, n in enumerate(names)}, {})


@pytest.mark.parametrize('name', ['llama', 'qwen3'])
def test_llama_cpp_says_the_same_with_an_adapter(name, tmp_path):
    """Rotary pairs of neighbours among them, where the rows of B are turned and those of A are not."""
    path, model, _ = write(tmp_path, name)
    adapter, file = adapted(model), tmp_path / 'adapter.gguf'
    gguf_adapter.write_adapter(adapter, model, file, say=lambda line: None)
    again = gguf_adapter.open_adapter(file, model)
    merged, back = adapter.over(model), again.over(model)
    for leaf in adapter.stacks:
        np.testing.assert_allclose(back.leaf(leaf).read(1), merged.leaf(leaf).read(1), atol=1e-5)
    prompt = np.random.default_rng(1).integers(4, VOCAB, 24).tolist()
    ids, logp = llama_cpp(path, prompt, 8, file)
    assert (ids, logp.tolist()) != tuple(map(list, llama_cpp(path, prompt, 8)))
    stacked = lambda x: np.stack([x.read(i) for i in range(x.layers)]) if x.layers else x.read(0)
    cfg, params = parameters(merged.model, {leaf: stacked(x) for leaf, x in merged.leaves.items()})
    said, expected = greedy(our_logits(params, cfg, np.array(prompt + ids))[len(prompt) - 1 : -1])
    assert said == ids
    np.testing.assert_allclose(logp, expected, atol=1e-3)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    _, model, _ = write(tmp_path, 'llama')
    other, _ = opened('qwen3', np.float32)
    file = tmp_path / 'adapter.gguf'
    gguf_adapter.write_adapter(adapted(model), model, file, say=lambda line: None)
    with pytest.raises(UsageError, match='is for the architecture llama, and .* is qwen3'):
        gguf_adapter.open_adapter(file, other)
    short = dataclasses.replace(model, model={**model.model, 'layers': 2})
    with pytest.raises(UsageError, match=r'blk.2.attn_q.weight.lora_a.* is of no matrix of'):
        gguf_adapter.open_adapter(file, short)
    narrow = dataclasses.replace(model, model={**model.model, 'ffn_dim': 64})
    with pytest.raises(UsageError, match=r'ffn_down.weight.lora_a.* makes it \(3, 64\)'):
        gguf_adapter.open_adapter(file, narrow)
    whole = adapted(model)
    dora = Stack(3, lambda i: dataclasses.replace(whole.stacks['layers/wq_DNH'].read(i), magnitude=np.ones((4, 32))))
    with pytest.raises(UsageError, match='DoRA has no place in a GGUF adapter'):
        lengths = dataclasses.replace(whole, stacks={'layers/wq_DNH': dora})
        gguf_adapter.write_adapter(lengths, model, tmp_path / 'x.gguf', say=lambda line: None)
    with pytest.raises(UsageError, match='a reward model has no GGUF form'):
        scored = dataclasses.replace(whole, scored=True)
        gguf_adapter.write_adapter(scored, model, tmp_path / 'x.gguf', say=lambda line: None)
    assert not (tmp_path / 'x.gguf').exists()
