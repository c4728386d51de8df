"""Checkpoints that notice damage.

Orbax writes and reads them. What it does not do is done here: it restores a flipped byte without a word (0.12.8: 24 of
24 flips came back silently wrong), it takes an empty directory with a step's name for the newest checkpoint, and it
skips a save whose step is below one that it has seen. So every leaf has a checksum that does not depend on the mesh,
and the list of them one of its own; restoring walks back from the newest checkpoint until one holds, and what is
damaged is renamed out of the way.
"""

import contextlib
import errno
import hashlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lm import files
from lm.config import split_run
from lm.data import cache
from lm.errors import RunError, UsageError
from lm.multihost import processes
from lm.runs import foreign

PIECE = 1 << 20  # elements of which a checksum is taken at once, on the host
FULL = os.strerror(errno.ENOSPC)
COMMITTED = 'commit_success.txt'  # what Orbax writes last, in a bucket
LAYOUT = 2  # raise it when a checkpoint of today could not be read by the code of yesterday


def _quieten() -> None:
    """Silences Orbax and TensorStore: when a file cannot be read or written, they log a traceback from each thread that
    finds out, TensorStore one for each answer that comes after that, and Python one for each read of Orbax's that was
    given up. We raise the error, and it is told in one line."""
    for name in ('absl', 'asyncio'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _told_by_us(unraisable):
            before(unraisable)

    sys.unraisablehook = hook


def _told_by_us(unraisable: Any) -> bool:
    """Tells whether an exception that nobody could catch is one of a failed read or write."""
    left = unraisable.object
    of_orbax = inspect.iscoroutine(left) and 'orbax' in Path(left.cr_code.co_filename).parts
    return of_orbax or str(unraisable.exc_value) == 'Event loop is closed'


_quieten()

# ---- checksums ----


def checksum(x: jax.Array) -> jax.Array:
    """Two uint32 words over the bits of an array and their places: any flipped bit changes them, the mesh does not.

    Each is Σ bits·odd(place) mod 2³²; an odd factor keeps every bit, and a sum does not care who adds first.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = x if x.dtype in (jnp.uint32, jnp.bool) else jax.lax.bitcast_convert_type(x, width)
    bits = bits.astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        step = jnp.arange(x.shape[axis], dtype=jnp.uint32) * jnp.uint32(stride % 2**32)
        place = place + step.reshape((-1,) + (1,) * (x.ndim - 1 - axis))
        stride *= x.shape[axis]
    return _words(bits, place)


def _words(bits: jax.Array, place: jax.Array) -> jax.Array:
    """The two sums, of bits and places that broadcast to them, in one reduction: of two, XLA on CPU first writes out
    what they add (twice the array's memory, ten times the time)."""
    terms = [bits * (_mix(place + jnp.uint32(salt)) | jnp.uint32(1)) for salt in (1, 0x9E3779B9)]
    zero = jnp.zeros((), jnp.uint32)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    return jnp.stack(jax.lax.reduce(terms, [zero, zero], add, tuple(range(bits.ndim))))


def checksum_of(piece: np.ndarray, start: int) -> np.ndarray:
    """Returns what a piece of an array adds to its `checksum`, uint32 [2]: those of all its pieces, added, are it.

    Args:
      piece: adjoining elements, in the order of memory (C). start: how many stand before them.
    """
    bits = np.ascontiguousarray(piece).reshape(-1).view(f'u{piece.dtype.itemsize}')
    total, step = np.zeros(2, np.uint32), PIECE
    while step >= 2 * max(bits.size, 2048):  # few lengths, so few programs: zeros add nothing
        step //= 2
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
        for at in range(0, bits.size, step):
            block = bits[at : at + step]
            block = np.pad(block, (0, step - block.size)) if block.size < step else block
            total = total + np.asarray(_piece_words(block, np.uint32((start + at) % 2**32)))
    return total


@jax.jit
def _piece_words(bits: jax.Array, start: jax.Array) -> jax.Array:
    return _words(bits.astype(jnp.uint32), start + jnp.arange(bits.size, dtype=jnp.uint32))


def _mix(x: jax.Array) -> jax.Array:
    """A hash of uint32 (the finaliser of MurmurHash3), so that neighbours get unrelated factors."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_checksums = jax.jit(lambda tree: jax.tree.map(checksum, tree))


def checksums(tree: Any) -> dict[str, list[int]]:
    """{leaf's path: [word, word]}."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))[0]
    return {jax.tree_util.keystr(path): [int(w) for w in words] for path, words in flat}


def digest(params: Any) -> str:
    """Fingerprint of weights, the same on whatever mesh they lie."""
    return cache.fingerprint(checksums(params))


def saved_digest(meta: Mapping[str, Any], item: str, role: str) -> str:
    """`digest` of the weights of a role as a checkpoint with this meta has them: in the dtypes that they have there."""
    prefix = leaf_key((item,) if meta['layout'] == 1 else (item, role))
    own = {key.removeprefix(prefix): words for key, words in meta['checksums'].items() if key.startswith(prefix)}
    return cache.fingerprint(own)


def leaf_key(names: Sequence[str]) -> str:
    """The name of a leaf of nested dicts in a checkpoint's meta, as `jax.tree_util.keystr` has it."""
    return ''.join(f'[{name!r}]' for name in names)


def leaf_names(key: str) -> tuple[str, ...]:
    """The names on the way to a leaf, out of its name in a checkpoint's meta. A field of a weight that is no array
    (`.scale`) is one of them."""
    return tuple(a or b for a, b in re.findall(r"\['([^']*)'\]|\.(\w+)", key))


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """The same with a seal over it: its own bytes can rot, too."""
    text = json.dumps(meta, sort_keys=True)
    return {**meta, 'seal': hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


# ---- reading ----


def listed(directory: epath.PathLike) -> list[int]:
    """Steps that have a directory, newest first; whether they hold is another question. In a bucket, where a directory
    cannot appear at once, one that was not finished is none."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    steps = [p for p in directory.iterdir() if p.name.isdecimal() and p.name == str(int(p.name))]
    if files.is_bucket(directory):
        steps = [p for p in steps if (p / COMMITTED).exists()]
    return sorted((int(p.name) for p in steps), reverse=True)


def read_meta(path: epath.Path) -> dict[str, Any]:
    """A checkpoint's JSON part. Raises ValueError if it is missing, damaged or of another step, UsageError if its
    layout is newer."""
    file = path / 'meta' / 'metadata'
    if not file.exists():
        raise ValueError('it is incomplete (no meta/metadata)')
    meta = json.loads(file.read_text())
    if not isinstance(meta, dict) or meta != sealed({k: v for k, v in meta.items() if k != 'seal'}):
        raise ValueError('the seal of meta/metadata is wrong')
    if type(meta.get('layout')) is not int:
        raise ValueError('its layout is no number')
    if meta['layout'] > LAYOUT:
        raise UsageError(f'{path} has layout {meta["layout"]}, this version reads up to {LAYOUT}: use a newer lm')
    if str(meta['step']) != path.name:
        raise ValueError(f'it is of step {meta["step"]}')
    return meta


def check_layout(directory: epath.PathLike) -> None:
    """Raises UsageError if the newest checkpoint is of a newer layout; a damaged one is found out when it is read."""
    for step in listed(directory)[:1]:
        with contextlib.suppress(ValueError):
            read_meta(epath.Path(directory) / str(step))


def newest_sealed(directory: epath.PathLike) -> int | None:
    """The newest step whose meta holds; whether its arrays do is another question. Raises UsageError as `read_meta`."""
    for step in listed(directory):
        with contextlib.suppress(ValueError):
            return read_meta(epath.Path(directory) / str(step))['step']
    return None


def locate(run: str) -> int:
    """The step of 'DIR' (the newest) or 'DIR@STEP', unread; 0 of another form's model. Raises UsageError if it is not
    there, or newer than us."""
    if foreign.find(run) is not None:
        return 0
    folder, step = split_run(run)
    directory = epath.Path(folder) / 'checkpoints'
    steps = listed(directory)
    if not steps:
        raise UsageError(f'{folder} has no checkpoint: train or convert it first, or name another run')
    if step is not None and (not step.isdecimal() or int(step) not in steps):
        raise UsageError(f'{folder} has no checkpoint {step} (it has: {", ".join(map(str, reversed(steps)))})')
    check_layout(directory)
    return steps[0] if step is None else int(step)


def read(path: epath.Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """(the tree, meta) of one checkpoint, every leaf verified.

    Args:
      abstract: tree of ShapeDtypeStruct with shardings; a part of the saved tree is enough ({'trainable': …}). A leaf
        that is stored in another dtype (a converted model's, by meta['dtypes']) is verified as it is stored, then cast.

    Raises:
      ValueError: what is damaged, by name. UsageError: a newer layout.
    """
    tree: Any = None
    meta, damage, roles = {}, None, {}
    try:
        meta = read_meta(path)
        stored, roles = _without_roles(abstract) if meta['layout'] == 1 else (abstract, {})
        tree = _restore(path, _as_stored(stored, meta))
    except ValueError as error:
        damage = error
    if (told := processes.agreed(damage)) is not None:  # what one of several processes cannot read, none of them takes
        raise ValueError(told) from damage
    saved = meta['checksums']
    wrong = [leaf for leaf, words in checksums(tree).items() if saved.get(leaf) != words]
    if wrong:
        raise ValueError(f'checksum of {wrong[0]} is wrong' + (f', and of {len(wrong) - 1} more' if wrong[1:] else ''))
    tree = _with_roles(tree, roles)
    return jax.tree.map(lambda x, asked: x if x.dtype == asked.dtype else x.astype(asked.dtype), tree, abstract), meta


def _without_roles(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the tree as layout 1 has it, where what is trained has one role and no name of it; the role of each part)."""
    roles = {item: next(iter(tree[item])) for item in ('trainable', 'ema') if item in tree}
    out = {**tree, **{item: tree[item][role] for item, role in roles.items()}}
    if 'opt' in tree:
        roles['opt'] = next(iter(tree['opt']['moments']))
        out['opt'] = {**tree['opt'], 'moments': tree['opt']['moments'][roles['opt']]}
    return out, roles


def _with_roles(tree: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """The reverse."""
    out = {item: {roles[item]: part} if item in roles and item != 'opt' else part for item, part in tree.items()}
    if 'opt' in roles:
        out['opt'] = {**tree['opt'], 'moments': {roles['opt']: tree['opt']['moments']}}
    return out


def _as_stored(abstract: Any, meta: Mapping[str, Any]) -> Any:
    """The same leaves with the dtypes that they have on disk."""
    stored = meta.get('dtypes', {})

    def leaf(path: Any, asked: Any) -> Any:
        dtype = stored.get(jax.tree_util.keystr(path), asked.dtype)
        return jax.ShapeDtypeStruct(asked.shape, dtype, sharding=asked.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract) if stored else abstract


def _restore(path: epath.Path, abstract: Any) -> Any:
    """Reads what `read` does, unverified. Each process reads its own shards, and waits for nobody. Raises
    ValueError."""
    try:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        with contextlib.closing(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_at_once(abstract))) as handler:
            tree = handler.restore(files.absolute(path) / 'state', args=args)
    except Exception as error:  # orbax and tensorstore raise many kinds for a truncated file
        raise ValueError(f'it cannot be read ({_first_line(error)})') from error
    missing = [p for p, x in jax.tree_util.tree_leaves_with_path(tree) if not isinstance(x, jax.Array)]
    if missing:  # a part that orbax does not find it leaves as it was asked for
        raise ValueError(f'{jax.tree_util.keystr(missing[0])} is not in it')
    return tree


def _at_once(abstract: Any) -> Any:
    """Gigabytes that Orbax holds on the host at once; None: as it likes. A CPU's memory is the host's: a second copy of
    the whole tree there would be the most that a command takes. Orbax refuses a leaf that is larger than this."""
    leaves = jax.tree.leaves(abstract)
    if not leaves or any(device.platform != 'cpu' for device in leaves[0].sharding.device_set):
        return None
    return 2e-9 * max(x.size * x.dtype.itemsize for x in leaves) + 0.01


def read_newest(
    directory: epath.PathLike, abstract: Any, *, warn: Callable[[str], None], set_aside: bool = False
) -> tuple[int, Any, dict[str, Any]] | None:
    """(step, tree, meta) of the newest checkpoint that holds, or None if there is no checkpoint at all.

    Each damaged one is named through `warn`; with `set_aside`, those newer than the one that holds are renamed to
    STEP.damaged so that the run can save these steps again. Raises RunError if there are checkpoints and none holds.
    """
    directory = epath.Path(directory)
    damaged: list[epath.Path] = []
    for step in listed(directory):
        path = directory / str(step)
        try:
            tree, meta = read(path, abstract)
        except ValueError as error:
            warn(f'checkpoint {path} is damaged: {error}; falling back to the one before')
            damaged.append(path)
            continue
        if set_aside:
            _set_aside(damaged)
        return step, tree, meta
    if damaged:
        raise RunError(
            f'none of the {len(damaged)} checkpoints in {directory} can be read: start again in another workdir'
        )
    return None


def find(run: str, abstract: Any, *, warn: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]]:
    """Reads 'DIR' (newest that holds) or 'DIR@STEP' (that one). Raises UsageError if it is not there."""
    step = locate(run)
    folder, asked = split_run(run)
    directory = epath.Path(folder) / 'checkpoints'
    if asked is None:
        found = read_newest(directory, abstract, warn=warn)
        if found is None:
            raise RunError(f'{folder} has lost its checkpoints: name another run')
        return found
    try:
        return step, *read(directory / str(step), abstract)
    except ValueError as error:
        raise RunError(f'checkpoint {run} is damaged: {error}') from error


def holds(run: str, item: str) -> bool:
    """Tells whether the checkpoint of 'DIR' or 'DIR@STEP' has an item in its tree; True if its meta cannot be read."""
    with contextlib.suppress(ValueError):
        meta = read_meta(epath.Path(split_run(run)[0]) / 'checkpoints' / str(locate(run)))
        return any(key.startswith(leaf_key((item,))) for key in meta['checksums'])
    return True


def _set_aside(paths: Sequence[epath.Path]) -> None:
    for path in paths if processes.first() else ():
        target, n = path.parent / f'{path.name}.damaged', 1
        while target.exists():
            target, n = path.parent / f'{path.name}.damaged.{n}', n + 1
        path.rename(target)
    processes.all_gather('set aside')  # until it is done


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _why(error: BaseException) -> str:
    """The reason in a line: that of the error itself or of what it was raised from, if that is the system's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return files.reason(cause)
        if FULL in str(cause):  # TensorStore's errors are texts
            return files.reason(OSError(errno.ENOSPC, FULL))
        cause = cause.__cause__ or cause.__context__
    return _first_line(error)


# ---- writing ----


class Writer:
    """Saves while training goes on. The `keep` newest stay; an error in the background is raised at the next call.

    A context manager: what was begun is finished before it is left.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int, whole: Callable[[int | None], None] = lambda step: None
    ) -> None:
        """
        Args:
          whole: is told the newest step that is on disk, each time that it changes.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        self._directory, self._whole = files.absolute(directory), whole
        self._begun: int | None = None
        # Orbax would compress: trained weights by a sixteenth, for seven times the CPU's time beside the steps.
        handlers = {'state': ocp.PyTreeCheckpointHandler(use_compression=False), 'meta': ocp.JsonCheckpointHandler()}
        with self._guarded():
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with contextlib.nullcontext() if error is None else contextlib.suppress(RunError), self._guarded():
            self._manager.close()
        if error is not None and self._begun is not None:  # what was under way may have come to its end
            self._whole(newest_sealed(self._directory))

    def save(self, step: int, tree: Any, **meta: Any) -> None:
        """Starts saving, with `meta` beside it; returns once the tree may be changed.

        Raises RunError if this or the last save failed.
        """
        sums = checksums(tree)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            meta=ocp.args.JsonSave(sealed({**meta, 'layout': LAYOUT, 'step': step, 'checksums': sums})),
        )
        with self._guarded():
            self._manager.save(step, args=args, force=True)
        self._begun = step

    def check(self) -> None:
        """Raises RunError if the save that is under way has failed; it does not wait for it."""
        if self._begun is None:
            return
        with self._guarded():
            self._manager.check_for_errors()
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is on disk."""
        with self._guarded():
            self._manager.wait_until_finished()
        if self._begun is not None:
            self._whole(self._begun)
            self._begun = None

    def set_aside(self, after: int) -> None:
        """Renames the checkpoints of steps past `after`: they can be read and are not worth going on from."""
        self.wait()
        _set_aside([self._directory / str(step) for step in listed(self._directory) if step > after])
        self._whole(newest_sealed(self._directory))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            where = f'a checkpoint in {self._directory} could not be written'
            raise RunError(f'{where} ({_why(error)}): the last one is intact') from error


def abstract(tree: Any) -> Any:
    """The tree as shapes, dtypes and shardings on the current mesh, to restore into.

    Args:
      tree: arrays, or what `jax.eval_shape` gives under the current mesh (its types know their partition specs).
    """
    mesh = jax.sharding.get_mesh()

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding is not None else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(leaf, tree)
