"""Adapters of llama.cpp in and out: GGUF files of the type `adapter`, factors beside the tensors of a model.

llama.cpp multiplies each product by one number of the file over its rank, and takes an alpha of 0 or none for a product
as it is (src/llama-adapter.h). The rows of B lie in the order of the rows of what they are added to.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lm import files
from lm.errors import UsageError
from lm.interop.adapter import OpenedAdapter, check_factors, stack_of
from lm.interop.gguf import arch as tables
from lm.interop.gguf import file, writer
from lm.interop.gguf.arch import Arch
from lm.interop.graph import Fetch, Info, Tensor, matrices_of
from lm.interop.opened import Opened
from lm.model import parameters

TYPE, KIND, ALPHA = 'general.type', 'adapter.type', 'adapter.lora.alpha'
PARTS = {'.lora_a': 'a', '.lora_b': 'b'}


def is_adapter(path: str | Path) -> bool:
    """Tells whether a GGUF file holds an adapter. Raises UsageError if it is no GGUF file."""
    return file.read_header(path).metadata.get(TYPE) == 'adapter'


# ---- reading ----


def base_of(path: str | Path) -> str:
    """Names the model under the adapter as far as a file does."""
    return f'a model of the architecture {file.read_header(path).metadata.get("general.architecture")}'


def open_adapter(path: str | Path, base: Opened, *, fetch: Fetch = file.read) -> OpenedAdapter:
    """The adapter in a GGUF file, over a model that it fits.

    Raises UsageError for what we cannot express, for tensors that have no place in the model or are not whole, and for
    another model's.

    Args:
      fetch: reads a tensor.
    """
    header, where, notes = file.read_header(path), str(path), []
    name, arch = writer.choose(base.model)
    if (kind := header.metadata.get(KIND)) != 'lora':
        raise UsageError(f'{where}: {KIND}={kind}: lora is read')
    if (theirs := header.metadata.get('general.architecture')) != name:
        raise UsageError(f'{where}: is for the architecture {theirs}, and {base.where} is {name}')
    alpha = header.metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float | int) or not np.isfinite(alpha):
        raise UsageError(f'{where}: {ALPHA}={alpha} is no number')
    if not alpha:
        notes.append(f'{where}: {ALPHA} is 0 or missing: products are taken as they are, as llama.cpp does')
    places = matrices_of(arch.layer, base.model['layers'])
    found: dict[str, dict[int, dict[str, Info]]] = defaultdict(lambda: defaultdict(dict))
    for tensor, info in header.tensors.items():
        place, part = tensor[:-7], tensor[-7:]
        if part not in PARTS or place not in places:
            raise UsageError(f"{where}: the tensor {tensor!r} is of no matrix of {base.where}: it is another model's")
        leaf, layer = places[place]
        found[leaf][layer][PARTS[part]] = info
    if not found:
        raise UsageError(f'{where}: has no factors')
    stacks = {}
    for leaf, layers in found.items():
        check_factors(leaf, layers, base, ('a', 'b'), where)
        scales = {i: alpha / parts['a'].shape[0] if alpha else 1.0 for i, parts in layers.items()}
        turned = _turned(leaf, arch, back=True)
        stacks[f'layers/{leaf}'] = stack_of(leaf, layers, base, scales, fetch, where, turned=turned)
    return OpenedAdapter(where, name, stacks, {}, notes=tuple(notes))


def _turned(leaf: str, arch: Arch, *, back: bool) -> Callable[[np.ndarray], np.ndarray]:
    """A function of B in our shape, [r, heads, head_dim]: its pairs of rotary positions as the architecture has them,
    or `back`."""
    if not arch.interleaved or not leaf.endswith(tables.ROTATED):
        return lambda b: b

    def turn(b: np.ndarray) -> np.ndarray:
        *lead, wide = b.shape
        pairs = (wide // 2, 2) if back else (2, wide // 2)
        return b.reshape(*lead, *pairs).swapaxes(-1, -2).reshape(b.shape)

    return turn


# ---- writing ----


def write_adapter(adapter: OpenedAdapter, base: Opened, path: str | Path, *, say: Callable[[str], None]) -> None:
    """Writes a file that llama.cpp takes as `--lora` beside the model `base` as `lm.convert` writes that. Every factor
    is in float32, and what multiplies it is in B where one number for all would not do.

    Raises UsageError, before anything is written, for what has no place in such a file.
    """
    if adapter.scored:
        raise UsageError(f'{adapter.where}: a reward model has no GGUF form')
    name, arch = writer.choose(base.model)
    alpha, plan, content = adapter.alpha(), [], []
    for parameter, layer, parts in adapter.stored(alpha):
        if 'magnitude' in parts:
            raise UsageError(f'{adapter.where}: DoRA has no place in a GGUF adapter: leave out --format, to merge it')
        leaf, rank = parameter.removeprefix('layers/'), len(parts['a'])
        outputs = base.leaf(parameter).shape[len(parameters.row(leaf).contracted) :]
        b = _turned(leaf, arch, back=False)(parts['b'].T.reshape(rank, *outputs)).reshape(rank, -1).T
        for end, x in (('.lora_a', parts['a']), ('.lora_b', b)):
            plan.append(Tensor(arch.layer[parameter].format(layer=layer) + end, 'F32', x.shape, x.nbytes, '', 0))
            content.append(np.ascontiguousarray(x, np.float32).tobytes())
    told = {TYPE: 'adapter', KIND: 'lora', ALPHA: float(alpha), 'general.name': Path(adapter.where).name or 'adapter'}
    say(f'{path}: {len(plan)} tensors of architecture {name}; its base: python -m lm.convert {adapter.base} BASE.gguf')
    with files.streamed(path) as write:
        write(writer.header(name, told, plan))
        for data in content:
            write(data + bytes(-len(data) % writer.ALIGNMENT))
