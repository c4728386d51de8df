"""Talks to runs: `python -m lm.chat DIR… [--prompt TEXT] [--system TEXT] [--raw]`, streaming.

Without --prompt it reads what you say from the terminal; each run remembers its own conversation. An empty line or
Ctrl-D ends, /reset begins anew. Of several runs each answers in turn. A run that was only pretrained knows no
conversation: beside others it continues the text, and --raw makes all do so.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence

from lm import runtime, sharding
from lm.config import FLOAT32_END, INT32_MAX, MAX_NEW_TOKENS, SEED_MAX, whole
from lm.errors import Parser, UsageError, checked, leave, run_command
from lm.sampling.conversation import Talker, answer, can_chat, forget, open_talker
from lm.sampling.generate import Sampling

RESET = '/reset'
COLDEST = 1e-4  # logits divided by much less are not finite


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.chat', __doc__)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='a run, or DIR@STEP for one of its checkpoints')
    parser.add_argument('--prompt', help='answer this and leave')
    parser.add_argument('--system', help='what the assistant is told before the conversation')
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
    checked(flags.prompt or '', 'the prompt')
    checked(flags.system or '', '--system')
    if flags.system is not None and flags.raw:
        raise UsageError('--system is for conversations: leave it out, or --raw')
    if not any([can_chat(run) for run in flags.runs]) and not flags.raw:
        raise UsageError('these runs were pretrained and know no conversation: add --raw to continue plain text')


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
        yield checked(line, 'the prompt')


def reply(talker: Talker, text: str, flags: argparse.Namespace, *, alone: bool) -> None:
    """Prints what a run says, under its name unless it is alone; a continuation is read with its beginning."""
    beside = talker.template is None and not flags.raw
    if not alone:
        print(f'--- {talker.name}{" (only pretrained: it continues the text)" if beside else ""}')
    if talker.template is None:
        print(text, end='', flush=True)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.min_p)
    options = {'max_new_tokens': flags.max_new_tokens, 'sampling': sampling, 'seed': flags.seed}
    for piece in answer(talker, text, warn=_warn, **options):
        print(piece, end='', flush=True)
    print(flush=True)


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def talk(flags: argparse.Namespace) -> None:
    """Answers each prompt with each run, on stdout."""
    check(flags)
    runtime.start_jax()
    with sharding.use_mesh():
        talkers = [open_talker(run, raw=flags.raw, system=flags.system, warn=_warn) for run in flags.runs]
        alone, typed = len(talkers) == 1, flags.prompt is None and sys.stdin.isatty()
        with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a conversation
            for text in prompts(flags):
                if text == RESET and flags.prompt is None:
                    for talker in talkers:
                        forget(talker)
                    continue
                if not (alone or typed or flags.raw):
                    print(f'> {text}')
                for talker in talkers:
                    reply(talker, text, flags, alone=alone)


def main() -> int:
    runtime.setup()
    return run_command(lambda: talk(parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
