"""Kills, starves and damages real runs at random, and checks that each ends as the run that nothing happened to.

    python tests/faults.py [--rounds=200 | --presses=50] [--seed=0]

What a round does is drawn from its seed alone, so a failed round is done again with --rounds=1 --seed=ITS_SEED; when
exactly a signal hits is up to the machine. Files are in a small tmpfs, which can be full; where mounting is not allowed
the running process is forbidden to let files grow instead (RLIMIT_FSIZE).
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import jax  # noqa: E402
import running  # noqa: E402
from etils import epath  # noqa: E402

from lm import config as configs  # noqa: E402
from lm import sharding  # noqa: E402
from lm.runs import checkpoint, execution, loading, rundir  # noqa: E402
from lm.stages import plan  # noqa: E402
from lm.training.loop import saved  # noqa: E402

STEPS = 16
SETTINGS = {
    'steps': STEPS, 'model__layers': 1, 'batch_size': 8, 'execution__microbatch': 4, 'seq_len': 64,
    'checkpoint__every': 2,    'eval__every': 8, 'eval__rows': 4, 'eval__max_new_tokens': 2,
}  # fmt: skip
PATIENCE = 120.0  # seconds after which a process is taken for hung
DISK = 48 << 20  # bytes of the tmpfs

# Where a process is hit, and for how many seconds after that was seen.
MOMENTS = {'start': 2.5, 'compile': 0.6, 'step': 0.03, 'save': 0.06, 'evaluation': 0.3}
ENDS = {'kill': 5, 'terminate': 3, 'interrupt': 1, 'terminate then kill': 1, 'full disk': 3}
DAMAGES = {
    'none': 6, 'flipped byte': 3, 'truncated file': 2, 'missing file': 2, 'empty step': 1, 'no meta': 1,
    'cut metrics': 1, 'noise after metrics': 1, 'half status.json': 1, 'half config.json': 1, 'stray temporary': 1,
    'rotten tokenizer': 1, 'no prepared data': 1,
}  # fmt: skip
NAMED = ('empty step', 'no meta')  # damage that cannot be harmless, so that the run has to name it


class Failure(AssertionError):
    """A promise that a run did not keep."""


def check(holds: bool, promise: str) -> None:
    if not holds:
        raise Failure(promise)


@dataclass(frozen=True)
class Fault:
    """How one process ends, and what is done to its files before the next one starts. `draw` are numbers in [0, 1)."""

    end: str
    moment: str
    damage: str
    draw: tuple[float, ...]


def faults_of(seed: int) -> list[Fault]:
    """The faults of a round."""
    draw = random.Random(seed)
    choose = lambda weights: draw.choices(list(weights), list(weights.values()))[0]
    faults = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        moment = draw.choice(list(MOMENTS))
        faults.append(Fault(choose(ENDS), moment, choose(DAMAGES), tuple(draw.random() for _ in range(4))))
    return faults


@dataclass
class Bench:
    """What all rounds share: a corpus, a cache, and a run that nothing happened to."""

    folder: Path
    mounted: bool
    lab: running.Lab
    seen: Counter[str] = field(default_factory=Counter)  # what has been done and was met
    done: list[str] = field(default_factory=list)  # in the round under way
    damaged: set[int] = field(default_factory=set)  # steps whose checkpoint was, in that round
    process: subprocess.Popen | None = None  # the last one

    def note(self, what: str, detail: str = '') -> None:
        self.seen[what] += 1
        self.done.append(what + detail)

    @property
    def whole(self) -> Path:
        return self.folder / 'whole'

    @cached_property
    def abstract(self) -> Any:
        """What a checkpoint holds, as shapes."""
        config, _ = configs.load(running.CONFIG, configs.split_settings(self.lab.argv(None, **SETTINGS))[1])
        params = loading.abstract_params(execution.model_config(config))
        return saved(plan.abstract_state({'policy': params}, plan.make_optimizer(config)[0], config.seed))

    def start(self, workdir: Path) -> subprocess.Popen:
        self.process = self.lab.start(workdir, **SETTINGS)
        return self.process

    def finish(self, process: subprocess.Popen) -> str:
        """Waits, and returns what was said on stderr."""
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failure(f'hung for {PATIENCE:.0f} s; said: {process.communicate()[1][-2000:]}') from None
        self.done.append(f'status {process.returncode}')
        check(before_us(said) or 'Traceback' not in said, f'a traceback: {said[-3000:]}')
        return said

    # -- the disk --

    @contextlib.contextmanager
    def full(self, process: subprocess.Popen, draw: Sequence[float]) -> Iterator[None]:
        """Inside, less can be written than two checkpoints take, perhaps nothing."""
        left = int(draw[0] ** 2 * 2 * size_of(self.whole / 'checkpoints' / str(STEPS)))
        if not self.mounted:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (left // 8, resource.RLIM_INFINITY))
            yield
            return
        filler = self.folder / 'filler'
        with filler.open('wb') as f:
            space = os.statvfs(self.folder)
            with contextlib.suppress(OSError):  # the process was quicker: then it is as full as can be
                os.posix_fallocate(f.fileno(), 0, max(4096, space.f_bavail * space.f_frsize - left))
        yield
        filler.unlink()


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """The bench with its uninterrupted run, on a disk of its own."""
    folder = Path(tempfile.mkdtemp(prefix='faults-'))
    options = ['mount', '-t', 'tmpfs', '-o', f'size={DISK}', 'none', str(folder)]
    mounted = shutil.which('mount') is not None and subprocess.run(options, capture_output=True).returncode == 0
    before = os.environ.get('LM_CACHE')
    os.environ['LM_CACHE'] = str(folder / 'cache')
    (folder / 'corpus').mkdir()
    found = Bench(folder, mounted, running.make_lab(folder / 'corpus'))
    try:
        process = found.start(found.whole)
        said = found.finish(process)
        check(process.returncode == 0, f'the uninterrupted run failed: {said[-2000:]}')
        yield found
    finally:
        if found.process:
            found.process.kill()
        os.environ.pop('LM_CACHE') if before is None else os.environ.update(LM_CACHE=before)
        if mounted:
            subprocess.run(['umount', '-l', str(folder)], check=True)
        shutil.rmtree(folder)


# ---- a round ----


def play(found: Bench, seed: int) -> None:
    """One round. Raises Failure, with the seed and what was done."""
    workdir, faults = found.folder / f'round-{seed}', faults_of(seed)
    found.done.clear(), found.damaged.clear()
    try:
        for fault in faults:
            hit(found, workdir, fault)
            if workdir.exists() and fault.damage != 'none':
                damage(found, workdir, fault)
        process = found.start(workdir)
        said = found.finish(process)
        check(process.returncode == 0, f'the last process ended with {process.returncode}: {said[-2000:]}')
        compare(found, workdir)
    except Exception as error:  # whatever it is, it says which round it was
        kept = Path(tempfile.mkdtemp(prefix=f'round-{seed}-'))
        if workdir.exists():
            shutil.copytree(workdir, kept, dirs_exist_ok=True)
        again = f'python tests/faults.py --rounds=1 --seed={seed}'
        raise Failure(f'round {seed} ({again}; files in {kept}): {error}\ndone: {"; ".join(found.done)}') from error
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def hit(found: Bench, workdir: Path, fault: Fault) -> None:
    """Runs until the fault's moment, ends the process in the fault's way, and checks how it took that."""
    process = found.start(workdir)
    wait_for(process, workdir, fault)
    over = process.poll() is not None
    found.note(f'{fault.end} at {fault.moment}' if not over else 'too late', f' (step {newest_step(workdir)})')
    {
        'kill': kill, 'terminate': stop, 'interrupt': stop, 'terminate then kill': stop_then_kill,
        'full disk': run_out,
    }[fault.end](found, process, workdir, fault)  # fmt: skip


def wait_for(process: subprocess.Popen, workdir: Path, fault: Fault) -> None:
    """Until the fault's moment has come, or the process has ended."""
    u, v = fault.draw[:2]
    first = (running.steps_saved(workdir) or [0])[-1] + 1
    at = first + int(u * max(1, STEPS - first + 1))
    at = at if fault.moment == 'step' else STEPS if at > SETTINGS['eval__every'] else SETTINGS['eval__every']
    temporary = lambda: set((workdir / 'checkpoints').glob('*tmp*'))
    before = temporary()
    come: dict[str, Callable[[], bool]] = {
        'start': lambda: True,
        'compile': lambda: b'"compiling"' in contents(workdir / 'status.json'),
        'step': lambda: b'"step": %d,' % at in contents(workdir / 'metrics.jsonl'),
        'evaluation': lambda: b'"step": %d,' % at in contents(workdir / 'metrics.jsonl'),
        'save': lambda: bool(temporary() - before),
    }
    end = time.monotonic() + PATIENCE
    while not come[fault.moment]() and process.poll() is None:
        check(time.monotonic() < end, f'no {fault.moment} in {PATIENCE:.0f} s')
        time.sleep(0.002)
    end = time.monotonic() + v * MOMENTS[fault.moment]
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)


# ---- how a process ends ----


def kill(found: Bench, process: subprocess.Popen, workdir: Path, fault: Fault) -> None:
    process.kill()
    found.finish(process)
    check(process.returncode in (0, -signal.SIGKILL), f'status {process.returncode} of a killed process')


def stop(found: Bench, process: subprocess.Popen, workdir: Path, fault: Fault) -> None:
    """A signal that asks: 75, and what was done is saved; or it had not begun, or was done already."""
    number = signal.SIGTERM if fault.end == 'terminate' else signal.SIGINT
    process.send_signal(number)
    said = found.finish(process)
    told = said.splitlines()[-1] if said else ''
    if process.returncode == 75:
        where = newest_step(workdir)
        check(told.startswith(('lm: stopped by', 'lm: saved at step')), f'75, and the last line is {told!r}')
        check('saved at step' not in told or f'saved at step {where} ' in told, f'{told!r}, and the newest is {where}')
        check(running.status(workdir)['state'] == 'preempted' if 'saved' in told else True, 'status.json is not told')
    elif process.returncode != 0:  # the interpreter starts or ends, and nobody handles signals
        begun = 'data ready' in said and running.status(workdir)['state'] != 'done'
        early = process.returncode == 128 + number or before_us(said) or process.returncode == -number
        check(early and not begun, f'status {process.returncode}: {said[-2000:]}')


def before_us(said: str) -> bool:
    """Whether Ctrl-C came while Python itself began: its traceback has no line of ours, nor of JAX's."""
    return said.endswith('KeyboardInterrupt\n') and '/lm/' not in said and '/jax' not in said


def stop_then_kill(found: Bench, process: subprocess.Popen, workdir: Path, fault: Fault) -> None:
    """What a scheduler does that waits too short."""
    process.send_signal(signal.SIGTERM)
    time.sleep(fault.draw[2] * 0.1)
    process.kill()
    found.finish(process)
    check(process.returncode in (0, 75, -signal.SIGKILL, -signal.SIGTERM), f'status {process.returncode}')


def run_out(found: Bench, process: subprocess.Popen, workdir: Path, fault: Fault) -> None:
    """A full disk: status 1, one line, and no checkpoint that only looks like one."""
    with found.full(process, fault.draw[2:]):
        said = found.finish(process)
    ours = [line for line in said.splitlines() if line.startswith('lm: ')]
    if process.returncode:
        check(process.returncode == 1 and len(ours) == 1, f'status {process.returncode}: {said[-2000:]}')
        check(said.splitlines()[-1] == ours[0], f'not the last line: {said[-2000:]}')
        found.seen['full disk, told'] += 1
    for step in running.steps_saved(workdir):
        if step not in found.damaged:
            read(found, workdir, step)


# ---- what is done to the files ----


def damage(found: Bench, workdir: Path, fault: Fault) -> None:
    """Damages what the fault says, if it is there; what cannot be got over is put back after the run has said so."""
    steps, draw = running.steps_saved(workdir), random.Random(fault.draw[3])
    newest = workdir / 'checkpoints' / str(steps[-1] if steps else 0)
    of_checkpoint = ('flipped byte', 'truncated file', 'missing file', 'no meta')
    if fault.damage in (*of_checkpoint, 'empty step') and not steps:
        return
    found.note(fault.damage, f' ({steps})')
    if fault.damage in of_checkpoint:
        if len(steps) == 1:
            return refuse(found, workdir, newest / 'meta' / 'metadata', 1, 'none of the 1 checkpoints')
        files = sorted(p for p in newest.rglob('*') if p.is_file() and p.stat().st_size)
        largest = max(files, key=lambda p: p.stat().st_size)  # the arrays
        path = newest / 'meta' / 'metadata' if fault.damage == 'no meta' else draw.choice([largest, draw.choice(files)])
        found.done.append(str(path.relative_to(workdir)))
        found.damaged.add(steps[-1])
        harm(path, fault.damage, draw)
    elif fault.damage == 'empty step':
        found.damaged.add(steps[-1] + draw.randint(1, 3))
        (workdir / 'checkpoints' / str(max(found.damaged))).mkdir()
    elif fault.damage == 'half config.json':
        if (workdir / 'config.json').exists():
            refuse(found, workdir, workdir / 'config.json', 2, 'is damaged')
    else:
        harm_others(found, workdir, fault.damage, steps[-1] if steps else 0, draw)


def harm(path: Path, how: str, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how in ('missing file', 'no meta'):
        path.unlink()
    elif how == 'truncated file':
        os.truncate(path, draw.randrange(len(data)))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)


def harm_others(found: Bench, workdir: Path, what: str, step: int, draw: random.Random) -> None:
    """What lies beside the checkpoints: lines after the newest one, and what is written anew at each start."""
    metrics, status = workdir / 'metrics.jsonl', workdir / 'status.json'
    if what == 'cut metrics' and metrics.exists():
        lines = metrics.read_bytes().splitlines(keepends=True)
        kept = sum(len(line) for line in lines if (at := step_of(line)) is not None and at <= step)
        os.truncate(metrics, draw.randint(kept, max(kept, metrics.stat().st_size)))
    elif what == 'noise after metrics' and metrics.exists():
        with metrics.open('ab') as f:
            f.write(draw.choice([b'{"schema": 1, "st', b'\0' * 40, draw.randbytes(40), b'\n\n17\n[]\nnull\n']))
    elif what == 'half status.json' and status.exists():
        os.truncate(status, status.stat().st_size // 2)
    elif what == 'stray temporary':
        (workdir / '.config.json.1a2b3c4d.tmp').write_text('{"con')
    elif what == 'rotten tokenizer' and (workdir / 'tokenizer').exists():
        harm(draw.choice(sorted((workdir / 'tokenizer').iterdir())), 'flipped byte', draw)
    elif what == 'no prepared data':
        shutil.rmtree(found.folder / 'cache' / 'prepared')


def refuse(found: Bench, workdir: Path, path: Path, status: int, words: str) -> None:
    """Cuts a file that nothing stands in for: the run says so in one line, and goes on once the file is back."""
    whole = path.read_bytes()
    os.truncate(path, len(whole) // 2)
    process = found.start(workdir)
    said = found.finish(process)
    told = said.splitlines()[-1]
    check(process.returncode == status and told.startswith('lm: ') and words in told, f'{path} was cut: {said[-2000:]}')
    path.write_bytes(whole)


# ---- what must hold ----


def compare(found: Bench, workdir: Path) -> None:
    """The run is the one that nothing happened to, bit for bit, and nothing lies around."""
    whole = found.whole
    for name, of in (('metrics', running.measured), ('samples', lambda w: running.lines(w, 'samples.jsonl'))):
        check(of(workdir) == of(whole), f'other {name}: {different(of(whole), of(workdir))}')
    check(running.status(workdir)['state'] == 'done', 'status.json does not say done')
    check(read(found, workdir, STEPS) == read(found, whole, STEPS), 'the last checkpoint holds something else')
    left = [p.name for p in (*workdir.iterdir(), *(workdir / 'checkpoints').iterdir()) if 'tmp' in p.name]
    check(not left and not (workdir / rundir.LOCK).exists(), f'left behind: {left}')
    log = contents(workdir / 'log.txt').decode(errors='replace')
    found.seen['damage, named'] += log.count('is damaged: ')
    check(not any(what.startswith(NAMED) for what in found.done) or 'is damaged: ' in log, 'damage was not named')


def read(found: Bench, workdir: Path, step: int) -> dict[str, Any]:
    """The checksums of a checkpoint's leaves, after every leaf was read and found to agree with its own."""
    with sharding.use_mesh({}, jax.devices()[:1]):
        try:
            return checkpoint.read(epath.Path(workdir / 'checkpoints' / str(step)), found.abstract)[1]['checksums']
        except ValueError as error:
            raise Failure(f'checkpoint {step} does not hold: {error}') from error


def different(a: Any, b: Any) -> str:
    """Where two of the same kind differ first."""
    if isinstance(a, dict):
        keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        return ', '.join(f'{k}: {a.get(k)} became {b.get(k)}' for k in keys[:3]) + f' ({len(keys)} in all)'
    return f'{len(a)} became {len(b)}; ' + next((f'{x} became {y}' for x, y in zip(a, b, strict=False) if x != y), '')


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b''


def newest_step(workdir: Path) -> int:
    """Of the checkpoints, 0 if there is none."""
    return max(running.steps_saved(workdir), default=0)


def step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None if it is none."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return None


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, in whole pages."""
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob('*') if p.is_file())


# ---- Ctrl-C over all commands ----


@dataclass(frozen=True)
class Command:
    """A command to press Ctrl-C on, and how long it takes by itself."""

    name: str
    words: tuple[str, ...]
    seconds: float


def commands(found: Bench) -> list[Command]:
    """Each command on the run that nothing happened to, timed when what it compiles is cached."""
    whole, folder = str(found.whole), found.folder
    of_data = found.lab.argv(None, **SETTINGS)
    words = {
        'main': found.lab.argv(folder / 'pressed', **SETTINGS),
        'chat': [whole, '--raw', '--prompt=the bucket', '--max_new_tokens=64'],
        'evaluate': [whole, '--tasks=heldout', '--rows=64'],
        'convert': [whole, str(folder / 'pressed.gguf')],
        'inspect': of_data,
    }
    timed = []
    for name, given in words.items():
        for _ in range(2):
            begun = time.monotonic()
            process = start_command(name, given)
            check(process.wait(PATIENCE) == 0, f'lm.{name} failed by itself: {process.communicate()[1][-2000:]}')
            seconds = time.monotonic() - begun
            clear(folder)
        timed.append(Command(name, tuple(given), seconds))
    return timed


def start_command(name: str, words: Sequence[str]) -> subprocess.Popen:
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    command = [sys.executable, '-m', f'lm.{name}', *words]
    return subprocess.Popen(command, cwd=running.ROOT, env=env, stdout=-1, stderr=-1, text=True)


def clear(folder: Path) -> None:
    shutil.rmtree(folder / 'pressed', ignore_errors=True)
    (folder / 'pressed.gguf').unlink(missing_ok=True)


def press(found: Bench, command: Command, draw: random.Random) -> str:
    """Presses Ctrl-C at a random moment, now and then twice, and returns how the command took it. Raises Failure."""
    at, twice = draw.random() * command.seconds, draw.random() < 0.2
    process = start_command(command.name, command.words)
    time.sleep(at)
    over = process.poll() is not None
    for _ in range(1 + twice):
        process.send_signal(signal.SIGINT)
        time.sleep(draw.random() * 0.2)
    try:
        out, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure(f'lm.{command.name} went on after Ctrl-C at {at:.2f} s') from None
    what = f'lm.{command.name}, Ctrl-C at {at:.2f} s{" twice" * twice}: status {process.returncode}: {said[-1500:]}'
    if over or before_us(said):
        clear(found.folder)
        return 'too late' if over else 'before us'
    check('Traceback' not in said, what)
    statuses = (0, 75, 130, *(1,) * twice) if command.name == 'main' else (0, 130)  # 1: what was done since is lost
    check(process.returncode in statuses, what)
    check(process.returncode != 0 or bool(out), f'0 and nothing done: {what}')
    check(process.returncode == 0 or 'lm: ' in said, f'not a word: {what}')
    left = [p.name for p in found.folder.iterdir() if p.name.endswith('.tmp')]
    check(not left, f'left behind {left}: {what}')
    clear(found.folder)
    return f'{command.name} {process.returncode}'


def presses(count: int, seed: int = 0, tell: Callable[[str], None] = lambda line: None) -> Counter[str]:
    """Presses Ctrl-C so often, over all commands in turn; how often each took it in each way. Raises Failure."""
    draw, seen = random.Random(seed), Counter()
    with bench() as found:
        known = commands(found)
        for i in range(count):
            taken = press(found, known[i % len(known)], draw)
            seen[taken] += 1
            tell(f'{i + 1}: {taken}')
    return seen


# ---- runs that draw from their policy ----

DRAWN = {
    'steps': 18, 'batch_size': 8, 'execution__microbatch': 8, 'data__mixture': 'chats.jsonl', 'data__pretraining': '',
    'rl__prompts': 4, 'rl__group': 4, 'rl__max_new_tokens': 8, 'log__every': 1, 'checkpoint__every': 3,
    'checkpoint__keep': 2, 'eval__every': 18, 'eval__rows': 2, 'eval__max_new_tokens': 2, 'optim__warmup': 0,
}  # fmt: skip
UPDATES = 2  # steps on a rollout of these settings
# Where such a run is when it dies, and for how many seconds after that was seen.
STATES = {'rollout': 0.1, 'update': 0.02, 'save': 0.05}
SERVE = """
import json, os, sys
from lm import errors, main
os.chdir(sys.argv[1])
for line in sys.stdin:
    print(errors.run_command(lambda: main.train(json.loads(line))), flush=True)
"""


class Warm:
    """A process of one device that trains one command line after another: only the first one waits for compilers."""

    def __init__(self, folder: Path, said: Path) -> None:
        self._said = said
        env = os.environ | {
            'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': running.DEVICES, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            'PYTHONPATH': os.pathsep.join([str(running.ROOT), str(running.ROOT / 'tests')]),
        }  # fmt: skip
        with said.open('w') as stderr:
            self.process = subprocess.Popen(
                [sys.executable, '-c', SERVE, str(folder)], stdin=-1, stdout=-1, stderr=stderr, text=True, env=env
            )

    def begin(self, argv: Sequence[str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(list(argv)) + '\n')
        self.process.stdin.flush()

    def end(self) -> None:
        """Waits. Raises Failure where it did not end well."""
        assert self.process.stdout is not None
        told = self.process.stdout.readline().strip()
        check(told == '0', f'it ended with {told or "nothing"}: {self._said.read_text()[-3000:]}')

    def copy(self, workdir: Path, target: Path) -> None:
        """Copies a directory as a kill would leave it now: while it is copied no thread of the process runs."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        shutil.copytree(workdir, target)
        self.process.send_signal(signal.SIGCONT)


def deaths_of(seed: int, count: int) -> list[tuple[int, float]]:
    """(the step under way, part of the time that is waited there) of each death, in their order."""
    draw = random.Random(seed)
    return [(step, draw.random()) for step in sorted(draw.sample(range(1, DRAWN['steps'] + 1), count))]


def state_at(step: int) -> str:
    """The state of a run at a step: as a checkpoint is saved after it, or its batch is drawn before it."""
    if step % DRAWN['checkpoint__every'] == 0:
        return 'save'
    return 'rollout' if (step - 1) % UPDATES == 0 else 'update'


def die(warm: Warm, workdir: Path, step: int, part: float, target: Path) -> str:
    """Copies a run at a moment; what was met there."""
    state, end = state_at(step), time.monotonic() + PATIENCE
    before = b'"step": %d,' % (step - 1)
    if state == 'save':
        come = lambda: any(p.name.startswith(f'{step}.') or p.name == str(step) for p in checkpoints(workdir))
    else:  # the line of a step is written when the next one is under way
        come = lambda: step < 2 or before in contents(workdir / 'metrics.jsonl')
    while not come():
        check(time.monotonic() < end, f'no {state} at step {step} in {PATIENCE:.0f} s')
        time.sleep(0.001)
    time.sleep(part * STATES[state])
    warm.copy(workdir, target)
    return f'{state}, half a checkpoint' if any('tmp' in p.name for p in checkpoints(target)) else state


def checkpoints(workdir: Path) -> list[Path]:
    folder = workdir / 'checkpoints'
    return list(folder.iterdir()) if folder.exists() else []


def checksums(workdir: Path, step: int) -> dict[str, Any]:
    """Those of all leaves of a checkpoint: parameters, moments, and the rows of the rollout under way."""
    found = dict(json.loads((workdir / 'checkpoints' / str(step) / 'meta' / 'metadata').read_text())['checksums'])
    check(any('task' in leaf for leaf in found), 'the checkpoint has no rollout in it')
    return found


def drawn(argv: Callable[[Path], Sequence[str]], lab: Path, folder: Path, *, seed: int, count: int) -> Counter[str]:
    """Trains a run once, and goes on from `count` deaths of it: each ends as the run that nothing happened to. Returns
    how often each state was met. Raises Failure.

    Args:
      argv: the command line of a run in a directory. lab: where it is given. folder: for the directories.
    """
    warm, whole, seen = Warm(lab, folder / 'said'), folder / 'whole', Counter()
    try:
        warm.begin(argv(whole))
        end = time.monotonic() + PATIENCE
        while not (whole / 'config.json').exists():
            check(warm.process.poll() is None and time.monotonic() < end, (folder / 'said').read_text()[-3000:])
            time.sleep(0.01)
        deaths = deaths_of(seed, count)
        for i, (step, part) in enumerate(deaths):
            seen[die(warm, whole, step, part, folder / f'{i}')] += 1
        warm.end()
        for i, (step, _) in enumerate(deaths):
            workdir = folder / f'{i}'
            seen['in the middle of a rollout'] += newest_step(workdir) % UPDATES
            warm.begin(argv(workdir))
            warm.end()
            compare_drawn(whole, workdir, f'death {i} at step {step}')
        return seen
    finally:
        warm.process.kill()
        warm.process.communicate()


def compare_drawn(whole: Path, workdir: Path, which: str) -> None:
    """Raises Failure unless two runs measured, said and saved the same, bit for bit."""
    of_last = lambda w: checksums(w, DRAWN['steps'])
    of_samples = lambda w: running.lines(w, 'samples.jsonl')
    for name, of in (('metrics', running.measured), ('samples', of_samples), ('checkpoint', of_last)):
        check(of(workdir) == of(whole), f'{which}: other {name}: {different(of(whole), of(workdir))}')
    left = [p.name for p in (*workdir.iterdir(), *checkpoints(workdir)) if 'tmp' in p.name]
    check(running.status(workdir)['state'] == 'done' and not left, f'{which}: left behind: {left}')


def rounds(seeds: Sequence[int], tell: Callable[[str], None] = lambda line: None) -> Counter[str]:
    """Plays a round for each seed, and returns how often each thing was done. Raises Failure."""
    with bench() as found:
        tell(f'files in {"a tmpfs" if found.mounted else "a folder: the disk is not really full"}')
        for seed in seeds:
            begun = time.monotonic()
            play(found, seed)
            tell(f'round {seed}: {time.monotonic() - begun:.1f} s: {"; ".join(found.done)}')
        return found.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--rounds', type=int, default=30)
    parser.add_argument('--seed', type=int, default=0, help='of the first round; each next one has the next')
    parser.add_argument('--presses', type=int, help='instead of rounds: Ctrl-C so often, over all commands')
    flags = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))  # so that the disk is given back
    said = lambda line: print(line, flush=True)
    try:
        if flags.presses:
            print(f'{flags.presses} presses held: {dict(sorted(presses(flags.presses, flags.seed, said).items()))}')
            return
        seen = rounds(range(flags.seed, flags.seed + flags.rounds), said)
    except Failure as failure:
        sys.exit(f'{failure}')
    print(f'{flags.rounds} rounds held, {time.monotonic() - begun:.0f} s: {dict(sorted(seen.items()))}')


if __name__ == '__main__':
    main()
