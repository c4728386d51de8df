"""Well-known datasets by a short name, for machines with a network: data.mixture='fineweb-edu:0.8,wiki40b:0.2'.

Where `$LM_DATA/NAME` is a folder, it is read instead: a local copy, in any form that `hf:FOLDER` or, for those of TFDS,
TFDS itself knows. The config, split and column of the table are what is read either way. The licences are those that
the datasets' own pages state; the texts in them may carry others. Those of conversations and pairs are read by their
fields (lm/data/conversations.py).
"""

import os
from pathlib import Path
from typing import NamedTuple

from lm.data.records import Kind


class Named(NamedTuple):
    """A dataset: the address of its source, its licence, what it holds, and of which kind."""

    source: str
    licence: str
    holds: str
    kind: Kind = 'text'


_MATH, _TINY = 'mathematics of the web, graded 4 and 5', 'short stories in small words, made by GPT-3.5 and GPT-4'
_TULU_PAIRS, _ULTRA = 'allenai/llama-3.1-tulu-3-8b-preference-mixture', 'HuggingFaceH4/ultrafeedback_binarized'
NAMED = {
    'c4': Named('hf:allenai/c4/en@train#text', 'ODC-By 1.0', 'English web pages of April 2019, cleaned'),
    'codeparrot': Named('hf:codeparrot/codeparrot-clean@train#content', "each file's own", 'Python files from GitHub'),
    'cosmopedia': Named('hf:HuggingFaceTB/smollm-corpus/cosmopedia-v2@train#text', 'ODC-By 1.0', 'synthetic textbooks'),
    'dclm': Named('hf:mlfoundations/dclm-baseline-1.0-parquet@train#text', 'CC-BY-4.0', 'web pages, filtered by model'),
    'finemath': Named('hf:HuggingFaceTB/finemath/finemath-4plus@train#text', 'ODC-By 1.0', _MATH),
    'fineweb': Named('hf:HuggingFaceFW/fineweb/sample-10BT@train#text', 'ODC-By 1.0', '10B tokens of web pages'),
    'fineweb-edu': Named('hf:HuggingFaceFW/fineweb-edu/sample-10BT@train#text', 'ODC-By 1.0', 'the same, educational'),
    'open-web-math': Named('hf:open-web-math/open-web-math@train#text', 'ODC-By 1.0', 'mathematics of the web'),
    'tinystories': Named('hf:roneneldan/TinyStories@train#text', 'CDLA-Sharing-1.0', _TINY),
    'wiki40b': Named('tfds:wiki40b/en@train#text', 'CC-BY-SA-3.0', 'English Wikipedia, with _START_ARTICLE_ marks'),
    'wikipedia': Named('hf:wikimedia/wikipedia/20231101.en@train#text', 'CC-BY-SA-3.0', 'English Wikipedia of 2023'),
    # Conversations.
    'dolly': Named('tfds:databricks_dolly@train', 'CC-BY-SA-3.0', '15k instructions, written by people', 'chat'),
    'no_robots': Named('hf:HuggingFaceH4/no_robots@train', 'CC-BY-NC-4.0', '9.5k instructions, by people', 'chat'),
    'openhermes': Named('hf:teknium/OpenHermes-2.5@train', 'not stated', '1M answers, mostly of GPT-4', 'chat'),
    'smoltalk': Named('hf:HuggingFaceTB/smoltalk/all@train', 'Apache-2.0', '1M synthetic conversations', 'chat'),
    'tulu-3-sft': Named('hf:allenai/tulu-3-sft-mixture@train', 'ODC-By 1.0', 'the mixture of Tulu 3', 'chat'),
    'ultrachat': Named('hf:HuggingFaceH4/ultrachat_200k@train_sft', 'MIT', '200k conversations of ChatGPT', 'chat'),
    # Pairs of answers.
    'helpsteer3': Named('hf:nvidia/HelpSteer3/preference@train', 'CC-BY-4.0', '38k, compared by people', 'pairs'),
    'hh-rlhf': Named('hf:Anthropic/hh-rlhf@train', 'MIT', '161k, helpful or harmless, compared by people', 'pairs'),
    'tulu-3-pairs': Named(f'hf:{_TULU_PAIRS}@train', 'ODC-By 1.0', '271k, compared by a model', 'pairs'),
    'ultrafeedback-binarized': Named(f'hf:{_ULTRA}@train_prefs', 'MIT', '61k, scored by GPT-4', 'pairs'),
}


def local_copy(name: str) -> str | None:
    """The folder `$LM_DATA/NAME` if there is one."""
    root = os.environ.get('LM_DATA')
    folder = Path(root).expanduser() / name if root else None
    return str(folder) if folder and folder.is_dir() else None
