"""Generation with a key/value cache: prompts are read in chunks, then tokens are drawn in one compiled loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import transformer
from lm.model.transformer import Cache, ModelConfig, Params

PREFILL_CHUNK = 256  # prompt tokens read at once: bounds the memory of attention over the cache
ROUND = 64  # caches are rounded up to this many tokens, so that few shapes are compiled


class Sampling(NamedTuple):
    """How a token is drawn. Each is one number, or one per row."""

    temperature: float | Sequence[float] = 0.0  # 0 is greedy
    top_k: int | Sequence[int] = 0  # the k likeliest; 0 is all
    top_p: float | Sequence[float] = 1.0  # the fewest that hold this much probability (Holtzman et al., 2020)
    min_p: float | Sequence[float] = 0.0  # those at least this part of the likeliest (Nguyen et al., 2024)


GREEDY = Sampling()


class Generation(NamedTuple):
    """What was drawn for a prompt, without the stop token; `ended` says that one came."""

    ids: list[int]
    ended: bool


class State(NamedTuple):
    """Rows in generation, the cache split over the mesh and the rest on every device. `next_B` is drawn and not yet in
    the cache."""

    cache: Cache
    next_B: jax.Array
    done_B: jax.Array
    key_B: jax.Array
    drawn: jax.Array  # tokens drawn so far
    out_BT: jax.Array  # what was drawn; `stop` where a row is done


def sample(logits_BV: jax.Array, key_B: jax.Array, sampling: Sequence[Any], *, filtered: bool) -> jax.Array:
    """One id a row from float32 logits. Filters apply to the tempered distribution in the order top-k, top-p, min-p.

    Each device draws for its own rows, and every one then knows all that was drawn.
    """
    knobs = [jnp.broadcast_to(jnp.asarray(x), logits_BV.shape[:1]) for x in sampling]
    if sharding.axis_sizes():
        key_B, *knobs = jax.reshard([key_B, *knobs], P(jax.typeof(logits_BV).sharding.spec[0]))
    temperature, top_k, top_p, min_p = knobs
    x_BV = logits_BV / jnp.where(temperature > 0, temperature, 1)[:, None]
    if filtered:
        x_BV = _filter(x_BV, top_k, top_p, min_p)
    drawn_B = jax.vmap(jax.random.categorical)(key_B, x_BV)
    return _replicated(jnp.where(temperature > 0, drawn_B, likeliest(logits_BV)))


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the highest logits of each row: argmax as two plain reductions, which a CPU vectorizes."""
    V = logits_BV.shape[-1]
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(best_BV, jnp.arange(V), V), axis=-1), V - 1).astype(jnp.int32)


def _replicated(x: jax.Array) -> jax.Array:
    """Whole on every device of the mesh."""
    return jax.reshard(x, P()) if sharding.axis_sizes() else x


def _filter(x_BV: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """-inf for what the filters leave out; the likeliest always stays, and of equals the lowest ids."""
    V = x_BV.shape[-1]
    sorted_BV = -jnp.sort(-x_BV, axis=-1)
    rank_V = jnp.arange(V)
    keep_BV = rank_V < jnp.where(top_k > 0, top_k, V)[:, None]
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    keep_BV &= (before_BV < top_p[:, None]) | (top_p[:, None] >= 1)  # rounding may bring the sum to 1 before the end
    keep_BV &= p_BV >= min_p[:, None] * p_BV[:, :1]
    keep_BV |= rank_V == 0
    kept_B1 = jnp.sum(keep_BV, axis=-1, keepdims=True)
    limit_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    above_BV, equal_BV = x_BV > limit_B1, x_BV == limit_B1
    room_B1 = kept_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    return jnp.where(above_BV | equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1), x_BV, -jnp.inf)


@partial(jax.jit, static_argnames=('cfg', 'slots', 'room', 'how'))
def _prefill(params, prompt_BT, length_B, seed, sampling, stop_ids, allowed_V, *, cfg, slots, room, how) -> State:
    """Reads the prompts and draws the first token of each row."""
    B, T = prompt_BT.shape
    chunk = math.gcd(T, PREFILL_CHUNK)

    def read(carry, start):
        cache, last_BD = carry
        tokens_BT = jax.lax.dynamic_slice_in_dim(prompt_BT, start, chunk, axis=1)
        count_B = jnp.clip(length_B - start, 0, chunk)
        h_BTD, cache = transformer.forward_cached(params, cfg, tokens_BT, cache, count_B=count_B)
        here_B = (length_B - 1 >= start) & (length_B - 1 < start + chunk)
        one_hot_BT = jax.nn.one_hot(count_B - 1, chunk, dtype=h_BTD.dtype)
        picked_BD = jnp.einsum('BT,BTD->BD', one_hot_BT, _replicated(h_BTD))
        return (cache, jnp.where(here_B[:, None], picked_BD, last_BD)), None

    carry = (transformer.empty_cache(cfg, B, slots), jnp.zeros((B, cfg.dim), cfg.dtype))
    (cache, last_BD), _ = jax.lax.scan(read, carry, jnp.arange(0, T, chunk))
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(B))
    out_BT = jnp.zeros((B, room), jnp.int32)
    state = State(cache, jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), key_B, jnp.zeros((), jnp.int32), out_BT)
    return _draw(params, cfg, state, last_BD[:, None], sampling, stop_ids, allowed_V, how)


def _draw(params, cfg, state: State, h_BTD, sampling, stop_ids, allowed_V, how: str) -> State:
    """Draws each row's next token from its last hidden state. The key of the i-th token of a row is fold_in(row, i), so
    what is drawn does not depend on who shares the batch."""
    logits_BV = transformer.logits(params, cfg, h_BTD)[:, 0]
    if allowed_V is not None:
        logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    if how == 'greedy':  # random bits for a whole vocabulary cost as much as a layer
        next_B = _replicated(likeliest(logits_BV))
    else:
        key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.drawn)
        next_B = sample(logits_BV, key_B, sampling, filtered=how == 'filtered')
    next_B = jnp.where(state.done_B, stop_ids[0], next_B)
    out_BT = jax.lax.dynamic_update_slice(state.out_BT, next_B[:, None], (0, state.drawn))
    done_B = state.done_B | jnp.any(next_B[:, None] == stop_ids, axis=-1)
    return state._replace(next_B=next_B, done_B=done_B, drawn=state.drawn + 1, out_BT=out_BT)


@partial(jax.jit, static_argnames=('cfg', 'how'), donate_argnums=1)
def _decode(params, state: State, until, sampling, stop_ids, allowed_V, *, cfg, how) -> State:
    """Draws tokens until `until` are drawn or every row is done."""

    def body(state: State) -> State:
        h_BTD, cache = transformer.forward_cached(params, cfg, state.next_B[:, None], state.cache)
        return _draw(params, cfg, state._replace(cache=cache), h_BTD, sampling, stop_ids, allowed_V, how)

    return jax.lax.while_loop(lambda s: (s.drawn < until) & ~jnp.all(s.done_B), body, state)


# Once for all that is generated with these parameters; without it `stream` does it at each call.
prepare = jax.jit(transformer.unstacked, static_argnames=('cfg', 'batch'))


@partial(jax.jit, static_argnames='slots')
def _grow(state: State, *, slots: int) -> State:
    """The state with a cache of so many slots."""
    return state._replace(cache=transformer.grow_cache(state.cache, slots))


def stream(
    params: Params,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    allowed: np.ndarray | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    every: int = 8,
) -> Iterator[list[Generation]]:
    """Generates for a ragged batch of prompts, yielding all rows so far each `every` tokens, and at the end.

    Args:
      prompts: ids of each row, at least one each. stop_ids: any of them ends a row; at least one.
      allowed: [ids] bool, which may be drawn, those beyond it not; None: all that the model has rows for.

    Raises:
      ValueError: an empty prompt, no stop id or no token to generate.
    """
    if not all(len(p) for p in prompts) or not stop_ids or max_new_tokens < 1:
        raise ValueError('a prompt needs at least one token, and generation at least one token and one stop id')
    B, longest = len(prompts), max(map(len, prompts))
    width, room = _rounded(longest), math.ceil(max_new_tokens / ROUND) * ROUND
    prompt_BT = np.zeros((B, width), np.int32)
    for row, prompt in zip(prompt_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    length_B = np.array([len(p) for p in prompts], np.int32)
    knobs = tuple(np.asarray(x) for x in sampling)
    stops, allowed_V = np.asarray(stop_ids, np.int32), _mask(allowed, cfg.vocab_size)
    if isinstance(params['layers'], Mapping):
        params = prepare(params, cfg, batch=B)
    static = {'cfg': cfg, 'how': _how(knobs)}
    sizes = {'slots': width + min(room, ROUND), 'room': room}  # empty slots are read too: the cache begins small
    state = _prefill(params, prompt_BT, length_B, np.uint32(seed), knobs, stops, allowed_V, **sizes, **static)
    decode = lambda state, until: _decode(params, state, np.int32(until), knobs, stops, allowed_V, **static)
    drawn = 0
    while True:
        until = min(drawn + every, max_new_tokens)
        state = _advance(state, until, decode, width=width, most=width + room)
        drawn = int(state.drawn)
        yield _rows(np.asarray(state.out_BT), drawn, set(stop_ids))
        if drawn >= max_new_tokens or np.all(state.done_B):
            return


def _mask(allowed: np.ndarray | None, vocab_size: int) -> np.ndarray | None:
    """[V] bool, the ids that may be drawn; None where all may, so that nothing is compiled for it."""
    if allowed is None:
        return None
    allowed_V = np.zeros(vocab_size, bool)
    allowed_V[: len(allowed)] = allowed[:vocab_size]
    return None if allowed_V.all() else allowed_V


def _advance(state: State, until: int, decode: Callable[[State, int], State], *, width: int, most: int) -> State:
    """Draws until `until` tokens are drawn or every row is done. Prompts fill the cache to `width`; when it is full it
    doubles, up to `most` slots."""
    while int(state.drawn) < until and not np.all(state.done_B):
        slots = state.cache.position_BS.shape[1]
        if int(state.drawn) > slots - width:  # the newest token has no slot
            slots = min(2 * slots, most)
            state = _grow(state, slots=slots)
        state = decode(state, min(until, slots - width + 1))
    return state


def generate(params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    """`stream`, whole: one compiled loop for as long as the cache has room."""
    *_, last = stream(params, cfg, prompts, every=options['max_new_tokens'], **options)
    return last


def _rounded(n: int) -> int:
    """A prompt's width in the batch: the next power of two up to ROUND, then multiples of it."""
    return min(1 << (n - 1).bit_length(), math.ceil(n / ROUND) * ROUND)


def _how(knobs: Sequence[np.ndarray]) -> str:
    """What of `sample` is needed: it is compiled without the rest."""
    temperature, top_k, top_p, min_p = knobs
    if not np.any(temperature > 0):
        return 'greedy'
    filters = np.any(top_k > 0) or np.any(top_p < 1) or np.any(min_p > 0)
    return 'filtered' if filters else 'drawn'


def _rows(out_BT: np.ndarray, drawn: int, stops: set[int]) -> list[Generation]:
    def row(ids: list[int]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        return Generation(ids[:end], end is not None)

    return [row(ids) for ids in out_BT[:, :drawn].tolist()]
