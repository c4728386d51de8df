"""Answers to held-out questions: whether they end by themselves, and how near they come to the true ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm.data.chats import Question
from lm.data.heldout import normalized
from lm.data.decline import is_decline
from lm.data.tokenizer import Tokenizer
from lm.model.transformer import ModelConfig
from lm.sampling.generate import GREEDY, Generation, Sampling, generate

BATCH = 64  # questions answered at once


def f1(answer: str, truth: str) -> float:
    """The harmonic mean of precision and recall of an answer's words against the true one's, as SQuAD has it
    (Rajpurkar et al., 2016, section 6.1): lower case, without punctuation, each word as often as it comes."""
    found, true = Counter(normalized(answer).split()), Counter(normalized(truth).split())
    common = (found & true).total()
    return 2 * common / (found.total() + true.total()) if common else float(found == true)


def answers(
    params: Any, cfg: ModelConfig, prompts: Sequence[Sequence[int]], *, stop_ids: Sequence[int], max_new_tokens: int,
    sampling: Sampling = GREEDY, seed: int = 0,
) -> list[Generation]:  # fmt: skip
    """An answer to each prompt, BATCH at a time, those of like length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    options = {'stop_ids': stop_ids, 'max_new_tokens': max_new_tokens, 'sampling': sampling, 'seed': seed}
    found: dict[int, Generation] = {}
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        found |= dict(zip(some, generate(params, cfg, [prompts[i] for i in some], **options), strict=True))
    return [found[i] for i in range(len(prompts))]


def metrics(
    params: Any, cfg: ModelConfig, tokenizer: Tokenizer, questions: Sequence[Question], *, stop_ids: Sequence[int],
    max_new_tokens: int,
) -> dict[str, float]:  # fmt: skip
    """Of greedy answers:

    ended               the part that ends by itself
    f1                  their mean F1 against the data's answers, where those answer
    declined_real       the part that declines, of questions which the data answers
    declined_invented   the same of questions which the data declines, if there are any
    """
    given = answers(params, cfg, [q.prompt for q in questions], stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    pairs = [(tokenizer.decode(g.ids), tokenizer.decode(q.answer)) for g, q in zip(given, questions, strict=True)]
    real, invented = ([p for p in pairs if is_decline(p[1]) == declines] for declines in (False, True))
    declined = lambda some: mean([float(is_decline(answer)) for answer, _ in some])
    found = {'ended': mean([float(g.ended) for g in given]), 'f1': mean([f1(*p) for p in real])}
    found |= {'declined_real': declined(real)} if real else {}
    return found | ({'declined_invented': declined(invented)} if invented else {})


def mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / max(len(values), 1)
