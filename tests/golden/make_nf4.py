"""Makes tests/golden/nf4.npz: a matrix as bitsandbytes quantizes it (NF4 with double quantization).

    python tests/golden/make_nf4.py

It needs torch and bitsandbytes (2.13.0 and 0.50.2 made what is here); the tests need none of them.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

OUT_IN = (80, 256)  # 320 groups: two blocks of scales

w = (0.05 * np.random.default_rng(0).standard_normal(OUT_IN)).astype(np.float32)
w[3] = 0
codes, state = bnb.quantize_4bit(torch.tensor(w), blocksize=64, compress_statistics=True, quant_type='nf4')
np.savez_compressed(
    Path(__file__).parent / 'nf4.npz', w=w, codes=codes.numpy().ravel(), scale=state.absmax.numpy(),
    steps=state.state2.absmax.numpy(), offset=state.offset.numpy(), dense=bnb.dequantize_4bit(codes, state).numpy(),
    book=state.code.numpy(), dynamic=state.state2.code.numpy(),
)  # fmt: skip
