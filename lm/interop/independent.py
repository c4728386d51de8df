"""What was written, read again by others than our readers: the packages of the formats themselves, and Orbax."""

from pathlib import Path

import numpy as np

from lm.interop import gguf_file, gguf_in
from lm.interop.gguf_file import Info
from lm.interop.opened import Opened


def open_gguf(path: str | Path) -> Opened:
    """A GGUF file whose tensors the package gguf finds and dequantizes."""
    gguf = gguf_file.package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def fetch(name: str, info: Info) -> np.ndarray:
        found = tensors[name]
        if info.kind in ('F32', 'F16'):
            return np.asarray(found.data).reshape(info.shape)
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        return values.astype(gguf_file.dtype_of(info)).reshape(info.shape)

    return gguf_in.open_gguf(path, fetch=fetch)
