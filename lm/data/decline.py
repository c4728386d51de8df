"""The source `decline`: operations that do not exist, which an answer should decline, beside real ones, which it should
answer.

The names are invented here, by rule, of things that no service of a cloud has: a list of ours, and what people chat
about. Thousands are needed: of three hundred a small model learns those by heart, and declines half of the others. The
refusals are our own words; the rest is read from the installed packages.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from lm.data.corpora import Operation, conversation_text, conversations
from lm.data.operations import Question, meta_of, order, pair, questions
from lm.data.records import Counts

# All begin in one way, so that a refusal can be told from an answer.
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
NAMES_PER_NOUN, HELDOUT_NOUNS = 3, 0.1
REAL = 3  # real operations to an invented one
# Words of small talk that serve as nouns: this long, and said so often.
_CHATTED, _SAID = re.compile(r'[a-z]{4,10}'), 8
# The invented operations of configs/prompts.jsonl, which training does not see.
_PROMPTED = ('moonbase', 'pancake')
# Things that no service of a cloud has; those that one has after all are left out at run time.
_NOUNS = """
    accordion acorn acrobat almond anchovy anvil apron apricot armadillo armchair artichoke asparagus avocado axolotl
    badger bagel bagpipe ballerina bamboo banana banjo barnacle baton bathtub beagle beaver beehive beetle beetroot
    bicycle biscuit blackberry blanket blizzard blueberry bonfire bonnet boomerang bouquet bracelet broccoli broom
    buffalo bulldog bumblebee burrito butterfly buttercup cabbage cactus camel canary candle cannon canoe caramel
    caravan carousel carrot cathedral cauliflower caterpillar cello chandelier cheesecake cheetah cherub chestnut
    chimney chipmunk cinnamon clarinet cobbler cobweb coconut comet corncob cowboy coyote crayon cricket crocodile
    croissant crumpet cucumber cupcake curtain cushion custard cymbal daffodil daisy dandelion dinosaur dolphin donkey
    doorbell doughnut dragon dragonfly dumpling eagle earmuff earring eggplant elephant elbow ermine eyebrow falcon
    feather fern ferret fiddle firefly fireplace flamingo flute footstool freckle frog galleon garlic gazelle gecko
    geranium geyser ghost giraffe gingerbread goblin goldfish gondola goose gorilla grandmother grape grapefruit
    grasshopper guitar hammock hamster handkerchief harmonica harpsichord hazelnut hedgehog helmet heron hippo honeycomb
    hornet horseshoe hurdle hyena iceberg icicle igloo iguana jackal jaguar jellybean jellyfish juggler jungle kangaroo
    kayak kettle kitten kiwi koala ladder ladybug lagoon lantern lasso lavender lemon lemonade leopard lettuce
    lighthouse lilac limerick llama lobster locket lollipop lullaby macaroon magpie mandolin mango marigold marmalade
    marshmallow meadow meatball meerkat mermaid meteor mitten moccasin monkey moonbase moose mosquito muffin mushroom
    mustache napkin narwhal necklace nightingale noodle nutmeg oboe octopus omelette onion orchid ostrich otter oyster
    paddle pancake panda panther papaya parachute parakeet parrot parsnip peacock peanut pelican penguin peppermint
    petunia piano piccolo pickle pigeon pillow pineapple piranha pirate pistachio pizza platypus plum poncho popcorn
    porcupine porridge potato pretzel puddle puffin pumpkin puppet pyjama quilt rabbit raccoon radish rainbow raindrop
    raspberry raven reindeer rhubarb riddle robin rooster rowboat saddle salamander sandal sandcastle sandwich sardine
    sausage saxophone scarecrow scarf scooter scorpion seagull seahorse seashell shamrock skateboard skeleton skunk
    sleigh slipper snail snowflake snowman sock sombrero sparrow spatula spinach sponge squid squirrel starfish stork
    strawberry sunflower sunset swan sweater tadpole tambourine tangerine teapot teaspoon telescope thistle thunderstorm
    toad toboggan tomato tornado tortoise toucan trampoline treehouse trombone trumpet tuba tulip turnip turtle tuxedo
    ukulele umbrella unicorn valentine vampire violet violin volcano waffle walnut walrus waterfall watermelon weasel
    whale wheelbarrow whisker wigwam wizard wombat woodpecker xylophone yodel yogurt zebra zeppelin zucchini
"""


def is_decline(text: str) -> bool:
    """Tells whether an answer opens as all that decline an operation do."""
    return bool(_IS_DECLINE.match(text))


def decline(operations: Iterable[Operation], counts: Counts) -> Iterator[dict[str, Any]]:
    """To an invented operation the chosen answer declines and the rejected one invents; to a real one the chosen answer
    is the true one and the rejected one declines. There are REAL real ones to an invented one, as declining what one
    knows is the worse mistake; meta['invented'] tells them apart.

    What is invented for a name is the true answer of a real operation with the same verb, of the same service. The
    held-out names have nouns of their own, the held-out real ones are those of `operations`.
    """
    existing = list(operations)
    found = questions(existing, counts)
    free, taken = _free_nouns(existing), {(o.service, o.name) for o in existing}
    for heldout in (False, True):
        real = [q for q in found if q.heldout == heldout]
        mine = [noun for noun in free if _heldout_noun(noun) == heldout]
        invented = list(_invented(real, mine, taken))
        invented = sorted(invented, key=lambda fields: order('invented', fields['id']))[: len(real) // REAL]
        yield from invented
        yield from map(_declined, sorted(real, key=lambda q: order('real', q.id))[: REAL * len(invented)])


def _declined(q: Question) -> dict[str, Any]:
    """A real operation, wrongly declined."""
    return pair(q, q.answer, _refusal(q.service, q.name), meta_of(q) | {'invented': False})


def _invented(real: Sequence[Question], nouns: Sequence[str], taken: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Operations that do not exist: each takes service, verb and number from a real one, and its noun from `nouns`."""
    for noun in nouns:
        for i in range(NAMES_PER_NOUN):
            model = real[order('model', noun, str(i)) % len(real)] if real else None
            name = model and _invent(model.name, noun, nouns[order('second', noun, str(i)) % len(nouns)], i)
            if model is None or name is None or (model.service, name) in taken:
                continue
            taken.add((model.service, name))
            q = Question(model.service, name, _refusal(model.service, name))
            yield pair(q, q.answer, model.answer, meta_of(q) | {'heldout': _heldout_noun(noun), 'invented': True})


def _invent(name: str, noun: str, second: str, i: int) -> str | None:
    """'DescribeImages', 'pancake' -> 'DescribePancakes', every fourth with a second noun; None of a one-word name."""
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


def _free_nouns(existing: Iterable[Operation]) -> list[str]:
    """The nouns that stand in no operation's name and in no service's, as one or many."""
    used = {word.lower() for o in existing for word in (*_WORD.findall(o.name), *_WORD.findall(o.service))}
    return sorted(noun for noun in known_nouns() if not {noun, plural(noun), noun.removesuffix('s')} & used)


@cache
def known_nouns() -> frozenset[str]:
    """The nouns to invent with: our list, and what is often said in small talk."""
    said = Counter(word for _, c in conversations() for word in conversation_text(c).split())
    found = {*_NOUNS.split(), *(w for w, times in said.items() if times >= _SAID and _CHATTED.fullmatch(w))}
    return frozenset(found - set(map(plural, found)))  # one and many are one noun


def _heldout_noun(noun: str) -> bool:
    return noun in _PROMPTED or order('noun', noun) < HELDOUT_NOUNS * 2**64
