"""Sets of reasoning-gym as sources of conversations: tasks made by a program, each with a scorer of its own.

    gym:NAME                       with our small defaults, where there are some
    gym:NAME(KEY=VALUE,…)          parameters of the set, and three of ours: size, heldout, seed

Item i is made from the seed `seed` + i, so seeds that lie closer than `size` share items; the held-out ones are HELDOUT
further on. All are drawn once, in worker processes with one hash seed, and kept in the cache: of items with the same
question the first stays, and a held-out question that training has, too, is left out.
"""

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

from etils import epath

from lm import files, workers
from lm.config import nearest
from lm.data import cache
from lm.data.conversations import belongs
from lm.data.records import Chat, Counts, Kind, Message, Source
from lm.errors import UsageError, install

PREFIX = 'gym:'
RECIPE = 1  # part of the cache's key: raise it when other items come out of the same parameters
HELDOUT = 2**31  # between the seeds of training and those held out
SIZES = {'size': 5000, 'heldout': 500, 'seed': 0}
LARGEST = {'size': 10**7, 'heldout': 10**6, 'seed': HELDOUT - 1}  # so that no seed is above 2³²: numpy takes no other
_ADDRESS = re.compile(r'gym:(?P<set>[a-zA-Z]\w*)(?:\((?P<arguments>.*)\))?', re.DOTALL)
CHUNK, SECONDS = 50, 120  # items that are made at once, and CPU time for them
# Parameters with which a model of a million learns a set in minutes.
OURS: dict[str, dict[str, Any]] = {
    'rotate_matrix': {'min_n': 2, 'max_n': 2, 'min_rotations': 1, 'max_rotations': 3},
}
# Measured with 0.1.25 and the sets' own defaults; what others do shows before a run (lm.rl.verifiers.baseline).
REFUSED = {
    'composite': 'it is made of other sets: name them one by one',
    'acre': 'its items depend on how many there are',
    **dict.fromkeys(('codeio', 'list_functions'), 'its items differ each time they are made'),
    **dict.fromkeys(
        ('intermediate_integration', 'isomorphic_strings', 'knight_swap', 'polynomial_multiplication', 'ransom_note',
         'word_ladder'), 'its items depend on the process that makes them (the order of sets of strings)',
    ),
    **dict.fromkeys(
        ('boxnet', 'graph_color', 'propositional_logic', 'rubiks_cube', 'rush_hour'), 'its items have no answer to show'
    ),
    **{
        name: f'one answer to everything ({answer}) earns {share} % of the reward'
        for name, answer, share in (
            ('circuit_logic', '0', 60), ('coin_flip', '0', 92), ('complex_arithmetic', 'nan', 100),
            ('course_schedule', 'False', 60),
            ('game_of_life_halting', 'False', 100), ('puzzle24', '1*3*5 + 9', 100), ('self_reference', '2', 50),
            ('syllogism', 'Yes', 70),
        )
    },
}  # fmt: skip


class Address(NamedTuple):
    """A source's name, taken apart. `parameters` are the set's own, as JSON."""

    name: str
    set: str
    parameters: str
    size: int
    heldout: int
    seed: int


class Item(NamedTuple):
    """A question, its answer, and where it comes from: item `number` of the set with this seed."""

    question: str
    answer: str
    seed: int
    number: int
    heldout: bool


def is_gym(name: str) -> bool:
    return name.startswith(PREFIX)


def parse(name: str) -> Address:
    """Raises UsageError for what is no address, and for a set that is refused, with the reason."""
    found = _ADDRESS.fullmatch(name)
    if found is None:
        raise UsageError(f'data source {name!r}: write gym:NAME or gym:NAME(KEY=VALUE,…)')
    own, arguments = found['set'], found['arguments'] or ''
    if own in REFUSED:
        raise UsageError(f'data source {name!r} is refused: {REFUSED[own]}')
    given = OURS.get(own, {}) | _arguments(name, arguments)
    sizes = {key: given.pop(key, default) for key, default in SIZES.items()}
    for key, value in sizes.items():
        least = 0 if key == 'seed' else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST[key]:
            raise UsageError(f'data source {name!r}: {key}={value} must be a whole number, {least} to {LARGEST[key]:,}')
    return Address(name, own, json.dumps(given, sort_keys=True), **sizes)


def _arguments(name: str, text: str) -> dict[str, Any]:
    """The arguments of a call as Python writes them; true, false and none may be small."""
    words = {'true': True, 'false': False, 'none': None}
    try:
        call = ast.parse(f'f({text})', mode='eval').body
        assert isinstance(call, ast.Call) and not call.args
        found = {}
        for argument in call.keywords:
            value, key = argument.value, argument.arg
            assert key and key not in found
            small = value.id if isinstance(value, ast.Name) else ''
            found[key] = words[small] if small in words else ast.literal_eval(value)
        json.dumps(found)
        return found
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        raise UsageError(f'data source {name!r}: between its brackets write KEY=VALUE,… with plain values') from None


def open_set(name: str, kind: Kind) -> Source:
    """The source of a set. Raises UsageError if it is refused, of another kind, or reasoning-gym is not installed."""
    if kind != 'chat':
        what = {'text': 'text', 'pairs': 'pairs of answers'}[kind]
        raise UsageError(f'data source {name!r} holds conversations, not {what}{belongs("chat")}')
    address = parse(name)
    key = _key(address)

    def read(counts: Counts) -> Iterator[Chat]:
        tally, items = _drawn(address)
        for reason, number in tally['dropped'].items():  # what was left out was never written
            counts.read += number
            counts.drop(reason, number=number)
        for item in items:
            counts.read += 1
            yield _chat(name, item)

    heldout = lambda record, share: record['meta']['heldout']
    return Source(name, key, read, lambda: _check(address), 'chat', heldout)


def _chat(name: str, item: Item) -> Chat:
    said = [Message(role='user', content=item.question), Message(role='assistant', content=item.answer)]
    place, size = f'{name}:{item.seed + item.number}', sum(len(m['content'].encode()) for m in said)
    meta = {'heldout': item.heldout}
    return Chat(id=str(item.seed + item.number), source=name, messages=said, bytes=size, meta=meta, place=place)


def items(name: str) -> list[Item]:
    """All items of a source, those of training first. Raises UsageError as `open_set` does."""
    return _drawn(parse(name))[1]


def call(item: Item, address: Address, response: str) -> list[Any]:
    """The arguments of `gym_worker.score`."""
    size = address.heldout if item.heldout else address.size
    return [address.set, address.parameters, item.seed, size, item.number, item.question, response]


# ---- drawn once ----


def _key(address: Address) -> dict[str, Any]:
    if importlib.util.find_spec('reasoning_gym') is None:
        raise UsageError(f'data source {address.name!r} needs the package reasoning-gym: {install("gym")}')
    return {'recipe': RECIPE, 'version': version('reasoning-gym'), **address._replace(name='')._asdict()}


def _drawn(address: Address) -> tuple[dict[str, Any], list[Item]]:
    """(the tally of what was left out, the items)."""
    folder = cache.build('gym', _key(address), functools.partial(_draw, address))
    lines = (folder / 'items.jsonl').read_text().split('\n')[:-1]
    return json.loads((folder / 'tally.json').read_text()), [Item(*json.loads(line)) for line in lines]


def _pool(**options: Any) -> workers.Pool:
    called = 'reasoning-gym in a worker process'
    return workers.Pool('lm.data.gym_worker:known_or_made', seconds=SECONDS, called=called, **options)


def _check(address: Address, pool: workers.Pool | None = None) -> None:
    """Raises UsageError for a set or a parameter that there is not."""
    name, own = address.name, json.loads(address.parameters)
    sets, parameters = _value((pool or _pool(size=1)).map([['known', address.set]])[0], address)
    if parameters is None:
        raise UsageError(f'data source {name!r}: reasoning-gym has no set {address.set}{nearest(address.set, sets)}')
    if unknown := next((key for key in own if key not in parameters), None):
        known = ', '.join([*parameters, *SIZES])
        raise UsageError(
            f'data source {name!r} has no parameter {unknown}{nearest(unknown, parameters)}: it has {known}'
        )


def _value(outcome: workers.Outcome, address: Address) -> Any:
    if outcome.problem:
        raise UsageError(f'data source {address.name!r}: its items cannot be made ({outcome.problem})')
    return outcome.value


def _draw(address: Address, directory: epath.Path) -> None:
    """Makes all items, without those that are there twice, and writes them with a tally of the others."""
    pool, tally, seen = _pool(), Counts(), {}
    _check(address, pool)
    parts = ((address.seed, address.size, False), (address.seed + HELDOUT, address.heldout, True))
    for seed, size, heldout in parts:
        of_set = ['make', address.set, address.parameters, seed, size]
        asked = [[*of_set, i, min(i + CHUNK, size)] for i in range(0, size, CHUNK)]
        made = (item for outcome in pool.map(asked) for item in _value(outcome, address))
        for number, (question, answer) in enumerate(made):
            known = seen.get(question)
            if answer is None:
                tally.drop('no_answer')
            elif known is None:
                seen[question] = Item(question, str(answer), seed, number, heldout)
            else:
                tally.drop('heldout_in_training' if heldout > known.heldout else 'duplicate')
    pool.close()
    counts = {part: sum(item.heldout == part for item in seen.values()) for part in (False, True)}
    if not all(counts.values()):
        missing = 'held-out' if counts[False] else 'training'
        raise UsageError(
            f'data source {address.name!r} has no {missing} question left ({_listed(tally)}): give it parameters that '
            'make more different ones, a smaller size or a larger heldout'
        )
    files.write_text(directory / 'items.jsonl', ''.join(json.dumps(item) + '\n' for item in seen.values()))
    files.write_json(directory / 'tally.json', {'dropped': tally.dropped})


def _listed(tally: Counts) -> str:
    return ', '.join(f'{reason} {n:,}' for reason, n in sorted(tally.dropped.items())) or 'nothing was dropped'
