"""Small stores of conversations and of pairs, made by hand: every token says which conversation it is of."""

from lm.data import chats, pairs
from lm.data.chats import ChatStore
from lm.data.pairs import PairStore
from lm.data.store import checksums_of

PAD = 0


def encoded(number, mask, *, step=40):
    """Ids that no other conversation has, and the mask ('.' said to the assistant, 'x' by it)."""
    return [1 + number * step + i for i in range(len(mask))], [m == 'x' for m in mask]


def chat_store(folder, found, *, vocab_size=60_000):
    chats.write_encoded(folder, found, vocab_size)
    return ChatStore.open(folder, vocab_size=vocab_size, pad_id=PAD, checksums=checksums_of(folder, chats._FILES))


def pair_store(folder, sides, table=None, *, vocab_size=60_000):
    """Of [(ids, trained) of each side] a pair."""
    table = [(1.0, 0.0)] * len(sides) if table is None else table
    chats.write_encoded(folder, [s for pair in sides for s in pair], vocab_size)
    differs = [pairs.first_difference(pair[0][0], pair[1][0]) for pair in sides]
    pairs.write_tables(folder, [x for line in table for x in line], differs)
    options = {'vocab_size': vocab_size, 'pad_id': PAD, 'checksums': checksums_of(folder, pairs._FILES)}
    return PairStore.open(folder, sides=len(sides[0]), **options)


def masks(count, draw, *, longest=12):
    """A mask a conversation: a prompt, then one to two answers with another question between."""
    found = []
    for _ in range(count):
        parts = [
            f'{"." * draw.integers(1, longest)}{"x" * draw.integers(1, longest)}' for _ in range(draw.integers(1, 3))
        ]
        found.append(''.join(parts))
    return found
