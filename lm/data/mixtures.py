"""Well-known datasets by a short name, for machines with a network: data.mixture='fineweb-edu:0.8,wiki40b:0.2'.

Where `$LM_DATA/NAME` is a folder, it is read instead: a local copy, in any form that `hf:FOLDER` or, for those of TFDS,
TFDS itself knows. The config, split and column of the table are what is read either way. The licences are those that
the datasets' own pages state; the texts in them may carry others.
"""

import os
from pathlib import Path
from typing import NamedTuple


class Named(NamedTuple):
    """Where a dataset lies (as after the name of a source), under which licence, and what it holds."""

    source: str
    licence: str
    holds: str


_MATH, _TINY = 'mathematics of the web, graded 4 and 5', 'short stories in small words, made by GPT-3.5 and GPT-4'
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
}


def local_copy(name: str) -> str | None:
    """The folder `$LM_DATA/NAME` if there is one."""
    root = os.environ.get('LM_DATA')
    folder = Path(root).expanduser() / name if root else None
    return str(folder) if folder and folder.is_dir() else None
