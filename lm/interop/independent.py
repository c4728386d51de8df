"""Models that were written, their tensors read again by others than our readers: the packages of the formats."""

import math
from pathlib import Path

import numpy as np

from lm.errors import UsageError, install
from lm.interop import peft
from lm.interop.gguf import adapter as gguf_adapter
from lm.interop.gguf import file as gguf_file
from lm.interop.gguf import reader as gguf_in
from lm.interop.gguf.file import CHUNK, READ_AS
from lm.interop.graph import Fetch, Info
from lm.interop.huggingface import folder as huggingface
from lm.interop.opened import Opened


def open_gguf(path: str | Path) -> Opened:
    """A GGUF file whose tensors the package gguf finds and dequantizes."""
    gguf = gguf_file.package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def fetch(info: Info) -> np.ndarray:
        """Some rows at a time, and read: what is mapped, as the package would, counts as our memory while it lives."""
        found = tensors[info.name]
        kind, width = found.data.dtype, found.data.shape[-1]
        out = np.empty((found.data.size // width, math.prod(info.shape) * width // found.data.size), READ_AS[info.kind])
        step = max(1, CHUNK // (width * kind.itemsize))
        for at in range(0, len(out), step):
            n = min(step, len(out) - at)
            place = found.data_offset + at * width * kind.itemsize
            rows = np.fromfile(path, kind, n * width, offset=place).reshape(n, width)
            out[at : at + n] = rows if info.kind in ('F32', 'F16') else gguf.quants.dequantize(rows, found.tensor_type)
        return out.reshape(info.shape)

    return gguf_in.open_gguf(path, fetch=fetch)


def open_gguf_adapter(path: str | Path, base: Opened) -> Opened:
    """A model with the adapter of a GGUF file, whose tensors the package gguf reads."""
    gguf = gguf_file.package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    fetch = lambda info: np.array(tensors[info.name].data).reshape(info.shape)
    return gguf_adapter.open_adapter(path, base, fetch=fetch).over(base)


def open_folder(path: str | Path) -> Opened:
    """A folder of Hugging Face's whose tensors the package safetensors reads."""
    return huggingface.open_folder(path, fetch=_fetch())


def open_adapter(path: str | Path, base: Opened) -> Opened:
    """A model with the adapter of a folder of peft's, whose tensors the package safetensors reads."""
    return peft.open_adapter(path, base, fetch=_fetch()).over(base)


def _fetch() -> Fetch:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UsageError(f'needs the package safetensors: {install("convert")}') from None

    def fetch(info: Info) -> np.ndarray:
        with safe_open(str(info.path), 'np') as file:
            return file.get_tensor(info.name)

    return fetch
