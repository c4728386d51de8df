"""Attention kernels of accelerators, and which one a device gets.

    blocks   causal blocks of queries in plain JAX (`attention.py`): runs anywhere, the CPU's own
    dense    all logits at once, in float32: the twin that the others are compared with
    cudnn    cuDNN's flash attention, on NVIDIA GPUs
    splash   the Pallas kernel that skips what the mask hides (`jax.experimental.pallas.ops.tpu`), on TPUs

A kernel here is one device's share of the work and has the signature of `attention._attend`: queries [B, T, N, H],
which begin at `offset` in a sequence of S keys [B, S, K, H], and the segments of both.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding
from lm.errors import UsageError

NAMES = ('blocks', 'dense', 'cudnn', 'splash')
PREFERRED = {'cuda': 'cudnn', 'tpu': 'splash'}  # of other platforms: blocks
NEEDS = {'cudnn': ('cuda', 'an NVIDIA GPU'), 'splash': ('tpu', 'a TPU')}
LANES = 128  # the splash kernel's queries and keys come in multiples of a TPU's vector width
SPLASH_BLOCKS = (512, 256, LANES)  # a side of its blocks, the first that divides; more would not fit in every TPU
NAME = 'attention'  # of what remat policies keep of it
INTERPRET = False  # tests run the splash kernel on CPU, step by step


class Device(NamedTuple):
    """The facts of a device on which the choice of a kernel depends."""

    platform: str  # cpu, tpu, cuda, rocm
    kind: str = ''
    capability: float = 0.0  # CUDA's, e.g. 9.0


class Choice(NamedTuple):
    """A backend's name, and why it is the one."""

    name: str
    why: str


# ---- the choice ----


def this_device() -> Device:
    """A device of the current mesh, or where there is none the one that JAX computes on. Not while tracing."""
    device = sharding.first_device()
    if device.platform != 'gpu':
        return Device(device.platform, device.device_kind)
    if 'cuda' not in device.client.platform_version.lower():
        return Device('rocm', device.device_kind)
    return Device('cuda', device.device_kind, float(device.compute_capability))


def choose(device: Device, *, dtype: str, head_dim: int, softcap: float | None, asked: str | None = None) -> Choice:
    """The backend for a device and a model: as asked, else the device's own kernel, else blocks.

    Raises UsageError if what is asked for cannot be had.
    """
    name = asked or PREFERRED.get(device.platform, 'blocks')
    if name not in NAMES:
        raise UsageError(f'execution.attention={name} is not one of {", ".join(NAMES)}')
    obstacle = _obstacle(name, device, dtype=dtype, head_dim=head_dim, softcap=softcap)
    if not obstacle:
        return Choice(name, 'as set' if asked else device.kind or device.platform)
    if asked:
        raise UsageError(
            f'execution.attention={name} {obstacle}: leave it out, the platform then decides, or set blocks'
        )
    return Choice('blocks', f'{name} {obstacle}')


def _obstacle(name: str, device: Device, *, dtype: str, head_dim: int, softcap: float | None) -> str | None:
    """Returns why a backend cannot be used, or None."""
    platform, words = NEEDS.get(name, (device.platform, ''))
    if platform != device.platform:
        return f'needs {words}, this is {device.platform}'
    largest = 256 if device.capability >= 9 else 128
    limits = (
        (device.capability < 8, f'needs compute capability 8.0 (Ampere), {device.kind} has {device.capability}'),
        (dtype not in ('bfloat16', 'float16'), f'computes in bfloat16, execution.dtype is {dtype}'),
        (softcap is not None, f'has no soft-cap, model.attn_softcap is {softcap}'),
        (
            head_dim % 8 or head_dim > largest,
            f'takes heads of a multiple of 8 up to {largest}, model.head_dim is {head_dim}',
        ),
    )
    return next((why for applies, why in limits if applies), None) if name == 'cudnn' else None


# ---- the kernels ----


def visible(
    T: int, S: int, *, offset: Any = 0, window: int | None = None, segments_BT: Any = None, segments_BS: Any = None
) -> jax.Array:
    """The boolean mask [B or 1, T, S] of queries that begin at `offset` among S keys."""
    behind_TS = jnp.arange(T)[:, None] + offset - jnp.arange(S)
    mask_TS = behind_TS >= 0 if window is None else (behind_TS >= 0) & (behind_TS < window)
    return mask_TS[None] if segments_BT is None else mask_TS & (segments_BT[:, :, None] == segments_BS[:, None])


def cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, *, offset, window, softcap):
    """cuDNN's flash attention (Dao, 2023), through `jax.nn`, in bfloat16 or float16.

    Causality and the window cost nothing, they are the kernel's own. Segments and the offset of a split sequence are a
    mask, which JAX turns into an added [B, 1, T, S] of the operands' dtype: 2·B·T·S bytes a layer, read once a head.
    (The kernel's packed layout would do without, but its statistics are as large as the most segments that a row may
    have times B·N·T, and it is not public.)
    """
    del softcap
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if segments_BT is None and offset is None:
        reach = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=reach, implementation='cudnn'
        )
    where = {'offset': 0 if offset is None else offset, 'window': window}
    mask_BTS = visible(T, S, **where, segments_BT=segments_BT, segments_BS=segments_BS)
    pads = ((0, T % 2), (0, S % 2))  # the kernel's backward pass takes an added matrix of even sides alone
    q_BTNH, k_BSKH, v_BSKH = _pad(q_BTNH, T % 2), _pad(k_BSKH, S % 2), _pad(v_BSKH, S % 2)
    mask_BNTS = jnp.pad(mask_BTS, ((0, 0), *pads))[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_BNTS, is_causal=offset is None, implementation='cudnn'
    )
    return out_BTNH[:, :T]


def splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, *, offset, window, softcap):
    """Splash attention: blocks that the mask hides are neither computed nor fetched, and no mask is held.

    What it knows of the mask is made for the whole sequence; a device with a part of the queries takes its rows of
    that. A sequence on one device is padded to a multiple of 128 (causality hides the padding).

    Raises UsageError if a split sequence's parts are no multiple of 128.
    """
    T, (_, S, _, H) = q_BTNH.shape[1], k_BSKH.shape
    if offset is None:
        extra = -T % LANES
        q_BTNH, k_BSKH, v_BSKH = (_pad(x, extra) for x in (q_BTNH, k_BSKH, v_BSKH))
        segments_BT, segments_BS = (None if x is None else _pad(x, extra) for x in (segments_BT, segments_BS))
    elif T % LANES:
        raise UsageError(
            f'execution.attention=splash: {S} tokens in {S // T} parts are {T} each, not a multiple of {LANES}: change '
            'seq_len or mesh.seq, or set execution.attention=blocks'
        )
    ops = _splash_ops()
    kernel = _splash_kernel(ops, q_BTNH.shape, k_BSKH.shape[1], offset, window, softcap)
    segments = () if segments_BT is None else (ops.SegmentIds(segments_BT, segments_BS),)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    out_BNTH = jax.vmap(kernel)(heads_first(q_BTNH * H**-0.5), heads_first(k_BSKH), heads_first(v_BSKH), *segments)
    return heads_first(out_BNTH)[:, :T]


def _splash_ops() -> Any:
    """The kernel's module. It takes half a second to import, which only its users pay."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _splash_kernel(
    ops: Any, shape: tuple[int, ...], S: int, offset: Any, window: int | None, softcap: float | None
) -> Any:
    """The kernel for [B, T, N, H] queries from `offset` on among S keys."""
    _, T, N, _ = shape
    block = next(b for b in SPLASH_BLOCKS if T % b == 0)
    fields = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
    sizes = ops.BlockSizes(**{f'block_{field}': block for field in fields})
    mask = ops.CausalMask((S, S)) if window is None else ops.LocalMask((S, S), (window - 1, 0), 0)
    kernel = ops.make_splash_mha(
        ops.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=S // T,
        attn_logits_soft_cap=softcap, residual_checkpoint_name=NAME, interpret=INTERPRET,
    )  # fmt: skip
    if offset is None:
        return kernel

    def mine(x):
        """This device's rows of what the kernel knows of the mask: [1, query blocks, key blocks] or [queries]."""
        axis, part = (1, x.shape[1] * T // S) if x.ndim == 3 else (0, T)
        return jax.lax.dynamic_slice_in_dim(x, offset // T * part, part, axis)

    return jax.tree.map(mine, kernel)


def _pad(x: jax.Array, extra: int) -> jax.Array:
    """[B, T, …] -> [B, T + extra, …] with zeros."""
    return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) if extra else x
