"""The kind that each tensor of a GGUF file gets: the mixes of llama.cpp's `llama-quantize`, for dense decoders.

A mix has a base kind, which most matrices get; more bits go where errors cost most: to what makes the logits, to the
values of attention and the way down of the MLP, there in some layers only.
"""

from collections.abc import Sequence

PLAIN = ('F32', 'F16', 'BF16')
# Names of --quantize: (general.file_type, the base kind).
MIXES = {
    'F32': (0, 'F32'), 'F16': (1, 'F16'), 'BF16': (32, 'BF16'), 'Q8_0': (7, 'Q8_0'), 'Q4_0': (2, 'Q4_0'),
    'Q4_K_S': (14, 'Q4_K'), 'Q4_K_M': (15, 'Q4_K'), 'Q5_K_M': (17, 'Q5_K'), 'Q6_K': (18, 'Q6_K'),
}  # fmt: skip
# Of rows that a super-block's 256 does not divide: blocks of 32, with at least the bits.
SMALLER = {'Q4_K': 'Q5_0', 'Q5_K': 'Q5_1', 'Q6_K': 'Q8_0'}
SUPER, BLOCK = 256, 32
FIRST_VALUES = 4  # layers, in Q4_K_S
SHARED_DEEP = 80  # layers: such models with fewer heads of keys and values than of queries have small attn_v matrices


def kind_of(name: str, shape: Sequence[int], *, mix: str, layer: int, layers: int, tied: bool = True) -> str:
    """The kind of one tensor, 'F32', 'Q4_K' …

    Args:
      name: as in the file, 'blk.0.attn_v.weight'.
      shape: as numpy has it: a row, which blocks divide, is the last axis.
      mix: one of MIXES.
      layer: the number of its layer; not read for what is in none.
      layers: how many the model has.
      tied: whether token_embd.weight makes the logits, too.

    Raises ValueError for another mix.
    """
    if mix not in MIXES:
        raise ValueError(f'{mix} is not one of {", ".join(MIXES)}')
    if len(shape) == 1:  # norms and biases: few, and they matter
        return 'F32'
    if mix in PLAIN:
        return mix
    kind = _wanted(name, shape, mix=mix, layer=layer, layers=layers, tied=tied)
    kind = SMALLER.get(kind, kind) if shape[-1] % SUPER else kind
    return kind if shape[-1] % BLOCK == 0 else 'F16'


def more_bits(layer: int, layers: int) -> bool:
    """Tells whether a layer is of those with more: the first eighth, the last, and each third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _wanted(name: str, shape: Sequence[int], *, mix: str, layer: int, layers: int, tied: bool) -> str:
    base, small = MIXES[mix][1], mix == 'Q4_K_S'
    values, down = name.endswith('.attn_v.weight'), name.endswith('.ffn_down.weight')
    if name == 'output.weight' or (tied and name == 'token_embd.weight'):
        return base if mix == 'Q8_0' else 'Q6_K'
    if (values or down) and mix.endswith('_M') and more_bits(layer, layers):
        return 'Q6_K'
    if small and ((values and layer < FIRST_VALUES) or (down and layer < layers // 8)):
        return 'Q5_K'
    shared = values and layers == SHARED_DEEP and shape[0] < shape[-1]
    return 'Q5_K' if shared and base == 'Q4_K' else base
