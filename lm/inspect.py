"""Shows a stage's data: `python -m lm.inspect --config=configs/pretrain.py [--rows N] [--config.KEY=VALUE …]`.

Packed rows as the model sees them, a colour a document, tokens that carry no loss struck through; before them what was
read and dropped of each source, by reason.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm.data import pipeline
from lm.data.prepare import Prepared, prepare
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError, leave, run_command

COLOURS = ('cyan', 'yellow', 'green', 'magenta', 'blue', 'red')


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = argparse.ArgumentParser(
        'python -m lm.inspect', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('--config', required=True, help='configs/STAGE.py[:ARG]')
    parser.add_argument('--rows', type=int, default=2, help='rows to show')
    flags, settings = configs.split_settings(argv)
    return parser.parse_args(flags), settings


def counts(prepared: Prepared) -> Table:
    """What became of each source's documents."""
    table = Table('source', 'rows', 'read', 'kept', 'dropped', 'held out', 'tokens', 'bytes/token')
    for s in prepared.sources:
        c = s.counts
        dropped = ', '.join(f'{reason} {n:,}' for reason, n in sorted(c['dropped'].items())) or '-'
        ratio = f'{c["train_bytes"] / max(c["train_tokens"], 1):.2f}'
        numbers = (f'{c[k]:,}' for k in ('read', 'kept'))
        table.add_row(
            s.name, f'{s.weight:.0%}', *numbers, dropped, f'{c["heldout_documents"]:,}', f'{c["train_tokens"]:,}', ratio
        )
    return table


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
    if flags.rows < 0:
        raise UsageError(f'--rows={flags.rows} must not be negative')
    console, errors = Console(highlight=False), Console(stderr=True)
    prepared = prepare(
        mixture=config.data.mixture, vocab_size=config.model.vocab_size, tokenizer=config.data.tokenizer,
        heldout=config.data.heldout, seed=config.seed, progress=errors.print,
    )  # fmt: skip
    console.print(counts(prepared))
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
