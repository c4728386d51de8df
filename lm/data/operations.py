"""What the operations of AWS do, as questions and answers: the default data of fine-tuning and of preferences.

An answer is the first sentence of an operation's documentation, read from the installed package botocore at run time.
Everything is split by the operation's name (`heldout_operation`), so a held-out question asks for a name that training
never sees. Choices are made by hashes, so they are the same everywhere.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm.data.corpora import MAX_CODE_SHARE, Operation, code_share
from lm.data.heldout import heldout_operation, leaks, normalized
from lm.data.records import Counts, Message

MIN_WORDS, MAX_CHARACTERS = 3, 300
# A sentence under so many names of one service is about the service: that it is a preview, or has a successor.
BOILERPLATE_NAMES = 3
NEARLY_EQUAL = 0.7
_FILLERS = frozenset(
    'a all amazon an and any aws by existing for from given in information more new of on one or specific specified '
    'that the this to which with within you your'.split()
)


@dataclass(frozen=True)
class Question:
    """What an operation of a service does: 'PutImage' of 'ECR'."""

    service: str
    name: str
    answer: str

    @property
    def text(self) -> str:
        return question(self.service, self.name)

    @property
    def heldout(self) -> bool:
        return heldout_operation(self.name)

    @property
    def id(self) -> str:
        return f'{self.service}/{self.name}'


def question(service: str, name: str) -> str:
    """The words in which an operation is asked for, those of configs/prompts.jsonl."""
    return f'What does {name} do in {service}?'


def says(role: Any, content: str) -> list[Message]:
    """One message, as the list that prompts and sides are."""
    return [Message(role=role, content=content)]


def order(*words: str) -> int:
    """A number that looks random and is the same everywhere: what to sort by, or to choose by."""
    return int.from_bytes(hashlib.blake2b('\n'.join(words).encode(), digest_size=8).digest(), 'big')


# ---- questions ----


def questions(operations: Iterable[Operation], counts: Counts) -> list[Question]:
    """The operations whose first sentence answers the question; counts why the others do not.

    What training may see does not contain an answer that is held out, as in pretraining.
    """
    found = [Question(o.service, o.name, ' '.join(o.first_sentence.split())) for o in operations]
    counts.read += len(found)
    shared = Counter((q.service, normalized(q.answer)) for q in found)
    seen: set[tuple[str, str]] = set()
    kept = []
    for q in found:
        if reason := _fault(q, shared, seen):
            counts.drop(reason)
        else:
            kept.append(q)
    answers = [normalized(q.answer) for q in kept if q.heldout]
    leaked = leaks([q.answer for q in kept], answers)
    counts.drop('heldout_answer', sum(leak and not q.heldout for q, leak in zip(kept, leaked, strict=True)))
    return [q for q, leak in zip(kept, leaked, strict=True) if q.heldout or not leak]


def _fault(q: Question, shared: Counter[tuple[str, str]], seen: set[tuple[str, str]]) -> str | None:
    """Why a question is dropped, or None; remembers in `seen` what was kept."""
    words = normalized(q.answer)
    if len(words.split()) < MIN_WORDS:
        return 'short'
    if len(q.answer) > MAX_CHARACTERS:
        return 'long'
    if q.answer.endswith((':', ';', ',')):
        return 'unfinished'
    if code_share(q.answer) > MAX_CODE_SHARE:
        return 'symbols'
    if shared[q.service, words] >= BOILERPLATE_NAMES:
        return 'boilerplate'
    # The same answer for the same name is that of a service and its successor.
    keys = {(q.name, words), (q.service, q.name)}
    if keys & seen:
        return 'duplicate'
    seen |= keys
    return None


def chats(operations: Iterable[Operation], counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `operations`: a question and its answer."""
    for q in questions(operations, counts):
        messages = says('user', q.text) + says('assistant', q.answer)
        yield {'id': q.id, 'messages': messages, 'meta': _meta(q)}


def _meta(q: Question) -> dict[str, Any]:
    return {'service': q.service, 'operation': q.name, 'heldout': q.heldout}


# ---- pairs ----


def programmatic(operations: Iterable[Operation], counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `programmatic`: the true answer against that of another operation of the same service.

    No person compared them. The questions of a service stand in a circle, in the order of their hashes, and each takes
    the answer of the next one whose answer is not nearly its own. So every answer is chosen once and rejected about
    once: who looks at the answers alone, at their length or their style, is right half of the time. Training and
    held-out questions have circles of their own; a held-out one that is alone in its service takes a training answer.
    """
    parts: dict[tuple[str, bool], list[Question]] = defaultdict(list)
    for q in sorted(questions(operations, counts), key=lambda q: order('circle', q.id)):
        parts[q.service, q.heldout].append(q)
    for (service, heldout), circle in parts.items():
        spare = parts.get((service, False), []) if heldout else []
        for i, q in enumerate(circle):
            other = next((o for o in (*circle[i + 1 :], *circle[:i], *spare) if not _alike(q, o)), None)
            if other is None:
                counts.drop('no_other_answer')
                continue
            yield _pair(q.id, q.text, q.answer, other.answer, _meta(q) | {'other': other.name})


def _pair(key: str, prompt: str, chosen: str, rejected: str, meta: dict[str, Any]) -> dict[str, Any]:
    sides = {'chosen': says('assistant', chosen), 'rejected': says('assistant', rejected)}
    return {'id': key, 'prompt': says('user', prompt), **sides, 'meta': meta}


def _alike(a: Question, b: Question) -> bool:
    """Whether two answers say nearly the same: most of their words are shared, fillers and plurals aside."""
    one, two = _said(a.answer), _said(b.answer)
    return len(one & two) >= NEARLY_EQUAL * len(one | two)


def _said(answer: str) -> frozenset[str]:
    return frozenset(word.rstrip('s') for word in normalized(answer).split()) - _FILLERS


# ---- declining ----

# All begin in one way, so that a refusal can be told from an answer.
_OPENING = "I don't know"
_DECLINES = (
    "I don't know an operation called {name} in {service}.",
    "I don't know any {name} in {service}, so I can't say what it does.",
    "I don't know {name}: as far as I can tell, {service} has no operation of that name.",
    "I don't know what {name} would do, because {service} has no such operation that I have read of.",
    "I don't know of a {name} in {service}. Please check the name of the operation.",
    "I don't know that one. {service} may have an operation like it, but none is called {name}.",
)
_IS_DECLINE = re.compile(r"\W*I (?:don['’]?t|do not) know\b", re.IGNORECASE)
_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+')
# Names that a noun is asked for under, and the part of the nouns that is held out.
NAMES_PER_NOUN, HELDOUT_NOUNS = 12, 0.25
# The invented operations of configs/prompts.jsonl, which training does not see.
_PROMPTED = ('moonbase', 'pancake')
# Things that no service of a cloud has; those that one has after all are left out at run time.
_NOUNS = """
    accordion acorn acrobat almond anchovy anvil apron apricot armadillo armchair artichoke asparagus avocado axolotl
    badger bagel bagpipe ballerina bamboo banana banjo barnacle baton bathtub beagle beaver beehive beetle beetroot
    bicycle biscuit blackberry blanket blizzard blueberry bonfire bonnet boomerang bouquet bracelet broccoli broom
    buffalo bulldog bumblebee burrito butterfly buttercup cabbage cactus camel canary candle cannon canoe caramel caravan
    carousel carrot cathedral cauliflower caterpillar cello chandelier cheesecake cheetah cherub chestnut chimney
    chipmunk cinnamon clarinet cobbler cobweb coconut comet corncob cowboy coyote crayon cricket crocodile croissant
    crumpet cucumber cupcake curtain cushion custard cymbal daffodil daisy dandelion dinosaur dolphin donkey doorbell
    doughnut dragon dragonfly dumpling eagle earmuff earring eggplant elephant elbow ermine eyebrow falcon feather fern
    ferret fiddle firefly fireplace flamingo flute footstool freckle frog galleon garlic gazelle gecko geranium geyser
    ghost giraffe gingerbread goblin goldfish gondola goose gorilla grandmother grape grapefruit grasshopper guitar
    hammock hamster handkerchief harmonica harpsichord hazelnut hedgehog helmet heron hippo honeycomb hornet horseshoe
    hurdle hyena iceberg icicle igloo iguana jackal jaguar jellybean jellyfish juggler jungle kangaroo kayak kettle kitten
    kiwi koala ladder ladybug lagoon lantern lasso lavender lemon lemonade leopard lettuce lighthouse lilac limerick
    llama lobster locket lollipop lullaby macaroon magpie mandolin mango marigold marmalade marshmallow meadow meatball
    meerkat mermaid meteor mitten moccasin monkey moonbase moose mosquito muffin mushroom mustache napkin narwhal necklace
    nightingale noodle nutmeg oboe octopus omelette onion orchid ostrich otter oyster paddle pancake panda panther
    papaya parachute parakeet parrot parsnip peacock peanut pelican penguin peppermint petunia piano piccolo pickle
    pigeon pillow pineapple piranha pirate pistachio pizza platypus plum poncho popcorn porcupine porridge potato
    pretzel puddle puffin pumpkin puppet pyjama quilt rabbit raccoon radish rainbow raindrop raspberry raven reindeer
    rhubarb riddle robin rooster rowboat saddle salamander sandal sandcastle sandwich sardine sausage saxophone scarecrow
    scarf scooter scorpion seagull seahorse seashell shamrock skateboard skeleton skunk sleigh slipper snail snowflake
    snowman sock sombrero sparrow spatula spinach sponge squid squirrel starfish stork strawberry sunflower sunset
    swan sweater tadpole tambourine tangerine teapot teaspoon telescope thistle thunderstorm toad toboggan tomato
    tornado tortoise toucan trampoline treehouse trombone trumpet tuba tulip turnip turtle tuxedo ukulele umbrella
    unicorn valentine vampire violet violin volcano waffle walnut walrus waterfall watermelon weasel whale wheelbarrow
    whisker wigwam wizard wombat woodpecker xylophone yodel yogurt zebra zeppelin zucchini
""".split()


def is_decline(text: str) -> bool:
    """Whether an answer opens as all that decline an operation do."""
    return bool(_IS_DECLINE.match(text))


def decline(operations: Iterable[Operation], counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `decline`: to an invented operation the chosen answer declines and the rejected one invents; to a real
    one the chosen answer is the true one and the rejected one declines. There are as many of either.

    What is invented for a name is the true answer of a real operation with the same verb, of the same service. The
    held-out names have nouns of their own, the held-out real ones are those of `operations`. meta['invented'] tells them
    apart.
    """
    found = questions(operations, counts)
    nouns = _free_nouns(found)
    for heldout in (False, True):
        real = [q for q in found if q.heldout == heldout]
        mine = [noun for noun in nouns if _heldout_noun(noun) == heldout]
        invented = list(_invented(real, mine, {(q.service, q.name) for q in found}))
        yield from invented
        yield from map(_declined, sorted(real, key=lambda q: order('real', q.id))[: len(invented)])


def _declined(q: Question) -> dict[str, Any]:
    """A real operation, wrongly declined."""
    return _pair(q.id, q.text, q.answer, _refusal(q.service, q.name), _meta(q) | {'invented': False})


def _invented(real: Sequence[Question], nouns: Sequence[str], taken: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Operations that do not exist: each takes service, verb and number from a real one, and its noun from `nouns`."""
    for noun in nouns:
        for i in range(NAMES_PER_NOUN):
            model = real[order('model', noun, str(i)) % len(real)] if real else None
            name = model and _invent(model.name, noun, nouns[order('second', noun, str(i)) % len(nouns)], i)
            if model is None or name is None or (model.service, name) in taken:
                continue
            taken.add((model.service, name))
            meta = {'service': model.service, 'operation': name, 'heldout': _heldout_noun(noun), 'invented': True}
            refusal = _refusal(model.service, name)
            yield _pair(f'{model.service}/{name}', question(model.service, name), refusal, model.answer, meta)


def _invent(name: str, noun: str, second: str, i: int) -> str | None:
    """'DescribeImages', 'pancake' -> 'DescribePancakes', every fourth with a second noun; None of a name of one word."""
    words = _WORD.findall(name)
    if len(words) < 2 or ''.join(words) != name:
        return None
    thing = (second.capitalize() if i % 4 == 3 and second != noun else '') + noun.capitalize()
    return words[0] + (plural(thing) if words[-1].endswith('s') else thing)


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    if noun.endswith('y') and noun[-2] not in 'aeiou':
        return noun[:-1] + 'ies'
    return noun + ('es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's')


def _refusal(service: str, name: str) -> str:
    """Declines an operation, in one of several wordings."""
    return _DECLINES[order('wording', service, name) % len(_DECLINES)].format(service=service, name=name)


def _free_nouns(found: Iterable[Question]) -> list[str]:
    """The nouns that stand in no operation's name and in no service's, as one or many."""
    used = {word.lower() for q in found for word in (*_WORD.findall(q.name), *_WORD.findall(q.service))}
    return sorted(noun for noun in set(_NOUNS) if not {noun, plural(noun)} & used)


def _heldout_noun(noun: str) -> bool:
    return noun in _PROMPTED or order('noun', noun) < HELDOUT_NOUNS * 2**64
