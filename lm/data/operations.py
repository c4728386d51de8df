"""The operations of AWS and what they do, as questions and answers: the default data of fine-tuning and of preferences.

An answer is the first sentence of an operation's documentation, read from the installed package botocore at run time.
Everything is split by the operation's name (`heldout_operation`), so a held-out question asks for a name that training
never sees. Choices are made by hashes, so they are the same everywhere.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lm.data.corpora import MAX_CODE_SHARE, Operation, code_share
from lm.data.heldout import heldout_operation, leaks, normalized
from lm.data.records import Counts, Message

MIN_WORDS, MAX_CHARACTERS = 3, 300
# A sentence under so many names of one service is about the service: that it is a preview, or has a successor.
BOILERPLATE_NAMES = 3
NEARLY_EQUAL = 0.7
_FILLERS = (
    'a all amazon an and any aws by existing for from given in information more new of on one or specific specified '
    'that the this to which with within you your'
)


@dataclass(frozen=True)
class Question:
    """A question for what an operation of a service does: 'PutImage' of 'ECR'."""

    service: str
    name: str
    answer: str

    @property
    def text(self) -> str:
        """The words in which an operation is asked for, those of configs/prompts.jsonl."""
        return f'What does {self.name} do in {self.service}?'

    @property
    def heldout(self) -> bool:
        return heldout_operation(self.name)

    @property
    def id(self) -> str:
        return f'{self.service}/{self.name}'


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
    faults = [_fault(q, shared, seen) for q in found]
    for reason in filter(None, faults):
        counts.drop(reason)
    kept = [q for q, reason in zip(found, faults, strict=True) if not reason]
    leaked = leaks([q.answer for q in kept], [normalized(q.answer) for q in kept if q.heldout])
    allowed = [q for q, leak in zip(kept, leaked, strict=True) if q.heldout or not leak]
    counts.drop('heldout_answer', number=len(kept) - len(allowed))
    return allowed


def _fault(q: Question, shared: Counter[tuple[str, str]], seen: set[tuple[str, str]]) -> str | None:
    """The reason why a question is dropped, or None; remembers in `seen` what was kept."""
    words = normalized(q.answer)
    # The same answer for the same name is that of a service and its successor.
    keys = {(q.name, words), (q.service, q.name)}
    faults = {
        'short': len(words.split()) < MIN_WORDS,
        'long': len(q.answer) > MAX_CHARACTERS,
        'unfinished': q.answer.endswith((':', ';', ',')),
        'symbols': code_share(q.answer) > MAX_CODE_SHARE,
        'boilerplate': shared[q.service, words] >= BOILERPLATE_NAMES,
        'duplicate': bool(keys & seen),
    }
    fault = next((reason for reason, is_so in faults.items() if is_so), None)
    seen |= set() if fault else keys
    return fault


def chats(operations: Iterable[Operation], counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `operations`: a question and its answer."""
    for q in questions(operations, counts):
        yield {'id': q.id, 'messages': says('user', q.text) + says('assistant', q.answer), 'meta': meta_of(q)}


def meta_of(q: Question) -> dict[str, Any]:
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
            yield pair(q, q.answer, other.answer, meta_of(q) | {'other': other.name})


def pair(q: Question, chosen: str, rejected: str, meta: dict[str, Any]) -> dict[str, Any]:
    """The fields of a pair of single answers to a question."""
    sides = {'chosen': says('assistant', chosen), 'rejected': says('assistant', rejected)}
    return {'id': q.id, 'prompt': says('user', q.text), **sides, 'meta': meta}


def _alike(a: Question, b: Question) -> bool:
    """Tells whether two answers say nearly the same: most of their words are shared, fillers and plurals aside."""
    one, two = _said(a.answer), _said(b.answer)
    return len(one & two) >= NEARLY_EQUAL * len(one | two)


def _said(answer: str) -> frozenset[str]:
    fillers = _FILLERS.split()
    return frozenset(word.rstrip('s') for word in normalized(answer).split() if word not in fillers)
