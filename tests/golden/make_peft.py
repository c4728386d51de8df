"""Makes tests/golden/peft: adapters that peft saved over the models of tests/golden/families, and the logits of both.

    python tests/golden/make_peft.py            makes them, then checks what we write of each
    python tests/golden/make_peft.py --check    checks alone

What is checked: that peft loads the folder that `write_adapter` makes of an adapter without a warning, and the model
says the same with it. It needs torch, transformers and peft (extra [peers]; tests/golden/peft/versions.json names
those that made what is here); the tests need none of them. Every factor is drawn, none is 0.
"""

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers as tf

from lm.interop import peft as ours
from lm.interop.huggingface.folder import open_folder

HERE = Path(__file__).parent
FOLDER, FAMILIES = HERE / 'peft', HERE / 'families'
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 8))
ALL = {'target_modules': 'all-linear', 'r': 2, 'lora_alpha': 6}
# name: (the model under it, settings of peft's LoraConfig)
ADAPTERS = {
    'plain': ('qwen2', ALL),
    'rs': ('llama', ALL | {'use_rslora': True}),
    'dora': ('qwen3', ALL | {'use_dora': True}),
    'patterns': (
        'gemma2',
        ALL
        | {
            'rank_pattern': {'q_proj': 3, r'layers\.1\.mlp\.up_proj': 4, 'down_proj': 1},
            'alpha_pattern': {'self_attn.v_proj': 1, 'layers.2.mlp.gate_proj': 9},
        },
    ),
    'expression': ('olmo2', ALL | {'target_modules': r'.*\.(q_proj|down_proj)'}),
    'layers': ('gemma3', ALL | {'target_modules': ['k_proj', 'o_proj'], 'layers_to_transform': [0, 2]}),
    'gaussian': ('granite', ALL | {'init_lora_weights': 'gaussian', 'target_modules': ['v_proj', 'gate_proj']}),
    'smollm3': ('smollm3', ALL | {'target_modules': ['q_proj', 'up_proj']}),
    'mistral': ('mistral', ALL | {'target_modules': ['q_proj', 'up_proj']}),
    'gemma': ('gemma', ALL | {'target_modules': ['q_proj', 'up_proj']}),
    'llama3': ('llama3', ALL | {'target_modules': ['q_proj', 'up_proj']}),
    'scored': ('scored', ALL | {'task_type': 'SEQ_CLS', 'target_modules': ['q_proj', 'v_proj']}),
}  # fmt: skip


def load(family: str):
    loader = tf.AutoModelForSequenceClassification if family == 'scored' else tf.AutoModelForCausalLM
    return loader.from_pretrained(FAMILIES / family, attn_implementation='eager').float().eval()


def logits_of(model) -> np.ndarray:
    """Row by row: no symbol is for padding."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor(row[None])).logits for row in TOKENS]).numpy()


def make(name: str, family: str, settings: dict) -> None:
    torch.manual_seed(len(name))
    model = peft.get_peft_model(load(family), peft.LoraConfig(**{'task_type': 'CAUSAL_LM', **settings})).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if 'lora_' in key or 'modules_to_save' in key:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / 'README.md').unlink(missing_ok=True)
    config = FOLDER / name / 'adapter_config.json'
    config.write_text(config.read_text().replace(str(FAMILIES / family), family))
    np.savez_compressed(
        FOLDER / name / 'logits.npz', tokens=TOKENS, base=logits_of(load(family)), logits=logits_of(model)
    )


def check(name: str, family: str) -> None:
    """Writes the adapter again by `write_adapter`, has peft load it, and compares."""
    base = open_folder(FAMILIES / family)
    with tempfile.TemporaryDirectory() as folder, np.load(FOLDER / name / 'logits.npz') as golden:
        ours.write_adapter(ours.open_adapter(FOLDER / name, base), base, f'{folder}/out', say=lambda line: None)
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='.*(missing|unexpected|adapter keys).*')
            found = logits_of(peft.PeftModel.from_pretrained(load(family), f'{folder}/out').eval())
        print(f'{name}: the largest difference is {np.max(np.abs(found - golden["logits"])):.3g}')
        np.testing.assert_allclose(found, golden['logits'], atol=2e-5)


def main() -> None:
    if '--check' not in sys.argv:
        shutil.rmtree(FOLDER, ignore_errors=True)
        for name, (family, settings) in ADAPTERS.items():
            make(name, family, settings)
        versions = {'peft': peft.__version__, 'transformers': tf.__version__, 'torch': torch.__version__.split('+')[0]}
        (FOLDER / 'versions.json').write_text(json.dumps(versions) + '\n')
    for name, (family, _) in ADAPTERS.items():
        check(name, family)


if __name__ == '__main__':
    main()
