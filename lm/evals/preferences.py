"""Preference metrics: how a model, or a reward model, takes held-out pairs, beside what their lengths alone would
tell."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import progress, sharding
from lm.data import pairs, pipeline
from lm.data.pairs import PairStore
from lm.model import sequences
from lm.model.config import ModelConfig
from lm.model.parameters import Params

BINS = 10  # of the probability, for calibration
Batches = Iterable[tuple[np.ndarray, Mapping[str, jax.Array]]]


@partial(jax.jit, static_argnames=('cfg', 'measure'))
def _measured(params: Params, batch: Any, *, cfg: ModelConfig, measure: Callable) -> Any:
    """Returns what a function of `sequences` gives for a batch, with its slots' weights, whole on every device."""
    found = (measure(params, cfg, batch), batch['weight_BP'])
    return jax.reshard(found, P()) if sharding.axis_sizes() else found


def of_pairs(measure: Callable, params: Params, cfg: ModelConfig, batches: Batches, count: int) -> np.ndarray:
    """[count, sides] float32: `sequences.log_probs` or `.scores` of a store's `count` pairs; NaN for those that are not
    in the batches.

    Args:
      batches: from `in_order`.
    """
    found: list[tuple[np.ndarray, Any]] = []
    for numbers, batch in progress.over(batches, 'batches of pairs'):
        found.append((numbers, _measured(params, batch, cfg=cfg, measure=measure)))
        jax.block_until_ready([values for _, values in found[-2:-1]])  # so that what is shown as done is done
    sides = len(found[0][1][0])
    out = np.full((count, sides), np.nan, np.float32)
    for numbers, (values, weight_BP) in jax.device_get(found):
        for side in range(sides):
            out[numbers, side] = values[side][weight_BP > 0]
    return out


log_probs, scores = (partial(of_pairs, measure) for measure in (sequences.log_probs, sequences.scores))


@dataclass(frozen=True)
class _InOrder:
    """Batches of rows with the numbers of their pairs."""

    rows: pairs.PairRows
    at_once: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.at_once)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Mapping[str, jax.Array]]]:
        for start in range(0, len(self.rows), self.at_once):
            here = range(start, min(start + self.at_once, len(self.rows)))
            rows = [self.rows.row(i) for i in here]
            rows += [self.rows.empty] * (self.at_once - len(rows))
            yield np.concatenate([self.rows.numbers(i) for i in here]), sharding.shard_batch(pipeline.stack(rows))


def in_order(store: PairStore, *, seq_len: int, batch_size: int, most: int | None = None) -> Batches:
    """(numbers of its pairs in the order of their slots, batch) of the first `most` usable pairs of a store, on the
    mesh, `batch_size` rows at a time."""
    found = pairs.in_order(store, seq_len=seq_len, most=most)
    return _InOrder(found, rows_shared(min(batch_size, len(found))))


def rows_shared(needed: int, microbatches: int = 1) -> int:
    """Rows of a batch that needs so many: a multiple of what microbatches and devices share."""
    mesh = jax.sharding.get_mesh().shape
    parts = microbatches * mesh['data'] * mesh['fsdp']
    return -(-needed // parts) * parts


def lengths(store: PairStore, measured: np.ndarray, *, seq_len: int) -> np.ndarray:
    """[measured, 2] tokens of the two responses of some pairs, as far as they are within seq_len.

    Args:
      measured: [pairs] bool, which pairs.
    """
    here = np.flatnonzero(measured).tolist()
    return np.array([[t[1:seq_len].sum() for _, t in store.pair(i)[:2]] for i in here], np.int64)


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


def baselines(store: PairStore, measured: np.ndarray, *, seq_len: int) -> dict[str, float]:
    """{'longer_wins', 'shorter_wins'}: the accuracy of preferring by length alone, on the pairs that are measured."""
    here = ~np.isnan(measured[:, 0])
    size = lengths(store, here, seq_len=seq_len)
    longer = ranked(size, size, store.table[here, 0])
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
    here = ~np.isnan(policy[:, 0])
    label, size = store.table[here, 0], lengths(store, here, seq_len=seq_len)

    def of(logp: np.ndarray) -> dict[str, float]:
        found = {'accuracy_per_token': ranked(logp[:, :2] / np.maximum(size, 1), size, label)}
        for side, name in enumerate(('chosen_loss', 'rejected_loss')):
            found[name] = -float(logp[:, side].sum() / size[:, side].sum()) if size[:, side].any() else None
        return {name: value for name, value in found.items() if value is not None}

    found = of(policy[here]) | baselines(store, policy, seq_len=seq_len)
    if reference is None:
        return found
    gained = (policy[here] - reference[here])[:, :2]
    accuracy = ranked(gained, size, label)
    found |= {} if accuracy is None else {'accuracy': accuracy}
    return found | {f'reference_{name}': value for name, value in of(reference[here]).items()}


def reward_metrics(store: PairStore, score: np.ndarray, *, seq_len: int) -> dict[str, float]:
    """Metrics of scores [pairs, 2]: accuracy and mean margin, the log loss of σ(margin), its expected calibration error
    (Guo et al., 2017, equation 3), the correlation of score with length, and the baselines of length."""
    here = ~np.isnan(score[:, 0])
    label, size, score = store.table[here, 0], lengths(store, here, seq_len=seq_len), score[here].astype(np.float64)
    margin = score[:, 0] - score[:, 1]
    loss = label * np.logaddexp(0, -margin) + (1 - label) * np.logaddexp(0, margin)
    return {
        'accuracy': wins(margin, label), 'margin': float(margin.mean()), 'log_loss': float(loss.mean()),
        'calibration_error': calibration_error(margin, label), 'length_correlation': correlation(score, size),
        **baselines(store, np.where(here[:, None], 0.0, np.nan), seq_len=seq_len),
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
