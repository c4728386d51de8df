"""Shows a stage's data: `python -m lm.inspect --config=configs/pretrain.py [--rows N] [--config.KEY=VALUE …]`.

Packed rows as the model sees them, a colour a document, tokens that carry no loss struck through; before them what was
read and dropped of each source, by reason.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm.data import pipeline
from lm.data.prepare import Prepared, prepare
from lm.data.tokenizer import Tokenizer
from lm.errors import Parser, UsageError, leave, run_command
from lm.training import runs

NUMBERS = ('rows', 'read', 'kept', 'held out', 'tokens', 'bytes/token')
COLOURS = ('cyan', 'yellow', 'green', 'magenta', 'blue', 'red')


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser('python -m lm.inspect', __doc__)
    parser.add_argument('--config', required=True, help='configs/STAGE.py[:ARG]')
    parser.add_argument('--rows', type=configs.whole('--rows'), default=2, help='rows to show')
    flags, settings = configs.split_settings(argv)
    return parser.parse_args(flags), settings


class Screen(Console):
    """A terminal, or a pipe that may close (`… | head`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # `run_command` knows what to do


def counts(prepared: Prepared) -> Table:
    """How much of each source there is; a long name is folded, a number stays whole."""
    table = Table(box=None, pad_edge=False)
    table.add_column('source', overflow='fold')
    for name in NUMBERS:
        table.add_column(name, justify='right', no_wrap=True)
    for s in prepared.sources:
        c = s.counts
        ratio = f'{c["train_bytes"] / max(c["train_tokens"], 1):.2f}'
        numbers = (f'{c[k]:,}' for k in ('read', 'kept', 'heldout_documents', 'train_tokens'))
        table.add_row(Text(s.name), f'{s.weight:.0%}', *numbers, ratio)
    return table


def dropped(prepared: Prepared) -> list[str]:
    """Why documents of each source were dropped, and how many."""
    reasons = {s.name: sorted(s.counts['dropped'].items()) for s in prepared.sources}
    return [
        f'{name}: dropped ' + (', '.join(f'{r} {n:,}' for r, n in found) or 'none') for name, found in reasons.items()
    ]


def row_text(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Text:
    """One packed row: runs of tokens of the same segment and mask, decoded and coloured."""
    text, T = Text(), len(row['tokens_T'])
    keys = [(int(row['segments_T'][t]), bool(row['weights_T'][t])) for t in range(T)]
    start = 0
    for t in range(1, T + 1):
        if t == T or keys[t] != keys[start]:
            segment, counted = keys[start]
            words = tokenizer.decode(row['tokens_T'][start:t].tolist()) if segment else '·' * (t - start)
            colour = COLOURS[(segment - 1) % len(COLOURS)] if segment else 'bright_black'
            text.append(
                words if counted or not segment else words or '⏹', style=colour + ('' if counted else ' strike')
            )
            start = t
    return text


def show(flags: argparse.Namespace, settings: Sequence[tuple[str, str]]) -> None:
    """Prints the counts and the first rows of the mixture."""
    config, _ = configs.load(flags.config, settings)
    if not 0 <= flags.rows <= configs.INT32_MAX:
        raise UsageError(f'--rows={flags.rows} must be from 0 to {configs.INT32_MAX}')
    runs.inherit_model(config, configs.chosen(flags.config, settings))
    console, errors = Screen(highlight=False), Screen(stderr=True, highlight=False)
    prepared = prepare(
        mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=config.data.tokenizer,
        heldout=config.data.heldout, progress=partial(errors.print, markup=False, soft_wrap=True),
    )  # fmt: skip
    console.print(counts(prepared))
    for line in dropped(prepared):
        console.print(line, markup=False, soft_wrap=True)
    mixture = pipeline.mix(prepared, seq_len=config.seq_len, seed=config.seed)
    for i in range(flags.rows):
        row = mixture.row(i)
        documents, targets = len(set(row['segments_T'].tolist()) - {0}), int(row['weights_T'].sum())
        console.rule(f'row {i}: {documents} documents, {targets} targets of {config.seq_len}')
        console.print(row_text(row, prepared.tokenizer), soft_wrap=True)


def main() -> int:
    return run_command(lambda: show(*parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
