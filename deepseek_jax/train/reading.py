"""How a step reads its weights: from a device's parts of the float32 ones, in the dtype of products or in codes.

| weights | gathered as |
| --- | --- |
| that products multiply | `weights` of the precision's policy; under fp8 E4M3 codes (`precision.coded`) |
| embedding, head | the dtype of the activations |
| gains, biases, routers | float32 |
| stored in shards (FSDP) | nothing here: a layer gathers its own |

Codes are gathered where parts of a weight lie on several devices (ZeRO-1) and `layers.base.in_codes` says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek_jax.layers.base import Tree, in_codes, logical_axes, matrix_axes, roles
from deepseek_jax.parallel import zero
from deepseek_jax.parallel.coded import gather_codes
from deepseek_jax.parallel.mesh import AnyMesh
from deepseek_jax.parallel.sharding import Placement, is_axes
from deepseek_jax.precision.coded import CodedWeight


@dataclass(frozen=True)
class Read:
    """How one weight is read."""

    place: Placement
    dtype: DTypeLike
    matrix: tuple[int, int] = (0, 0)  # axes that are a stack's, axes that are contracted (`layers.base.matrix_axes`)
    codes: str | None = None  # the scales of its codes, if it is gathered in codes


def reads(
    model: nnx.Module, shapes: Tree, places: Tree, dtype: Callable[[str], DTypeLike], codes: str | None, mesh: AnyMesh
) -> Tree:
    """Returns the `Read` of every weight of a model.

    Args:
        model: whose weights have these `shapes` and `places` as they are stored.
        shapes, places: trees like its weights.
        dtype: in which weights of a role are read.
        codes: the scales of the codes that products read, if they read codes (`precision.matmul.Matmul`).
        mesh: of the run.
    """

    def one(axes: tuple, role: str, shape: jax.ShapeDtypeStruct, place: Placement) -> Read:
        is_coded = codes is not None and in_codes(axes, shape.shape, role, place, mesh)
        return Read(place, dtype(role), matrix_axes(axes), codes if is_coded else None)

    axes, _ = logical_axes(model)
    return jax.tree.map(one, axes, roles(model), shapes, places, is_leaf=is_axes)


@jax.named_scope("gather_weights")
def whole(params: Tree, how: Tree) -> Tree:
    """The weights as a step reads them, from this device's parts of the float32 ones; inside `per_device` only.

    Those that are gathered again where they are used are float32 until then, with the values of their dtype.
    """

    def one(part: jax.Array, it: Read) -> jax.Array | CodedWeight:
        if it.place.reads_master(it.dtype):
            return part
        if it.codes:
            bits, scale = gather_codes(part.astype(it.dtype), it.place, it.matrix, it.codes)
            return CodedWeight(jnp.zeros(bits.shape, it.dtype), bits, scale)
        gathered = zero.gather(part.astype(it.dtype), it.place)
        return gathered.astype(part.dtype) if it.place.is_sharded else gathered

    return jax.tree.map(one, params, how)


def as_read(params: Tree, how: Tree) -> Tree:
    """The weights of a state in the dtypes in which a step reads them, none in codes; outside of `per_device`."""
    return jax.tree.map(lambda weight, it: weight if it.place.is_sharded else weight.astype(it.dtype), params, how)
