#!/usr/bin/env bash
# transformers 5.24.0, tokenizers 0.23.3: beside `model_type: qwen2` a tokenizer.json loses its own pre-tokenizer.
#
# The same tokenizer.json (byte-level BPE that keeps runs of digits whole), the same tokenizer_config.json that asks for
# PreTrainedTokenizerFast, and beside them a config.json of model_type llama or qwen2. Expected: one file, one result.
# Seen: '2024' is one token beside llama, and four beside qwen2, where the class becomes Qwen2Tokenizer, which splits
# digits. A model trained with such a tokenizer and exported as a qwen2 graph is fed other ids than it learned.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'transformers==5.24.0' 'tokenizers==0.23.3'
cat > try.py <<'P'
import json, pathlib
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
vocab = {t: i for i, t in enumerate(['2', '0', '4', '20', '24', '2024'])}
t = Tokenizer(models.BPE(vocab, [('2', '0'), ('2', '4'), ('20', '24')]))
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
print('tokenizers', t.encode('2024').tokens)
for kind in ('llama', 'qwen2'):
    folder = pathlib.Path(kind); folder.mkdir()
    t.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'}))
    (folder / 'config.json').write_text(json.dumps({'model_type': kind}))
    found = AutoTokenizer.from_pretrained(folder)
    print(kind, type(found).__name__, found.tokenize('2024'))
P
env/bin/python try.py | tee seen
grep -q "^tokenizers \['2024'\]$" seen
grep -q "^llama TokenizersBackend \['2024'\]$" seen
grep -q "^qwen2 Qwen2Tokenizer \['2', '0', '2', '4'\]$" seen
echo 'as stated: the folder means two tokenizers'
