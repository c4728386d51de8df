"""The training step: (state, batch) -> (state, metrics), the same for every stage."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.losses.objective import measured, objective
from lm.model import lora
from lm.model.roles import Roles, assemble
from lm.training import optimizer as optim

DROPOUT = 1  # folded into a microbatch's key for what adapters leave out
Batch = Mapping[str, jax.Array]
Sums = Mapping[str, jax.Array]


@struct.dataclass
class TrainState:
    """The state that a step reads and writes, parameters by their role. `frozen` (a base, a reference, a teacher) is an
    argument and not a closure, because XLA would bake a closed-over array into the program; optimizer and checkpoint
    see only `trainable`."""

    step: jax.Array  # int32, updates tried so far; also the position in the data
    trainable: Roles
    frozen: Roles
    opt: Any
    rng: jax.Array  # key data; the key of step i is fold_in(rng, i)
    ema: Roles | None = None  # the average of `trainable`; None: off

    @property
    def models(self) -> dict[str, Any]:
        """{role: parameters} to evaluate, sample from and hand on: the average if there is one."""
        return assemble(self.trainable if self.ema is None else self.ema, self.frozen)


class Loss(NamedTuple):
    """A stage's loss. `terms(models, batch, key)` gives ({term: sum}, {metric: sum}) of a microbatch, `models` being
    parameters by their role; `denominators(batch)` gives {term or metric: W} of the whole batch; `coefs` {term:
    coefficient}.

    What does not decompose into sums is made first: `pre_pass(models, batch, key)` gives {name: sum} of a microbatch,
    and `terms` takes these, added up over the whole batch and without gradient, as its last argument.
    """

    terms: Callable[..., tuple[Sums, Sums]]
    denominators: Callable[[Batch], Sums]
    coefs: Mapping[str, float]
    pre_pass: Callable[[Roles, Batch, jax.Array], Sums] | None = None


def create(
    trainable: Roles, frozen: Roles, optimizer: optax.GradientTransformation, seed: int, *, ema: bool = False
) -> TrainState:
    """A state at step 0. Call it under jit and the current mesh: the moments then lie where their parameters do."""
    key = jax.random.key_data(jax.random.key(seed))
    average = jax.tree.map(jnp.copy, trainable) if ema else None  # a copy: both are donated to the step
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), key, average)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    clip: float | None,
    microbatches: int = 1,
    rate: optax.Schedule | None = None,
    ema: float | None = None,
    counts: np.ndarray | None = None,
    rates: Mapping[str, Any] = MappingProxyType({}),
    filled: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step function, to be jitted with its state donated.

    Gradients are summed over the microbatches, each divided by the denominators of the whole batch, so any number of
    microbatches gives the same update. An update whose loss or gradient norm is not finite leaves parameters and
    optimizer as they were and reports skipped = 1; one whose gradient is 0 leaves them, too.

    Args:
      clip: the largest global norm of the gradients of each role; None is off.
      rate: the optimizer's own schedule, only to be reported as `lr`.
      counts: how many of the microbatches are computed at each step, while the batch grows; the last number holds for
        every later step. The others have weight 0. None: all of them.
      ema: decay of the average of the weights, for a state that has one.
      rates: {role: what its updates, or each part of them, are multiplied by}, 1 for the others.
      filled: leave out the microbatches after the last that holds a token.
    """

    update = optax.with_extra_args_support(optimizer).update

    def clipped(grads: Roles, norm: jax.Array) -> Roles:
        if clip is None or len(grads) == 1:
            return grads if clip is None else optim.clip(grads, norm, clip)
        return {role: optim.clip(own, optax.tree.norm(own), clip) for role, own in grads.items()}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        denominators = loss.denominators(batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        count = microbatches if counts is None else jnp.asarray(counts)[jnp.minimum(state.step, len(counts) - 1)]
        count = holding(batch, microbatches) if filled else count

        def on_microbatch(fn: Callable, trainable: Roles, part: Batch, index: jax.Array | int) -> Any:
            return fn(assemble(trainable, state.frozen), part, jax.random.fold_in(key, index))

        terms_of = loss.terms
        if loss.pre_pass is not None:
            pre_pass = partial(on_microbatch, loss.pre_pass)
            global_sums = accumulate(pre_pass, state.trainable, batch, microbatches, count)
            terms_of = lambda *args: loss.terms(*args, global_sums)

        def micro(trainable: Roles, part: Batch, index: jax.Array | int) -> tuple[jax.Array, Sums]:
            trainable = lora.with_keys(trainable, jax.random.fold_in(jax.random.fold_in(key, index), DROPOUT))
            terms, metrics = on_microbatch(terms_of, trainable, part, index)
            return objective(terms, denominators, loss.coefs), {**metrics, **terms}

        value_and_grad = jax.value_and_grad(micro, has_aux=True)
        (value, sums), grads = accumulate(value_and_grad, state.trainable, batch, microbatches, count)
        with jax.named_scope('optimizer'):
            norm = optax.tree.norm(grads)
            finite = jnp.isfinite(norm) & jnp.isfinite(value)
            learns = finite & (norm > 0)  # of no gradient at all a step of Muon's would be as large as of any
            updates: Any
            updates, opt = update(clipped(grads, norm), state.opt, state.trainable, step=state.step)
            times = lambda by, part: jax.tree.map(lambda x: x * by, part)
            updates = {**updates, **{role: jax.tree.map(times, by, updates[role]) for role, by in rates.items()}}
            trainable = optax.apply_updates(state.trainable, updates)
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(learns, n, o), new, old)
            trainable, opt = keep(trainable, state.trainable), keep(opt, state.opt)
            average = None if ema is None else averaged(state.ema, trainable, state.step, decay=ema)
        metrics = {name: measured(total, denominators[name]) for name, total in sums.items()}
        metrics |= {'loss': value, 'grad_norm': norm, 'skipped': 1 - finite.astype(jnp.int32)}
        metrics |= {} if rate is None else {'lr': jnp.asarray(rate(state.step))}
        return dataclasses.replace(state, step=state.step + 1, trainable=trainable, opt=opt, ema=average), metrics

    return step


def averaged(ema: Any, trainable: Any, step: jax.Array, *, decay: float) -> Any:
    """The average with one more: decay is min(decay, (1 + step)/(10 + step)), so that it forgets where it began and is
    at each step the weights to use, with no bias left to divide out."""
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, x: e + rate.astype(e.dtype) * (x - e), ema, trainable)


def accumulate(fn: Callable, trainable: Any, batch: Batch, n: int, count: jax.Array | int) -> Any:
    """Sums fn(trainable, microbatch j, j), such as ((value, aux), gradients), over the first `count` of n microbatches;
    microbatch j is rows j, j+n, j+2n, …, so that every device keeps its own rows."""
    if n == 1:
        return fn(trainable, batch, 0)
    parts = {name: split_rows(x, n) for name, x in batch.items()}

    def body(j: jax.Array, total: Any) -> Any:
        part = {name: jax.lax.dynamic_index_in_dim(x, j, keepdims=False) for name, x in parts.items()}
        return jax.tree.map(jnp.add, total, fn(trainable, part, j))

    first = {name: x[0] for name, x in parts.items()}
    shapes = jax.eval_shape(fn, trainable, first, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)
    return jax.lax.fori_loop(0, count, body, zeros)


def holding(batch: Batch, n: int) -> jax.Array:
    """The number of microbatches, of n, up to the last that holds a token."""
    any_B = jnp.any(batch['segments_BT'] > 0, axis=1).astype(jnp.int32)
    return jnp.max(jnp.where(jnp.any(split_rows(any_B, n) > 0, axis=1), jnp.arange(1, n + 1), 0))


def split_rows(x: jax.Array, n: int) -> jax.Array:
    """[B, …] -> [n, B/n, …] with row j of part i = row j·n + i, without moving data between devices."""
    shape = (x.shape[0] // n, n, *x.shape[1:])
    if not sharding.axis_sizes():
        return jnp.swapaxes(x.reshape(shape), 0, 1)
    spec = jax.typeof(x).sharding.spec
    return jnp.swapaxes(jax.lax.reshape(x, shape, out_sharding=P(spec[0], None, *spec[1:])), 0, 1)
