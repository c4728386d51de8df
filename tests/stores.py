"""Small stores of conversations and of pairs, made by hand: every token says which conversation it is of."""

import numpy as np

from lm.data import chats
from lm.data.chats import ChatStore
from lm.data.pairs import PairStore
from lm.data.store import TokenStore, checksums_of

PAD = 0


def encoded(number, mask, *, step=40):
    """Ids that no other conversation has, and the mask ('.' said to the assistant, 'x' by it)."""
    return [1 + number * step + i for i in range(len(mask))], [m == 'x' for m in mask]


def chat_store(folder, found, *, vocab_size=60_000):
    chats.write_encoded(folder, found, vocab_size)
    tokens = TokenStore.open(folder, vocab_size=vocab_size, pad_id=PAD, checksums=checksums_of(folder))
    return ChatStore(tokens, np.memmap(folder / 'trained.bin', np.uint8, 'r'))


def pair_store(folder, sides, table=None, **options):
    """Of [(ids, trained) of each side] a pair."""
    table = [(1.0, 0.0)] * len(sides) if table is None else table
    sequences = chat_store(folder, [s for pair in sides for s in pair], **options)
    return PairStore(sequences, np.array(table, np.float32), len(sides[0]))


def masks(count, draw, *, longest=12):
    """A mask a conversation: a prompt, then one to two answers with another question between."""
    found = []
    for _ in range(count):
        parts = [
            f'{"." * draw.integers(1, longest)}{"x" * draw.integers(1, longest)}' for _ in range(draw.integers(1, 3))
        ]
        found.append(''.join(parts))
    return found
