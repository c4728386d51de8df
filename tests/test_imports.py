"""Imports go one way: each room imports only what stands to its right."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / 'lm'

# From left to right. The bottom is ordered too: errors know nothing, files and the mesh know errors, and so on.
ROOMS = (
    {'main', 'chat', 'evaluate', 'inspect', 'convert', 'label', 'prepare'},
    {'jobs'},
    {'stages'},
    {'evals'},
    {'rl'},
    {'sampling'},
    {'training'},
    {'runs'},
    {'interop'},
    {'data'},
    {'losses', 'advantages', 'model'},
    {'presets'},
    {'config'},
    {'settings'},
    {'runtime', 'files', 'sharding', 'terminal', 'workers', 'worker_main'},
    {'progress'},
    {'multihost', 'xla'},
    {'errors'},
    {'interrupts', 'locks'},
)
ENTRY_POINTS = ROOMS[0]
ORDER = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}


def imported(path):
    """The modules of ours that a file imports, inside functions too: (line, 'lm.data.store')."""
    package = ('lm', *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = (
                '.'.join((*package[: len(package) - node.level + 1], node.module or '')) if node.level else node.module
            )
            names = [f'{module.rstrip(".")}.{alias.name}' for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names)


def room_of(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix('.py')


def wrong(path):
    """The imports of a file that go the wrong way, one sentence each."""
    room = room_of(path)
    for line, name in imported(path):
        top, _, rest = name.partition('.')
        if room in ('losses', 'advantages') and top not in ('jax', 'collections', 'typing', 'functools', 'math', 'lm'):
            yield f'{path}:{line} imports {name}: {room} imports jax alone'
        if top != 'lm':
            continue
        target = rest.partition('.')[0]
        if target not in ORDER:
            yield f'{path}:{line} imports {name}, which is in no room: add it to ROOMS'
        elif room == target:
            continue
        elif room in ('losses', 'advantages') or room in ENTRY_POINTS and target in ENTRY_POINTS:
            yield f'{path}:{line} imports {name}: {room} stands alone'
        elif ORDER[target] < ORDER[room]:
            yield f'{path}:{line} imports {name}: {target} is to the left of {room}'


FILES = sorted(p for p in ROOT.rglob('*.py') if p != ROOT / '__init__.py')


def test_every_file_is_in_a_room():
    assert len(FILES) > 30 and {room_of(p) for p in FILES} <= set(ORDER)


@pytest.mark.parametrize('path', FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_imports_go_one_way(path):
    assert not list(wrong(path))


@pytest.mark.parametrize(
    ('room', 'source', 'fits'),
    [
        ('data/x.py', 'from lm.training import step', False),
        ('data/x.py', 'def f():\n    from lm import training', False),
        ('data/x.py', 'from ..training.step import create', False),
        ('data/x.py', 'import lm.chat', False),
        ('data/x.py', 'from lm.data import cache\nfrom . import store\nfrom lm import files', True),
        ('losses/x.py', 'import numpy', False),
        ('losses/x.py', 'from lm import sharding', False),
        ('losses/x.py', 'import jax.numpy as jnp\nfrom lm.losses.objective import normalised', True),
        ('chat.py', 'from lm import evaluate', False),
        ('chat.py', 'from lm.stages import pretrain', True),
        ('errors.py', 'from lm import files', False),
        ('data/x.py', 'from lm.attic import relic', False),
    ],
)
def test_the_check_sees_what_is_wrong(tmp_path, monkeypatch, room, source, fits):
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    path = tmp_path / room
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert (not list(wrong(path))) == fits


def test_no_stage_imports_another():
    """They share what is no stage, and only the registry knows them."""
    stages = {path.stem for path in (ROOT / 'stages').glob('*.py') if '\nSPEC = ' in path.read_text()}
    assert stages >= {'pretrain', 'sft', 'reward', 'dpo'}
    for path in ROOT.rglob('*.py'):
        names = {
            name.removeprefix('lm.stages.').partition('.')[0] for _, name in imported(path) if 'lm.stages.' in name
        }
        assert path == ROOT / 'stages' / '__init__.py' or not names & stages, path


def test_only_the_table_of_older_runs_names_stages():
    """No code decides by the name of a stage: a spec says what it needs."""
    found = []
    for path in ROOT.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                constants = {side.value for side in sides if isinstance(side, ast.Constant)}
                if constants & {'pretrain', 'sft', 'reward', 'dpo'} and 'stage' in ast.unparse(node):
                    found.append(f'{path}:{node.lineno}: {ast.unparse(node)}')
    assert not found


def asks_the_process(source):
    """The lines that ask JAX what this process computes on."""
    named = {'default_backend', 'devices', 'local_devices'}
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in named and ast.unparse(node.value) == 'jax'
    ]


@pytest.mark.parametrize('path', [p for p in FILES if room_of(p) in ('losses', 'model') or p.stem == 'muon'], ids=str)
def test_a_program_depends_on_the_mesh_and_not_on_the_process(path):
    """`sharding.platform` and `first_device` say: else a program for devices that are not here is this machine's."""
    assert not asks_the_process(path.read_text())


def test_the_process_is_seen_to_be_asked():
    assert asks_the_process('import jax\nx = mesh.devices\nif jax.default_backend() == "cpu":\n  jax.devices()') == [
        3,
        4,
    ]
