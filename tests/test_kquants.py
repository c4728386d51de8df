"""The quantized kinds against llama.cpp's own figures (golden/kquants.json), and the mixes against its choices."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lm.interop.gguf import kquants, mixes
from lm.interop.graph import DTYPES

gguf = pytest.importorskip('gguf')
GOLDEN = Path(__file__).parent / 'golden'
STORED = json.loads((GOLDEN / 'kquants.json').read_text())
KINDS = tuple(kquants.FLOATS)
K_QUANTS = ('Q4_K', 'Q5_K', 'Q6_K')


def rows_of(name: str) -> np.ndarray:
    """As golden/make_kquants.py makes them."""
    if name == 'real':
        return np.load(GOLDEN / 'kquants.npz')['real'].astype(np.float32)
    if name == 'gaussian':
        return (np.random.RandomState(0).standard_normal((64, 1024)) * 0.02).astype(np.float32)
    normal = np.random.RandomState(1).standard_normal((4, 64, 1024))
    return (normal[0] / np.sqrt((normal[1:] ** 2).mean(0)) * 0.02).astype(np.float32)


def read_back(blocks: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float64)


def error(rows: np.ndarray, kind: str) -> float:
    """Relative root mean square."""
    left = read_back(kquants.quantize(rows, kind), kind) - rows
    return float(np.sqrt((left**2).mean() / (rows.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['gaussian', 'heavy', 'real'])
def test_errors_are_those_of_llama_cpp(name, kind):
    assert error(rows_of(name), kind) <= 1.05 * STORED['rmse'][name][kind]


@pytest.mark.parametrize('kind', kquants.SIMPLE)
def test_bytes_without_a_search_are_those_of_llama_cpp(kind):
    """Of the stored rows: draws from a normal may differ in a last bit between machines."""
    assert hashlib.sha256(kquants.quantize(rows_of('real'), kind).tobytes()).hexdigest() == STORED['sha256'][kind]


@pytest.mark.parametrize('kind', KINDS)
def test_zeros_and_constants_stay(kind):
    for value in (0.0, -0.0, 0.37, -0.37):
        rows = np.full((2, 256), value, np.float32)
        assert np.abs(read_back(kquants.quantize(rows, kind), kind) - value).max() <= 0.01 * abs(value)
    mixed = np.concatenate([np.zeros((1, 256)), np.ones((1, 256))]).astype(np.float32)
    mixed[1, :64] = 0  # blocks of nothing beside others
    assert np.abs(read_back(kquants.quantize(mixed, kind), kind) - mixed).max() <= 0.01


@pytest.mark.parametrize('kind', K_QUANTS)
def test_an_outlier_is_kept_and_its_block_alone_pays(kind):
    rows = rows_of('gaussian')[:4, :256].copy()
    rows[:, 5] = 0.5  # 25 standard deviations
    seen = read_back(kquants.quantize(rows, kind), kind)
    assert np.abs(seen[:, 5] / 0.5 - 1).max() < 0.05
    assert np.abs(seen[:, 32:] - rows[:, 32:]).max() < 0.02


@pytest.mark.parametrize('kind', K_QUANTS)
@pytest.mark.parametrize('factor', [2.0**-3, 2.0**9])
def test_a_power_of_two_changes_only_the_scale(kind, factor):
    rows = rows_of('gaussian')[:8] * 64  # such that no scale is below float16's normal numbers
    plain = read_back(kquants.quantize(rows, kind), kind)
    scaled = read_back(kquants.quantize(rows * np.float32(factor), kind), kind)
    assert np.array_equal(scaled, plain * factor)


@pytest.mark.parametrize('kind', K_QUANTS)
def test_numbers_below_float16_are_no_nan(kind):
    for size in (1e-12, 1e-30, 1e-42):
        rows = rows_of('gaussian')[:1] * np.float32(size)
        assert np.abs(read_back(kquants.quantize(rows, kind), kind)).max() < 1e-6


@pytest.mark.parametrize('kind', K_QUANTS)
def test_chunks_do_not_matter(kind):
    """More rows than a chunk holds, its end within a row: each has the bytes that it has alone."""
    few = rows_of('heavy')[:3, :768]
    many = np.tile(few, (kquants.CHUNK // 9 + 2, 1))
    assert kquants.CHUNK % 3 and many.size // 256 > kquants.CHUNK
    whole = kquants.quantize(many, kind)
    assert whole.shape == (len(many), 3 * kquants.FLOATS[kind][0]) and whole.dtype == np.uint8
    alone = np.concatenate([kquants.quantize(few[i : i + 1], kind) for i in range(len(few))])
    assert np.array_equal(whole, np.tile(alone, (len(many) // 3, 1)))


@pytest.mark.parametrize('kind', KINDS)
def test_what_has_no_blocks_is_refused(kind):
    rows = np.ones((2, 256), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        rows[1, 77] = bad
        with pytest.raises(ValueError, match='not finite'):
            kquants.quantize(rows, kind)
    with pytest.raises(ValueError, match='multiple of'):
        kquants.quantize(np.ones((2, 250), np.float32), kind)
    with pytest.raises(ValueError, match='multiple of'):
        kquants.quantize(np.ones(256, np.float32), kind)
    for most in (1e30, 1.2e38, 1.8e38, 3.4e38):  # of 1.2e38 the power of two above has no normal reciprocal
        with pytest.raises(ValueError, match='too large'):
            kquants.quantize(np.linspace(-most, most, 256)[None].astype(np.float32), kind)
    with pytest.raises(ValueError, match='not one of'):
        kquants.quantize(rows, 'Q3_K')


# ---- mixes ----


@pytest.mark.parametrize('model', STORED['models'])
def test_mixes_choose_as_llama_cpp(model):
    dim, keys, ffn, layers, tied = STORED['models'][model]
    shapes = {
        'attn_k': (keys, dim), 'attn_v': (keys, dim), 'ffn_down': (dim, ffn), 'ffn_up': (ffn, dim),
        'ffn_gate': (ffn, dim), 'output': (256, dim), 'token_embd': (256, dim),
    }  # fmt: skip
    for mix, roles in STORED['kinds'][model].items():
        for role, stored in roles.items():
            top = role in ('token_embd', 'output', 'output_norm')
            shape = (dim,) if role.endswith('norm') else shapes.get(role, (dim, dim))
            kinds = [
                mixes.kind_of(f'{role}.weight' if top else f'blk.{i}.{role}.weight', shape, mix=mix, layer=i,
                              layers=layers, tied=tied)
                for i in range(1 if top else layers)
            ]  # fmt: skip
            expected = stored.split()
            assert kinds == (expected * len(kinds) if len(expected) == 1 else expected), (mix, role)


def test_smollm2_itself():
    """Rows of 576, which 256 does not divide, and of 1536, which it does; 30 layers."""

    def kind(name, shape, layer=0):
        return mixes.kind_of(name, shape, mix='Q4_K_M', layer=layer, layers=30)

    assert kind('token_embd.weight', (49152, 576)) == 'Q8_0'
    assert [kind(f'blk.{i}.attn_v.weight', (192, 576), i) for i in (0, 3, 5)] == ['Q8_0', 'Q5_0', 'Q8_0']
    down = [i for i in range(30) if kind(f'blk.{i}.ffn_down.weight', (576, 1536), i) == 'Q6_K']
    assert down == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


def test_other_widths_and_mixes():
    assert mixes.kind_of('blk.0.ffn_up.weight', (64, 40), mix='Q4_K_M', layer=0, layers=2) == 'F16'
    assert mixes.kind_of('blk.0.ffn_up.weight', (64, 40), mix='Q8_0', layer=0, layers=2) == 'F16'
    assert mixes.kind_of('blk.0.attn_q.bias', (64,), mix='Q4_0', layer=0, layers=2) == 'F32'
    with pytest.raises(ValueError, match='Q3_K_L'):
        mixes.kind_of('output.weight', (64, 256), mix='Q3_K_L', layer=0, layers=2)


def test_every_mix_is_of_kinds_that_are_written():
    assert {kind for _, kind in mixes.MIXES.values()} <= {*DTYPES, *kquants.FLOATS}
