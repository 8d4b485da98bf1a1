"""A train state as names and leaves: what a checkpoint stores, compares and places.

A state is a nested dict of jax arrays; a leaf's name is its path, `params/blocks/q_up`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.train.checkpoint import grid, shards
from deepseek_jax.train.checkpoint.grid import Piece, Region
from deepseek_jax.tree import paths


def flatten(tree: dict, leaf_types: type = jax.Array) -> dict[str, Any]:
    """Returns {"params/blocks/q_up": leaf}; UserError for anything but nested dicts with plain names."""
    leaves = {}
    for path, leaf in paths(tree).items():
        for depth, key in enumerate(path):
            if not isinstance(key, str) or not key or set(key) & set("/."):
                where = "/".join(path[:depth])
                raise UserError(f"checkpoint entry {key!r} under '{where}': expected a name without '/' and '.'.")
        name = "/".join(path)
        if not isinstance(leaf, leaf_types) or not hasattr(leaf, "dtype"):
            raise UserError(f"checkpoint leaf '{name}' is a {type(leaf).__name__}: expected a jax array.")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(f"checkpoint leaf '{name}' is a random key: save jax.random.key_data of it.")
        leaves[name] = leaf
    return leaves


def refill(tree: Any, leaves: Iterator) -> Any:
    """Returns `tree` with its leaves replaced in the order in which `flatten` met them."""
    return {key: refill(tree[key], leaves) for key in tree} if isinstance(tree, dict) else next(leaves)


def compare(where: str, saved: dict[str, dict], expected: dict) -> None:
    """Raises UserError naming the first leaf in which the checkpoint and the expected state differ."""

    def text(shape: Sequence[int], dtype: DTypeLike) -> str:
        return f"{jnp.dtype(dtype)}[{','.join(map(str, shape))}]"

    have = {name: text(array["shape"], array["dtype"]) for name, array in saved.items()}
    want = {name: text(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
    differing = [name for name in sorted({*have, *want}) if have.get(name) != want.get(name)]
    if differing:
        name, more = differing[0], f" ({len(differing) - 1} more leaves differ)" if len(differing) > 1 else ""
        raise UserError(
            f"{where}: '{name}' is {have.get(name, 'absent')} there, expected {want.get(name, 'no such leaf')}{more}."
            " Use the config that wrote the checkpoint."
        )


def with_shardings(expected: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Fills in the default device where no leaf says where it lives; UserError when only some do."""
    bare = [name for name, leaf in expected.items() if getattr(leaf, "sharding", None) is None]
    if bare and len(bare) < len(expected):
        raise UserError(f"leaf '{bare[0]}' has no sharding while others have: give each leaf its own.")
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=default if bare else leaf.sharding)
        for name, leaf in expected.items()
    }


def region_of(index: tuple[slice, ...], shape: Sequence[int]) -> Region:
    """Returns the block that an index of jax's means: (start, stop) per dimension."""
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def held(arrays: Mapping[str, jax.Array]) -> dict[str, dict[Region, set[int]]]:
    """Returns name -> region -> the processes that hold it, of arrays on any mesh; the same on all processes."""
    found: dict[str, dict[Region, set[int]]] = {}
    for name, array in arrays.items():
        regions = found.setdefault(name, {})
        indices: dict[Any, tuple] = dict(array.sharding.devices_indices_map(array.shape))
        for device, index in indices.items():
            regions.setdefault(region_of(index, array.shape), set()).add(device.process_index)
    return found


def on_host(arrays: Mapping[str, jax.Array], pieces: Iterable[Piece]) -> list[tuple[Piece, np.ndarray]]:
    """Returns the values of pieces that this process holds, in the host's memory, whatever becomes of the arrays."""
    pieces = list(pieces)
    here: dict[str, dict[Region, jax.Array]] = {}
    for name in {piece.name for piece in pieces}:
        array = arrays[name]
        here[name] = {region_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    whole = {piece: _containing(piece.region, here[piece.name]) for piece in pieces}
    for piece, region in whole.items():
        here[piece.name][region].copy_to_host_async()
    found = []
    for piece, region in whole.items():
        data = here[piece.name][region]
        part = np.asarray(data)[grid.within(piece.region, region)]
        # what a CPU computes with, or an accelerator's pinned memory, may be looked at in place and is overwritten
        is_own = next(iter(data.devices())).platform != "cpu" and data.sharding.memory_kind in (None, "device")
        found.append((piece, part if is_own else np.array(part)))
    return found


def _containing(part: Region, regions: Iterable[Region]) -> Region:
    return next(region for region in regions if grid.overlap(region, part) == part or not part)


def regions_here(leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, Region]:
    """Returns the block of an array that each device of this process is to hold."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {device: region_of(index, leaf.shape) for device, index in indices.items()}


def placed(leaf: jax.ShapeDtypeStruct, values: Mapping[Region, np.ndarray]) -> jax.Array:
    """Returns the array of a leaf's sharding from the blocks that the devices of this process hold."""
    kind = leaf.sharding.memory_kind
    arrays = []
    for device, region in regions_here(leaf).items():
        there = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        arrays.append(jax.device_put(values[region], there, may_alias=False))  # so that it may be donated
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays, dtype=leaf.dtype)


def read_shards(store: shards.Source, manifest: dict, leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the named arrays of a step in format 2, as far as this process's devices hold them; raises ShardDamaged."""
    found: dict[str, jax.Array] = {}
    values: dict[str, dict[Region, np.ndarray]] = {name: {} for name in leaves}
    regions = {name: {*regions_here(leaf).values()} for name, leaf in leaves.items()}

    def done(name: str, region: Region, value: np.ndarray) -> None:
        values[name][region] = value
        if len(values[name]) == len(regions[name]):
            found[name] = placed(leaves[name], values.pop(name))

    shards.read(store, manifest["objects"], manifest["arrays"], regions, done)
    return found | {name: placed(leaves[name], {}) for name in leaves if not regions[name]}


def read_arrays(path: Path, expected: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads the named arrays of an Orbax directory, each placed exactly as asked and free to be donated."""
    abstract = unflatten_dict(expected, sep="/")
    args = ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        arrays = flatten(reader.restore(path, args=args))
    # Some restored buffers belong to the reader and could not be donated: XLA gets its own, in place where it can.
    by_devices: dict[frozenset, list[str]] = {}
    for name in expected:
        by_devices.setdefault(frozenset(expected[name].sharding.device_set), []).append(name)
    for names in by_devices.values():
        own = jax.jit(_copies, out_shardings=[expected[name].sharding for name in names], donate_argnums=0)
        arrays.update(zip(names, own([arrays[name] for name in names]), strict=True))
    return arrays


def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]
