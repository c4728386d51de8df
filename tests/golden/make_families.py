"""Makes tests/golden/families: tiny random models of transformers, one a family, and the logits that it gives them.

    python tests/golden/make_families.py            makes them, then checks what we write of each
    python tests/golden/make_families.py --check    checks alone

What is checked: that transformers loads the folder that `write_folder` makes of a model, and says the same.
It needs torch and transformers (5.24 made what is here; extra [peers]); the tests need neither. Norms, biases and
scales are drawn away from where they would not show, layers are as many as do not fit their pattern, windows are
shorter than the rows. Run it again when a family is added, never to make a test pass.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf

from lm.interop.huggingface.folder import open_folder, write_folder

FOLDER = Path(__file__).parent / 'families'
TOKENS = np.random.default_rng(0).integers(
    3, 96, (2, 24)
)  # none of the symbols: padding would move where a score is read
SHAPE = {
    'vocab_size': 96, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 64, 'rms_norm_eps': 3e-5, 'initializer_range': 0.2,
    'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2,
}  # fmt: skip
LLAMA3 = {
    'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}  # fmt: skip
PLAIN = {'rope_type': 'default', 'rope_theta': 1000.0}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 8.0}
# name: (family, settings beside SHAPE)
MODELS = {
    'llama': ('Llama', {'rope_parameters': PLAIN, 'tie_word_embeddings': False}),
    'llama3': ('Llama', {'rope_parameters': LLAMA3, 'tie_word_embeddings': True, 'head_dim': 16}),
    'mistral': ('Mistral', {'rope_parameters': PLAIN, 'sliding_window': 7, 'head_dim': 16}),
    'qwen2': ('Qwen2', {'rope_parameters': PLAIN, 'tie_word_embeddings': True}),
    'qwen3': ('Qwen3', {'rope_parameters': PLAIN, 'head_dim': 16}),
    'olmo2': ('Olmo2', {'rope_parameters': PLAIN}),
    'smollm3': ('SmolLM3', {'rope_parameters': PLAIN, 'num_hidden_layers': 6}),
    'granite': (
        'Granite',
        {
            'rope_parameters': PLAIN, 'embedding_multiplier': 6.0, 'residual_multiplier': 0.4, 'logits_scaling': 3.0,
            'attention_multiplier': 0.11, 'tie_word_embeddings': True,
        },
    ),
    'gemma': ('Gemma', {'rope_parameters': PLAIN, 'head_dim': 16}),
    'gemma2': (
        'Gemma2',
        {
            'rope_parameters': PLAIN, 'head_dim': 16, 'sliding_window': 7, 'query_pre_attn_scalar': 24,
            'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0,
        },
    ),
    'gemma3': (
        'Gemma3',
        {
            'rope_parameters': {
                'full_attention': LINEAR, 'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0}
            },
            'head_dim': 16, 'sliding_window': 7, 'query_pre_attn_scalar': 24, 'num_hidden_layers': 7,
        },
    ),
}  # fmt: skip
SCORED = {'scored': ('Llama', {'rope_parameters': PLAIN, 'num_labels': 1})}


def config_class(family: str):
    return getattr(tf, f'{family}{"Text" if family == "Gemma3" else ""}Config')


def make(name: str, family: str, settings: dict, head: str) -> None:
    torch.manual_seed(len(name))
    config = config_class(family)(**{**SHAPE, **settings}, attn_implementation='eager')
    model = getattr(tf, f'{family}{head}')(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases
                weight.add_(0.3 * torch.randn_like(weight))
        out = model(torch.tensor(TOKENS)).logits.numpy()
    folder = FOLDER / name
    model.save_pretrained(folder)
    (folder / 'generation_config.json').unlink(missing_ok=True)
    np.savez_compressed(folder / 'logits.npz', tokens=TOKENS, logits=out)


def logits_of(folder: Path, head: str) -> np.ndarray:
    """What transformers says of a folder; every one of its parameters must be there, and no other."""
    loader = tf.AutoModelForCausalLM if head == 'ForCausalLM' else tf.AutoModelForSequenceClassification
    options = {'attn_implementation': 'eager', 'output_loading_info': True}
    model, found = loader.from_pretrained(folder, **options)
    assert not any(found[what] for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), found
    assert type(model).__name__ in json.loads((folder / 'config.json').read_text())['architectures']
    with torch.no_grad():
        rows = [model.float().eval()(torch.tensor(row[None])).logits for row in TOKENS]  # no symbol is for padding
        return torch.cat(rows).numpy()


def check(name: str, head: str) -> None:
    """Writes the folder again by `write_folder`, and compares."""
    with tempfile.TemporaryDirectory() as folder, np.load(FOLDER / name / 'logits.npz') as golden:
        write_folder(open_folder(FOLDER / name), f'{folder}/out', say=lambda line: None)
        found = logits_of(Path(folder) / 'out', head)
        print(f'{name}: the largest difference is {np.max(np.abs(found - golden["logits"])):.3g}')
        np.testing.assert_allclose(found, golden['logits'], atol=1e-6)


def main() -> None:
    if '--check' not in sys.argv:
        make_all()
    for name in MODELS:
        check(name, 'ForCausalLM')
    for name in SCORED:
        check(name, 'ForSequenceClassification')


def make_all() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, (family, settings) in MODELS.items():
        make(name, family, settings, 'ForCausalLM')
    for name, (family, settings) in SCORED.items():
        make(name, family, settings, 'ForSequenceClassification')
    versions = {'transformers': tf.__version__, 'torch': torch.__version__.split('+')[0]}
    (FOLDER / 'versions.json').write_text(json.dumps(versions) + '\n')


if __name__ == '__main__':
    main()
