"""Conversations and pairs for the tiny lab, and the stages that learn from them, started as commands."""

import contextlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import ROOT, WORDS, Lab

STAGES = ('sft', 'reward', 'dpo')
OPTIONS = {
    'steps': 6, 'seq_len': 48, 'optim__name': 'adamw', 'optim__lr': 3e-3, 'eval__every': 3, 'eval__rows': 4,
    'checkpoint__every': 2,
}  # fmt: skip


@dataclass(frozen=True)
class Dialogues:
    """Conversations and pairs beside the lab's corpus, and a tiny run of each stage, made when it is asked for.

    Runs are started in the lab's folder: the name of a source, here relative, is part of what orders its rows.
    """

    lab: Lab
    runs: Path

    def run(self, stage: str) -> Path:
        """A finished run: pretrained, or with the settings that the stage has here."""
        workdir = self.runs / stage
        if not workdir.exists():
            if stage == 'pretrain':
                with contextlib.chdir(self.lab.folder):
                    mixture = 'one.jsonl:0.7,two.jsonl:0.3'
                    self.lab.train(workdir, steps=4, eval__every=4, data__mixture=mixture)
            else:
                self.train(stage, workdir)
        return workdir

    def settings(self, stage: str, **settings: Any) -> dict[str, Any]:
        own = {'data__mixture': 'chats.jsonl' if stage == 'sft' else 'pairs.jsonl'}
        own['config'] = str(ROOT / 'configs' / f'{stage}.py')
        own |= {'nll': 0.1} if stage == 'dpo' else {}  # whatever the default is
        if not {'init_from', 'branch_from'} & set(settings):
            own['init_from'] = str(self.run('pretrain' if stage == 'sft' else 'sft'))
        return self.lab.inherited | OPTIONS | own | settings

    def argv(self, stage: str, workdir: Path | str | None, *words: str, **settings: Any) -> list[str]:
        return self.lab.argv(workdir, *words, **self.settings(stage, **settings))

    def train(self, stage: str, workdir: Path | str, *words: str, **settings: Any) -> dict[str, Any]:
        """Trains in this process, on all of its devices."""
        given = self.settings(stage, **settings)
        with contextlib.chdir(self.lab.folder):
            return self.lab.train(workdir, *words, **given)


def message(role: str, content: str) -> dict[str, str]:
    return {'role': role, 'content': content}


def some(draw: random.Random, least: int, most: int) -> str:
    return ' '.join(draw.choices(WORDS, k=draw.randint(least, most)))


def chats(count: int, draw: random.Random, *, most: int = 8) -> list[dict[str, Any]]:
    """Conversations of one or two turns."""
    found = []
    for i in range(count):
        turns = [(some(draw, 1, most), some(draw, 1, most)) for _ in range(draw.randint(1, 2))]
        said = [message(role, text) for turn in turns for role, text in zip(('user', 'assistant'), turn, strict=True)]
        said[0]['content'] += f' {i}?'
        found.append({'messages': said})
    return found


def pairs(count: int, draw: random.Random, *, most: int = 6) -> list[dict[str, Any]]:
    return [
        {
            'prompt': [message('user', f'{some(draw, 1, most)} {i}?')],
            'chosen': [message('assistant', f'{some(draw, 1, most)} yes')],
            'rejected': [message('assistant', f'{some(draw, 1, most)} no')],
            'margin': i % 3,
        }
        for i in range(count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return path


def make(lab: Lab, runs: Path) -> Dialogues:
    """Writes the files, the same every time."""
    draw = random.Random(0)
    write(lab.folder / 'chats.jsonl', chats(90, draw))
    write(lab.folder / 'pairs.jsonl', pairs(120, draw))
    return Dialogues(lab, runs)
