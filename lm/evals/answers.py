"""Answers to held-out questions: whether they end by themselves, and how near they come to the true ones."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lm import progress
from lm.data.chats import Question
from lm.data.decline import is_decline
from lm.data.heldout import normalized
from lm.data.tokenizer import Tokenizer
from lm.model.config import ModelConfig
from lm.sampling.generate import Sampling, generate

BATCH = 64  # questions answered at once


def f1(answer: str, truth: str) -> float:
    """The harmonic mean of precision and recall of an answer's words against the true one's, as SQuAD has it
    (Rajpurkar et al., 2016, section 6.1): lower case, without punctuation, each word as often as it comes."""
    found, true = Counter(normalized(answer).split()), Counter(normalized(truth).split())
    common = (found & true).total()
    return 2 * common / (found.total() + true.total()) if common else float(found == true)


class Answered(NamedTuple):
    """An answer, what the data has, and whether the answer ended by itself."""

    text: str
    truth: str
    ended: bool


def answered(
    params: Any, cfg: ModelConfig, tokenizer: Tokenizer, questions: Sequence[Question], *, stop_ids: Sequence[int],
    max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
) -> list[Answered]:  # fmt: skip
    """Returns a model's answer to each question, greedy by default, BATCH at a time, those of like length together."""
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    options = {'stop_ids': stop_ids, 'max_new_tokens': max_new_tokens, 'allowed': tokenizer.is_token}
    options['sampling'] = Sampling(temperature)
    found: dict[int, Answered] = {}
    with progress.task('answers', len(order)) as task:
        for start in range(0, len(order), BATCH):
            some = order[start : start + BATCH]
            drawn = generate(params, cfg, [questions[i].prompt for i in some], seed=seed + start, **options)
            for i, (ids, ended) in zip(some, drawn, strict=True):
                found[i] = Answered(tokenizer.decode(ids), tokenizer.decode(questions[i].answer), ended)
            task.advance(len(some))
    return [found[i] for i in range(len(questions))]


def quality(found: Sequence[Answered]) -> dict[str, float]:
    """{'ended', 'f1'}: the part that ends by itself, and the mean F1 against the data's answers."""
    return {'ended': mean(a.ended for a in found), 'f1': mean(f1(a.text, a.truth) for a in found)}


def metrics(found: Sequence[Answered]) -> dict[str, float]:
    """`quality` and, where the data declines some questions, `refusals`. What is said of real names tells how well a
    model answers; where it should decline there is nothing to say."""
    declines = any(is_decline(a.truth) for a in found)
    return quality([a for a in found if not is_decline(a.truth)] or found) | (refusals(found) if declines else {})


def refusals(found: Sequence[Answered]) -> dict[str, float]:
    """{'declined_real', 'declined_invented'}: the part that declines of questions about real operations, which the data
    answers, and about invented ones, which it declines; of each kind that is there."""
    names = {False: 'declined_real', True: 'declined_invented'}
    of = {names[is_decline(a.truth)]: [] for a in found}
    for a in found:
        of[names[is_decline(a.truth)]].append(is_decline(a.text))
    return {name: mean(declined) for name, declined in of.items()}


def mean(values: Iterable[float]) -> float:
    """0 of none."""
    found = list(values)
    return sum(found) / max(len(found), 1)
