"""Seconds and peak memory of a conversion: `python benchmarks/convert.py [--size=8b] [--to=run|huggingface|gguf]`.

Method: a model of a preset's shape, bfloat16, whose weights are random and made layer by layer as they are asked for,
so that it is nowhere in memory; it is written into a temporary folder as `python -m lm.convert` writes it, opened
again with every checksum verified (a run), and both are compared on --tokens tokens of the fixed text, layer by layer.
The folder is removed. Random bits are what compresses worst: the disk must have room for the whole of the model.

Prints one JSON line: parameters, bytes on disk, seconds of writing, opening and comparing, the largest difference of a
logit, and the peak of the process's resident memory after each, bytes. The sum is of this process alone: what the
system keeps of files in memory that nobody needs is not in it.
"""

import json
import math
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from lm import config as configs
from lm import convert, runtime, sharding
from lm.data.tokenizer import train_tokenizer
from lm.errors import Parser, UsageError, run_command
from lm.evals import agreement
from lm.interop.opened import Leaf, Opened
from lm.model.config import ModelConfig
from lm.presets import PRESETS
from lm.runs import loading

SIGN_AND_MANTISSA, EXPONENT = 0x81FF, 0x3C00  # random sign and mantissa, four sizes of number from 2⁻⁷ up
TINY = {'model.dim': 64, 'model.layers': 3, 'model.heads': 4, 'model.kv_heads': 2, 'model.head_dim': 16}


def model(size: str) -> Opened:
    """A random model of a preset's shape; 'tiny' is for tests. Raises UsageError for another."""
    if size not in (*PRESETS, 'tiny'):
        raise UsageError(f'--size={size}{configs.nearest(size, list(PRESETS))} is not one of {", ".join(PRESETS)}')
    config = configs.base()
    for key, value in (TINY if size == 'tiny' else PRESETS[size]).items():
        *parents, last = key.split('.')
        (config[parents[0]] if parents else config)[last] = value
    settings = {k: v for k, v in dict(config.model).items() if k != 'scan'} | {'context': config.seq_len}
    flat = jax.tree_util.tree_leaves_with_path(loading.shapes(ModelConfig(**settings)))
    named = {'/'.join(key.key for key in path): x.shape for path, x in flat}
    leaves = {name: leaf(name, shape, settings['vocab_size']) for name, shape in named.items()}
    words = train_tokenizer(agreement.TEXT.splitlines(), vocab_size=384)
    return Opened(f'a random {size}', settings, leaves, words.saved)


def leaf(name: str, shape: tuple[int, ...], vocab_size: int) -> Leaf:
    """A parameter that is made anew, and the same, each time that it is read."""
    stacked, letters = name.startswith('layers/'), sharding.dims_of(name)
    own = tuple(vocab_size if d == 'V' else n for d, n in zip(letters, shape[1:] if stacked else shape, strict=True))

    def read(layer: int) -> np.ndarray:
        draw = np.random.default_rng((zlib.crc32(name.encode()), layer))
        bits = draw.integers(1 << 16, size=own, dtype=np.uint16)
        bits &= np.uint16(SIGN_AND_MANTISSA)
        bits |= np.uint16(EXPONENT)
        return bits.view(ml_dtypes.bfloat16)

    return Leaf(own, np.dtype(ml_dtypes.bfloat16), shape[0] if stacked else None, read)


def parse(argv: Sequence[str]):
    parser = Parser('python benchmarks/convert.py', __doc__)
    parser.add_argument('--size', default='8b', help=f'tiny, {", ".join(PRESETS)} (8b)')
    parser.add_argument('--to', default='run', choices=convert.FORMS)
    parser.add_argument('--quantize', help='of a GGUF file')
    parser.add_argument('--tokens', type=configs.whole('--tokens'), default=64, help='to compare on (64); 0: none')
    parser.add_argument('--folder', default=tempfile.gettempdir(), help='where the temporary folder is made')
    return parser.parse_args(argv)


def measure(argv: Sequence[str]) -> None:
    flags = parse(argv)
    opened = model(flags.size)
    count = sum(math.prod(leaf.shape) * (leaf.layers or 1) for leaf in opened.leaves.values())
    told = {'size': flags.size, 'to': flags.to, 'parameters': count, 'seconds': {}, 'peak_memory': {}}
    runtime.start_jax()

    def timed(what, call):
        began = time.perf_counter()
        found = call()
        told['seconds'][what] = round(time.perf_counter() - began, 1)
        told['peak_memory'][what] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return found

    mesh = sharding.use_mesh({}, devices=jax.local_devices()[:1])
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder, mesh:
        dst = str(Path(folder) / ('model.gguf' if flags.to == 'gguf' else 'model'))
        timed('write', lambda: convert.write_model(opened, dst, flags.to, flags.quantize, convert.say))
        told['bytes'] = sum(path.stat().st_size for path in Path(folder).rglob('*') if path.is_file())
        again = timed('open', lambda: convert.reopened(dst, flags.to))
        if flags.tokens:
            found = timed('compare', lambda: agreement.compare(opened, again, tokens=flags.tokens))
            told |= {'tokens': found.tokens, 'largest': found.largest, 'kl': found.kl}
    print(json.dumps(told))


def main() -> int:
    runtime.setup(keep_memory=False)
    return run_command(lambda: measure(sys.argv[1:]))


if __name__ == '__main__':
    sys.exit(main())
