"""Conversations and pairs for the tiny lab, and the stages that learn from them, started as commands."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


from running import ROOT, WORDS, Lab

OPTIONS = {'optim__lr': 3e-3, 'eval__rows': 4}


@dataclass(frozen=True)
class Dialogues:
    """Where the files lie, and a tiny run that each stage starts from."""

    lab: Lab
    folder: Path

    @property
    def pretrained(self) -> Path:
        return self._made('pretrain', lambda workdir: self.lab.train(workdir, steps=4, eval__every=4))

    @property
    def tuned(self) -> Path:
        return self._made('sft', lambda workdir: self.train('sft', workdir))

    def settings(self, stage: str, **settings: Any) -> dict[str, Any]:
        data = {'data__mixture': f'{self.folder / ("chats" if stage == "sft" else "pairs")}.jsonl'}
        parent = {} if 'init_from' in settings else {'init_from': str(self.parent(stage))}
        return self.lab.inherited | OPTIONS | data | parent | {'config': str(ROOT / f'configs/{stage}.py')} | settings

    def parent(self, stage: str) -> Path:
        return self.pretrained if stage == 'sft' else self.tuned

    def argv(self, stage: str, workdir: Path | str | None, *words: str, **settings: Any) -> list[str]:
        return self.lab.argv(workdir, *words, **self.settings(stage, **settings))

    def train(self, stage: str, workdir: Path | str, *words: str, **settings: Any) -> dict[str, Any]:
        return self.lab.train(workdir, *words, **self.settings(stage, **settings))

    def _made(self, name: str, make: Any) -> Path:
        workdir = self.folder / 'runs' / name
        if not workdir.exists():
            make(workdir)
        return workdir


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


def make(lab: Lab, folder: Path) -> Dialogues:
    """Writes the files, the same every time."""
    draw = random.Random(0)
    write(folder / 'chats.jsonl', chats(90, draw))
    write(folder / 'pairs.jsonl', pairs(120, draw))
    return Dialogues(lab, folder)


