"""The mesh, and the one table that says which axes each letter takes.

Every dimension in this codebase has a letter, and the letter is the only one it ever has: it names variables (`x_BTD`),
einsum subscripts, parameter leaves (`wq_DNH`) and, through the table below, the sharding.

    B batch            T query time        S key time         D model            N query heads     K key/value heads
    H head dim         F feed-forward      V vocabulary       L layers (implied) E experts         J queries per kv head
    C chunk            G quantization group                   R adapter rank     P pairs in a packed row
    W likely words of a teacher

Five axes, always all five, all Explicit (JAX checks each operation's layout when it is traced); size 1 is free:

    data    copies of the model, batch split          fsdp    batch split, parameters split, gathered just in time
    seq     sequence split (context parallelism)      tensor  heads, feed-forward and vocabulary split
    expert  experts split

There is no pipeline axis on purpose: FSDP over a pod's fast links with tensor parallelism inside reaches the sizes this
codebase is for, and a pipeline schedule would put a second execution order next to the only one a reader has to learn.
"""

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.errors import UsageError

AXES = ('data', 'fsdp', 'seq', 'tensor', 'expert')
MODEL_AXES = ('tensor', 'expert')
BATCH_AXES = ('data', 'fsdp')

# Letters claim axes in this order, each axis once per equation, and only when it divides the dimension.
CLAIMS: dict[str, tuple[str, ...]] = {
    'B': ('data', 'fsdp'),
    'E': ('expert',),
    'N': ('tensor',),
    'K': ('tensor',),
    'F': ('tensor',),
    'V': ('tensor',),
    'T': ('seq', 'tensor'),
    'D': ('fsdp', 'seq'),
}


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given axis sizes; one axis may be -1 and takes the devices that are left.

    Raises:
      UsageError: an unknown axis, more than one -1, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: int(shape.get(axis, 1)) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if set(shape) - set(AXES) or len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UsageError(f'mesh {dict(shape)}: axes are {", ".join(AXES)}, sizes at least 1, and at most one is -1')
    if free:
        if len(devices) % known:
            given = ', '.join(f'{axis}={size}' for axis, size in shape.items() if size != 1)
            raise UsageError(f'mesh {given} does not divide {len(devices)} devices: nothing is left for {free[0]}=-1')
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise UsageError(f'mesh {sizes} has {known} devices in it, this job has {len(devices)}: make them divide')
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


@contextlib.contextmanager
def use_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Iterator[Mesh]:
    """Everything inside sees this mesh: training, chat, evaluation, tests. None takes all devices for fsdp."""
    mesh = make_mesh({'fsdp': -1} if shape is None else shape, devices)
    with jax.set_mesh(mesh):
        yield mesh


def platform() -> str:
    """The platform of the current mesh's devices: 'cpu', 'gpu' or 'tpu'; outside a mesh, what JAX computes on by
    default.

    Whatever makes a program another one asks this, so that a mesh of devices that are not here gets its own program.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device  # the abstract mesh is there while a program is traced
    return jax.default_backend() if device is None else device.platform


def first_device() -> Any:
    """A device of the current mesh, of this process if one is; outside a mesh, JAX's default. Not while tracing."""
    mesh = jax.sharding.get_mesh()
    devices = jax.local_devices() if mesh.empty else mesh.devices.flat
    return next((d for d in devices if d.process_index == jax.process_index()), devices[0])


def axis_sizes() -> dict[str, int]:
    """The current mesh's axes that split anything, i.e. of more than one device; {} outside a mesh."""
    return {axis: size for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1}


def assign(sizes: Mapping[str, int], axes: Sequence[str] = AXES) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each letter in an equation whose letters have these sizes, drawn from `axes`."""
    mesh, taken = axis_sizes(), {}
    free = [axis for axis in axes if axis in mesh]
    for letter, claims in CLAIMS.items():
        if letter not in sizes:
            continue
        taken[letter], parts = (), 1
        for axis in claims:
            if axis in free and sizes[letter] % (parts * mesh[axis]) == 0:
                taken[letter] += (axis,)
                parts *= mesh[axis]
                free.remove(axis)
    return taken


def spec(dims: str, taken: Mapping[str, tuple[str, ...]]) -> P:
    """The partition spec of an array with these dims: spec('BTD', {'B': ('data',)}) is P('data', None, None)."""
    return P(*((axes[0] if len(axes) == 1 else axes) if (axes := taken.get(d)) else None for d in dims))


def array_spec(dims: str, shape: Sequence[int], axes: Sequence[str] = AXES) -> P:
    """The sharding of an array of these dims that stands alone, e.g. a batch ('BT') or a parameter ('DNH')."""
    return spec(dims, assign(dict(zip(dims, shape, strict=True)), axes))


def activation_spec(dims: str, shape: Sequence[int]) -> P:
    """As `array_spec` for activations, which never shard D (a product over a split D would need a sum each time)."""
    return spec(dims, assign({d: n for d, n in zip(dims, shape, strict=True) if d != 'D'}))


def dims_of(name: str) -> str:
    """The letters in a parameter's name: 'wq_DNH' -> 'DNH'; a name that ends with none is a scalar's."""
    last = name.rsplit('_', 1)[-1]
    return last if last.isupper() else ''


def param_specs(params: Any) -> Any:
    """The tree of partition specs of a parameter tree, read off its leaf names.

    Leaves under a key `layers` are stacked: their leading dimension L is in no name and on no axis. A weight that is
    not an array is asked for the dims of its fields: `weight.dims('DNH') -> {'scale': 'NH', …}`.
    """

    def spec_of(dims: str, value: Any, stacked: bool) -> Any:
        if hasattr(value, 'dims'):
            fields = value.dims(dims)
            return value.replace(**{f: spec_of(d, vars(value)[f], stacked) for f, d in fields.items()})
        shape = value.shape[1:] if stacked else value.shape
        own = array_spec(dims, shape)
        return P(None, *own) if stacked else own

    def leaf(path: Any, value: Any) -> Any:
        names = [key.key for key in path]
        return spec_of(dims_of(names[-1]), value, 'layers' in names)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda x: hasattr(x, 'dims'))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings on a mesh for a tree of partition specs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def on_shards(fn: Callable, args: tuple, specs: tuple, out_specs: Any) -> Any:
    """Calls `fn` on each device's parts of the arguments, laid out as their specs say; one may be None."""
    put = lambda x, spec: None if x is None else jax.reshard(x, spec)
    args = jax.tree.map(put, args, specs, is_leaf=lambda x: x is None)
    return jax.shard_map(fn, in_specs=specs, out_specs=out_specs, check_vma=False)(*args)


class LocalRows(NamedTuple):
    """The rows that a process holds of a batch of `batch_size`."""

    rows: Sequence[int]
    batch_size: int


def local_rows(batch_size: int, seq_len: int) -> LocalRows | None:
    """The rows of a batch [B, T] that this process's devices have a part of; None where they have all of it.

    Processes whose devices split a row (along `seq`) or share it (along `tensor`) have the same rows.
    """
    where = NamedSharding(jax.sharding.get_mesh(), activation_spec('BT', (batch_size, seq_len)))
    if where.is_fully_addressable:
        return None
    parts = filter(None, where.addressable_devices_indices_map((batch_size, seq_len)).values())
    return LocalRows(sorted({row for rows, _ in parts for row in range(batch_size)[rows]}), batch_size)


def shard_batch(batch: Mapping[str, Any], local: LocalRows | None = None) -> dict[str, jax.Array]:
    """Puts host arrays, named by their dims (`tokens_BT`), on the current mesh.

    Args:
      local: which rows of the batch the arrays hold, at least `local_rows`; None: all.
    """
    mesh = jax.sharding.get_mesh()

    def put(dims: str, x: Any) -> jax.Array:
        held = LocalRows(range(len(x)), len(x)) if local is None else local
        shape = (held.batch_size, *x.shape[1:])
        where = NamedSharding(mesh, activation_spec(dims, shape))
        if where.is_fully_addressable:
            return jax.device_put(x, where)
        parts = where.addressable_devices_indices_map(shape).items()
        blocks = [jax.device_put(_block(x, held.rows, index), device) for device, index in parts if index is not None]
        return jax.make_array_from_single_device_arrays(shape, where, blocks)

    return {name: put(dims_of(name), x) for name, x in batch.items()}


def whole(x: Any) -> jax.Array:
    """A copy of a host array, which every process has, whole on every device of the current mesh.

    A copy, since an array of a CPU device may share the memory of what it was made of, which others go on writing to.
    Not by `jax.device_put` where there are several processes: it compares what they have, and NaN is not NaN.
    """
    x, mesh = np.array(x), jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(x)
    where = NamedSharding(mesh, P())
    return jax.device_put(x, where) if where.is_fully_addressable else jax.make_array_from_process_local_data(where, x)


def replicated(tree: Any) -> Any:
    """The arrays, whole on every device of the current mesh; under jit, too."""
    return jax.reshard(tree, P()) if axis_sizes() else tree


def _block(x: Any, rows: Sequence[int], index: tuple[slice, ...]) -> Any:
    """The part of a batch at `index`; `x` holds these rows of it."""
    first, last, _ = index[0].indices(rows[-1] + 1)
    return x[(slice(bisect.bisect_left(rows, first), bisect.bisect_left(rows, last)), *index[1:])]
