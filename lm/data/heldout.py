"""Held-out data: documents by their content or the end of a long text, and what pretraining must not see, the answers
that operation Q&A holds out.

Fine-tuning asks what an operation does and answers with the first sentence of its documentation. It is split by the
operation's *name*, and pretraining leaves out every document that contains the answer of a held-out name.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

HELDOUT_SHARE = 0.05
SHORTEST_TEXT = 100  # bytes that can be cut in two
_NOT_A_WORD = re.compile(r'[\W_]+')


def heldout_operation(name: str) -> bool:
    """Tells whether operation Q&A holds out the operations called `name`, in every service: about a name in twenty."""
    return is_heldout(hashlib.blake2b(b'operation:' + name.encode(), digest_size=8).digest(), HELDOUT_SHARE)


def is_heldout(content_digest: bytes, share: float) -> bool:
    """Tells whether the document with this digest is held out: a hash of its content, not its place, decides."""
    return int.from_bytes(content_digest[:8], 'big') < share * 2**64


def cut_tail(text: bytes, size: float) -> tuple[bytes, bytes] | None:
    """(beginning, end) of a UTF-8 text whose end is to have about `size` bytes; None where one of them would be blank,
    or the text has less than SHORTEST_TEXT bytes.

    The end begins with a line where one begins in its first half, else with a word, else with a character.
    """
    if len(text) < SHORTEST_TEXT:
        return None
    size = round(min(max(size, 1), len(text) / 2))
    start = len(text) - size
    reach = start + size // 2
    for mark in (b'\n', b' '):
        if (found := text.find(mark, start, reach)) >= 0:
            start = found + 1
            break
    while start < len(text) and text[start] & 0xC0 == 0x80:  # inside a character
        start += 1
    parts = text[:start], text[start:]
    return parts if all(part.decode().strip() for part in parts) else None


def normalized(text: str) -> str:
    """Lower-case words with single spaces between them: texts that differ in case, markup or spacing become equal."""
    return _NOT_A_WORD.sub(' ', text.lower()).strip()


def leaks(texts: Sequence[str], answers: Iterable[str]) -> list[bool]:
    """For each text, whether it contains one of `answers` (normalized) as whole words.

    Each answer is looked for only in the texts that contain its rarest word, so a thousand answers against a hundred
    thousand texts take about a second.
    """
    padded = [f' {normalized(text)} ' for text in texts]
    frequency = Counter(word for text in padded for word in set(text.split()))
    by_word: dict[str, list[str]] = defaultdict(list)
    for answer in set(answers) - {''}:
        by_word[min(answer.split(), key=lambda w: (frequency[w], w))].append(f' {answer} ')
    return [any(a in text for word in set(text.split()) & by_word.keys() for a in by_word[word]) for text in padded]
