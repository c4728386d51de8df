"""The prompts that an online stage asks: what stands before the last answers of conversations."""

from collections.abc import Sequence
from typing import Any

from lm.data import chats
from lm.data.chats import Question
from lm.data.packing import shuffled
from lm.data.prepare import PreparedSource
from lm.errors import UsageError


class Prompts:
    """The prompts of some sources that leave room for a response, in the order in which they are asked.

    Attributes:
      places: (source, conversation) of each. longest: the tokens of the longest. too_long: how many leave no room.

    Raises UsageError if there is none.
    """

    def __init__(self, sources: Sequence[PreparedSource], *, seq_len: int, max_new_tokens: int, seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.places: list[tuple[int, int]] = []
        self.longest = self.too_long = 0
        for n, s in enumerate(sources):
            for i in range(s.train.documents):
                question = self._question(n, i)
                if question is None:
                    continue
                if len(question.prompt) > seq_len - max_new_tokens:
                    self.too_long += 1
                    continue
                self.places.append((n, i))
                self.longest = max(self.longest, len(question.prompt))
        if not self.places:
            raise UsageError(
                f'no prompt leaves room for rl.max_new_tokens={max_new_tokens} in seq_len={seq_len}: set a longer '
                'seq_len'
            )

    def __len__(self) -> int:
        return len(self.places)

    def all(self) -> list[Any]:
        """All of them, by source."""
        return [self._question(*place) for place in self.places]

    def at(self, number: int, again: int = 0) -> tuple[int, Any]:
        """(its source, the prompt) that is asked at this place: each once in an epoch, in an order that the seed gives.

        Args:
          again: the number of another order, of prompts that take the place of others.
        """
        source, conversation = self.places[shuffled(number, len(self), self.seed + (again << 32))]  # seeds have 32 bits
        return source, self._question(source, conversation)

    def _question(self, source: int, conversation: int) -> Question | None:
        """The last answer of a conversation and what stands before it; None if it has none."""
        ids, trained = self.sources[source].train.conversation(conversation)
        return chats.last_answer(ids, trained, len(ids))
