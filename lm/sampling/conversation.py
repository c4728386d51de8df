"""A conversation with a run: what the model is shown of it, and its answer as it is drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.data.chat_shape import Message
from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.sampling.generate import prepare, stream
from lm.training import runs
from lm.training.runs import Model


@dataclass
class Talker:
    """A run and what was said to it; without a template it continues text, each for itself."""

    name: str
    model: Model
    template: ChatTemplate | None
    turns: list[Message] = field(default_factory=list)
    cut: bool = False  # whether it was said that the conversation is too long


def can_chat(run: str) -> bool:
    """Whether a run has learned to answer; one that was only pretrained continues text.

    Raises UsageError if it is a reward model, or there is no such run.
    """
    stage = runs.read_config(run)['config']['stage']
    if stage == 'reward':
        raise UsageError(
            f'{run} is a reward model and gives scores, not answers: python -m lm.evaluate {run} --score PROMPT ANSWER'
        )
    return stage != 'pretrain'


def open_talker(run: str, *, raw: bool, system: str | None, warn: Callable[[str], None]) -> Talker:
    """Loads a run onto the current mesh, its parameters laid out once for all answers.

    Args:
      raw: it is to continue plain text. system: what it is told before a conversation.
    """
    chats = can_chat(run) and not raw
    model = runs.load(run, warn=warn)
    template = ChatTemplate.load(runs.tokenizer_folder(run), model.tokenizer) if chats else None
    talker = Talker(run, model._replace(params=prepare(model.params, model.cfg, batch=1)), template)
    if system is not None:
        talker.turns.append({'role': 'system', 'content': system})
    return talker


def forget(talker: Talker) -> None:
    """Begins anew, with what the system says."""
    talker.turns = [turn for turn in talker.turns if turn['role'] == 'system']


def answer(talker: Talker, text: str, *, warn: Callable[[str], None], **options: Any) -> Iterator[str]:
    """What a run says to a text, in pieces of whole characters, and remembers.

    Args:
      options: as for `stream`: max_new_tokens, sampling, seed.

    Raises:
      UsageError: its chat template refuses the conversation.
    """
    model, tokenizer = talker.model, talker.model.tokenizer
    if talker.template is None:
        yield from continuation(model, tokenizer.encode_prompt(text), tokenizer.stop_ids, continued=True, **options)
        return
    talker.turns.append({'role': 'user', 'content': text})
    trained_on = model.cfg.context or model.config['seq_len']
    room = room_to_ask(trained_on, options['max_new_tokens'])
    ids, left_out = fitting(talker.template, tokenizer, talker.turns, room=room)
    if (left_out or len(ids) > trained_on) and not talker.cut:
        does = 'the oldest turns are left out' if left_out else 'expect little of the answer'
        warn(f'{talker.name} was trained on {trained_on} tokens at once, and this is longer: {does}')
        talker.cut = True
    said = []
    for piece in continuation(model, ids, talker.template.stop_ids(tokenizer), **options):
        said.append(piece)
        yield piece
    talker.turns.append({'role': 'assistant', 'content': ''.join(said)})


def room_to_ask(seq_len: int, max_new_tokens: int) -> int:
    """How many tokens a prompt may have, so that it and the answer stay within what the model was trained on; half of
    that where the answer alone may be longer."""
    return max(seq_len - max_new_tokens, seq_len // 2)


def fitting(
    template: ChatTemplate, tokenizer: Tokenizer, turns: Sequence[Message], *, room: int
) -> tuple[list[int], int]:
    """(the ids of as much of a conversation as fits into `room`, how many turns were left out).

    The oldest go first, a question with its answer; what the system says and the last question stay, however long.
    """
    first = 1 if turns[0]['role'] == 'system' else 0
    starts = [i for i in range(first, len(turns)) if turns[i]['role'] == 'user']
    for start in starts:
        ids = template.prompt(tokenizer, [*turns[:first], *turns[start:]])
        if len(ids) <= room or start == starts[-1]:
            return ids, start - first
    raise ValueError('a conversation in which nobody asks')


def continuation(
    model: Model, ids: Sequence[int], stop_ids: Sequence[int], *, continued: bool = False, **options: Any
) -> Iterator[str]:
    """Pieces of text as they are drawn, whole characters only.

    Args:
      continued: the text goes on with that of `ids`, and does not answer it.
    """

    def drawn() -> Iterator[int]:
        shown = 0
        given = {'stop_ids': stop_ids, 'allowed': model.tokenizer.is_token, **options}
        for (row,) in stream(model.params, model.cfg, [ids], **given):
            yield from row.ids[shown:]
            shown = len(row.ids)

    yield from model.tokenizer.decode_stream(drawn(), continued=continued)
