"""The device mesh of a run, and the one way in which per-device code is run on it.

Axes: `data` (replicas of the experts) and `expert` (the routed experts are shared out over it). The batch is split
over both together: as in DeepSeek's layout, expert ranks hold different tokens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError

DATA, EXPERT = "data", "expert"
ALL = (DATA, EXPERT)  # all devices: what is summed once for the whole run
REPLICAS = (DATA, EXPERT)  # devices that share out a batch, with the same layers
BATCH = P(REPLICAS)  # a leading axis split over them
REPLICATED = P()
AnyMesh = Mesh | AbstractMesh  # where only sizes matter


def make_mesh(data: int = -1, expert: int = 1, devices: list | None = None, pipe: int = 1) -> Mesh:
    """A mesh of `data` x `expert` devices, axes of type Auto.

    Args:
        data: devices along `data`; -1 takes all that are left.
        expert: devices along `expert`.
        devices: those to use; all of this run's by default.
        pipe: pipeline stages; 1, for they are planned with only (`deepseek-jax plan`).

    Raises UserError: the product is not the number of devices, or there is more than one stage.
    """
    devices = jax.devices() if devices is None else devices
    if pipe != 1:
        raise UserError(
            f"config.mesh.pipe={pipe}: a run has no pipeline axis yet, only deepseek-jax plan knows it. Set it to 1."
        )
    given = f"config.mesh: data={data} x expert={expert}"
    data = sizes(pipe, data, expert, len(devices) if data == -1 else 0)[DATA]
    if data * expert > len(devices):
        raise UserError(f"{given} needs {data * expert} devices, here are {len(devices)}. Make the mesh smaller.")
    if jax.process_count() > 1 and data * expert != len(devices):
        raise UserError(f"{given} must use all {len(devices)} devices of a run of several processes.")
    chosen = np.asarray(devices[: data * expert]).reshape(data, expert)
    return Mesh(chosen, ALL, axis_types=(AxisType.Auto,) * 2)


def sizes(pipe: int, data: int, expert: int, n_devices: int) -> dict[str, int]:
    """Devices along each axis of a mesh that need not be here.

    Args:
        pipe, data, expert: as in `config.mesh`; data=-1 takes what the others leave.
        n_devices: of the mesh; 0: as many as the sizes say, where data=-1 counts as 1.

    Raises UserError: a size is invalid, or they do not make up `n_devices`.
    """
    given = f"config.mesh: pipe={pipe} x data={data} x expert={expert}"
    if min(pipe, expert) < 1 or (data < 1 and data != -1) or n_devices < 0:
        raise UserError(f"{given} on {n_devices} devices: expected sizes >= 1 (data may be -1: all remaining devices).")
    rest = pipe * expert * max(data, 1)
    if n_devices % rest or (data != -1 and n_devices not in (0, rest)):
        raise UserError(
            f"{given} does not divide the {n_devices} devices. Choose other sizes, or a multiple of {rest} devices."
        )
    return {"pipe": pipe, DATA: data if data != -1 else max(n_devices // rest, 1), EXPERT: expert}


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


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The host or device arrays of `tree` laid out on `mesh` as `specs` (a tree like it) says."""
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def global_batch(local: Any, mesh: Mesh) -> Any:
    """One global array per host array of `local`, the rows of all processes in order, split over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), local)


def largest(*values: float) -> tuple[float, ...]:
    """The largest that any process gives, value by value; the same on all of them."""
    if jax.process_count() == 1:
        return values
    found = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return tuple(np.max(found.reshape(-1, len(values)), axis=0).tolist())
