"""Where each weight lives: logical axes -> mesh axes, ZeRO-1, FSDP.

A weight's logical axes are declared with it ("experts", "embed", "heads", …). A run's rules map some of them to mesh
axes.  "experts" is compute sharding: a device works with the experts it holds. Every other rule is storage sharding
(FSDP): the weight is gathered just before use, and its gradient comes back summed and scattered.

What is kept between steps, the float32 master of a weight and its optimizer state, is cut further (ZeRO-1), over all
devices that would otherwise hold the same copy; a step begins by gathering the weights in the dtype that it reads.
Stacked axes are cut first: an optimizer that works on whole matrices finds them whole wherever layers or experts can be
split. In a pipeline layers are split over its ranks, and so is the vocabulary (`parallel.vocabulary`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import ALL, PIPE, REPLICAS, AnyMesh, size
from deepseek_jax.tree import dotted

EXPERTS = "experts"
LAYERS = "layers"
VOCAB = "vocab"
STACKED = (LAYERS, EXPERTS)  # logical axes along which a weight is a stack of matrices


@dataclass(frozen=True)
class Placement:
    """Where one weight and what belongs to it live."""

    spec: P  # of the weight as a step reads it
    copies: tuple[str, ...]  # mesh axes along which devices hold the same part; its gradient is summed over them
    # dimension along which master and optimizer state are split over `copies`; None if no dimension divides
    zero_dim: int | None
    state_spec: P  # of its float32 master and its optimizer state
    is_sharded: bool  # whether it is gathered where it is used (FSDP), and its gradient scattered

    def reads_master(self, dtype: DTypeLike) -> bool:
        """Whether a step that reads this weight in `dtype` reads the master itself, and makes no copy of it."""
        return self.zero_dim is None and (self.is_sharded or dtype == jnp.float32)


def check_rules(rules: Mapping[str, str]) -> None:
    """Raises UserError for a rule that names no mesh axis."""
    for logical, axis in rules.items():
        if axis and axis not in REPLICAS:
            raise UserError(
                f"config.sharding.{logical}={axis!r}: no such mesh axis. Choose one of {', '.join(REPLICAS)}."
            )


def expert_axis(rules: Mapping[str, str], mesh: AnyMesh) -> str | None:
    """The mesh axis over which the routed experts are split; None when every device holds them all."""
    axis = rules.get(EXPERTS)
    return axis if axis and mesh.shape[axis] > 1 else None


def is_axes(leaf: object) -> bool:
    """Whether `leaf` is a weight's tuple of logical axes."""
    return isinstance(leaf, tuple)


def placements(axes: dict, shapes: dict, rules: Mapping[str, str], mesh: AnyMesh) -> dict:
    """The `Placement` of every weight.

    `axes` is a tree of logical axes, one tuple per weight, `shapes` one like it of arrays or `jax.ShapeDtypeStruct`s;
    a logical axis that is absent from `rules` or "" there keeps a dimension whole.

    Raises:
        UserError: a dimension does not divide by its mesh axis, or two dimensions of a weight are split over the same.
    """
    check_rules(rules)

    def placement(path: tuple, logical: tuple, array: jax.ShapeDtypeStruct) -> Placement:
        return _placement(dotted(path), logical, array.shape, rules, mesh)

    return jax.tree_util.tree_map_with_path(placement, axes, shapes, is_leaf=is_axes)


def _placement(name: str, logical: tuple, shape: tuple, rules: Mapping[str, str], mesh: AnyMesh) -> Placement:
    split = [rules.get(axis) or None if axis else None for axis in logical]
    if mesh.shape[PIPE] > 1 and {LAYERS, VOCAB} & {*logical}:
        split = _along_pipeline(name, logical, split)
    split = [axis if axis and mesh.shape[axis] > 1 else None for axis in split]
    for dim, axis in enumerate(split):
        if axis and shape[dim] % mesh.shape[axis]:
            raise UserError(
                f"{name}: {shape[dim]} {logical[dim]} over mesh axis {axis!r} of size {mesh.shape[axis]}: not "
                f"divisible. Choose a divisor of {shape[dim]} in config.mesh.{axis}."
            )
        if axis and split.index(axis) != dim:
            raise UserError(
                f"{name}: {logical[split.index(axis)]} and {logical[dim]} both want mesh axis {axis!r}. "
                f'Set one of them to "" in config.sharding.'
            )
    copies = tuple(axis for axis in ALL if axis not in split and mesh.shape[axis] > 1)
    zero_dim = _zero_dim(split, logical, shape, size(mesh, copies)) if copies else None
    cut: list = list(split)
    if zero_dim is not None:
        cut[zero_dim] = copies
    stored = [axis for name, axis in zip(logical, split, strict=True) if axis not in (None, PIPE) and name != EXPERTS]
    return Placement(P(*split), copies, zero_dim, P(*cut), bool(stored))


def _along_pipeline(name: str, logical: tuple, split: list) -> list:
    """The mesh axes of a weight in a pipeline. What has a vocabulary is split by that alone: a part of it is small."""
    if VOCAB not in logical:
        return [PIPE if axis == LAYERS else found for axis, found in zip(logical, split, strict=True)]
    if rule := split[logical.index(VOCAB)]:
        raise UserError(
            f"{name}: config.sharding.vocab={rule!r} in a pipeline, which splits the vocabulary over its ranks. Set "
            'config.sharding.vocab="".'
        )
    return [PIPE if axis == VOCAB else None for axis in logical]


def _zero_dim(split: list, logical: tuple, shape: tuple, n_copies: int) -> int | None:
    """The largest dimension that is still whole and divides by `n_copies`, a stacked one if any does."""
    free = [dim for dim, axis in enumerate(split) if axis is None and shape[dim] % n_copies == 0 and shape[dim]]
    return max(free, key=lambda dim: (logical[dim] in STACKED, shape[dim]), default=None)


def without_layers(spec: P, shape: tuple[int, ...], mesh: AnyMesh) -> P:
    """A spec that splits over the pipeline as well, but not the layers: the largest dimension that divides, if any."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    if not entries or entries[0] != PIPE:
        return spec
    entries[0] = None
    n_ranks = mesh.shape[PIPE]
    free = [dim for dim, axis in enumerate(entries) if dim and axis is None and shape[dim] % n_ranks == 0]
    if free:
        entries[max(free, key=lambda dim: shape[dim])] = PIPE
    return P(*entries)


def state_specs(state: dict, params: dict, placements: dict) -> dict:
    """Where an optimizer's state lives: what belongs to a weight like that weight's ZeRO-1 part, scalars everywhere.

    Raises ValueError for an array that is neither a scalar nor of the shape of the weight at its path.
    """
    weights = {path: leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = dict(jax.tree_util.tree_leaves_with_path(placements))

    def spec(path: tuple, leaf: jax.ShapeDtypeStruct) -> P:
        weight = path[1:]  # the first key is the state's own
        if weights.get(weight) == leaf.shape:
            return places[weight].state_spec
        if leaf.ndim:
            shown = f"{dotted(path)} {leaf.shape}"
            raise ValueError(f"optimizer state {shown}: expected a scalar, or the shape of that weight.")
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


def unsharder(rules: Mapping[str, str], mesh: AnyMesh, read: Callable[[str], DTypeLike]) -> Callable[..., None] | None:
    """A function that makes whole, in place, a module's weights that FSDP stores in shards; None if there are none.

    Called on a model it leaves stacked blocks alone, unless `stacks` asks for them; called on one layer of a stack it
    gathers that layer. What is gathered is in the dtype `read(role)`.
    """
    stored = {name: axis for name, axis in rules.items() if name != EXPERTS and axis and mesh.shape[axis] > 1}
    if not stored:
        return None

    def unshard(module: nnx.Module, stacks: bool = False) -> None:
        for _, variable in nnx.iter_graph(module):
            if not isinstance(variable, nnx.Variable):
                continue
            logical, value = variable.get_metadata("axes"), variable[...]
            if VOCAB in logical and mesh.shape[PIPE] > 1:
                continue
            if logical[:1] == (LAYERS,) and len(logical) > value.ndim:
                logical = logical[1:]
            elif logical[:1] == (LAYERS,) and not stacks:
                continue
            for dim, name in enumerate(logical):
                if name in stored:
                    value = _gathered(stored[name], dim, read(variable.get_metadata("role")), value)
            variable.set_value(value)

    return unshard


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(axis: str, dim: int, dtype: DTypeLike, shard: jax.Array) -> jax.Array:
    """The whole weight in `dtype`. Its gradient is summed over the devices in the dtype of the shard."""
    return jax.lax.all_gather(shard.astype(dtype), axis, axis=dim, tiled=True)


def _gathered_forward(axis: str, dim: int, dtype: DTypeLike, shard: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _gathered(axis, dim, dtype, shard), jnp.zeros((0,), shard.dtype)


def _gathered_backward(axis: str, dim: int, dtype: DTypeLike, like: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(g.astype(like.dtype), axis, scatter_dimension=dim, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def bytes_per_device(array: jax.ShapeDtypeStruct, spec: P, mesh: AnyMesh) -> int:
    """Bytes of one device's part of an array laid out as `spec`."""
    parts = math.prod(size(mesh, axis if isinstance(axis, tuple) else (axis,)) for axis in spec if axis)
    return array.size * array.dtype.itemsize // parts
