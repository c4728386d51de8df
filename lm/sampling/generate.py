"""Generation with a key/value cache: prompts are read in chunks, then tokens are drawn in one compiled loop."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.model import kv_cache, parameters, transformer
from lm.model.config import ModelConfig
from lm.model.kv_cache import Cache
from lm.model.parameters import Params

PREFILL_CHUNK = 256  # prompt tokens read at once: bounds the memory of attention over the cache
ROUND = 64  # caches are rounded up to this many tokens, so that few shapes are compiled
SLOTS = 512, 4  # the sizes of a cache that never grows: the least, and how many times the one before the next is
WAYS = ('greedy', 'drawn', 'filtered')  # of choosing a token
PIECE_SECONDS = 0.1  # of drawing between two looks at what was drawn, where nobody says after how many tokens


class Sampling(NamedTuple):
    """The settings by which a token is drawn. Each is one number, or one per row."""

    temperature: float | Sequence[float] = 0.0  # 0 is greedy
    top_k: int | Sequence[int] = 0  # the k likeliest; 0 is all
    top_p: float | Sequence[float] = 1.0  # the fewest that hold this much probability (Holtzman et al., 2020)
    min_p: float | Sequence[float] = 0.0  # those at least this part of the likeliest (Nguyen et al., 2024)
    # What logits of tokens that the prompt or the answer has are divided by, or multiplied where negative (Keskar et
    # al., 2019; transformers' meaning): before all the others, greedy or not.
    repetition_penalty: float | Sequence[float] = 1.0


GREEDY = Sampling()
KNOBS = (np.float32, np.int32, np.float32, np.float32, np.float32)  # of a sampling's fields
STOPS = 16  # stop ids that programs compiled ahead have room for


class Generation(NamedTuple):
    """The tokens drawn for a prompt, without the stop token; `ended` says that one came."""

    ids: list[int]
    ended: bool


class Drawn(NamedTuple):
    """A response as the policy drew it: its ids with the stop token, the log-prob of each at its temperature, and
    whether a stop token ended it."""

    ids: list[int]
    logps: list[float]
    ended: bool


class State(NamedTuple):
    """Rows in generation, the cache split over the mesh and the rest on every device. `next_B` is drawn and not yet in
    the cache."""

    cache: Cache
    last_BD: jax.Array  # of the last token of each prompt, as far as it was read
    next_B: jax.Array
    done_B: jax.Array
    key_B: jax.Array
    drawn: jax.Array  # tokens drawn so far
    out_BT: jax.Array  # what was drawn; `stop` where a row is done
    seen_BV: jax.Array | None  # whether the prompt or the answer has it; None: nothing depends on that
    logp_BT: jax.Array | None  # log p of what was drawn, of the tempered distribution; None: nobody asks


def sample(logits_BV: jax.Array, key_B: jax.Array, sampling: Sequence[Any], *, filtered: bool) -> jax.Array:
    """One id a row from float32 logits. Filters apply to the tempered distribution in the order top-k, top-p, min-p.

    Each device draws for its own rows, and every one then knows all that was drawn.

    Args:
      sampling: the fields of `Sampling` up to min_p.
    """
    knobs = [jnp.broadcast_to(jnp.asarray(x), logits_BV.shape[:1]) for x in sampling]
    if sharding.axis_sizes():
        key_B, *knobs = jax.reshard([key_B, *knobs], P(jax.typeof(logits_BV).sharding.spec[0]))
    temperature, top_k, top_p, min_p = knobs
    x_BV = logits_BV / jnp.where(temperature > 0, temperature, 1)[:, None]
    if filtered:
        x_BV = _filter(x_BV, top_k, top_p, min_p)
    drawn_B = jax.vmap(jax.random.categorical)(key_B, x_BV)
    return sharding.replicated(jnp.where(temperature > 0, drawn_B, likeliest(logits_BV)))


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the highest logits of each row: argmax as two plain reductions, which a CPU vectorizes."""
    V = logits_BV.shape[-1]
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(best_BV, jnp.arange(V), V), axis=-1), V - 1).astype(jnp.int32)


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


@partial(jax.jit, static_argnames=('cfg', 'batch', 'slots', 'room', 'logps'))
def _begin(seed, seen_BV, *, cfg, batch, slots, room, logps=False) -> State:
    """Rows of which nothing is read yet."""
    cache, last_BD = kv_cache.empty_cache(cfg, batch, slots), jnp.zeros((batch, cfg.dim), cfg.dtype)
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
    next_B, done_B, out_BT = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), jnp.zeros((batch, room), jnp.int32)
    logp_BT = jnp.zeros((batch, room), jnp.float32) if logps else None
    return State(cache, last_BD, next_B, done_B, key_B, jnp.zeros((), jnp.int32), out_BT, seen_BV, logp_BT)


@partial(jax.jit, static_argnames='cfg', donate_argnums=1)
def _read(params, state: State, tokens_BT, count_B, *, cfg) -> State:
    """Reads a piece of the prompts, of which each row has its first `count_B` tokens."""
    h_BTD, cache = kv_cache.forward_cached(params, cfg, tokens_BT, state.cache, count_B=count_B)
    one_hot_BT = jax.nn.one_hot(count_B - 1, tokens_BT.shape[1], dtype=h_BTD.dtype)
    picked_BD = jnp.einsum('BT,BTD->BD', one_hot_BT, sharding.replicated(h_BTD))
    return state._replace(cache=cache, last_BD=jnp.where(count_B[:, None] > 0, picked_BD, state.last_BD))


@partial(jax.jit, static_argnames=('cfg', 'how'), donate_argnums=1)
def _draw_first(params, state: State, sampling, stop_ids, allowed_V, *, cfg, how) -> State:
    """Draws the first token of each row."""
    return _draw(params, cfg, state, state.last_BD[:, None], sampling, stop_ids, allowed_V, how)


def _draw(params, cfg, state: State, h_BTD, sampling, stop_ids, allowed_V, how: str) -> State:
    """Draws each row's next token from its last hidden state. The key of the i-th token of a row is fold_in(row, i), so
    what is drawn does not depend on who shares the batch."""
    logits_BV, seen_BV = transformer.logits(params, cfg, h_BTD)[:, 0], state.seen_BV
    if allowed_V is not None:
        logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    if seen_BV is not None:
        logits_BV = _penalised(logits_BV, seen_BV, sampling[-1])
    # Apart from what is drawn: random bits for a whole vocabulary cost as much as a layer.
    greedy = lambda: sharding.replicated(likeliest(logits_BV))

    def drawn(filtered: bool) -> jax.Array:
        key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.drawn)
        return sample(logits_BV, key_B, sampling[:-1], filtered=filtered)

    ways = dict(zip(WAYS, (greedy, lambda: drawn(False), lambda: drawn(True)), strict=True))
    next_B = ways[how]() if how in ways else jax.lax.switch(_way(sampling, jnp), list(ways.values()))
    next_B = jnp.where(state.done_B, stop_ids[0], next_B)
    out_BT, logp_BT = jax.lax.dynamic_update_slice(state.out_BT, next_B[:, None], (0, state.drawn)), state.logp_BT
    if logp_BT is not None:
        logp_B = sharding.replicated(_log_prob(logits_BV, next_B, sampling[0]))
        logp_BT = jax.lax.dynamic_update_slice(logp_BT, logp_B[:, None], (0, state.drawn))
    done_B = state.done_B | jnp.any(next_B[:, None] == stop_ids, axis=-1)
    if seen_BV is not None:
        seen_BV |= next_B[:, None] == jnp.arange(seen_BV.shape[1])
    state = state._replace(drawn=state.drawn + 1, out_BT=out_BT, logp_BT=logp_BT)
    return state._replace(next_B=next_B, done_B=done_B, seen_BV=seen_BV)


def _log_prob(logits_BV: jax.Array, ids_B: jax.Array, temperature: jax.Array) -> jax.Array:
    """log p [B] of ids under softmax(logits/T)."""
    spec = jax.typeof(logits_BV).sharding.spec if sharding.axis_sizes() else None
    knob_B = jnp.broadcast_to(jnp.asarray(temperature, logits_BV.dtype), logits_BV.shape[:1])
    if spec is not None:
        ids_B, knob_B = jax.reshard((ids_B, knob_B), P(spec[0]))
    x_BV = logits_BV / knob_B[:, None]
    hit_BV = jnp.arange(logits_BV.shape[1]) == ids_B[:, None]
    return jnp.sum(jnp.where(hit_BV, x_BV, 0), axis=-1) - jax.nn.logsumexp(x_BV, axis=-1)


def _penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    penalty_B = jnp.broadcast_to(jnp.asarray(penalty, logits_BV.dtype), logits_BV.shape[:1])
    if sharding.axis_sizes():
        rows = jax.typeof(logits_BV).sharding.spec[0]
        seen_BV, penalty_B = jax.reshard(seen_BV, P(rows)), jax.reshard(penalty_B, P(rows))
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


@partial(jax.jit, static_argnames=('cfg', 'how'), donate_argnums=1)
def _decode(params, state: State, until, sampling, stop_ids, allowed_V, *, cfg, how) -> State:
    """Draws tokens until `until` are drawn or every row is done."""

    def body(state: State) -> State:
        h_BTD, cache = kv_cache.forward_cached(params, cfg, state.next_B[:, None], state.cache)
        return _draw(params, cfg, state._replace(cache=cache), h_BTD, sampling, stop_ids, allowed_V, how)

    return jax.lax.while_loop(lambda s: (s.drawn < until) & ~jnp.all(s.done_B), body, state)


# Once for all that is generated with these parameters; without it `stream` does it at each call.
prepare = jax.jit(parameters.unstacked, static_argnames=('cfg', 'batch'))


def lay_out(params: Params, cfg: ModelConfig) -> dict[str, Any]:
    """`prepare` for one row, of parameters that nobody else needs: each stack is freed once its layers lie apart."""
    layers: list[dict[str, Any]] = [{} for _ in range(cfg.layers)]
    for name, stack in params['layers'].items():
        apart = jax.block_until_ready(prepare({'layers': {name: stack}}, cfg, batch=1)['layers'])
        for whole in jax.tree.leaves(stack):
            whole.delete()
        for layer, part in zip(layers, apart, strict=True):
            layer.update(part)
    return {**prepare({**params, 'layers': {}}, cfg, batch=1), 'layers': layers}


@partial(jax.jit, static_argnames='slots')
def _grow(state: State, *, slots: int) -> State:
    """The state with a cache of so many slots."""
    return state._replace(cache=kv_cache.grow_cache(state.cache, slots))


class Programs(NamedTuple):
    """The programs that generation runs, in this order: each is (parameters, state, …) -> state, but for the first."""

    begin: Callable[..., State]
    read: Callable[..., State]
    first: Callable[..., State]
    decode: Callable[..., State]


def _programs(cfg: ModelConfig, *, batch: int, slots: int, room: int, how: str) -> Programs:
    """They are compiled when they are called."""
    begin = partial(_begin, cfg=cfg, batch=batch, slots=slots, room=room)
    draws = (partial(f, cfg=cfg, how=how) for f in (_draw_first, _decode))
    return Programs(begin, partial(_read, cfg=cfg), *draws)


def compiled(params: Params, cfg: ModelConfig, *, slots: int) -> Iterator[Callable[..., State]]:
    """Compiles `Programs` for one row with a cache of `slots` tokens, whatever the prompt and the sampling, on the
    current mesh: its fields in their order, each when it is asked for.

    Args:
      params: from `lay_out`, or their shapes and shardings. slots: from `fixed_slots`.
    """
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    number, seen = shape(np.int32), shape(np.bool, 1, cfg.vocab_size)
    knobs = tuple(shape(dtype) for dtype in KNOBS)
    plain = _programs(cfg, batch=1, slots=slots, room=slots, how='as the sampling says')
    state = _described(jax.eval_shape(plain.begin, shape(np.uint32), seen))
    drawn, drawn_from = (params, state), (knobs, shape(np.int32, STOPS), shape(np.bool, cfg.vocab_size))
    arguments = (
        (shape(np.uint32), seen),
        (*drawn, shape(np.int32, 1, ROUND), shape(np.int32, 1)),
        (*drawn, *drawn_from),
        (*drawn, number, *drawn_from),
    )
    lower = lambda program, given: program.func.lower(*given, **program.keywords).compile()
    return map(lower, plain, arguments)


def _described(tree: Any) -> Any:
    """Returns what `jax.eval_shape` gave under the current mesh, with shardings on it."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    where = lambda x: jax.NamedSharding(mesh, P() if x.sharding is None else x.sharding.spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), tree)


def laid_out(abstract: Any, cfg: ModelConfig) -> Any:
    """Returns what `lay_out` makes of parameters, given as shapes and shardings."""
    return _described(jax.eval_shape(partial(parameters.unstacked, cfg=cfg, batch=1), abstract))


def draw(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int],
    temperature: float, seed: int,
) -> list[Drawn]:  # fmt: skip
    """A response to each prompt, drawn from the whole tempered distribution, with the log-probs of its tokens: a pure
    function of the parameters, the prompts and the seed.

    Raises:
      ValueError: as `stream`, or a temperature of 0, which has no distribution.
    """
    if temperature <= 0:
        raise ValueError('a temperature above 0 is needed: the likeliest token alone has no log-prob')
    options = {'max_new_tokens': max_new_tokens, 'stop_ids': stop_ids, 'sampling': Sampling(temperature), 'seed': seed}
    *_, state = _states(params, cfg, prompts, every=max_new_tokens, logps=True, **options)
    assert state is not None
    drawn, found = int(state.drawn), []
    for ids, logps in zip(np.asarray(state.out_BT)[:, :drawn], np.asarray(state.logp_BT)[:, :drawn], strict=True):
        ends = np.flatnonzero(np.isin(ids, stop_ids))
        n = int(ends[0]) + 1 if len(ends) else drawn
        found.append(Drawn(ids[:n].tolist(), logps[:n].tolist(), bool(len(ends))))
    return found


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
    every: int | None = 8,
    programs: tuple[int, Programs] | None = None,
) -> Generator[list[Generation], None, None]:
    """Generates for a ragged batch of prompts, yielding all rows so far each `every` tokens, and at the end.

    Args:
      prompts: ids of each row, at least one each. stop_ids: any of them ends a row; at least one.
      allowed: [ids] bool, which may be drawn, those beyond it not; None: all that the model has rows for.
      every: None: as many as are drawn in PIECE_SECONDS, and before the first token after each piece of the prompts.
      programs: (the size of the cache, from `fixed_slots`; `compiled` for it). None: a cache that grows, which costs
        the least time at each token, and programs for just these lengths and this sampling.

    Raises:
      ValueError: an empty prompt, no stop id, no token to generate, or too few slots.
    """
    options = {'max_new_tokens': max_new_tokens, 'stop_ids': stop_ids, 'allowed': allowed, 'sampling': sampling}
    for state in _states(params, cfg, prompts, seed=seed, every=every, programs=programs, **options):
        if state is None:
            yield [Generation([], False)] * len(prompts)
        else:
            yield _rows(np.asarray(state.out_BT), int(state.drawn), set(stop_ids))


def _states(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int],
    sampling: Sampling, seed: int, every: int | None, allowed: np.ndarray | None = None,
    programs: tuple[int, Programs] | None = None, logps: bool = False,
) -> Iterator[State | None]:  # fmt: skip
    """The states of which `stream` gives the rows; None while prompts are read."""
    if not all(len(p) for p in prompts) or not stop_ids or max_new_tokens < 1:
        raise ValueError('a prompt needs at least one token, and generation at least one token and one stop id')
    B, longest = len(prompts), max(map(len, prompts))
    knobs = tuple(np.asarray(x, dtype) for x, dtype in zip(sampling, KNOBS, strict=True))
    if isinstance(params['layers'], Mapping):
        params = prepare(params, cfg, batch=B)
    if programs is None:
        width, room, stops = _rounded(longest), _whole_rounds(max_new_tokens), np.asarray(stop_ids, np.int32)
        slots = width + min(room, ROUND)  # empty slots are read too: the cache begins small
        piece, most = math.gcd(width, PREFILL_CHUNK), width + room
        run = _programs(cfg, batch=B, slots=slots, room=room, how=_how(knobs))
    else:
        most, run = programs
        width, piece, stops = _whole_rounds(longest), ROUND, np.resize(np.asarray(stop_ids, np.int32), STOPS)
        if most < width + max_new_tokens or len(stop_ids) > STOPS:
            raise ValueError(f'{most} slots, {STOPS} stop ids: too few for {width} and {max_new_tokens} tokens')
    seen = None if programs is None and np.all(knobs[-1] == 1) else _seen(prompts, cfg.vocab_size)
    state = run.begin(np.uint32(seed), seen, logps=True) if logps else run.begin(np.uint32(seed), seen)
    for tokens_BT, count_B in _pieces(prompts, width, piece):
        state = run.read(params, state, tokens_BT, count_B)
        if every is None:
            jax.block_until_ready(state.last_BD)
            yield None
    drawn_from = knobs, stops, _mask(allowed, cfg.vocab_size, whole=programs is not None)
    state = run.first(params, state, *drawn_from)
    decode = lambda state, until: run.decode(params, state, np.int32(until), *drawn_from)
    drawn, step = 0, every or 1
    while True:
        begun = time.perf_counter()
        until = min(drawn + step, max_new_tokens)
        state = _advance(state, until, decode, width=width, most=most)
        drawn = int(state.drawn)
        yield state
        if drawn >= max_new_tokens or np.all(state.done_B):
            return
        if every is None:
            step = max(1, min(2 * step, int(step * PIECE_SECONDS / (time.perf_counter() - begun))))


def fixed_slots(longest: int, max_new_tokens: int, *, context: int) -> int:
    """The size of a cache for a prompt of `longest` tokens and an answer: one of few, each a few times the one before,
    and no larger than a text of `context` tokens needs where that is enough."""
    needed = _whole_rounds(longest) + max_new_tokens
    least, factor = SLOTS
    slots = least
    while slots < needed:
        slots *= factor
    whole = _whole_rounds(context)
    return min(slots, whole) if needed <= whole else slots


def _pieces(prompts: Sequence[Sequence[int]], width: int, piece: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens [B, piece], how many of them each row has) of prompts that are padded to `width`."""
    for start in range(0, width, piece):
        rows = [p[start : start + piece] for p in prompts]
        tokens_BT = np.zeros((len(rows), piece), np.int32)
        for tokens_T, row in zip(tokens_BT, rows, strict=True):
            tokens_T[: len(row)] = row
        yield tokens_BT, np.array([len(row) for row in rows], np.int32)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Which ids each prompt has, [B, V]."""
    seen_BV = np.zeros((len(prompts), vocab_size), bool)
    for seen_V, prompt in zip(seen_BV, prompts, strict=True):
        seen_V[list(prompt)] = True
    return seen_BV


def _mask(allowed: np.ndarray | None, vocab_size: int, *, whole: bool) -> np.ndarray | None:
    """[V] bool, the ids that may be drawn; None where all may, so that nothing is compiled for it, but for `whole`."""
    allowed_V = np.full(vocab_size, allowed is None)
    if allowed is not None:
        allowed_V[: len(allowed)] = allowed[:vocab_size]
    return None if allowed_V.all() and not whole else allowed_V


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
    return min(1 << (n - 1).bit_length(), _whole_rounds(n))


def _whole_rounds(n: int) -> int:
    return math.ceil(n / ROUND) * ROUND


def _how(knobs: Sequence[np.ndarray]) -> str:
    """Names the part of `sample` that is needed: it is compiled without the rest."""
    return WAYS[int(_way(knobs, np))]


def _way(knobs: Sequence[Any], xp: Any) -> Any:
    """The index of `_how`, by numpy or under jit."""
    temperature, top_k, top_p, min_p, _ = knobs
    filters = xp.any(top_k > 0) | xp.any(top_p < 1) | xp.any(min_p > 0)
    return xp.where(xp.any(temperature > 0), 1 + filters, 0)


def _rows(out_BT: np.ndarray, drawn: int, stops: set[int]) -> list[Generation]:
    def row(ids: list[int]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        return Generation(ids[:end], end is not None)

    return [row(ids) for ids in out_BT[:, :drawn].tolist()]
