"""Progress of what takes longer than a moment, on stderr: a bar on a terminal, a line now and then where there is none.

    with progress.task('encoding notes', total=120) as task:
        task.advance()

A task may be opened inside another: on a terminal each has a bar, a line names them all. `say` prints a line above the
bars. Of several processes the first alone speaks.
"""

import contextlib
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lm.multihost import processes

FIRST = 5.0  # seconds of silence until a line says what takes so long
AGAIN = 15.0  # and between two such lines
REFRESHES = 4  # a second, of the bars
T = TypeVar('T')


class Task:
    """Something under way. `total` is None where nobody knows how much it is."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done, self.text = what, total, 0, ''
        self.begun, self.told = time.monotonic(), 0.0
        self._since: tuple[float, int] | None = None

    def advance(self, number: int = 1) -> None:
        """Says that so much more is done."""
        self.update(self.done + number)

    def update(self, done: int, text: str = '') -> None:
        """Says how much is done, and in words how it goes."""
        self._since = self._since or (time.monotonic(), done)
        self.done, self.text = done, text

    def count(self) -> str:
        """'12/120', '12' or ''."""
        total = '' if self.total is None else f'/{self.total:,}'
        return f'{self.done:,}{total}' if self.done or total else ''

    def time(self) -> str:
        """The time in words: what is left where that can be told, else since when it is under way."""
        now = time.monotonic()
        if self.total and self._since and self.done > self._since[1]:
            a_piece = (now - self._since[0]) / (self.done - self._since[1])
            return f'{_clock(a_piece * (self.total - self.done))} left'
        return _clock(now - self.begun)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class _Screen:
    """The tasks under way in this process, and who shows them: there is one stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.tasks: list[Task] = []
        self.spoke = time.monotonic()
        self._stop: Callable[[], None] = lambda: None  # stops showing them

    def open(self, task: Task) -> None:
        self.tasks.append(task)
        if len(self.tasks) > 1 or not processes.first():
            return
        if self.console.is_terminal:
            live = Live(
                get_renderable=self._bars, console=self.console, refresh_per_second=REFRESHES, transient=True,
                redirect_stdout=False,
            )  # fmt: skip
            live.start()
            self._stop = live.stop
        else:
            ended = threading.Event()
            threading.Thread(target=self._watch, args=(ended,), daemon=True).start()
            self._stop = ended.set

    def close(self, task: Task) -> None:
        self.tasks.remove(task)
        if not self.tasks:
            self._stop()

    def say(self, text: str, style: str | None = None) -> None:
        self.spoke = time.monotonic()
        if processes.first():
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def _bars(self) -> Table:
        """A line a task, which fits the terminal."""
        table = Table.grid(padding=(0, 1))
        for column in range(5):
            table.add_column(no_wrap=True, overflow='ellipsis', ratio=1 if column == 4 else None)
        for task in list(self.tasks):
            bar = ProgressBar(total=task.total, completed=task.done, width=20, pulse=not task.done)
            cells = (Text(task.what[:50]), bar if task.total else '', task.count(), task.time(), Text(task.text))
            table.add_row(*cells)
        return table

    def _watch(self, ended: threading.Event) -> None:
        """Says what is under way, where nothing was said for a while."""
        while not ended.wait(1.0):
            tasks = list(self.tasks)
            if not tasks:
                continue
            last = tasks[-1]
            silent = time.monotonic() - max(self.spoke, last.begun)
            if silent >= (AGAIN if last.told else FIRST):
                last.told = time.monotonic()
                self.say(line(tasks))


def line(tasks: Iterable[Task]) -> str:
    """Tasks, each inside the one before it, as one line: 'runs/sft: answers 64/512, 0:41 left'."""
    *_, last = tasks = list(tasks)
    names = ': '.join(' '.join(filter(None, (task.what, task.count()))) for task in tasks)
    return f'{names}, {last.time()}'


_screen = _Screen()
say = _screen.say


def on_terminal() -> bool:
    """Tells whether the bars are seen."""
    return _screen.console.is_terminal


@contextlib.contextmanager
def task(what: str, total: int | None = None) -> Iterator[Task]:
    """Shows `what` while the block runs."""
    opened = Task(what, total)
    _screen.open(opened)
    try:
        yield opened
    finally:
        _screen.close(opened)


def over(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, shown as they are done with."""
    with task(what, operator.length_hint(items) or None) as shown:
        for item in items:
            yield item
            shown.advance()
