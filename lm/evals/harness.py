"""A run as a model of EleutherAI's lm-evaluation-harness (the package lm-eval, extra `eval`, which this file imports).

    import lm_eval
    from lm.evals.harness import Harness
    lm_eval.simple_evaluate(model=Harness('runs/sft'), tasks=['hellaswag'], apply_chat_template=True)

The harness hands texts around, and a text of ours never becomes a control symbol. So a conversation comes to it with
the name of each control symbol between two characters for private use, and is known by them when it comes back, alone
or with more text after it.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from lm import progress, sharding
from lm.config import nearest
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.evals import likelihood
from lm.evals.likelihood import Request
from lm.evals.tasks import Subject
from lm.runs import loading, rundir, saved_config
from lm.sampling.choice import Sampling
from lm.sampling.conversation import room_to_ask

MARK = '\U0010fffd'  # stands around the name of a control symbol; twice, where texts are encoded apart
MAX_NEW_TOKENS = 256  # where a task does not say: the harness's own
BOOTSTRAP = 1000  # resamplings for the standard errors that have no formula
# Otherwise the harness forks for its standard errors, which may stop for good in a process where JAX has threads.
os.environ.setdefault('DISABLE_MULTIPROC', '1')
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p')


class Harness(LM):
    """A run, or one of its checkpoints ('DIR@STEP'), as the harness asks a model.

    A context begins with <bos>, once, if the run's texts do, and is cut on the left to the tokens that the run was
    trained on. As in the harness's own models an empty one is <bos>, or <eos> where there is none.

    Args:
      subject: the run, if it is loaded already.

    Raises:
      UsageError: a reward model, or no such run.
    """

    def __init__(self, run: str, *, subject: Subject | None = None) -> None:
        super().__init__()
        if saved_config.about(rundir.read_config(run)).output == 'scores':
            raise UsageError(f'{run} is a reward model and gives scores, not text')
        self.mesh = sharding.make_mesh({'fsdp': -1}) if subject is None else jax.sharding.get_mesh()
        with jax.set_mesh(self.mesh):
            self.subject = subject or Subject(run, loading.load(run, warn=progress.say), progress.say)

    # ---- what it is asked ----

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether it is greedy) of each continuation of a context."""
        found = [self.request(*request.args) for request in requests]
        return self._log_likelihoods('loglikelihood', found, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, after <bos>."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        found = [Request([self.tokenizer.bos_id], ids) for ids in texts]
        return [logp for logp, _ in self._log_likelihoods('loglikelihood_rolling', found, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, those with the same settings together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        out: dict[int, str] = {}
        with self._progress('generate_until', len(requests), disable_tqdm) as done:
            for numbers in groups.values():
                contexts = [requests[i].args[0] for i in numbers]
                out |= dict(zip(numbers, self._generate(contexts, requests[numbers[0]].args[1], done), strict=True))
        return [out[i] for i in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any], done: Callable[[int], Any]) -> list[str]:
        stops, max_new_tokens, sampling = generation_settings(settings)
        room = room_to_ask(self.max_length, max_new_tokens)
        chat = any(MARK in context for context in contexts)
        stop_ids = self.subject.template.stop_ids(self.tokenizer) if chat else self.tokenizer.stop_ids
        model = self.subject.model
        return likelihood.completions(
            model.params, model.cfg, self.tokenizer, [self.encode(context)[-room:] for context in contexts],
            stops=stops, stop_ids=stop_ids, max_new_tokens=max_new_tokens, sampling=sampling, done=done,
        )  # fmt: skip

    def _log_likelihoods(self, name: str, requests: Sequence[Request], quiet: bool) -> list[tuple[float, bool]]:
        model, length = self.subject.model, self.max_length
        windows = sum(-(-len(r.continuation) // length) for r in requests)
        with self._progress(name, windows, quiet) as done:
            return likelihood.log_likelihoods(model.params, model.cfg, requests, length=length, done=done)

    @contextlib.contextmanager
    def _progress(self, name: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
        """On the run's own mesh, shown unless it is to be `quiet`."""
        with jax.set_mesh(self.mesh), contextlib.nullcontext() if quiet else progress.task(name, total) as task:
            yield task.advance if task else lambda number: None

    # ---- text and ids ----

    @property
    def tokenizer(self) -> Tokenizer:
        return self.subject.model.tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a context, at least one: with <bos> before it where the tokenizer puts it, unless it has one."""
        ids, bos = encode_marked(self.tokenizer, text), self.tokenizer.bos_id
        return [bos, *ids] if not ids or (self.tokenizer.adds_bos and ids[0] != bos) else ids

    def request(self, context: str, continuation: str) -> Request:
        """The two as ids. Spaces at the end of a context belong to the continuation, since a piece begins with its
        space. Both are encoded as one where that leaves the context as it is alone, else apart."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        head, whole = self.encode(context), self.encode(context + continuation)
        if context and whole[: len(head)] == head:
            return Request(head, whole[len(head) :])
        return Request(head, encode_marked(self.tokenizer, continuation, continued=bool(context)))

    # ---- what it says of itself ----

    @property
    def max_length(self) -> int:
        return self.subject.seq_len

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return f'lm-{self.tokenizer.fingerprint}-{self.subject.template.fingerprint}'

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the run's template, for the record."""
        return self.subject.template.text if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as `encode` reads it, up to where the assistant is to speak, or with the beginning of what it
        says if it has the last word."""
        del add_generation_prompt  # who has the last word says it
        begun = [m for m in chat_history[-1:] if m['role'] == 'assistant']
        asked = chat_history[: len(chat_history) - len(begun)]
        if any(MARK in message['content'] for message in chat_history):
            raise UsageError(f'a message has the character U+{ord(MARK):X} in it, which stands for control symbols')
        pieces = self.subject.template.prompt_pieces(self.tokenizer, asked)
        return marked(self.tokenizer, pieces) + ''.join(m['content'] for m in begun)


def marked(tokenizer: Tokenizer, pieces: Sequence[int | str]) -> str:
    """Control symbols and texts as one text, from which `encode_marked` gets the ids of the pieces."""
    names = {i: name for name, i in tokenizer.controls.items()}
    return ''.join(f'{piece}{MARK}{MARK}' if isinstance(piece, str) else MARK + names[piece] + MARK for piece in pieces)


def encode_marked(tokenizer: Tokenizer, text: str, *, continued: bool = False) -> list[int]:
    """The ids of a text with marks in it (`continued`: there is text before it). Raises UsageError for marks that are
    not ours."""
    parts = text.split(MARK)
    if len(parts) % 2 == 0 or any(name and name not in tokenizer.controls for name in parts[1::2]):
        raise UsageError(f'a text has the character U+{ord(MARK):X} in it, which stands for control symbols')
    named = lambda i, part: [part] if i % 2 == 0 else [tokenizer.controls[part]] if part else []
    pieces = [piece for i, part in enumerate(parts) for piece in named(i, part)]
    return [i for ids in tokenizer.encode_pieces(pieces, continued=continued) for i in ids]


def generation_settings(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """(stop strings, tokens at most, how they are drawn) of a task's generation_kwargs. As in the harness, an answer is
    greedy unless `do_sample` or a temperature says otherwise. Says which settings it does not know."""
    until = settings.get('until') or []
    stops = [until] if isinstance(until, str) else list(until)
    lengths = [settings[name] for name in _LENGTHS if settings.get(name) is not None]
    known = {'until', 'do_sample', *_LENGTHS, *_SAMPLING}
    if unknown := [name for name in settings if name not in known]:
        _say_once(f'lm has no generation setting {", ".join(unknown)}: left out')
    given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    drawn = settings.get('do_sample', bool(given.get('temperature')))
    sampling = Sampling(**{'temperature': 1.0, **given}) if drawn else Sampling()
    return stops, int(lengths[0]) if lengths else MAX_NEW_TOKENS, sampling


_say_once = functools.cache(progress.say)


# ---- for lm.evaluate ----


def measure(
    subject: Subject, names: Sequence[str], *, num_fewshot: int | None, apply_chat_template: bool, limit: int | None
) -> dict[str, float]:
    """{'lm_eval/TASK/METRIC'} of tasks by name, or by the path of a YAML file. Raises UsageError for an unknown one."""
    files = [name for name in names if Path(name).is_file()]
    manager = TaskManager(include_defaults=len(files) < len(names))  # reading all of the harness's takes seconds
    for name in names:
        if name not in files and not manager.match_tasks([name]):
            raise UsageError(f'lm_eval has no task {name}{nearest(name, manager.all_tasks)}, and there is no such file')
    with contextlib.redirect_stdout(sys.stderr):
        found = lm_eval.simple_evaluate(
            model=Harness(subject.run, subject=subject), tasks=list(names), limit=limit, num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template, task_manager=manager, bootstrap_iters=BOOTSTRAP, log_samples=False,
        )  # fmt: skip
    return {
        f'lm_eval/{task}/{key.removesuffix(",none")}': float(value)
        for task, metrics in found['results'].items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and key != 'sample_len'
    }
