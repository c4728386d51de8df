"""Conversations of people, from the installed package chitchat-dataset: as chats, and as pairs by the people's ratings.

Each was opened by a question that both people saw (its `prompt`, one of 35), and rated by them from 1 to 10 for being
witty, interesting and upbeat. The sliders began at 5.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lm.data.corpora import conversation_text, conversations
from lm.data.heldout import is_heldout
from lm.data.operations import order, says
from lm.data.records import Chat, Counts, Message, Role
from lm.data.store import digest

MIN_TURNS, MIN_GAP, MAX_LENGTH_RATIO = 4, 2.0, 1.25
HELDOUT_PROMPTS = 0.1
MAX_PIECE, MAX_REPLY = 500, 100  # characters
_UNTOUCHED = 5


def chats(counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `smalltalk`: whoever speaks first is the user, the other the assistant, who has the last word. Long
    conversations come in pieces, so that a small model's context holds one."""
    for key, conversation in conversations():
        counts.read += 1
        messages = _messages(_turns(conversation), ('user', 'assistant'))
        if len(messages) < 2:
            counts.drop('one_turn')
            continue
        # Held out is what pretraining holds out, which goes by the text that it reads.
        meta = {'document': digest(conversation_text(conversation).encode()).hex()}
        for number, piece in enumerate(_pieces(messages)):
            yield {'id': f'{key}/{number}', 'messages': piece, 'meta': meta}


def _pieces(messages: list[Message]) -> Iterator[list[Message]]:
    """Whole exchanges, user and assistant, of MAX_PIECE characters or one more; broken off before a long reply, of
    which a small model learns to ramble."""
    piece: list[Message] = []
    for user, assistant in zip(messages[::2], messages[1::2], strict=True):
        short = len(assistant['content']) <= MAX_REPLY
        piece += [user, assistant] if short else []
        if piece and (not short or sum(len(m['content']) for m in piece) > MAX_PIECE):
            yield piece
            piece = []
    if piece:
        yield piece


def heldout_chat(record: Chat, share: float) -> bool:
    """Tells whether pretraining holds out the document of the same conversation, at the same share."""
    return is_heldout(bytes.fromhex(record['meta']['document']), share)


def _turns(conversation: dict[str, Any]) -> list[str]:
    """The turns of one and the other. An empty turn is none, and joins those around it."""
    said = [(m['sender'], ' '.join(m['text'].split())) for turn in conversation['messages'] for m in turn]
    groups = itertools.groupby([(who, text) for who, text in said if text], key=lambda pair: pair[0])
    return [' '.join(text for _, text in group) for _, group in groups]


def _messages(turns: list[str], roles: tuple[Role, Role]) -> list[Message]:
    """The turns as messages, without a last one that is a user's."""
    messages = [Message(role=roles[i % 2], content=turn) for i, turn in enumerate(turns)]
    return messages[:-1] if messages and messages[-1]['role'] == 'user' else messages


# ---- ratings ----


@dataclass(frozen=True)
class _Rated:
    """A conversation with a rating: how it opened, what was said, the mean of its ratings, its length in characters."""

    id: str
    prompt: str
    messages: list[Message]
    rating: float

    @property
    def length(self) -> int:
        return sum(len(m['content']) for m in self.messages)


def ratings(counts: Counts) -> Iterator[dict[str, Any]]:
    """The source `ratings`: of two conversations about one question, the one that people rated higher by 2 or more.

    The question is the prompt, the user's first message, as both people had read it before they spoke; whoever spoke
    first then answers it as the assistant. Only conversations of similar length are compared: of all of them the longer
    one is rated higher three times in four, and a model would learn to count. `margin` is the gap between the mean
    ratings. Held-out pairs are about questions that training does not see, so no conversation is in both parts.
    """
    by_prompt: dict[str, list[_Rated]] = defaultdict(list)
    for rated in _rated(counts):
        by_prompt[rated.prompt].append(rated)
    for prompt, group in sorted(by_prompt.items()):
        meta = {'heldout': order('rated', prompt) < HELDOUT_PROMPTS * 2**64}
        for pair in itertools.combinations(group, 2):
            worse, better = sorted(pair, key=lambda rated: rated.rating)
            gap, (shorter, longer) = better.rating - worse.rating, sorted(rated.length for rated in pair)
            if gap >= MIN_GAP and longer <= MAX_LENGTH_RATIO * shorter:
                sides = {'prompt': says('user', prompt), 'chosen': better.messages, 'rejected': worse.messages}
                yield {'id': f'{better.id}/{worse.id}', **sides, 'margin': round(gap, 4), 'meta': meta}


def _rated(counts: Counts) -> Iterator[_Rated]:
    """The conversations that can be compared; counts why the others cannot."""
    for key, conversation in conversations():
        counts.read += 1
        numbers = list(conversation.get('ratings', {}).values())
        turns = _turns(conversation)
        if not numbers:
            counts.drop('not_rated')
        elif set(numbers) == {_UNTOUCHED}:
            counts.drop('untouched')
        elif not conversation.get('prompt'):
            counts.drop('no_prompt')
        elif len(turns) < MIN_TURNS:
            counts.drop('few_turns')
        else:
            messages = _messages(turns, ('assistant', 'user'))
            yield _Rated(key, conversation['prompt'], messages, sum(numbers) / len(numbers))
