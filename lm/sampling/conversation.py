"""A conversation with a run: how much of it the model is shown, and its answer as it is drawn."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from lm.data.chat_shape import Message
from lm.data.chat_template import ChatTemplate
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.runs import execution, loading, rundir, saved_config
from lm.runs.loading import Model
from lm.sampling import generate
from lm.sampling.generate import Programs, fixed_slots, lay_out, stream


@dataclass
class Talker:
    """A run and what was said to it; without a template it continues text, each for itself."""

    name: str
    model: Model
    template: ChatTemplate | None
    turns: list[Message] = field(default_factory=list)
    cut: bool = False  # whether it was said that the conversation is too long
    ended: bool = True  # whether the last answer ended by itself
    ahead: 'Ahead | None' = None  # None: what an answer needs is compiled when it is needed

    @property
    def trained_on(self) -> int:
        """Tokens that it was made to read at once."""
        return self.model.cfg.context or self.model.config['seq_len']


class Ahead:
    """The programs of a model's answers, compiled by a thread before they are needed, one size of cache at a time."""

    def __init__(self, params: Any, cfg: Any) -> None:
        """`params` as shapes and shardings on the current mesh: nothing of the model needs to be there yet."""
        self._compiled = partial(generate.compiled, params, cfg)
        self._thread = ThreadPoolExecutor(1, initializer=jax.set_mesh, initargs=(jax.sharding.get_mesh(),))
        self._found: dict[int, list[Future[Callable[..., Any]]]] = {}

    def begin(self, slots: int) -> None:
        """Has the thread compile them, if it did not; what fails is raised where it is needed."""
        if slots not in self._found:
            programs = self._thread.submit(self._compiled, slots=slots)
            compile_next = lambda: next(programs.result())
            self._found[slots] = [self._thread.submit(compile_next) for _ in Programs._fields]

    def ready(self, slots: int, seconds: float | None = None) -> bool:
        """Tells whether all are there, within so many seconds."""
        return not wait(self._found[slots], seconds).not_done

    def programs(self, slots: int) -> tuple[int, Programs]:
        """The size, and what runs with it: a program that is not there yet is waited for when it is called, and raises
        what compiling raised. So a prompt is read while what draws the answer is compiled."""
        self.begin(slots)
        return slots, Programs(*(partial(_when_there, future) for future in self._found[slots]))


def _when_there(future: Future[Callable[..., Any]], *given: Any) -> Any:
    return future.result()(*given)


def can_chat(run: str) -> bool:
    """Tells whether a run has learned to answer; one that was only pretrained continues text.

    Raises UsageError if it is a reward model, or there is no such run.
    """
    output = saved_config.about(rundir.read_config(run)).output
    if output == 'scores':
        raise UsageError(
            f'{run} is a reward model and gives scores, not answers: python -m lm.evaluate {run} --score PROMPT ANSWER'
        )
    return output == 'answers'


def open_talker(
    run: str, *, raw: bool, system: str | None, max_new_tokens: int, warn: Callable[[str], None], bare: bool = False
) -> Talker:
    """Loads a run onto the current mesh, its parameters laid out once for all answers.

    Args:
      bare: of an adapter, load its base alone.
      raw: it is to continue plain text. system: what it is told before a conversation.
      max_new_tokens: of an answer, to compile for.
    """
    chats = can_chat(run) and not raw
    whole = rundir.read_config(run)
    saved = whole['config']
    cfg = execution.model_config(saved, training=False)
    used = saved_config.base_of(whole).path if bare else run
    ahead = Ahead(generate.laid_out(loading.abstract_in_use(used, cfg), cfg), cfg)
    ahead.begin(fixed_slots(1, max_new_tokens, context=cfg.context or saved['seq_len']))  # while the weights are read
    model = loading.load(run, warn=warn, bare=bare)
    template = ChatTemplate.load(rundir.tokenizer_folder(run), model.tokenizer) if chats else None
    named = f'{run} without its adapter' if bare else run
    talker = Talker(named, model._replace(params=lay_out(model.params, model.cfg)), template, ahead=ahead)
    instruct(talker, system)
    return talker


def instruct(talker: Talker, system: str | None) -> None:
    """Sets the words of the system from now on; None: none."""
    turns = [turn for turn in talker.turns if turn['role'] != 'system']
    talker.turns = turns if system is None else [{'role': 'system', 'content': system}, *turns]


def forget(talker: Talker) -> None:
    """Begins anew, with what the system says."""
    talker.turns = [turn for turn in talker.turns if turn['role'] == 'system']


def answer(talker: Talker, text: str, *, warn: Callable[[str], None], **options: Any) -> Generator[str, None, None]:
    """Yields the answer of a run to a text, in pieces of whole characters, and remembers both: as far as it came, if it
    is not drawn to the end. A piece can be empty: then the prompt is being read.

    Args:
      options: as for `stream`: max_new_tokens, sampling, seed.

    Raises:
      UsageError: its chat template refuses the conversation; the text is forgotten.
    """
    tokenizer, turns = talker.model.tokenizer, [*talker.turns, _asked(text)]
    ids, left_out = shown(talker, text, max_new_tokens=options['max_new_tokens'])
    if talker.template is None:
        yield from continuation(talker, ids, tokenizer.stop_ids, continued=True, **options)
        return
    if (left_out or len(ids) > talker.trained_on) and not talker.cut:
        does = 'the oldest turns are left out' if left_out else 'expect little of the answer'
        warn(f'{talker.name} was trained on {talker.trained_on} tokens at once, and this is longer: {does}')
        talker.cut = True
    said: list[str] = []
    try:
        for piece in continuation(talker, ids, talker.template.stop_ids(tokenizer), **options):
            said.append(piece)
            yield piece
    except GeneratorExit:
        if not any(said):
            return
    talker.turns = [*turns, {'role': 'assistant', 'content': ''.join(said)}]


def heading(talker: Talker, *, raw: bool) -> str:
    """The line before an answer of one of several runs."""
    beside = talker.template is None and not raw
    return f'--- {talker.name}{" (only pretrained: it continues the text)" if beside else ""}'


def print_answer(
    talker: Talker, text: str, *, warn: Callable[[str], None], stopped: Callable[[], bool] = lambda: False,
    **options: Any,
) -> None:  # fmt: skip
    """Prints an answer as it is drawn, until it is stopped; a continuation with its beginning. Raises as `answer`."""
    if talker.template is None:
        print(text, end='', flush=True)
    with contextlib.closing(answer(talker, text, warn=warn, **options)) as pieces:
        for piece in pieces:
            print(piece, end='', flush=True)
            if stopped():
                break
    print(flush=True)


def _asked(text: str) -> Message:
    return {'role': 'user', 'content': text}


def shown(talker: Talker, text: str, *, max_new_tokens: int) -> tuple[list[int], int]:
    """(the ids that a run is shown when a text is said to it, how many turns before it are left out)."""
    tokenizer = talker.model.tokenizer
    if talker.template is None:
        return tokenizer.encode_prompt(text), 0
    room = room_to_ask(talker.trained_on, max_new_tokens)
    return fitting(talker.template, tokenizer, [*talker.turns, _asked(text)], room=room)


def needs(talker: Talker, text: str, *, max_new_tokens: int) -> int:
    """The size of the cache for the answer to a text. Raises UsageError as `answer`."""
    length = len(shown(talker, text, max_new_tokens=max_new_tokens)[0])
    return fixed_slots(length, max_new_tokens, context=talker.trained_on)


def room_to_ask(seq_len: int, max_new_tokens: int) -> int:
    """The tokens that a prompt may have, so that it and the answer stay within what the model was trained on; half of
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
    talker: Talker, ids: Sequence[int], stop_ids: Sequence[int], *, continued: bool = False, **options: Any
) -> Iterator[str]:
    """Pieces of text as they are drawn, whole characters only, and empty ones while the prompt is read.

    Args:
      continued: the text goes on with that of `ids`, and does not answer it.
    """
    model, talker.ended = talker.model, False
    if talker.ahead is not None:
        slots = fixed_slots(len(ids), options['max_new_tokens'], context=talker.trained_on)
        options |= {'programs': talker.ahead.programs(slots), 'every': None}
    given = {'stop_ids': stop_ids, 'allowed': model.tokenizer.is_token, **options}
    rows = stream(model.params, model.cfg, [ids], **given)

    def drawn(first: Sequence[int]) -> Iterator[int]:
        yield from first
        before = len(first)
        for (row,) in rows:
            yield from row.ids[before:]
            before, talker.ended = len(row.ids), row.ended

    with contextlib.closing(rows):
        for (row,) in rows:
            talker.ended = row.ended
            if row.ids or row.ended:
                yield from model.tokenizer.decode_stream(drawn(row.ids), continued=continued)
                return
            yield ''
