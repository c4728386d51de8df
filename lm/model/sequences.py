"""From packed rows to the sequences in them: each one's log-probs, and its score by a reward model.

A batch is as lm/data/pairs.py makes it: `sequence_BT` says which of its row's sequences a token is of, if of any.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lm import sharding
from lm.model import head, seam, transformer
from lm.model.config import ModelConfig
from lm.model.feed_forward import Aux
from lm.model.parameters import Params

Batch = Mapping[str, jax.Array]


def log_probs(params: Params, cfg: ModelConfig, batch: Batch) -> list[jax.Array]:
    """Σ log p of the targets that weigh something, of each side of each pair: float32 [B, P] a side."""
    return by_side(token_log_probs(params, cfg, batch)[0], batch)


def token_log_probs(
    params: Params, cfg: ModelConfig, batch: Batch, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array, Aux]:
    """(log p of each target, the entropy there, both at a temperature, times the target's weight and float32 [B, T];
    the auxiliary sums of the forward pass)."""
    h_BTD, aux = hidden(params, cfg, batch)
    return *of_hidden(params, cfg, h_BTD, batch, temperature), aux


def of_hidden(
    params: Params, cfg: ModelConfig, h_BTD: jax.Array, batch: Batch, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The first two of `token_log_probs`, of final hidden states."""
    h_BTD, w, options = transformer.head_inputs(params, cfg, h_BTD, temperature)
    weights_BT = batch['weights_BT']
    logp_BT, _, entropy_BT = head.logp(h_BTD, w, batch['targets_BT'], weights_BT, **options)
    return logp_BT * weights_BT, entropy_BT * weights_BT


def token_kl(
    params: Params, reference: Params, cfg: ModelConfig, h_BTD: jax.Array, batch: Batch, temperature: float
) -> jax.Array:
    """KL(π‖π_ref) over the vocabulary at each target, at a temperature, times the target's weight: float32 [B, T], in
    nats, with gradient in the policy's parameters and final hidden states `h_BTD`."""
    other_BTD, _ = hidden(reference, cfg, batch)
    h_BTD, w, options = transformer.head_inputs(params, cfg, h_BTD, temperature)
    other_BTD, other_w, _ = transformer.head_inputs(reference, cfg, other_BTD, temperature)
    weights_BT = batch['weights_BT']
    return head.kl(h_BTD, w, jax.lax.stop_gradient(other_BTD), other_w, weights_BT, **options) * weights_BT


def outside(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """The sum over the tokens that are of no sequence: those of text that is replayed beside the pairs."""
    return jnp.sum(jnp.where(batch['sequence_BT'] < 0, x_BT, 0))


def scores(params: Params, cfg: ModelConfig, batch: Batch) -> list[jax.Array]:
    """A reward model's score of each side of each pair, read at its last token: float32 [B, P] a side."""
    return scores_and_aux(params, cfg, batch)[0]


def scores_and_aux(params: Params, cfg: ModelConfig, batch: Batch) -> tuple[list[jax.Array], Aux]:
    """(`scores`, the auxiliary sums of the forward pass)."""
    h_BTD, aux = hidden(params, cfg, batch)
    return by_side(token_scores(params, h_BTD) * batch['last_BT'], batch), aux


def token_values(params: Params, cfg: ModelConfig, batch: Batch) -> tuple[jax.Array, Aux]:
    """(a critic's value before each target that weighs something, float32 [B, T]; the auxiliary sums)."""
    h_BTD, aux = hidden(params, cfg, batch)
    return token_scores(params, h_BTD) * batch['weights_BT'], aux


def last_scores(params: Params, cfg: ModelConfig, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """A reward model's score of each row, one sequence of `length_B` tokens and then padding: float32 [B]."""
    score_BT = token_scores(params, transformer.forward(params, cfg, tokens_BT)[0])
    last_BT = jnp.arange(tokens_BT.shape[1]) == length_B[:, None] - 1
    if sharding.axis_sizes():
        last_BT = jax.reshard(last_BT, jax.typeof(score_BT).sharding.spec)
    return jnp.sum(jnp.where(last_BT, score_BT, 0), axis=1)


def token_scores(params: Params, h_BTD: jax.Array) -> jax.Array:
    """The score that each place would have as the last one, float32 [B, T]."""
    w_D = seam.gather(seam.dense(params['score_D']), 'D').astype(jnp.float32)
    return jnp.sum(h_BTD.astype(jnp.float32) * w_D, axis=-1) + params['bias_score']


def hidden(params: Params, cfg: ModelConfig, batch: Batch) -> tuple[jax.Array, Aux]:
    """(final hidden states [B, T, D] of packed rows, the auxiliary sums of the forward pass)."""
    rows = {name: batch[name] for name in ('segments_BT', 'positions_BT')}
    return transformer.forward(params, cfg, batch['tokens_BT'], **rows)


def by_side(x_BT: jax.Array, batch: Batch) -> list[jax.Array]:
    """Sums over the tokens of each sequence: [B, P] for each of the sides that a pair has."""
    P = batch['weight_BP'].shape[1]
    sides = sum(name.startswith('length_') for name in batch)
    sequences = jnp.arange(P * sides)
    member_BTP = batch['sequence_BT'][..., None] == sequences
    x_BTP = jnp.where(member_BTP, x_BT[..., None], 0)
    x_BP = jnp.sum(x_BTP, axis=1)
    if sharding.axis_sizes():
        x_BP = jax.reshard(x_BP, sharding.activation_spec('BP', x_BP.shape))
    return [x_BP[:, side::sides] for side in range(sides)]
