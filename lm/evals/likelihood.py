"""Log-likelihoods: how likely a text is after another, whether it is what greedy decoding gives, and text up to a stop
string: what tasks of multiple choice, perplexity and generation ask of a model."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.tokenizer import Tokenizer
from lm.model import head, transformer
from lm.model.config import ModelConfig
from lm.model.parameters import Params
from lm.sampling.choice import Sampling, likeliest
from lm.sampling.generate import stream

TOKENS_A_DEVICE = 1 << 13  # at once, of padded rows
CHUNK = 64  # widths are multiples of it, and so many places have their logits at once
BATCH, EVERY = 64, 16  # prompts that are continued at once; tokens after which stop strings are looked for
Progress = Callable[[int], Any]


class Request(NamedTuple):
    """Ids, and the ids after them whose likelihood is asked for. At least one stands before."""

    context: Sequence[int]
    continuation: Sequence[int]


def windows(context: Sequence[int], continuation: Sequence[int], length: int) -> Iterator[tuple[list[int], int]]:
    """(at most length + 1 ids, how many of the last of them are asked for): each id of a continuation once, after as
    many of those before it as a model of `length` tokens takes. So a long context is cut on the left, and a long text
    is cut into pieces, the last of which has a full context."""
    ids, at = [*context, *continuation], len(context)
    while at < len(ids):
        end = min(len(ids), at + length)
        yield ids[max(0, end - 1 - length) : end], end - at
        at = end


def log_likelihoods(
    params: Params, cfg: ModelConfig, requests: Sequence[Request], *, length: int, done: Progress = lambda n: None
) -> list[tuple[float, bool]]:
    """(log p of the continuation in nats, whether each of its ids is the likeliest) of each request.

    Args:
      length: tokens that the model takes at once.
      done: is told how many windows were read.
    """
    parts = [(i, *window) for i, r in enumerate(requests) for window in windows(*r, length)]
    parts.sort(key=lambda part: -len(part[1]))  # those of like length together, the largest batches first
    total, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    at = 0
    while at < len(parts):
        width, rows = _shape(len(parts[at][1]) - 1, len(parts) - at)
        some = parts[at : at + rows]
        logp, all_likeliest = jax.device_get(_row_sums(params, _batch(some, rows, width), cfg=cfg))
        for (i, *_), value, is_greedy in zip(some, logp, all_likeliest, strict=False):
            total[i] += value
            greedy[i] &= is_greedy
        at += rows
        done(len(some))
    return [(float(value), bool(is_greedy)) for value, is_greedy in zip(total, greedy, strict=True)]


def _shape(longest: int, left: int) -> tuple[int, int]:
    """(width, rows) of a batch: few shapes are compiled, and all devices share it."""
    mesh = jax.sharding.get_mesh()
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    width = math.ceil(longest / CHUNK) * CHUNK
    most = max(1, TOKENS_A_DEVICE * mesh.size // width)
    rows = min(1 << (most.bit_length() - 1), 1 << (left - 1).bit_length())
    return width, math.ceil(rows / parts) * parts


def _batch(parts: Sequence[tuple[int, list[int], int]], rows: int, width: int) -> dict[str, jax.Array]:
    """Each part in a row; what follows it is padding that no token before it sees."""
    tokens_BT, targets_BT = np.zeros((2, rows, width), np.int32)
    weights_BT = np.zeros((rows, width), np.float32)
    for row, (_, ids, asked) in enumerate(parts):
        n = len(ids) - 1
        tokens_BT[row, :n], targets_BT[row, :n] = ids[:-1], ids[1:]
        weights_BT[row, n - asked : n] = 1
    return sharding.shard_batch({'tokens_BT': tokens_BT, 'targets_BT': targets_BT, 'weights_BT': weights_BT})


@partial(jax.jit, static_argnames='cfg')
def _row_sums(params: Params, batch: Any, *, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(Σ weight·log p(target), whether all targets that weigh something are the likeliest) of each row."""
    h_BTD, _ = transformer.forward(params, cfg, batch['tokens_BT'])
    scaled_BTD, w, options = transformer.head_inputs(params, cfg, h_BTD)
    logp_BT, _, _ = head.logp(scaled_BTD, w, batch['targets_BT'], **options)
    hit_BT = _likeliest(params, cfg, h_BTD) == batch['targets_BT']
    weights_BT = batch['weights_BT']
    found = (jnp.sum(weights_BT * logp_BT, axis=-1), jnp.all(hit_BT | (weights_BT == 0), axis=-1))
    return sharding.replicated(found)


def _likeliest(params: Params, cfg: ModelConfig, h_BTD: jax.Array) -> jax.Array:
    """The likeliest id at each place, [B, T], the logits of CHUNK places at a time."""
    B, T, D = h_BTD.shape
    if sharding.axis_sizes():
        h_BTD = jax.reshard(h_BTD, sharding.array_spec('BTD', h_BTD.shape, sharding.BATCH_AXES))
    chunks = jnp.moveaxis(h_BTD.reshape(B, T // CHUNK, CHUNK, D), 1, 0)
    found = jax.lax.map(lambda h_BCD: likeliest(transformer.logits(params, cfg, h_BCD)), chunks)
    return jnp.moveaxis(found, 0, 1).reshape(B, T)


# ---- generation up to a text ----


def before(text: str, stops: Sequence[str]) -> str | None:
    """Returns the text before its first stop string; None if there is none in it."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def completions(
    params: Params, cfg: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], *, stops: Sequence[str],
    stop_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, seed: int = 0, done: Progress = lambda n: None,
) -> list[str]:  # fmt: skip
    """The text that follows each prompt, up to a stop id, before a stop string, or of max_new_tokens; BATCH prompts of
    like length at a time, each batch until all of it has ended."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    options = {'stop_ids': stop_ids, 'max_new_tokens': max_new_tokens, 'sampling': sampling, 'every': EVERY}
    options['allowed'] = tokenizer.is_token
    found: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        some, texts = order[start : start + BATCH], []
        for rows in stream(params, cfg, [prompts[i] for i in some], seed=seed + start, **options):
            texts = [tokenizer.decode(row.ids) for row in rows]
            if all(row.ended or before(text, stops) is not None for row, text in zip(rows, texts, strict=True)):
                break
        for i, text in zip(some, texts, strict=True):
            cut = before(text, stops)
            found[i] = text if cut is None else cut
        done(len(some))
    return [found[i] for i in range(len(prompts))]
