"""Preference metrics: how a model, or a reward model, takes held-out pairs, beside what their lengths alone would
tell."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from lm import progress, sharding
from lm.data import pairs, pipeline
from lm.data.pairs import PairStore
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.model.parameters import Params

BINS = 10  # of the probability, for calibration
Batches: TypeAlias = pipeline.InOrder  # of `pairs.PairRows`


@partial(jax.jit, static_argnames=('cfg', 'measure'))
def _measured(params: Params, batch: Any, *, cfg: ModelConfig, measure: Callable) -> Any:
    """Returns what a function of `sequences` gives for a batch, with its slots' weights, whole on every device."""
    found = (measure(params, cfg, batch), batch['weight_BP'])
    return sharding.replicated(found)


def of_pairs(measure: Callable, params: Params, cfg: ModelConfig, batches: Batches, count: int) -> np.ndarray:
    """[count, sides] float32: `sequences.log_probs` or `.scores` of a store's `count` pairs; NaN for those that are not
    in the batches.

    Args:
      batches: from `in_order`.
    """
    found, rows = [], batches.rows
    for batch in progress.over(batches, 'batches of pairs'):
        found.append(_measured(params, sharding.shard_batch(batch), cfg=cfg, measure=measure))
        jax.block_until_ready(found[-2:-1])  # so that what is shown as done is done
    values, weight_BP = jax.tree.map(lambda *parts: np.concatenate(parts), *jax.device_get(found))
    numbers = np.concatenate([rows.numbers(i) for i in range(len(rows))])
    out = np.full((count, len(values)), np.nan, np.float32)
    out[numbers] = np.stack([side_BP[weight_BP > 0] for side_BP in values], axis=-1)
    return out


log_probs, scores = (partial(of_pairs, measure) for measure in (sequences.log_probs, sequences.scores))


def in_order(store: PairStore, *, seq_len: int, batch_size: int, most: int | None = None) -> Batches:
    """Batches of the first `most` usable pairs of a store, `batch_size` rows at a time."""
    rows = pairs.in_order(store, seq_len=seq_len, most=most)
    return pipeline.in_order(rows, batch_size=rows_shared(min(batch_size, len(rows))))


def rows_shared(needed: int, microbatches: int = 1) -> int:
    """Rows of a batch that needs so many: a multiple of what microbatches and devices share."""
    mesh = jax.sharding.get_mesh().shape
    parts = microbatches * mesh['data'] * mesh['fsdp']
    return -(-needed // parts) * parts


def measured(store: PairStore, values: np.ndarray, *, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([pairs] bool, which of them have values and are measured; [measured] labels; [measured, 2] tokens of the two
    responses, as far as they are within seq_len)."""
    here = ~np.isnan(values[:, 0])
    numbers = np.flatnonzero(here).tolist()
    size = np.array([[t[1:seq_len].sum() for _, t in store.pair(i)[:2]] for i in numbers], np.int64)
    return here, store.table[here, 0], size


def ranked(value: np.ndarray, size: np.ndarray, labels: np.ndarray) -> float | None:
    """`wins` of values [pairs, 2]; of single answers, the part of all pairs of a good one and a bad one in which the
    good one has the higher value. None without one of either.

    Args:
      size: [pairs, 2] tokens of the responses, 0 where there is none.
    """
    if size.all():
        return wins(value[:, 0] - value[:, 1], labels)
    good, bad = (value[size[:, side] > 0, side] for side in (0, 1))
    if not len(good) or not len(bad):
        return None
    below, within = (np.searchsorted(np.sort(bad), good, where).sum() for where in ('left', 'right'))
    return float(below + within) / (2 * len(good) * len(bad))


def wins(margins: np.ndarray, labels: np.ndarray) -> float:
    """The part of pairs whose margin has the label's sign; what is undecided counts half."""
    return float(np.mean((1 + np.sign(margins) * np.sign(labels - 0.5)) / 2))


def baselines(size: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{'longer_wins', 'shorter_wins'}: accuracies of preferring by length alone, of [pairs, 2] tokens of responses."""
    longer = ranked(size, size, labels)
    return {} if longer is None else {'longer_wins': longer, 'shorter_wins': 1 - longer}


def policy_metrics(
    store: PairStore, policy: np.ndarray, reference: np.ndarray | None, *, seq_len: int
) -> dict[str, float]:
    """Metrics of log-probs [pairs, ≥ 2]; accuracies of single answers are those of `ranked`, and what there is nothing
    to say of is left out:

    accuracy              the chosen response has gained more on the reference (the implicit reward is higher)
    accuracy_per_token    the chosen response is likelier per token
    chosen_loss, rejected_loss   −log p per token: both can rise while the accuracies do (likelihood displacement)
    reference_…           the last three of the reference
    """
    here, label, size = measured(store, policy, seq_len=seq_len)

    def of(logp: np.ndarray) -> dict[str, float]:
        found = {'accuracy_per_token': ranked(logp[:, :2] / np.maximum(size, 1), size, label)}
        for side, name in enumerate(('chosen_loss', 'rejected_loss')):
            found[name] = -float(logp[:, side].sum() / size[:, side].sum()) if size[:, side].any() else None
        return {name: value for name, value in found.items() if value is not None}

    found = of(policy[here]) | baselines(size, label)
    if reference is None:
        return found
    gained = (policy[here] - reference[here])[:, :2]
    accuracy = ranked(gained, size, label)
    found |= {} if accuracy is None else {'accuracy': accuracy}
    return found | {f'reference_{name}': value for name, value in of(reference[here]).items()}


def reward_metrics(store: PairStore, score: np.ndarray, *, seq_len: int) -> dict[str, float]:
    """Metrics of scores [pairs, 2]: accuracy and mean margin, the log loss of σ(margin), its expected calibration error
    (Guo et al., 2017, equation 3), the correlation of score with length, and the baselines of length."""
    here, label, size = measured(store, score, seq_len=seq_len)
    score = score[here].astype(np.float64)
    margin = score[:, 0] - score[:, 1]
    loss = label * np.logaddexp(0, -margin) + (1 - label) * np.logaddexp(0, margin)
    return {
        'accuracy': wins(margin, label), 'margin': float(margin.mean()), 'log_loss': float(loss.mean()),
        'calibration_error': calibration_error(margin, label), 'length_correlation': correlation(score, size),
        **baselines(size, label),
    }  # fmt: skip


def calibration_error(margin: np.ndarray, label: np.ndarray) -> float:
    """Σ over BINS of confidence, from ½ to 1, of the part of pairs in it × |how often they are right − confidence|."""
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = np.where(margin >= 0, label, 1 - label)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float(np.sum(right[bins == b] - confidence[bins == b]))) for b in range(BINS)]
    return sum(gaps) / max(len(margin), 1)


def correlation(score: np.ndarray, size: np.ndarray) -> float:
    """Pearson's, over both responses of all pairs; 0 where one does not vary."""
    x, y = score.ravel() - score.mean(), size.ravel() - size.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else 0.0
