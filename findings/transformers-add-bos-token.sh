#!/usr/bin/env bash
# transformers 5.24.0, tokenizers 0.23.3: `add_bos_token: false` in tokenizer_config.json is not followed.
#
# A folder whose tokenizer.json has a post-processor that puts <s> before a text, and whose tokenizer_config.json says
# `add_bos_token: false`, with tokenizer_class PreTrainedTokenizerFast. Expected: no <s>, as the setting's name says.
# Seen: ids [0, 2, 3] with true and with false, 0 being <s>.
# Who writes a folder for others has to leave the post-processor out; the setting alone says nothing.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'transformers==5.24.0' 'tokenizers==0.23.3'
cat > try.py <<'P'
import json, pathlib
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer
import transformers, tokenizers
print('transformers', transformers.__version__, 'tokenizers', tokenizers.__version__)
t = Tokenizer(models.WordLevel({'<s>': 0, '<unk>': 1, 'a': 2, 'b': 3}, unk_token='<unk>'))
t.pre_tokenizer = pre_tokenizers.Whitespace()
t.add_special_tokens(['<s>'])
t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
for says in (True, False):
    folder = pathlib.Path(f'folder-{says}'); folder.mkdir()
    t.save(str(folder / 'tokenizer.json'))
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'add_bos_token': says}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    print('add_bos_token', says, AutoTokenizer.from_pretrained(folder)('a b')['input_ids'])
P
env/bin/python try.py | tee seen
grep -q '^add_bos_token True \[0, 2, 3\]$' seen
grep -q '^add_bos_token False \[0, 2, 3\]$' seen
echo 'as stated: the setting is not followed'
