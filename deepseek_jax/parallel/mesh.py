"""The device mesh of a run, and the one way in which per-device code is run on it.

Axes: `pipe` (stages of a pipeline), `data` (replicas of the experts), `context` (each sequence is split over it,
`parallel.context`) and `expert` (the routed experts are split over it). The sequences of a batch are split over `data`
and `expert` together: as in DeepSeek's layout, expert ranks hold different tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.context import CONTEXT, zigzag
from deepseek_jax.parallel.meeting import meet

PIPE, DATA, EXPERT = "pipe", "data", "expert"
ALL = (PIPE, DATA, CONTEXT, EXPERT)  # all devices: what is summed once for the whole run
REPLICAS = (DATA, CONTEXT, EXPERT)  # devices over which the tokens of a batch are split; they have the same layers
SEQUENCES = (DATA, EXPERT)  # those over which its sequences are split
BATCH = P(SEQUENCES, CONTEXT)  # a leading axis of sequences, then one of their tokens
REPLICATED = P()
AnyMesh = Mesh | AbstractMesh  # where only sizes matter


def make_mesh(data: int = -1, expert: int = 1, devices: list | None = None, pipe: int = 1, context: int = 1) -> Mesh:
    """A mesh of `pipe` x `data` x `context` x `expert` devices, axes of type Auto.

    Args:
        data: devices along `data`; -1 takes all that are left.
        expert: devices along `expert`.
        devices: those to use; all of this run's by default.
        pipe: devices along `pipe`.
        context: devices along `context`.

    Raises UserError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    given = _given(pipe, data, context, expert)
    shape = tuple(sizes(pipe, data, expert, len(devices) if data == -1 else 0, context).values())
    needed = math.prod(shape)
    if needed > len(devices):
        raise UserError(f"{given} needs {needed} devices, here are {len(devices)}. Make the mesh smaller.")
    if jax.process_count() > 1 and needed != len(devices):
        raise UserError(f"{given} must use all {len(devices)} devices of a run of several processes.")
    _check_processes(given, needed // jax.process_count(), shape)
    return Mesh(np.asarray(devices[:needed]).reshape(shape), ALL, axis_types=(AxisType.Auto,) * len(ALL))


def _given(pipe: int, data: int, context: int, expert: int) -> str:
    divided = f" x context={context}" if context != 1 else ""
    return f"config.mesh: pipe={pipe} x data={data}{divided} x expert={expert}"


def _check_processes(given: str, n_here: int, shape: tuple[int, ...]) -> None:
    """Raises UserError unless a process holds whole ranks, or a rank whole processes, of pipeline and context."""
    _, data, context, expert = shape
    ranks = {"of the pipeline": ("data x context x expert", data * context * expert)}
    ranks |= {"along context": ("expert", expert), "along data": ("context x expert", context * expert)}
    for which, (names, n) in ranks.items() if context > 1 else [*ranks.items()][:1]:
        if n_here % n and n % n_here:
            raise UserError(
                f"{given} with {n_here} devices per process: a process must hold whole ranks {which}, or a rank whole "
                f"processes. Choose sizes so that one of {names} and the devices of a process divides the other."
            )


def sizes(pipe: int, data: int, expert: int, n_devices: int, context: int = 1) -> dict[str, int]:
    """Devices along each axis of a mesh that need not be here.

    Args:
        pipe, data, expert, context: as in `config.mesh`; data=-1 takes what the others leave.
        n_devices: of the mesh; 0: as many as the sizes say, where data=-1 counts as 1.

    Raises UserError: a size is invalid, they do not make up `n_devices`, or a pipeline divides sequences.
    """
    given = _given(pipe, data, context, expert)
    if min(pipe, expert, context) < 1 or (data < 1 and data != -1) or n_devices < 0:
        raise UserError(f"{given} on {n_devices} devices: expected sizes >= 1 (data may be -1: all remaining devices).")
    if pipe > 1 and context > 1:
        raise UserError(f"{given}: sequences are not divided within a pipeline. Set pipe or context to 1.")
    rest = pipe * expert * context * max(data, 1)
    if n_devices % rest or (data != -1 and n_devices not in (0, rest)):
        raise UserError(
            f"{given} does not divide the {n_devices} devices. Choose other sizes, or a multiple of {rest} devices."
        )
    return {PIPE: pipe, DATA: data if data != -1 else max(n_devices // rest, 1), CONTEXT: context, EXPERT: expert}


def size(mesh: AnyMesh, axes: tuple[str, ...]) -> int:
    """Number of devices along `axes` together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def per_device(function: Callable, mesh: Mesh, in_specs: object, out_specs: object) -> Callable:
    """`function` run once on each device of `mesh`, on that device's part of its arguments (a manual `shard_map`).

    Varying-axes checks are off: gradients are summed by the caller, once, not by hidden psums.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def total(x: Any, axes: tuple[str, ...] = ALL) -> Any:
    """The sum over the devices along `axes` of every array in `x`; inside `per_device` only."""
    return jax.lax.psum(x, axes)


def maximum(x: jax.Array, axes: tuple[str, ...] = ALL) -> jax.Array:
    """The largest over the devices along `axes`, element by element; inside `per_device` only."""
    return jax.lax.pmax(x, axes)


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The host or device arrays of `tree` laid out on `mesh` as `specs` (a tree like it) says."""
    return jax.device_put(tree, shardings(mesh, specs))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """How arrays that `specs` (a tree of `PartitionSpec`s) describes lie on `mesh`, for `jax.jit`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def global_batch(local: Any, mesh: Mesh) -> Any:
    """One global array per host array of `local`, the rows of all processes in order, split over all devices.

    Rows are whole sequences; where these are split as well, their tokens are put in the order of the devices.
    """
    sharding, (_, n_shares) = NamedSharding(mesh, BATCH), batch_share(mesh)
    if mesh.shape[CONTEXT] > 1:
        local = jax.tree.map(lambda rows: rows[:, zigzag(rows.shape[1], mesh.shape[CONTEXT])], local)
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)  # all arrays at once, which takes less of the host's time

    def placed(rows: np.ndarray) -> jax.Array:
        shape = (rows.shape[0] * n_shares, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(placed, local)


def own_share(rows: Any, mesh: Mesh) -> Any:
    """This process's share of host arrays that all processes have whole, for `global_batch`."""
    number, n_shares = batch_share(mesh)
    return jax.tree.map(lambda array: np.split(array, n_shares)[number], rows)


def fetched(rows: Any) -> Any:
    """The whole of arrays that are split over all devices, as host arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(rows)
    meet("whole")
    return multihost_utils.process_allgather(rows, tiled=True)


def joined(own: np.ndarray) -> np.ndarray:
    """The rows that each process gives, in the order of the processes, on all of them; float64 keeps its bits."""
    if jax.process_count() == 1:
        return own
    meet("joined")
    bits = multihost_utils.process_allgather(np.ascontiguousarray(own, np.float64).view(np.uint32), tiled=True)
    return np.asarray(bits).view(np.float64)


def batch_shape(shape: tuple[int, ...], dtype: DTypeLike, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """An array of a batch as shapes, split over all devices as `global_batch` splits it."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(number of this process's share of a batch's sequences, number of shares).

    Ranks of a pipeline read the same samples, and so do devices that share sequences. Devices are in the order of the
    processes, and of the axes of `ALL`.
    """
    n_here = mesh.size // jax.process_count()
    data, context, expert = (mesh.shape[axis] for axis in REPLICAS)
    first = jax.process_index() * n_here % (data * context * expert)
    if n_here >= context * expert:  # all devices of some ranks along `data`
        n_shares = max(data * context * expert // n_here, 1)
        return jax.process_index() % n_shares, n_shares
    here = min(n_here, expert)  # of one rank along `context`; if that is all of it, perhaps of several such ranks
    return (first // (context * expert) * expert + first % expert) // here, data * expert // here


def largest(*values: float) -> tuple[float, ...]:
    """The largest that any process gives, value by value; the same on all of them."""
    if jax.process_count() == 1:
        return values
    meet("largest")
    found = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return tuple(np.max(found.reshape(-1, len(values)), axis=0).tolist())
