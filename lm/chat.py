"""Talks to runs: `python -m lm.chat DIR… [--prompt TEXT] [--system TEXT] [--raw]`, streaming.

At a terminal it is a conversation, in which each run remembers its own: Enter sends, Ctrl-C stops an answer, Ctrl-D
leaves, /help lists the commands. --prompt gives one answer; without it and with no terminal, each line of stdin is
answered, and /reset begins anew. Of several runs each answers in turn. A run that was only pretrained knows no
conversation: beside others it continues the text, and --raw makes all do so. How tokens are drawn is by the flags, else
by the generation_config.json of a model that came with one, else at temperature 0.7 of all.
"""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lm.config import check_flags, whole
from lm.errors import Parser, UsageError, checked, leave, run_command
from lm.settings import COUNT_OR_0, FLOAT32_END, MAX_NEW_TOKENS, PART, SEED_MAX, Bound, up_to

if TYPE_CHECKING:  # else imported when the flags are known to make sense: it takes a second
    from lm.sampling.choice import Sampling
    from lm.sampling.conversation import Talker

RESET = '/reset'
COLDEST = 1e-4  # logits divided by much less are not finite
TEMPERATURE = 0.7
UNNAMED = {'temperature': 1.0, 'top_k': 50}  # where a model says do_sample: transformers' for what it does not name
LIMITS = {
    'temperature': Bound(f'0, or from {COLDEST} on and finite', lambda x: x == 0 or COLDEST <= x < FLOAT32_END),
    'top_k': COUNT_OR_0,
    'top_p': Bound('more than 0 and at most 1', lambda x: 0 < x <= 1),
    'min_p': PART,
    'repetition_penalty': Bound('more than 0 and finite', lambda x: 1 / FLOAT32_END < x < FLOAT32_END),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.chat', __doc__)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='a run, DIR@STEP, a Hugging Face folder or a GGUF file')
    parser.add_argument('--prompt', help='answer this and leave')
    parser.add_argument('--system', help='what the assistant is told before the conversation')
    parser.add_argument('--raw', action='store_true', help='continue plain text')
    parser.add_argument(
        '--base', action='store_true', help='of a run that is an adapter, the model under it answers too'
    )
    parser.add_argument('--max_new_tokens', type=whole('--max_new_tokens'), default=128)
    parser.add_argument('--temperature', type=float, help='0 is greedy')
    parser.add_argument('--top_k', type=whole('--top_k'), help='draw from the k likeliest; 0: all')
    parser.add_argument('--top_p', type=float, help='draw from the fewest that hold this probability')
    parser.add_argument('--min_p', type=float, help='draw from those at least this part of the likeliest')
    parser.add_argument(
        '--repetition_penalty', type=float, help='what tokens that were there already are less likely by; 1: none'
    )
    parser.add_argument(
        '--seed', type=whole('--seed'), help='of what is drawn; default a random one at a terminal, else 0'
    )
    return parser.parse_args(argv)


def check(flags: argparse.Namespace) -> None:
    """Raises UsageError for values that cannot be drawn with."""
    check_flags(vars(flags), {'max_new_tokens': up_to(MAX_NEW_TOKENS, 1), 'seed': up_to(SEED_MAX), **LIMITS})
    checked(flags.prompt or '', 'the prompt')
    checked(flags.system or '', '--system')
    if flags.system is not None and flags.raw:
        raise UsageError('--system is for conversations: leave it out, or --raw')


def prompts(flags: argparse.Namespace) -> Iterator[str]:
    """The one prompt, or the lines of stdin up to an empty one. Raises UsageError for what is no UTF-8."""
    if flags.prompt is not None:
        yield flags.prompt
        return
    try:
        for line in iter(input, ''):
            yield checked(line, 'the prompt')
    except EOFError:
        return
    except UnicodeDecodeError:
        raise UsageError('the prompt is not valid UTF-8') from None


def sampling(flags: argparse.Namespace, saved: Mapping[str, bytes]) -> 'Sampling':
    """The way to draw for a model with these tokenizer's files: flags, then its own settings where they make sense."""
    from lm.data.tokenizer_json import GENERATION_FILE
    from lm.sampling.choice import Sampling

    own = json.loads(saved.get(GENERATION_FILE, b'{}'))
    found, drawn = Sampling(temperature=TEMPERATURE), own.get('do_sample')
    if drawn is True:
        found = Sampling(**UNNAMED)
    elif drawn is False:  # whatever else it says
        found, own['temperature'] = Sampling(), 0.0
    own = {name: own.get(name) for name in LIMITS if type(own.get(name)) in (int, float)}
    found = found._replace(**{name: value for name, value in own.items() if LIMITS[name].holds(value)})
    return found._replace(**{name: vars(flags)[name] for name in LIMITS if vars(flags)[name] is not None})


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_talkers(flags: argparse.Namespace) -> 'list[Talker]':
    """The runs, loaded. Raises UsageError if there is no such run, or none of them knows a conversation."""
    from lm.runs import rundir, saved_config
    from lm.sampling.conversation import can_chat, open_talker

    for run in flags.runs if flags.base else ():
        if saved_config.about(rundir.read_config(run)).adapter is None:
            raise UsageError(f'--base is for runs that are adapters, and {run} is none: leave it out')
    if not any([can_chat(run) for run in flags.runs]) and not flags.raw:
        raise UsageError('these runs were pretrained and know no conversation: add --raw to continue plain text')
    options = {'raw': flags.raw, 'system': flags.system, 'max_new_tokens': flags.max_new_tokens}
    asked = [(run, bare) for run in flags.runs for bare in ((False, True) if flags.base else (False,))]
    return [open_talker(run, warn=say, bare=bare, **options) for run, bare in asked]


def talk(flags: argparse.Namespace) -> None:
    """Answers each prompt with each run, on stdout."""
    check(flags)
    watched = sys.stdout.isatty() and (flags.prompt is not None or sys.stdin.isatty())
    conversation = flags.prompt is None and watched
    if conversation:
        say(f'loading {" ".join(flags.runs)} …')
    if flags.seed is None:
        flags.seed = secrets.randbelow(10**6) if watched else 0
        if watched and not conversation:
            say(f'--seed={flags.seed}')
    from lm import runtime, sharding

    runtime.setup(keep_memory=False)
    runtime.start_jax()
    with sharding.use_mesh():
        talkers = open_talkers(flags)
        if conversation:
            from lm.sampling.dialogue import Dialogue

            cache = Path(os.environ.get('LM_CACHE', '~/.cache/lm')).expanduser()
            draws = [sampling(flags, talker.model.tokenizer.saved) for talker in talkers]
            return Dialogue(talkers, draws, flags, LIMITS['temperature'], history=cache / 'chat_history').hold()
        for text in prompts(flags):
            answer_all(talkers, text, flags)


def answer_all(talkers: 'Sequence[Talker]', text: str, flags: argparse.Namespace) -> None:
    """Prints the answer of each run to a text that nobody sees beside it, or does as it says. Several are named."""
    from lm.sampling.conversation import forget, heading, print_answer

    if text == RESET and flags.prompt is None:
        for talker in talkers:
            forget(talker)
        return
    if len(talkers) > 1 and not flags.raw:
        print(f'> {text}')
    for talker in talkers:
        if len(talkers) > 1:
            print(heading(talker, raw=flags.raw))
        drawn = sampling(flags, talker.model.tokenizer.saved)
        options = {'max_new_tokens': flags.max_new_tokens, 'sampling': drawn, 'seed': flags.seed}
        print_answer(talker, text, warn=say, **options)


def main() -> int:
    return run_command(lambda: talk(parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
