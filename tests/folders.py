"""Tiny folders of Hugging Face's: random weights, and byte-level or SentencePiece-like tokenizers of few pieces."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'rms_norm_eps': 1e-6, 'max_position_embeddings': 128, 'hidden_act': 'silu',
    'tie_word_embeddings': True,
}  # fmt: skip
CLASSES = {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM'}
SYMBOLS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def symbol(i: int, content: str, *, special: bool = True, **more: bool) -> dict[str, Any]:
    """An added token."""
    plain = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': special}
    return {'id': i, 'content': content, **plain, **more}


def byte_level(
    symbols: tuple[str, ...] = SYMBOLS, merges: tuple[tuple[str, str], ...] = (('t', 'h'),)
) -> dict[str, Any]:
    """A tokenizer.json that is GPT-2's in small: 256 bytes, what their merges make, and symbols after them."""
    plain, others = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)], iter(range(0x100, 0x200))
    names = [chr(b) if b in plain else chr(next(others)) for b in range(256)]
    vocab = {name: i for i, name in enumerate([*names, *map(''.join, merges)])}
    splits = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None, 'pre_tokenizer': splits,
        'post_processor': None, 'decoder': splits,
        'added_tokens': [symbol(len(vocab) + i, name) for i, name in enumerate(symbols)],
        'model': {
            'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '',
            'end_of_word_suffix': '', 'fuse_unk': False, 'byte_fallback': False, 'vocab': vocab,
            'merges': [' '.join(pair) for pair in merges],
        },
    }  # fmt: skip


def sentencepiece(scheme: str = 'always') -> dict[str, Any]:
    """A tokenizer.json that is Llama 2's in small; `scheme`: where it puts a space, as the library calls it."""
    merges = [('H', 'i'), ('▁', 'H'), ('▁', 'Hi'), ('▁H', 'i'), ('[', 'I'), ('▁', '[I')]
    symbols, letters = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))], '▁[]IHio'
    pieces = [*symbols, *letters, *dict.fromkeys(map(''.join, merges))]
    parts = [{'type': 'Prepend', 'prepend': '▁'}, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]
    metaspace = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': False}
    return byte_level() | {
        'normalizer': {'type': 'Sequence', 'normalizers': parts} if scheme == 'always' else None,
        'pre_tokenizer': None if scheme == 'always' else metaspace,
        'decoder': {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, {'type': 'Fuse'}]},
        'added_tokens': [symbol(i, name) for i, name in enumerate(pieces[:3])],
        'model': byte_level()['model'] | {
            'unk_token': '<unk>', 'byte_fallback': True, 'fuse_unk': True,
            'vocab': {piece: i for i, piece in enumerate(pieces)}, 'merges': [' '.join(pair) for pair in merges],
        },
    }  # fmt: skip


def begins_with(spec: dict[str, Any], name: str) -> dict[str, Any]:
    """The tokenizer.json, with a symbol that it puts before a text."""
    single = [{'SpecialToken': {'id': name, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
    pair = [*single, {'Sequence': {'id': 'B', 'type_id': 1}}]
    ids = [token['id'] for token in spec['added_tokens'] if token['content'] == name]
    symbols = {name: {'id': name, 'ids': ids, 'tokens': [name]}}
    return spec | {
        'post_processor': {'type': 'TemplateProcessing', 'single': single, 'pair': pair, 'special_tokens': symbols}
    }


def weights(kind: str, rows: int) -> dict[str, np.ndarray]:
    """Random tensors of CONFIG's shape, with a tied embedding of so many rows."""
    draw, dim, ffn, head = np.random.default_rng(0), 32, 64, 8
    w = lambda *shape: (draw.normal(size=shape) * 0.05).astype(np.float32)
    tensors = {'model.embed_tokens.weight': w(rows, dim), 'model.norm.weight': np.ones(dim, np.float32)}
    for i in range(2):
        p = f'model.layers.{i}.'
        shapes = {
            'q_proj': (4 * head, dim),
            'k_proj': (2 * head, dim),
            'v_proj': (2 * head, dim),
            'o_proj': (dim, 4 * head),
        }
        tensors |= {f'{p}self_attn.{name}.weight': w(*shape) for name, shape in shapes.items()}
        mlp = {'gate_proj': (ffn, dim), 'up_proj': (ffn, dim), 'down_proj': (dim, ffn)}
        tensors |= {f'{p}mlp.{name}.weight': w(*shape) for name, shape in mlp.items()}
        norms = ('input_layernorm', 'post_attention_layernorm')
        tensors |= {f'{p}{name}.weight': np.ones(dim, np.float32) for name in norms}
        if kind == 'qwen2':
            tensors |= {f'{p}self_attn.{name}.bias': w(shapes[name][0]) for name in ('q_proj', 'k_proj', 'v_proj')}
    return tensors


def make(
    folder: Path, kind: str = 'llama', *, rows: int = 260, spec: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None, settings: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None, template: str | None = CHATML, **config: Any,
) -> Path:  # fmt: skip
    """Writes a folder.

    Args:
      rows: of the embedding. spec: tokenizer.json. settings: of tokenizer_config.json. config: of config.json.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    ends = {'eos_token': '<|im_end|>', 'add_bos_token': False, **({'chat_template': template} if template else {})}
    named = {'architectures': [CLASSES[kind]], 'model_type': kind, 'vocab_size': rows}
    files = {
        'config.json': CONFIG | named | config, 'tokenizer.json': spec or byte_level(),
        'tokenizer_config.json': ends | (settings or {}), 'generation_config.json': generation,
    }  # fmt: skip
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    save_file(weights(kind, rows) if tensors is None else tensors, str(folder / 'model.safetensors'))
    return folder
