"""Layers of a stack as a step reads them on one device: weights as shapes, in the dtype and the part that are there."""

import contextlib
import gc
from collections.abc import Iterator, Mapping

import jax
from flax import nnx
from jax.sharding import Mesh

from deepseek_jax.layers.base import Execution, dtype_read, logical_axes, roles, split
from deepseek_jax.parallel.sharding import Placement, placements


def layers_read(
    blocks: nnx.Module, n: int, run: Execution, rules: Mapping[str, str], mesh: Mesh
) -> tuple[nnx.GraphDef, dict, dict]:
    """Returns (definition, weights, router biases) of n layers of a stack."""
    definition, params, router_bias = split(blocks)
    axes, _ = logical_axes(blocks)
    places = placements(axes, params, rules, mesh)

    def read(x: jax.ShapeDtypeStruct, place: Placement, role: str) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if place.is_sharded else dtype_read(role, run.compute, run.compute)
        return local_part(first_layers(x, n), tuple(place.spec), mesh).update(dtype=dtype)

    params = jax.tree.map(read, params, places, roles(blocks))
    return definition, params, jax.tree.map(lambda x: first_layers(x, n), router_bias)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Disables the garbage collector, which takes a third of the time of a trace and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def first_layers(array: jax.ShapeDtypeStruct, n: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of n layers of a stacked array."""
    return jax.ShapeDtypeStruct((n, *array.shape[1:]), array.dtype)


def local_part(array: jax.ShapeDtypeStruct, spec: tuple, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of one device's part of an array laid out as `spec`."""
    axes = (*spec, *[None] * (len(array.shape) - len(spec)))
    shape = tuple(n // (mesh.shape[axis] if axis else 1) for n, axis in zip(array.shape, axes, strict=True))
    return jax.ShapeDtypeStruct(shape, array.dtype)
