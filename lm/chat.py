"""Talks to a run: `python -m lm.chat DIR… --raw [--prompt TEXT]`, streaming; several runs answer one after another.

`--raw` continues plain text, which is all that a pretrained model can do. Without --prompt it reads prompts from the
terminal, an empty line or Ctrl-D ends.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from lm import runtime, sharding
from lm.config import FLOAT32_END, INT32_MAX, MAX_NEW_TOKENS, SEED_MAX, whole
from lm.errors import Parser, UsageError, leave, run_command
from lm.sampling.generate import Sampling, prepare, stream
from lm.training import runs
from lm.training.runs import Model

COLDEST = 1e-4  # logits divided by much less are not finite


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.chat', __doc__)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='a run, or DIR@STEP for one of its checkpoints')
    parser.add_argument('--prompt', help='answer this and leave')
    parser.add_argument('--raw', action='store_true', help='continue plain text')
    parser.add_argument('--max_new_tokens', type=whole('--max_new_tokens'), default=128)
    parser.add_argument('--temperature', type=float, default=0.7, help='0 is greedy')
    parser.add_argument('--top_k', type=whole('--top_k'), default=0, help='draw from the k likeliest; 0: all')
    parser.add_argument('--top_p', type=float, default=1.0, help='draw from the fewest that hold this probability')
    parser.add_argument('--min_p', type=float, default=0.0, help='draw from those at least this part of the likeliest')
    parser.add_argument('--seed', type=whole('--seed'), default=0)
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot be drawn with."""
    for name, least, most in (('max_new_tokens', 1, MAX_NEW_TOKENS), ('top_k', 0, INT32_MAX), ('seed', 0, SEED_MAX)):
        if not least <= vars(flags)[name] <= most:
            raise UsageError(f'--{name}={vars(flags)[name]} must be from {least} to {most}')
    if flags.temperature and not COLDEST <= flags.temperature < FLOAT32_END:
        raise UsageError(f'--temperature={flags.temperature} must be 0, or from {COLDEST} on and finite')
    if not 0 < flags.top_p <= 1 or not 0 <= flags.min_p <= 1:
        raise UsageError('--top_p must lie in (0, 1] and --min_p in [0, 1]')
    checked(flags.prompt or '')
    if not flags.raw:
        raise UsageError('these runs were pretrained and know no conversation: add --raw to continue plain text')


def answer(model: Model, prompt: str, flags: argparse.Namespace) -> Iterator[str]:
    """Pieces of text as they are drawn, whole characters only."""
    tokenizer = model.tokenizer
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p)
    options = {'max_new_tokens': flags.max_new_tokens, 'stop_ids': tokenizer.stop_ids, 'seed': flags.seed}
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]

    def ids() -> Iterator[int]:
        shown = 0
        for (row,) in stream(model.params, model.cfg, [prompt_ids], sampling=sampling, **options):
            yield from row.ids[shown:]
            shown = len(row.ids)

    yield from tokenizer.decode_stream(ids())


def prompts(flags: argparse.Namespace) -> Iterator[str]:
    """The one prompt, or what is typed. Raises UsageError for what is no UTF-8."""
    if flags.prompt is not None:
        yield flags.prompt
        return
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UsageError('the prompt is not valid UTF-8') from None
        if not line:
            return
        yield checked(line)


def checked(prompt: str) -> str:
    """The prompt. Raises UsageError if it is no UTF-8: Python hides such bytes in lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError('the prompt is not valid UTF-8') from None
    return prompt


def _load(name: str, warn: Callable[[str], None]) -> Model:
    """A run's model, its parameters laid out once for all answers."""
    model = runs.load(name, warn=warn)
    return model._replace(params=prepare(model.params, model.cfg, batch=1))


def talk(flags: argparse.Namespace) -> None:
    """Answers each prompt with each run, on stdout."""
    check(flags)
    warn = lambda line: print(line, file=sys.stderr)
    runtime.start_jax()
    with sharding.use_mesh():
        models = {name: _load(name, warn) for name in flags.runs}
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a conversation
            for prompt in prompts(flags):
                for name, model in models.items():
                    if len(models) > 1:
                        print(f'--- {name}')
                    print(prompt, end='', flush=True)
                    for piece in answer(model, prompt, flags):
                        print(piece, end='', flush=True)
                    print(flush=True)


def main() -> int:
    runtime.setup()
    return run_command(lambda: talk(parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
