"""Compares two models at rest: their logits on a fixed text, computed layer by layer.

Of each model one layer is in memory at a time, so that what does not fit there can still be compared.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import progress
from lm.errors import UsageError
from lm.interop.opened import Opened
from lm.interop.tokenizers import files as tokenizer_files
from lm.model import sequences, transformer
from lm.model.config import ModelConfig

WORDS = 1 << 12  # of the vocabulary whose logits are made at once
TEXT = """\
A lighthouse keeper wrote down the weather three times a day. On the ninth of March the wind turned north, and by noon \
the glass had fallen so far that she tapped it twice. "It is broken," said her brother; it was not. At four o'clock \
the first wave came over the wall, and the boats that had not gone out were glad of it. She lit the lamp an hour \
early, counted the seconds between two flashes (there were twelve), and wrote: storm, all well, two cups of tea.

def flashes(minutes: int, period: float = 12.0) -> int:
    # How often the lamp is seen in so many minutes.
    return int(minutes * 60 / period)

Is 5 × 7 more than 6²? No: 35 < 36. Am Morgen war das Meer ruhig, et le phare brillait encore.
"""


class Agreement(NamedTuple):
    """The differences found: the largest difference of a logit (of a reward model: of a score), KL(a‖b) in nats a
    token, and each one's perplexity on the text; None for a reward model, which has no logits. NaN where the numbers
    are."""

    largest: float
    kl: float | None
    perplexity_before: float | None
    perplexity_after: float | None
    tokens: int


def compare(a: Opened, b: Opened, *, tokens: int) -> Agreement:
    """Measures how far b is from a on the first `tokens` tokens of the text, by a's tokenizer.

    Raises UsageError if b's gives other ids, or is a reward model where a is none.
    """
    if a.scored != b.scored:
        raise UsageError(f'{a.where} and {b.where}: one is a reward model and the other is not')
    ids = ids_of(a, tokens)
    if ids_of(b, tokens) != ids:
        raise UsageError(f'{b.where}: its tokenizer gives other ids than that of {a.where}')
    if a.scored:
        largest = np.max(np.abs(scores(a, ids) - scores(b, ids)))
        return Agreement(float(largest), None, None, None, len(ids))
    largest, kl = np.float32(0), 0.0
    nll = np.zeros(2)
    for p_V, q_V, target in zip(logits_of(a, ids), logits_of(b, ids), [*ids[1:], None], strict=True):
        largest = np.maximum(largest, np.max(np.abs(p_V - q_V)))  # NaN stays, which max() loses
        with np.errstate(invalid='ignore'):
            p_V, q_V = (x - np.logaddexp.reduce(x) for x in (p_V.astype(np.float64), q_V.astype(np.float64)))
        kl += float(np.sum(np.exp(p_V) * (p_V - q_V)))
        nll -= 0 if target is None else (p_V[target], q_V[target])
    before, after = np.exp(nll / (len(ids) - 1))
    return Agreement(float(largest), float(np.maximum(kl / len(ids), 0)), float(before), float(after), len(ids))


def ids_of(opened: Opened, tokens: int) -> list[int]:
    """The text's first ids by a model's tokenizer. Raises UsageError if it has none that fits."""
    words, rows = tokenizer_files.loaded(opened.tokenizer), opened.model['vocab_size']
    ids = words.encode_prompt(TEXT)[:tokens]
    if max(ids) >= rows:
        raise UsageError(
            f'{opened.where}: its tokenizer gives the id {max(ids)}, and the model has {rows} rows for them'
        )
    return ids


def logits_of(opened: Opened, ids: Sequence[int]) -> np.ndarray:
    """Float32 logits [T, V] of a row of ids."""
    h_BTD, cfg = hidden(opened, ids), ModelConfig(**opened.model)
    parts = []
    for w, name in _head(opened, cfg):
        words = w.shape[0 if cfg.tied else 1]
        some = dataclasses.replace(cfg, vocab_size=words, vocab_multiple=1)
        parts.append(np.asarray(_logits({name: w}, some, h_BTD)[0]))
    return np.concatenate(parts, axis=-1)


def _head(opened: Opened, cfg: ModelConfig) -> Iterator[tuple[jax.Array, str]]:
    """The head, some words at a time."""
    name = 'embed_VD' if cfg.tied else 'head_DV'
    whole = opened.leaves[name].read(0)
    for at in range(0, cfg.vocab_size, WORDS):
        yield _float(whole[at : at + WORDS] if cfg.tied else whole[:, at : at + WORDS]), name


def scores(opened: Opened, ids: Sequence[int]) -> np.ndarray:
    """A reward model's score at each place of a row of ids, float32 [T]."""
    params = {name: _float(opened.leaves[name].read(0)) for name in ('score_D', 'bias_score')}
    return np.asarray(sequences.token_scores(params, hidden(opened, ids))[0])


def hidden(opened: Opened, ids: Sequence[int]) -> jax.Array:
    """Final hidden states [1, T, D] of a row of ids."""
    cfg = ModelConfig(**opened.model)
    rows_TD = _float(opened.leaves['embed_VD'].read(0)[np.asarray(ids)])
    x_BTD = transformer.embed({'embed_VD': rows_TD}, cfg, jnp.arange(len(ids))[None])
    for i in progress.over(range(cfg.layers), f'layers of {opened.where}'):  # each is done before the next is read
        x_BTD = jax.block_until_ready(_layer(layer_of(opened, i), cfg, x_BTD, number=i % len(cfg.kinds)))
    return transformer.final_norm({'final_norm_D': _float(opened.leaves['final_norm_D'].read(0))}, cfg, x_BTD)


def layer_of(opened: Opened, i: int) -> dict[str, jax.Array]:
    """The parameters of one layer, float32."""
    names = [name for name in opened.leaves if name.startswith('layers/')]
    return {name.removeprefix('layers/'): _float(opened.leaves[name].read(i)) for name in names}


_layer: Any = jax.jit(transformer.layer, static_argnames=('cfg', 'number'))
_logits: Any = jax.jit(transformer.logits, static_argnames='cfg')


def _float(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
