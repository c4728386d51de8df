"""The reader of GGUF files: what is wrong with one is one line, at once; what is right comes as `gguf` reads it."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, STRING, U8, array, header, padded, pair, string, tensor, text, u32

from lm.errors import UsageError
from lm.interop.gguf import file as gguf_file
from lm.interop.graph import DTYPES

HUGE = 2**62
DATA = bytes(256)
GOOD = header([string('general.architecture', 'llama')], [tensor('a', [8]), tensor('b', [8], offset=32)])

HOSTILE = {
    'empty': (b'', 'does not begin with GGUF'),
    'not GGUF': (b'PK\3\4' + DATA, 'does not begin with GGUF'),
    'only the magic': (b'GGUF', 'the version at byte 4 reaches over the end'),
    'version 1': (header(version=1), 'its version is 1'),
    'version 9': (header(version=9), 'its version is 9'),
    'big-endian': (b'GGUF' + struct.pack('>IQQ', 3, 0, 0), 'big-endian'),
    'a count of tensors': (header(n_tensors=HUGE), 'the number of tensors'),
    'a count of metadata': (header(n_pairs=HUGE), 'the number of metadata'),
    'a long key': (header([struct.pack('<Q', HUGE)] + [b' ' * 64]), 'a key has'),
    'a key that is no text': (header([pair(b'\xff\xfe', 4, DATA[:4])]), 'not valid UTF-8'),
    'a long string': (header([pair('k', STRING, struct.pack('<Q', HUGE))]), 'reaches over the end'),
    'a key twice': (header([u32('k', 1), u32('k', 2)]), "the key 'k' twice"),
    'an unknown type': (header([pair('k', 13, DATA)]), 'the type 13'),
    'an unknown type of elements': (header([array('k', 77, 1, DATA)]), 'elements of the type 77'),
    'a long array': (header([array('k', U8, HUGE)]), "the elements of 'k'"),
    'a long array of strings': (header([array('k', STRING, 2**33, DATA)]), "the elements of 'k'"),
    'arrays in arrays': (header([array('k', ARRAY, 1, struct.pack('<IQ', ARRAY, 1) * 50 + DATA)]), 'more than 2 deep'),
    'a bool of 2': (header([pair('k', BOOL, b'\2')]), 'neither 0 nor 1'),
    'alignment of 0': (header([u32('general.alignment', 0)]), 'general.alignment=0'),
    'alignment of 24': (header([u32('general.alignment', 24)]), 'general.alignment=24'),
    'alignment of text': (header([string('general.alignment', 'x')]), "general.alignment='x'"),
    'a name twice': (header([], [tensor('a', [8]), tensor('a', [8], offset=32)]) + DATA, "the tensor 'a' twice"),
    'no dims': (header([], [tensor('a', [])]) + DATA, '0 dims'),
    'many dims': (header([], [tensor('a', [1] * 4, n_dims=2**31)]) + DATA, 'dims, not 1 to 4'),
    'a dim of 0': (header([], [tensor('a', [0, 8])]) + DATA, 'cannot be of kind F32'),
    'absurd dims': (header([], [tensor('a', [2**63, 2**63, 2**63, 4])]) + DATA, 'reaches over the end'),
    'dims whose product is 0 in 64 bits': (header([], [tensor('a', [2**32, 2**32])]) + DATA, 'reaches over the end'),
    'an unknown kind': (header([], [tensor('a', [8], kind=99)]) + DATA, 'of kind 99'),
    'half a block': (header([], [tensor('a', [40], kind=8)]) + DATA, 'blocks of 32'),
    'an offset beyond': (header([], [tensor('a', [8], offset=2**40)]) + DATA, 'reaches over the end'),
    'an offset that wraps': (header([], [tensor('a', [8], offset=2**64 - 32)]) + DATA, 'reaches over the end'),
    'an unaligned offset': (header([], [tensor('a', [8], offset=4)]) + DATA, 'no multiple of 32'),
    'overlap': (header([], [tensor('a', [16]), tensor('b', [8], offset=32)]) + DATA, "'a' and 'b' overlap"),
    'the same place': (header([], [tensor('a', [8]), tensor('b', [8])]) + DATA, 'overlap'),
    'a tensor cut short': (padded(GOOD) + DATA[:60], "'b' of shape (8,) reaches over the end"),
    'a name that is too long': (header([], [text(b'x' * 70_000) + DATA]), "a tensor's name has 70000 bytes"),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_file_is_one_line(name, tmp_path):
    data, why = HOSTILE[name]
    path = tmp_path / 'bad.gguf'
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as caught:
            gguf_file.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f'{path}: ') and why in line and '\n' not in line and len(line) < 400


def test_header_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / 'cut.gguf'
    for n in range(len(GOOD)):
        path.write_bytes(GOOD[:n])
        with pytest.raises(UsageError):
            gguf_file.read_header(path)
    path.write_bytes(padded(GOOD) + DATA)
    assert set(gguf_file.read_header(path).tensors) == {'a', 'b'}


def test_array_longer_than_any_vocabulary_is_refused(tmp_path, monkeypatch):
    path = tmp_path / 'long.gguf'
    path.write_bytes(header([array('k', U8, 200, DATA[:200])]))
    assert gguf_file.read_header(path).metadata == {'k': [0] * 200}
    monkeypatch.setattr(gguf_file, 'MAX_ELEMENTS', 100)
    with pytest.raises(UsageError, match='200 elements, more than 100'):
        gguf_file.read_header(path)


def test_a_folder_and_no_file_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / 'none.gguf'):
        with pytest.raises(UsageError, match='cannot be read'):
            gguf_file.read_header(path)


def random_bytes(kind, shape, draw):
    """A tensor's bytes as blocks; scales are small, so that all numbers are finite."""
    elements, size = gguf_file.BLOCKS[kind]
    if kind in DTYPES:
        return draw.normal(size=shape).astype(DTYPES[kind]).view(np.uint8).reshape(shape[0], -1)
    data = draw.integers(0, 256, (shape[0], shape[1] // elements, size), np.uint8)
    return (data & 0x3F).reshape(shape[0], -1)  # the top bits of a float16's exponent


@pytest.fixture(scope='module')
def every_kind(tmp_path_factory):
    """A file with one tensor of each kind, written by `gguf`, and metadata of each type."""
    path, draw = tmp_path_factory.mktemp('kinds') / 'kinds.gguf', np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, 'llama')
    for name in ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'uint64', 'int64'):
        getattr(writer, f'add_{name}')(name, 7)
    writer.add_float32('float32', 0.1)
    writer.add_float64('float64', 0.1)
    writer.add_bool('bool', True)
    for name, value in {'ints': [1, -2], 'floats': [0.5, 2.0], 'strings': ['ä', ''], 'bools': [True, False]}.items():
        writer.add_array(name, value)
    for kind in gguf_file.BLOCKS:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, random_bytes(kind, (37, 512), draw), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_what_the_package_reads(every_kind):
    mine, theirs = gguf_file.read_header(every_kind).metadata, gguf.GGUFReader(every_kind).fields
    assert mine == {k: field.contents() for k, field in theirs.items() if not k.startswith('GGUF.')}
    assert mine['bool'] is True and mine['strings'] == ['ä', '']


@pytest.mark.parametrize('kind', gguf_file.BLOCKS)
def test_tensor_is_what_the_package_reads(kind, every_kind, monkeypatch):
    info = gguf_file.read_header(every_kind).tensors[kind]
    (theirs,) = (t for t in gguf.GGUFReader(every_kind).tensors if t.name == kind)
    want = gguf.quants.dequantize(theirs.data, theirs.tensor_type).astype(np.float32)
    assert info.kind == kind and info.shape == want.shape and np.isfinite(want).all()
    for chunk in (gguf_file.CHUNK, 1000):  # one chunk; a few rows each
        monkeypatch.setattr(gguf_file, 'CHUNK', chunk)
        found = gguf_file.read(info)
        assert found.dtype == gguf_file.READ_AS[kind]
        np.testing.assert_array_equal(found.astype(np.float32), want)


def test_file_that_shrinks_is_one_line(every_kind, tmp_path):
    path = tmp_path / 'short.gguf'
    path.write_bytes(every_kind.read_bytes())
    info = gguf_file.read_header(path).tensors['Q6_K']
    with open(path, 'r+b') as f:
        f.truncate(info.at + 100)
    with pytest.raises(UsageError, match='cut short'):
        gguf_file.read(info)
