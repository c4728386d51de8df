"""Talks to runs: `python -m lm.chat DIR… [--prompt TEXT] [--system TEXT] [--raw]`, streaming.

Without --prompt it reads what you say from the terminal; each run remembers its own conversation. An empty line or
Ctrl-D ends, /reset begins anew. Of several runs each answers in turn. A run that was only pretrained knows no
conversation: beside others it continues the text, and --raw makes all do so. How tokens are drawn is by the flags, else
by the generation_config.json of a model that came with one, else at temperature 0.7 of all.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from lm import runtime, sharding
from lm.config import FLOAT32_END, INT32_MAX, MAX_NEW_TOKENS, SEED_MAX, whole
from lm.data.tokenizer_json import GENERATION_FILE
from lm.errors import Parser, UsageError, checked, leave, run_command
from lm.sampling.conversation import Talker, answer, can_chat, forget, open_talker
from lm.sampling.generate import Sampling

RESET = '/reset'
COLDEST = 1e-4  # logits divided by much less are not finite
DEFAULT = Sampling(temperature=0.7)
UNNAMED = Sampling(temperature=1.0, top_k=50)  # where a model says do_sample: transformers' for what it does not name
# What each may be, and how that is said.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    'temperature': (lambda x: x == 0 or COLDEST <= x < FLOAT32_END, f'0, or from {COLDEST} on and finite'),
    'top_k': (lambda x: 0 <= x <= INT32_MAX, f'from 0 to {INT32_MAX}'),
    'top_p': (lambda x: 0 < x <= 1, 'more than 0 and at most 1'),
    'min_p': (lambda x: 0 <= x <= 1, 'from 0 to 1'),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.chat', __doc__)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='a run, or DIR@STEP for one of its checkpoints')
    parser.add_argument('--prompt', help='answer this and leave')
    parser.add_argument('--system', help='what the assistant is told before the conversation')
    parser.add_argument('--raw', action='store_true', help='continue plain text')
    parser.add_argument('--max_new_tokens', type=whole('--max_new_tokens'), default=128)
    parser.add_argument('--temperature', type=float, help='0 is greedy')
    parser.add_argument('--top_k', type=whole('--top_k'), help='draw from the k likeliest; 0: all')
    parser.add_argument('--top_p', type=float, help='draw from the fewest that hold this probability')
    parser.add_argument('--min_p', type=float, help='draw from those at least this part of the likeliest')
    parser.add_argument('--seed', type=whole('--seed'), default=0)
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot be drawn with."""
    for name, least, most in (('max_new_tokens', 1, MAX_NEW_TOKENS), ('seed', 0, SEED_MAX)):
        if not least <= vars(flags)[name] <= most:
            raise UsageError(f'--{name}={vars(flags)[name]} must be from {least} to {most}')
    for name, (fits, words) in LIMITS.items():
        value = vars(flags)[name]
        if value is not None and not fits(value):
            raise UsageError(f'--{name}={value} must be {words}')
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


def sampling(flags: argparse.Namespace, saved: Mapping[str, bytes]) -> Sampling:
    """How to draw for a model with these tokenizer's files: flags, then its own settings where they make sense."""
    own = json.loads(saved.get(GENERATION_FILE, b'{}'))
    found, drawn = DEFAULT, own.get('do_sample')
    if drawn is True:
        found = UNNAMED
    elif drawn is False:  # whatever else it says
        own['temperature'] = 0.0
    own = {name: own.get(name) for name in LIMITS if type(own.get(name)) in (int, float)}
    found = found._replace(**{name: value for name, value in own.items() if LIMITS[name][0](value)})
    return found._replace(**{name: vars(flags)[name] for name in LIMITS if vars(flags)[name] is not None})


def reply(talker: Talker, text: str, flags: argparse.Namespace, *, alone: bool) -> None:
    """Prints what a run says, under its name unless it is alone; a continuation is read with its beginning."""
    beside = talker.template is None and not flags.raw
    if not alone:
        print(f'--- {talker.name}{" (only pretrained: it continues the text)" if beside else ""}')
    if talker.template is None:
        print(text, end='', flush=True)
    drawn = sampling(flags, talker.model.tokenizer.saved)
    options = {'max_new_tokens': flags.max_new_tokens, 'sampling': drawn, 'seed': flags.seed}
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
