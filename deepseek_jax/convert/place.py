"""Weights straight from files to the devices that hold them.

Every device's part of a weight is a buffer on that device, filled in place. A tensor is read once, sent to all devices
that need part of it, and dropped. It is sent some rows at a time in memory order, and transposed and cast on the
device. So the host holds one tensor and a few blocks, whatever the size of the model, and the small weights: these are
filled in on the host, which takes less time than to compile programs for their shapes, and sent when all is read.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.convert import names
from deepseek_jax.convert.hf import Piece, Source, map_leaves
from deepseek_jax.tree import paths

BLOCK_BYTES = 2**26  # of a tensor, sent at a time
HOST_BYTES = 2**22  # of a device's part of a weight, if it is filled in on the host; NumPy transposes those in 20 ms

Region = tuple[slice, ...]  # a device's part of a weight
Part = tuple[tuple[int, ...], np.dtype]  # the shape and dtype of its buffer
Buffer = jax.Array | np.ndarray


def place(source: Source, target: dict, report: Callable[[Piece], None] | None = None) -> dict:
    """Returns the weights of a source on devices. In a run of several processes each reads what its own devices need.

    Raises UserError if files are damaged.

    Args:
        source: where the weights come from.
        target: a tree like `source.abstract` whose leaves have a `sharding`; weights are cast to the leaves' dtype.
        report: called with each piece after it is sent, for a progress bar.
    """
    targets = paths(target)
    regions = {path: _regions(leaf) for path, leaf in targets.items()}
    buffers = _buffers(targets, regions)
    under_way: deque[jax.Array] = deque()

    def is_elsewhere(path: names.Path, index: names.Index) -> bool:
        return not any(_holds(region, index) for region in regions[path].values())

    def send(piece: Piece, device: jax.Device, region: Region) -> None:
        layer = [i - s.start for i, s in zip(piece.index, region, strict=False)]
        part, buffer = piece.array[region[len(layer) :]], buffers[piece.path][device]
        if isinstance(buffer, np.ndarray):
            buffer[tuple(layer)] = part
            return
        for rows, axes, start in _blocks(part):
            sent = jax.device_put(rows, device)
            buffer = _filled_in(buffer, sent, np.asarray([*layer, *start], np.int32), axes)
            buffers[piece.path][device] = buffer
            under_way.append(sent)
            while sum(block.nbytes for block in under_way) > 2 * BLOCK_BYTES:
                under_way.popleft().block_until_ready()

    for piece in source.pieces(skip=is_elsewhere):
        for device, region in regions[piece.path].items():
            if _holds(region, piece.index):
                send(piece, device, region)
        if report:
            report(piece)
        del piece  # free it before the next is read

    def whole(path: names.Path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = [jax.device_put(buffer, device) for device, buffer in buffers.pop(path).items()]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts, dtype=leaf.dtype)

    return map_leaves(target, whole)


def _regions(leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, Region]:
    """Returns the part of a weight that each device of this process holds."""
    held = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(region, leaf.shape, strict=True))
        for device, region in held.items()
    }


def _buffers(
    targets: dict[names.Path, jax.ShapeDtypeStruct], regions: dict[names.Path, dict[jax.Device, Region]]
) -> dict[names.Path, dict[jax.Device, Buffer]]:
    """Returns zeros for every device's part of every weight, on the device those that are not small, by one program."""
    parts: dict[jax.Device, dict[names.Path, Part]] = {}
    found: dict[names.Path, dict[jax.Device, Buffer]] = {path: {} for path in targets}
    for path, leaf in targets.items():
        for device, region in regions[path].items():
            part = tuple(s.stop - s.start for s in region), np.dtype(leaf.dtype)
            if math.prod(part[0]) * part[1].itemsize <= HOST_BYTES:
                found[path][device] = np.zeros(*part)
            else:
                parts.setdefault(device, {})[path] = part
    for device, of_device in parts.items():
        with jax.default_device(device):
            for path, zeros in zip(of_device, _zeros(tuple(of_device.values())), strict=True):
                found[path][device] = zeros
    return found


@functools.partial(jax.jit, static_argnums=0)
def _zeros(parts: tuple[Part, ...]) -> list[jax.Array]:
    return [jnp.zeros(*part) for part in parts]


def _holds(region: Region, index: names.Index) -> bool:
    """Returns whether a device's region of a weight overlaps the piece at `index`."""
    return all(s.start <= i < s.stop for i, s in zip(index, region, strict=False))


def _blocks(part: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]]:
    """Yields blocks of a part that are contiguous in memory: (block, axes that restore the part's order, start)."""
    order = tuple(sorted(range(part.ndim), key=lambda axis: -part.strides[axis]))
    axes = tuple(order.index(axis) for axis in range(part.ndim))
    in_memory_order = part.transpose(order)
    row_bytes = in_memory_order[:1].nbytes
    n_rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for first in range(0, len(in_memory_order), n_rows):
        start = [0] * part.ndim
        start[order[0]] = first
        yield np.ascontiguousarray(in_memory_order[first : first + n_rows]), axes, tuple(start)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _filled_in(buffer: jax.Array, rows: jax.Array, at: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `buffer` with a block written at `at`; the axes of layer and expert, missing in the block, lead."""
    block = jnp.transpose(rows, axes).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, block[(None,) * (buffer.ndim - block.ndim)], tuple(at))
