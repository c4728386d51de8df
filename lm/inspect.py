"""Shows a stage's data: `python -m lm.inspect --config=configs/STAGE.py [--rows N] [--config.KEY=VALUE …]`.

Packed rows as the model sees them, a colour a document, control symbols by name. Of text, tokens whose next one is not
learned are struck through; of conversations, what is learned stands out and the rest is dim. Of pairs the prompt and
both responses, as far as they are within seq_len; of a stage that answers by itself the prompts, in its order, and what
the data would answer. Before them what was read and dropped of each source, by reason. Of a job (configs/generate.py)
the prompts that it asks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm.data import chats, pairs, pipeline
from lm.data.prepare import Prepared
from lm.data.tokenizer import Tokenizer
from lm.errors import Parser, leave, run_command
from lm.jobs import JOBS
from lm.jobs.spec import JobSpec
from lm.progress import say, task
from lm.rl.prompts import Prompts
from lm.runs import lineage
from lm.settings import COUNT_OR_0
from lm.stages import find, plan

NUMBERS = ('share', 'read', 'kept', 'held out', 'tokens')
COLOURS = ('cyan', 'yellow', 'green', 'magenta', 'blue', 'red')


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser('python -m lm.inspect', __doc__)
    parser.add_argument('--config', required=True, help='configs/STAGE.py[:ARG]')
    parser.add_argument('--rows', type=configs.whole('--rows'), default=2, help='rows, pairs or prompts to show')
    flags, settings = configs.split_settings(argv)
    return parser.parse_args(flags), settings


class Screen(Console):
    """A terminal, or a pipe that may close (`… | head`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # `run_command` knows what to do


def counts(prepared: Prepared, lengths: Sequence[tuple[int, int]] | None = None) -> Table:
    """A table of how much of each source there is; a long name is folded, a number stays whole.

    Args:
      lengths: of conversations and pairs, how many of each source are cut, and how many left out.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column('source', overflow='fold')
    for name in (*NUMBERS, *(('bytes/token',) if lengths is None else ('cut', 'left out'))):
        table.add_column(name, justify='right', no_wrap=True)
    for i, s in enumerate(prepared.sources):
        c = s.counts
        numbers = [f'{c[k]:,}' for k in ('read', 'kept', 'heldout_documents', 'train_tokens')]
        ratio = f'{c["train_bytes"] / max(c["train_tokens"], 1):.2f}'
        numbers += [ratio] if lengths is None else [f'{n:,}' for n in lengths[i]]
        table.add_row(Text(s.name), f'{s.weight:.0%}', *numbers)
    return table


def dropped(prepared: Prepared) -> list[str]:
    """Lines on why documents of each source were dropped, and how many; what was changed in others, and what is not
    used."""
    told = lambda found: ', '.join(f'{r} {n:,}' for r, n in sorted(found.items()))
    lines = []
    for s in prepared.sources:
        unused = {key: n for key, (n, _) in s.counts['unused'].items()}
        more = (('changed', s.counts['changed']), ('not used', unused))
        parts = [f'dropped {told(s.counts["dropped"]) or "none"}', *(f'{w} {told(x)}' for w, x in more if x)]
        lines.append(f'{s.name}: {"; ".join(parts)}')
    return lines


# (id, segment, marked: learned in a conversation, or followed by what is not learned in a text) of a token to show.
Token = tuple[int, int, bool]


def row_text(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, *, conversations: bool = False) -> Text:
    """One packed row: runs of tokens of the same segment and mask decoded and coloured, control symbols by name.

    Args:
      row: tokens_T, segments_T and weights_T; of conversations targets_T too.
      conversations: colour the tokens that are learned, and not the others; else every document, and strike through the
        tokens whose next one is not learned.
    """
    names = {i: name for name, i in tokenizer.controls.items()}
    text = Text()
    kind = lambda token: (*token[1:], names.get(token[0]))
    for (segment, marked, name), run in groupby(_learned(row) if conversations else _text(row), kind):
        ids = [i for i, *_ in run]
        words = tokenizer.decode(ids, continued=True) if name is None else name * len(ids)
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
    return [(i, segment, not weight) for i, segment, weight in columns]


def _learned(row: Mapping[str, np.ndarray]) -> list[Token]:
    """The tokens, marked where the place before them has a weight, since that is of its target; and the last target of
    a segment where it is learned, which has no place of its own if the row was packed so."""
    columns = zip(*(row[f'{name}_T'].tolist() for name in ('tokens', 'targets', 'weights', 'segments')), strict=True)
    found: list[Token] = []
    for segment, places in groupby(columns, lambda place: place[-1]):
        learned, target = False, None
        for i, next_i, weight, _ in places:
            found.append((i, segment, learned))
            learned, target = weight > 0, next_i
        if learned and target is not None:
            found.append((target, segment, True))
    return found


def pair_texts(sides: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer) -> list[Text]:
    """The prompt of a pair, and each side's response to it."""

    divided = [conversation_texts(*side, tokenizer) for side in sides]
    return [max((prompt for prompt, _ in divided), key=len), *(response for _, response in divided)]


def conversation_texts(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> tuple[Text, Text]:
    """A conversation up to what is learned, and from there on."""

    def text(n: int) -> Text:
        whole = [(np.append(ids[:n], tokenizer.pad_id), np.append(trained[:n], 0))]
        return row_text(chats.segments_row(whole, n, tokenizer.pad_id), tokenizer, conversations=True)

    prompt = text(int(np.argmax(trained)) if len(trained) else 0)
    return prompt, text(len(ids))[len(prompt) :]


def show_rows(console: Console, mixture: pipeline.Mixture, count: int, tokenizer: Tokenizer, *, dialogues: int) -> None:
    """The first rows; the first `dialogues` sources of the mixture are conversations."""
    for i in range(count):
        row, of_chats = mixture.row(i), mixture.locate(i)[0] < dialogues
        holds, targets = len(set(row['segments_T'].tolist()) - {0}), int(row['weights_T'].sum())
        holds = f'{holds} conversations' if of_chats else f'{holds} documents'
        console.rule(f'row {i}: {holds}, {targets} targets of {len(row["tokens_T"])}')
        console.print(row_text(row, tokenizer, conversations=of_chats), soft_wrap=True)


def show_pairs(
    console: Console, rows: pipeline.Mixture, count: int, tokenizer: Tokenizer, names: Sequence[str]
) -> None:
    """The first pairs: the prompt, then each response on a line of its own."""
    located = map(rows.locate, range(count))  # a row has a pair or more
    numbered = ((s, n) for s, i in located if s < len(names) for n in rows.rows[s].numbers(i).tolist())
    for i, (source, number) in enumerate(islice(numbered, count)):
        of = rows.rows[source]
        label, margin = of.store.table[number]
        console.rule(Text(f'pair {i}: {names[source]}, label {label:g}, margin {margin:g}'))
        for name, text in zip(('prompt', *pairs.SIDES), pair_texts(of.pair(number), tokenizer), strict=False):
            console.print(Text(f'{name}: ', style='italic').append_text(text), soft_wrap=True)


def show_prompts(console: Console, prompts: Prompts, count: int, tokenizer: Tokenizer) -> None:
    """The first prompts in the order of a run, each with the answer that the data have for it."""
    for i in range(min(count, len(prompts))):
        source, question = prompts.at(i)
        name = prompts.sources[source].name
        console.rule(Text(f'prompt {i} of {len(prompts):,}: {name}, {len(question.prompt)} tokens'))
        ids = np.array([*question.prompt, *question.answer])
        answered = np.arange(len(ids)) >= len(question.prompt)
        prompt, answer = conversation_texts(ids, answered, tokenizer)
        console.print(prompt, soft_wrap=True)
        console.print(Text("the data's answer: ", style='italic').append_text(answer), soft_wrap=True)


def tell(console: Console, prepared: Prepared, lengths: Sequence[tuple[int, int]] | None = None) -> None:
    """The counts, and why records were dropped."""
    console.print(counts(prepared, lengths))
    for line in dropped(prepared):
        console.print(line, markup=False, soft_wrap=True)


def show_job(console: Console, job: JobSpec, config: configs.Config, count: int) -> None:
    """Prints the first prompts that a job would work on."""
    job.check(config)
    with task(f'looking at what {job.name} works on'):
        found = job.show(config, count, say)
    for title, text in found:
        console.rule(Text(title))
        console.print(Text(text), soft_wrap=True)


def show(flags: argparse.Namespace, settings: Sequence[tuple[str, str]]) -> None:
    """Prints the counts, and the first rows or pairs of the mixture."""
    config, _ = configs.load(flags.config, settings)
    configs.check_flags(vars(flags), {'rows': COUNT_OR_0})
    if config.stage in JOBS:
        show_job(Screen(highlight=False), JOBS[config.stage], config, flags.rows)
        return
    spec = find(config.stage)
    lineage.inherit_model(config, spec.about, configs.chosen(flags.config, settings), weights=False)
    spec.settle(config)
    console = Screen(highlight=False)
    with task('preparing the data'):
        data: Any = spec.prepare(config, config.data.tokenizer, say)
    options = {'seq_len': config.seq_len, 'seed': config.seed}
    if spec.data == 'text':
        plan.shrink_vocabulary(config, data.tokenizer, say)
        tell(console, data)
        show_rows(console, pipeline.mix(data, **options), flags.rows, data.tokenizer, dialogues=0)
        return
    own, replay, of_pairs = data.own.sources, config.data.replay, spec.data == 'pairs'
    if of_pairs:
        mixture, sizes = pairs.mix(data, replay=0, **options), [pairs.sizes(s.train, config.seq_len) for s in own]
    else:
        mixture = chats.mix(data, replay=replay, **options)
        sizes = [rows.sizes for rows in mixture.rows[: len(own)]]
    tell(console, data.own, [(of.cut, of.left_out) for of in sizes])
    if data.text:
        console.rule(f'text of pretraining, {replay:.0%} of all rows')
        tell(console, data.text)
    if of_pairs:
        show_pairs(console, mixture, flags.rows, data.tokenizer, [s.name for s in own])
    elif 'rl' in config:  # it answers by itself
        room = {'seq_len': config.seq_len, 'max_new_tokens': config.rl.max_new_tokens}
        show_prompts(console, Prompts(own, **room, seed=config.seed), flags.rows, data.tokenizer)
    else:
        show_rows(console, mixture, flags.rows, data.tokenizer, dialogues=len(own))


def main() -> int:
    return run_command(lambda: show(*parse(sys.argv[1:])))


if __name__ == '__main__':
    leave(main())
