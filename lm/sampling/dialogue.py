"""A conversation at a terminal: what is typed is said to each run, or a command; Ctrl-C stops an answer."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from lm import files, interrupts, progress, terminal
from lm.config import nearest
from lm.errors import RunError, UsageError
from lm.interrupts import Ending, Interrupted
from lm.sampling.choice import Sampling
from lm.sampling.conversation import Talker, forget, heading, instruct, needs, print_answer
from lm.sampling.generate import fixed_slots
from lm.settings import SEED_MAX, Bound

COMMANDS = {
    '/help': 'lists these',
    '/reset': 'begins anew; what the system says stays',
    '/system': 'TEXT: what the assistant is told before the conversation; `none`: nothing; without TEXT: shows it',
    '/save': 'FILE.jsonl: writes the conversation as {"messages": …}, a line for each run, as configs/sft.py reads it',
    '/seed': 'N: draws the next answers from it; without N: shows it',
    '/temperature': 'T: 0 is greedy; without T: shows it',
    '/quit': 'leaves, as Ctrl-D does',
}
KEYS = 'Enter sends, Alt-Enter begins a line, Ctrl-C clears the line or stops an answer, Ctrl-D leaves'
note = partial(progress.say, style='bright_black')  # a line that is no answer


class Dialogue:
    """The runs and how each draws, at temperatures that `warmth` allows; the seed is one more after each message, so
    that asking again is answered anew."""

    def __init__(
        self, talkers: Sequence[Talker], draws: Sequence[Sampling], flags: argparse.Namespace, warmth: Bound, *,
        history: Path,
    ) -> None:  # fmt: skip
        self.talkers, self.draws, self.seed, self._warmth = talkers, list(draws), flags.seed, warmth
        self._max_new_tokens, self._raw, self._stopped = flags.max_new_tokens, flags.raw, False
        self._editor = terminal.Editor(COMMANDS, history)

    def hold(self) -> None:
        """Reads and answers until it is left."""
        for talker, draw in zip(self.talkers, self.draws, strict=True):
            note(banner(talker, draw))
        note(f'seed {self.seed}; /help lists commands, Ctrl-D leaves')
        try:
            while True:
                typed = self._editor.read()
                text = typed.strip()
                command = text.split()[0] if typed.startswith('/') else ''
                if command == '/quit':
                    return
                if command[1:].isalpha():
                    self.obey(command, text.removeprefix(command).strip())
                elif text:
                    self.say(text)
        except EOFError:
            return
        finally:
            terminal.forget_typed()

    # ---- answers ----

    def say(self, text: str) -> None:
        """Prints each run's answer to a text."""
        self._stopped = False
        with terminal.answering(), interrupts.reacting(self._react):
            for talker, draw in zip(self.talkers, self.draws, strict=True):
                try:
                    self._reply(talker, draw, text)
                except UsageError as error:  # its template refuses this: the others may not
                    note(f'{error}')
                if self._stopped:
                    break
        for talker in self.talkers:
            if not self._stopped and talker.template is not None:
                self._prepare(talker)
        self.seed = (self.seed + 1) % (SEED_MAX + 1)

    def _react(self, name: str) -> Ending | None:
        """The first Ctrl-C asks the answer to stop, the second leaves."""
        if self._stopped or name != 'SIGINT':
            return Interrupted()
        self._stopped = True
        return None

    def _reply(self, talker: Talker, draw: Sampling, text: str) -> None:
        if len(self.talkers) > 1:
            note(heading(talker, raw=self._raw))
        if not self._compiled(talker, text):
            return
        options = {'max_new_tokens': self._max_new_tokens, 'sampling': draw, 'seed': self.seed}
        print_answer(talker, text, warn=note, stopped=lambda: self._stopped, **options)
        if self._stopped:
            note('stopped')
        elif not talker.ended:
            note(f'cut at {self._max_new_tokens} tokens: --max_new_tokens sets how many')

    def _compiled(self, talker: Talker, text: str) -> bool:
        """Waits for what the answer runs, and says so; false if that was stopped."""
        assert talker.ahead is not None
        slots = needs(talker, text, max_new_tokens=self._max_new_tokens)
        talker.ahead.begin(slots)
        if not talker.ahead.ready(slots, 0.2):
            note('compiling, once for a model and a length of conversation …')
        while not talker.ahead.ready(slots, 0.1):
            if self._stopped:
                note('stopped')
                return False
        return True

    def _prepare(self, talker: Talker) -> None:
        """Begins to compile what a longer conversation will run, before it is that long."""
        assert talker.ahead is not None
        slots = needs(talker, '', max_new_tokens=self._max_new_tokens)
        if slots < talker.trained_on:
            talker.ahead.begin(fixed_slots(slots, 1, context=talker.trained_on))

    # ---- commands ----

    def obey(self, command: str, words: str) -> None:
        """Does what a command says, or says why not."""
        ways = {
            '/help': self._help, '/reset': self._reset, '/system': self._system, '/save': self._save,
            '/seed': self._seed, '/temperature': self._temperature,
        }  # fmt: skip
        try:
            if command not in ways:
                known = f'{nearest(command, list(COMMANDS))}: /help lists them'
                raise UsageError(f'{command} is no command{known}; a text that begins so needs a space')
            ways[command](words)
        except (UsageError, RunError) as error:
            note(f'{error}')

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            note(f'{name:<13} {meaning}')
        note(KEYS)

    def _reset(self, _: str) -> None:
        for talker in self.talkers:
            forget(talker)
        note('begun anew')

    def _system(self, words: str) -> None:
        chats = [talker for talker in self.talkers if talker.template is not None]
        if not chats:
            raise UsageError('/system is for conversations, and these runs continue text')
        for talker in chats if words else ():
            instruct(talker, None if words == 'none' else words)
        said = next((turn['content'] for turn in chats[0].turns if turn['role'] == 'system'), None)
        note('the system says nothing' if said is None else f'the system says: {said}')

    def _save(self, words: str) -> None:
        kept = [talker.turns for talker in self.talkers if any(t['role'] == 'assistant' for t in talker.turns)]
        if not words:
            raise UsageError('/save FILE.jsonl: name a new file')
        if not kept:
            raise UsageError('there is no conversation to save yet')
        path = Path(words).expanduser()
        if path.exists():
            raise UsageError(f'{path} exists: name another file')
        files.write_text(path, ''.join(json.dumps({'messages': turns}, ensure_ascii=False) + '\n' for turns in kept))
        note(f'saved in {path}')

    def _seed(self, words: str) -> None:
        if words:
            if not words.isdecimal() or int(words) > SEED_MAX:
                raise UsageError(f'/seed {words}: must be a whole number from 0 to {SEED_MAX}')
            self.seed = int(words)
        note(f'seed {self.seed}')

    def _temperature(self, words: str) -> None:
        if words:
            try:
                value = float(words)
            except ValueError:
                value = -1.0
            if not self._warmth.holds(value):
                raise UsageError(f'/temperature {words}: must be {self._warmth.words}')
            self.draws = [draw._replace(temperature=value) for draw in self.draws]
        note(', '.join(f'temperature {temperature:g}' for temperature in {d.temperature for d in self.draws}))


def banner(talker: Talker, draw: Sampling) -> str:
    """A run, its step and size, and how it draws, in a line."""
    size = sum(x.size for x in jax.tree.leaves(talker.model.params))
    plain = Sampling()._asdict()
    how = [
        f'{name} {value:g}' for name, value in draw._asdict().items() if name == 'temperature' or value != plain[name]
    ]
    millions = f'{size / 1e6:,.1f}M parameters, {talker.trained_on:,} tokens at once'
    return f'{talker.name}: step {talker.model.step}, {millions}; {", ".join(how)}'
