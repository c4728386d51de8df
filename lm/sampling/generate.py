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
from lm.sampling import choice
from lm.sampling.choice import GREEDY, KNOBS, Sampling

PREFILL_CHUNK = 256  # prompt tokens read at once: bounds the memory of attention over the cache
ROUND = 64  # caches are rounded up to this many tokens, so that few shapes are compiled
SLOTS = 512, 4  # the sizes of a cache that never grows: the least, and how many times the one before the next is
# Tokens that are drawn between two looks at which rows go on, where a look costs: a GPU's is the host's.
TURNS = {'gpu': 8}
FEWEST = 16  # rows that go on together to the end, on each device: fewer are not worth another program
PIECE_SECONDS = 0.1  # of drawing between two looks at what was drawn, where nobody says after how many tokens


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
    out_BT: jax.Array  # what was drawn; a stop id where a row is done
    seen_BV: jax.Array | None  # whether the prompt or the answer has it; None: nothing depends on that
    logp_BT: jax.Array | None  # log p of what was drawn, of the tempered distribution; None: nobody asks


@partial(jax.jit, static_argnames=('cfg', 'batch', 'slots', 'room', 'logps'))
def _begin(seed, seen_BV, *, cfg, batch, slots, room, logps=False) -> State:
    """Rows of which nothing is read yet."""
    cache, last_BD = kv_cache.empty_cache(cfg, batch, slots), jnp.zeros((batch, cfg.dim), cfg.dtype)
    key_B = _keys(seed, batch)
    next_B, done_B, out_BT = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool), jnp.zeros((batch, room), jnp.int32)
    logp_BT = jnp.zeros((batch, room), jnp.float32) if logps else None
    return State(cache, last_BD, next_B, done_B, key_B, jnp.zeros((), jnp.int32), out_BT, seen_BV, logp_BT)


def _keys(seed: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


@jax.jit
def _taken(state: State, row_B) -> State:
    """The state of these rows, each of which goes on where it is kept: on the device with the same part of the rows."""

    def cached(x_BKSH: jax.Array) -> jax.Array:
        if not sharding.axis_sizes():
            return x_BKSH[row_B]
        spec = jax.typeof(x_BKSH).sharding.spec
        return sharding.on_shards(lambda x, row_B: x[row_B % x.shape[0]], (x_BKSH, row_B), (spec, P(spec[0])), spec)

    k_BKSH, v_BKSH = (tuple(map(cached, xs)) for xs in (state.cache.k_BKSH, state.cache.v_BKSH))
    rest = state._replace(cache=state.cache._replace(k_BKSH=(), v_BKSH=()))
    rest = jax.tree.map(lambda x: x[row_B] if x.ndim else x, rest)
    return rest._replace(cache=rest.cache._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH))


@jax.jit
def _repeated(state: State, row_B, seed) -> State:
    """The state of rows that begin with what these rows read, each with a key of its own."""
    return _taken(state, row_B)._replace(key_B=_keys(seed, len(row_B)))


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
        logits_BV = choice.penalised(logits_BV, seen_BV, sampling[-1])
    greedy = lambda: (sharding.replicated(choice.likeliest(logits_BV)), jnp.zeros(logits_BV.shape[0]))

    def drawn(filtered: bool) -> tuple[jax.Array, jax.Array]:
        key_B = jax.vmap(jax.random.fold_in, (0, None))(state.key_B, state.drawn)
        return choice.sample(logits_BV, key_B, sampling[:-1], filtered=filtered)

    ways = dict(zip(choice.WAYS, (greedy, lambda: drawn(False), lambda: drawn(True)), strict=True))
    next_B, logp_B = ways[how]() if how in ways else jax.lax.switch(choice.way(sampling, jnp), list(ways.values()))
    next_B = jnp.where(state.done_B, stop_ids[0], next_B)
    out_BT, logp_BT = jax.lax.dynamic_update_slice(state.out_BT, next_B[:, None], (0, state.drawn)), state.logp_BT
    if logp_BT is not None:
        logp_BT = jax.lax.dynamic_update_slice(logp_BT, logp_B[:, None], (0, state.drawn))
    done_B = state.done_B | jnp.any(next_B[:, None] == stop_ids, axis=-1)
    if seen_BV is not None:
        seen_BV |= next_B[:, None] == jnp.arange(seen_BV.shape[1])
    state = state._replace(drawn=state.drawn + 1, out_BT=out_BT, logp_BT=logp_BT)
    return state._replace(next_B=next_B, done_B=done_B, seen_BV=seen_BV)


@partial(jax.jit, static_argnames=('cfg', 'how'), donate_argnums=1)
def _decode(params, state: State, until, least, sampling, stop_ids, allowed_V, *, cfg, how) -> State:
    """Draws tokens, TURNS at a time, until `until` are drawn or no device has more than `least` rows that go on."""
    parts, turn = _parts(state.done_B.shape[0]), _turn()

    def body(state: State) -> State:
        h_BTD, cache = kv_cache.forward_cached(params, cfg, state.next_B[:, None], state.cache)
        return _draw(params, cfg, state._replace(cache=cache), h_BTD, sampling, stop_ids, allowed_V, how)

    live = lambda s: jnp.max(jnp.sum(~s.done_B.reshape(parts, -1), axis=1))
    turned = body if turn == 1 else lambda s: jax.lax.fori_loop(0, turn, lambda _, s: body(s), s)
    return jax.lax.while_loop(lambda s: (s.drawn < until) & (live(s) > least), turned, state)


def _turn() -> int:
    return TURNS.get(sharding.platform(), 1)


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
        (*drawn, number, number, *drawn_from),
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
    *_, out = _progress(params, cfg, prompts, every=max_new_tokens, logps=True, **options)
    assert out is not None
    found = []
    for ids, logps in zip(out.ids_BT, out.logp_BT, strict=True):
        ends = np.flatnonzero(np.isin(ids, stop_ids))
        n = int(ends[0]) + 1 if len(ends) else len(ids)
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
    """Generates for a ragged batch of prompts, yielding all rows so far each `every` tokens (or some more,
    see TURNS) and at the end.

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
    for out in _progress(params, cfg, prompts, seed=seed, every=every, programs=programs, **options):
        yield [Generation([], False)] * len(prompts) if out is None else _rows(out.ids_BT, set(stop_ids))


class Progress(NamedTuple):
    """What was drawn so far for each prompt; after a stop id, anything."""

    ids_BT: np.ndarray
    logp_BT: np.ndarray  # 0 where nobody asks


def _progress(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int],
    sampling: Sampling, seed: int, every: int | None, allowed: np.ndarray | None = None,
    programs: tuple[int, Programs] | None = None, logps: bool = False,
) -> Iterator[Progress | None]:  # fmt: skip
    """What `stream` gives the rows of; None while prompts are read.

    Rows that ended no longer compute: when few enough go on, these alone are put into a smaller batch.
    """
    if not all(len(p) for p in prompts) or not stop_ids or max_new_tokens < 1:
        raise ValueError('a prompt needs at least one token, and generation at least one token and one stop id')
    B, longest = len(prompts), max(map(len, prompts))
    asked, reads_B = _once(prompts)
    knobs = tuple(np.asarray(x, dtype) for x, dtype in zip(sampling, KNOBS, strict=True))
    if isinstance(params['layers'], Mapping):
        params = prepare(params, cfg, batch=B)
    if programs is None:
        width, room, stops = _rounded(longest), _whole_rounds(max_new_tokens), np.asarray(stop_ids, np.int32)
        slots = width + min(room, ROUND)  # empty slots are read too: the cache begins small
        piece, most = math.gcd(width, PREFILL_CHUNK), width + room
        run = _programs(cfg, batch=len(asked), slots=slots, room=room, how=choice.how(knobs))
    else:
        most, run = programs
        width, piece, stops = _whole_rounds(longest), ROUND, np.resize(np.asarray(stop_ids, np.int32), STOPS)
        if most < width + max_new_tokens or len(stop_ids) > STOPS:
            raise ValueError(f'{most} slots, {STOPS} stop ids: too few for {width} and {max_new_tokens} tokens')
    seen = None if programs is None and np.all(knobs[-1] == 1) else _seen(asked, cfg.vocab_size)
    state = run.begin(np.uint32(seed), seen, logps=True) if logps else run.begin(np.uint32(seed), seen)
    for tokens_BT, count_B in _pieces(asked, width, piece):
        state = run.read(params, state, tokens_BT, count_B)
        if every is None:
            jax.block_until_ready(state.last_BD)
            yield None
    if len(asked) < B:
        state = _repeated(state, reads_B, np.uint32(seed))
    allowed_V = _mask(allowed, cfg.vocab_size, whole=programs is not None)
    drawn_from = lambda rows: (tuple(x[rows] if x.ndim else x for x in knobs), stops, allowed_V)
    rows, out = (
        np.arange(B),
        Progress(np.zeros((B, max_new_tokens), np.int32), np.zeros((B, max_new_tokens), np.float32)),
    )
    state, drawn, step = run.first(params, state, *drawn_from(rows)), 0, every or 1
    while True:
        begun = time.perf_counter()
        until = min(drawn + step, max_new_tokens)
        while int(state.drawn) < until and not np.all(state.done_B):
            if len(kept := _going_on(np.asarray(state.done_B))) < len(rows):
                _write(out, rows, state)
                state, rows = _taken(state, kept), rows[kept]
            state, full = _with_room(state, width=width, most=most)
            least = np.int32(_fewer(len(rows)))
            state = run.decode(params, state, np.int32(min(until, full)), least, *drawn_from(rows))
        _write(out, rows, state)
        drawn = int(state.drawn)
        yield Progress(*(x[:, :drawn] for x in out))
        if drawn >= max_new_tokens or np.all(state.done_B):
            return
        if every is None:
            step = max(1, min(2 * step, int(step * PIECE_SECONDS / (time.perf_counter() - begun))))


def _once(prompts: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], np.ndarray]:
    """(the prompts to read, which of them each row begins with): equal ones are read once, where every device then has
    what its rows begin with, and all come as often: each number of prompts is another program."""
    places: dict[tuple[int, ...], int] = {}
    reads_B = np.array([places.setdefault(tuple(prompt), len(places)) for prompt in prompts])
    B, P, parts = len(prompts), len(places), _parts(len(prompts))
    if B % P or not _split_alike(B, P) or np.any(reads_B * parts // P != np.arange(B) * parts // B):
        return prompts, np.arange(B)
    return list(places), reads_B


def _parts(batch: int) -> int:
    """Over how many devices the rows of a batch are split."""
    sizes = sharding.axis_sizes()
    return math.prod(sizes[axis] for axis in sharding.assign({'B': batch})['B'])


def _split_alike(*batches: int) -> bool:
    """Tells whether the rows of these batches are split over the same axes."""
    return len({sharding.assign({'B': batch})['B'] for batch in batches}) == 1


def _fewer(batch: int) -> int:
    """How many rows, on each device, are put into a batch of their own when no more go on: a power of two, so that few
    programs are compiled; 0: none."""
    parts = _parts(batch)
    fewer = 1 << (batch // parts * 3 // 4).bit_length() >> 1
    return fewer if fewer >= FEWEST and _split_alike(batch, parts * fewer) else 0


def _going_on(done_B: np.ndarray) -> np.ndarray:
    """The rows of the next batch: all of this one, or those that go on and, on each device, as many others as fill a
    batch of `_fewer`."""
    live_PB = ~done_B.reshape(_parts(len(done_B)), -1)
    parts, size = live_PB.shape
    while (fewer := _fewer(parts * size)) >= live_PB.sum(1).max() > 0:
        size = fewer
    kept_PB = np.sort(np.argsort(~live_PB, axis=1, kind='stable')[:, :size], axis=1)
    return (kept_PB + np.arange(parts)[:, None] * live_PB.shape[1]).reshape(-1)


def _write(out: Progress, rows: np.ndarray, state: State) -> None:
    """Adds what the rows in generation have drawn, of the last turn as much as was asked for."""
    drawn = min(int(state.drawn), out.ids_BT.shape[1])
    out.ids_BT[rows, :drawn] = np.asarray(state.out_BT)[:, :drawn]
    if state.logp_BT is not None:
        out.logp_BT[rows, :drawn] = np.asarray(state.logp_BT)[:, :drawn]


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


def _with_room(state: State, *, width: int, most: int) -> tuple[State, int]:
    """(the state with room for another turn, how many may be drawn before it is full). Prompts fill the cache to
    `width`; when it is full it doubles, up to `most` slots."""
    slots, turn = state.cache.position_BS.shape[1], _turn()
    full = lambda: (slots - width) // turn * turn + 1  # the newest token has no slot yet
    if int(state.drawn) >= full():
        slots = min(2 * slots, most)
        state = _grow(state, slots=slots)
    return state, full()


def generate(params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    """`stream`, whole: one compiled loop for as long as the cache has room."""
    *_, last = stream(params, cfg, prompts, every=options['max_new_tokens'], **options)
    return last


def _rounded(n: int) -> int:
    """A prompt's width in the batch: the next power of two up to ROUND, then multiples of it."""
    return min(1 << (n - 1).bit_length(), _whole_rounds(n))


def _whole_rounds(n: int) -> int:
    return math.ceil(n / ROUND) * ROUND


def _rows(out_BT: np.ndarray, stops: set[int]) -> list[Generation]:
    def row(ids: list[int]) -> Generation:
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        return Generation(ids[:end], end is not None)

    return [row(ids) for ids in out_BT.tolist()]
