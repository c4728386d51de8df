"""Loss, perplexity and bits per byte on held-out text."""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import progress, sharding
from lm.data.tokenizer import Tokenizer
from lm.model import head, transformer
from lm.model.config import ModelConfig
from lm.model.parameters import Params


@partial(jax.jit, static_argnames='cfg')
def _sums(params: Params, batch: Mapping[str, jax.Array], *, cfg: ModelConfig) -> dict[str, jax.Array]:
    h_BTD, _ = transformer.forward(
        params, cfg, batch['tokens_BT'], segments_BT=batch['segments_BT'], positions_BT=batch['positions_BT']
    )
    h_BTD, w, options = transformer.head_inputs(params, cfg, h_BTD)
    logp_BT, _, _ = head.logp(h_BTD, w, batch['targets_BT'], **options)
    nll_BT = -batch['weights_BT'] * logp_BT
    return {'nll': jnp.sum(nll_BT), 'byte_nll': jnp.sum(nll_BT * batch['spelled_BT'])}


def sums(
    params: Params,
    cfg: ModelConfig,
    batches: Iterable[Mapping[str, np.ndarray]],
    bytes_V: np.ndarray,
    name: str = '',
    space_after: int | None = None,
) -> dict[str, float]:
    """Sums over batches of packed rows: nll in nats over all targets, and over those that spell bytes; tokens; bytes.

    Tokens and bytes are counted as integers on the host: float32 would be exact for 16 million of them alone.

    Args:
      bytes_V: how many UTF-8 bytes each id stands for; 0 for control symbols.
      name: of the source, to be shown.
      space_after: the id after which the tokenizer has put a space that is not the text's, a byte not to be counted.
    """
    found, tokens, written = [], 0, 0
    for batch in progress.over(batches, f'held-out rows of {name}' if name else 'held-out rows'):
        bytes_BT = bytes_V[batch['targets_BT']] * (batch['weights_BT'] > 0)
        bytes_BT -= (bytes_BT > 0) & (batch['tokens_BT'] == space_after)
        tokens += int(np.count_nonzero(batch['weights_BT']))
        written += int(bytes_BT.sum(dtype=np.int64))
        spelled_BT = (bytes_BT > 0).astype(np.float32)
        found.append(_sums(params, sharding.shard_batch({**batch, 'spelled_BT': spelled_BT}), cfg=cfg))
        jax.block_until_ready(found[-2:-1])  # so that what is shown as done is done
    sums_of = jax.device_get(found)
    nll = {name: float(np.sum([s[name] for s in sums_of], dtype=np.float64)) for name in ('nll', 'byte_nll')}
    return {**nll, 'tokens': tokens, 'bytes': written}


def metrics(totals: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{'eval/SOURCE/loss', 'ppl', 'bpb'} from each source's sums, and 'eval/loss', 'eval/bpb' over all of them.

    Bits per byte are Σ nll / (ln 2 · bytes) over the tokens that spell bytes: comparable across vocabularies, and exact
    because every byte of a held-out document is some target's, once.
    """
    out = {}
    for name, t in totals.items():
        loss = t['nll'] / max(t['tokens'], 1)
        out |= {f'eval/{name}/loss': loss, f'eval/{name}/ppl': math.exp(min(loss, 80)), f'eval/{name}/bpb': bpb(t)}
    whole = {k: sum(t[k] for t in totals.values()) for k in ('nll', 'tokens', 'byte_nll', 'bytes')}
    return out | {'eval/loss': whole['nll'] / max(whole['tokens'], 1), 'eval/bpb': bpb(whole)}


def bpb(t: Mapping[str, float]) -> float:
    """Bits per byte of one set of sums."""
    return t['byte_nll'] / (math.log(2) * max(t['bytes'], 1))


def by_source(params: Params, cfg: ModelConfig, batches: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, float]:
    """`metrics` of {source: batches}."""
    bytes_V = tokenizer.bytes_of_ids
    space_after = None if tokenizer.prepend_scheme == 'never' else tokenizer.bos_id
    return metrics({name: sums(params, cfg, b, bytes_V, name, space_after) for name, b in batches.items()})
