"""Shows a stage's data: `python -m lm.inspect --config=configs/pretrain.py [--rows N] [--config.KEY=VALUE …]`.

Packed rows as the model sees them, a colour a document, control symbols by name. Of text, tokens whose next one is not
learned are struck through; of conversations, what is learned stands out and the rest is dim. Before them what was read
and dropped of each source, by reason.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

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


class Token(NamedTuple):
    """A token of a row to show; `marked`: learned in a conversation, or followed by what is not learned in a text."""

    id: int
    segment: int
    marked: bool


def row_text(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, conversations: bool = False) -> Text:
    """One packed row: runs of tokens of the same segment and mask decoded and coloured, control symbols by name.

    Args:
      row: tokens_T, segments_T and weights_T; of conversations targets_T too.
      conversations: colour the tokens that are learned, and not the others; else every document, and strike through the
        tokens whose next one is not learned.
    """
    names = {i: name for name, i in tokenizer.controls.items()}
    text = Text()
    kind = lambda token: (token.segment, token.marked, names.get(token.id))
    for (segment, marked, name), run in groupby(_learned(row) if conversations else _text(row), kind):
        ids = [token.id for token in run]
        words = tokenizer.decode(ids) if name is None else name * len(ids)
        colour = COLOURS[(segment - 1) % len(COLOURS)]
        if not segment:
            words, style = '·' * len(ids), 'bright_black'
        elif conversations:
            style = f'bold {colour}' if marked else 'dim'
        else:
            style = f'{colour} strike' if marked else colour
        text.append(words, style=style)
    return text


def _text(row: Mapping[str, np.ndarray]) -> list[Token]:
    columns = zip(row['tokens_T'].tolist(), row['segments_T'].tolist(), row['weights_T'].tolist(), strict=True)
    return [Token(i, segment, not weight) for i, segment, weight in columns]


def _learned(row: Mapping[str, np.ndarray]) -> list[Token]:
    """The tokens, marked where the place before them has a weight, since that is of its target; and the last target of
    a segment where it is learned, which has no place of its own if the row was packed so."""
    columns = zip(*(row[f'{name}_T'].tolist() for name in ('tokens', 'targets', 'weights', 'segments')), strict=True)
    found: list[Token] = []
    for segment, places in groupby(columns, lambda place: place[-1]):
        learned, target = False, None
        for i, next_i, weight, _ in places:
            found.append(Token(i, segment, learned))
            learned, target = weight > 0, next_i
        if learned and target is not None:
            found.append(Token(target, segment, True))
    return found


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
        console.print(row_text(row, prepared.tokenizer, conversations=config.stage != 'pretrain'), soft_wrap=True)


def main() -> int:
    return run_command(lambda: show(*parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
