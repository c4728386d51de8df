"""Answers to held-out questions: whether they end by themselves, and how near they come to the true ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm.data.chats import Question
from lm.data.heldout import normalized
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
    """{'ended', 'f1'}: the part of the greedy answers that end by themselves, and their mean F1 against the data's."""
    given = answers(params, cfg, [q.prompt for q in questions], stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    scores = [f1(tokenizer.decode(g.ids), tokenizer.decode(q.answer)) for g, q in zip(given, questions, strict=True)]
    count = max(len(questions), 1)
    return {'ended': sum(g.ended for g in given) / count, 'f1': sum(scores) / count}
