"""Parts of a rollout: scored responses, and the rows that they share."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.data.chats import Question
from lm.losses import policy as losses
from lm.sampling.generate import Drawn


class Scored(NamedTuple):
    """Responses to questions, those to one beside each other, with their scores."""

    asked: list[Question]
    drawn: list[Drawn]
    scores: dict[str, np.ndarray]  # by their source

    def filled(self, wanted: np.ndarray, others: 'Scored', good: np.ndarray, group: int) -> 'Scored':
        """With groups that are `wanted` [P] given up for those of the others that are `good` [P], in their order."""
        moves = list(zip(np.flatnonzero(wanted).tolist(), np.flatnonzero(good).tolist(), strict=False))
        takes = {to * group + i: of * group + i for to, of in moves for i in range(group)}
        pick = lambda own, new: [new[takes[i]] if i in takes else x for i, x in enumerate(own)]
        scores = {name: np.array(pick(x, others.scores[name]), np.float32) for name, x in self.scores.items()}
        return Scored(pick(self.asked, others.asked), pick(self.drawn, others.drawn), scores)


def overlong(lengths: Sequence[int], longest: int) -> np.ndarray:
    """The penalty to add to the scores of responses that come near the longest length: from 0 at 4/5 of it down to −1
    (DAPO, arXiv 2503.14476, eq. 13). Float32 [N]."""
    room = longest / 5
    return np.clip((longest - room - np.array(lengths)) / room, -1, 0).astype(np.float32)


class Packing(NamedTuple):
    """Responses in rows, several to one: [(response, its place, its tokens), …] of each row."""

    rows: list[list[tuple[int, int, int]]]
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], width: int) -> 'Packing':
        """The longest first, each in the first row that has room."""
        rows: list[list[tuple[int, int, int]]] = []
        used: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fits = (r for r, n in enumerate(used) if n + lengths[i] <= width and len(rows[r]) < losses.RESPONSES)
            r = next(fits, len(rows))
            if r == len(rows):
                rows.append([])
                used.append(0)
            rows[r].append((i, used[r], lengths[i]))
            used[r] += lengths[i]
        return cls(rows, width)

    def lay(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays [responses, T] as packed rows."""
        out = {name: np.zeros((len(self.rows), self.width), x.dtype) for name, x in arrays.items()}
        for r, row in enumerate(self.rows):
            for segment, (i, at, n) in enumerate(row, 1):
                for name, x in arrays.items():
                    out[name][r, at : at + n] = segment if name == 'segments_BT' else x[i, :n]
        return out

    def unpack(self, x_RT: np.ndarray, responses: int) -> np.ndarray:
        """An array of packed rows as [responses, T]."""
        out = np.zeros((responses, self.width), x_RT.dtype)
        for r, row in enumerate(self.rows):
            for i, at, n in row:
                out[i, :n] = x_RT[r, at : at + n]
        return out
