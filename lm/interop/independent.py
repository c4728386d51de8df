"""What was written, its tensors read again by others than our readers: the packages of the formats themselves."""

from pathlib import Path

import numpy as np

from lm.errors import UsageError
from lm.interop import gguf_file, gguf_in, huggingface
from lm.interop.gguf_file import Info
from lm.interop.opened import Opened
from lm.interop.safetensors_file import Info as Stored


def open_gguf(path: str | Path) -> Opened:
    """A GGUF file whose tensors the package gguf finds and dequantizes."""
    gguf = gguf_file.package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def fetch(name: str, info: Info) -> np.ndarray:
        found = tensors[name]
        # Read, not mapped as the package would: what is mapped counts as the process's memory for as long as it lives.
        data = np.fromfile(path, found.data.dtype, found.data.size, offset=found.data_offset).reshape(found.data.shape)
        if info.kind in ('F32', 'F16'):
            return data.reshape(info.shape)
        values = gguf.quants.dequantize(data, found.tensor_type)
        return values.astype(gguf_file.dtype_of(info)).reshape(info.shape)

    return gguf_in.open_gguf(path, fetch=fetch)


def open_folder(path: str | Path) -> Opened:
    """A folder of Hugging Face's whose tensors the package safetensors reads."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UsageError("needs the package safetensors (pip install 'lm[convert]')") from None

    def fetch(name: str, tensor: Stored) -> np.ndarray:
        with safe_open(str(tensor.path), 'np') as file:
            return file.get_tensor(name)

    return huggingface.open_folder(path, fetch=fetch)
