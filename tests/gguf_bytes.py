"""GGUF files made by hand, byte by byte, so that anything can be wrong with them."""

import struct

STRING, ARRAY, U32, U8, BOOL = 8, 9, 4, 0, 7


def text(s):
    data = s if isinstance(s, bytes) else s.encode()
    return struct.pack('<Q', len(data)) + data


def pair(key, kind, value):
    """A key and its value, packed."""
    return text(key) + struct.pack('<I', kind) + value


def string(key, value):
    return pair(key, STRING, text(value))


def u32(key, value):
    return pair(key, U32, struct.pack('<I', value))


def array(key, kind, count, data=b''):
    return pair(key, ARRAY, struct.pack('<IQ', kind, count) + data)


def tensor(name, dims, kind=0, offset=0, n_dims=None):
    """A tensor's entry in the header; dims as the file has them, the fastest first."""
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f'<I{len(dims)}QIQ', count, *dims, kind, offset)


def header(pairs=(), tensors=(), *, magic=b'GGUF', version=3, n_pairs=None, n_tensors=None):
    counts = len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    return magic + struct.pack('<IQQ', version, *counts) + b''.join(pairs) + b''.join(tensors)


def padded(data, alignment=32):
    return data + bytes(-len(data) % alignment)
