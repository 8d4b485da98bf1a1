"""ZeRO-1: weights are gathered, their gradients summed and scattered, and each device updates its part.

What needs whole matrices is computed by owners: where devices hold parts of each matrix of a stack, they exchange them,
so that each has some matrices whole, and exchange the results back (`by_matrix`).

All functions work inside `per_device`.
Paper: Rajbhandari et al. 2020; used by V3 (section 3.2).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.mesh import ALL
from deepseek_jax.parallel.sharding import Placement


def sum_and_scatter(gradients: dict, placements: dict) -> dict:
    """This device's part of the gradients summed over all devices, in float32."""

    def one(place: Placement, gradient: jax.Array) -> jax.Array:
        if not place.copies:
            return gradient
        gradient = gradient.astype(jnp.float32)
        if place.zero_dim is None:
            return jax.lax.psum(gradient, place.copies)
        return jax.lax.psum_scatter(gradient, place.copies, scatter_dimension=place.zero_dim, tiled=True)

    return jax.tree.map(one, placements, gradients)


def gather(part: jax.Array, place: Placement) -> jax.Array:
    """The whole weight, as `Placement.spec` says, from the parts of all devices."""
    if place.zero_dim is None:
        return part
    return jax.lax.all_gather(part, place.copies, axis=place.zero_dim, tiled=True)


@jax.named_scope("gradient_norm")
def global_norm(parts: dict, placements: dict) -> jax.Array:
    """sqrt of the sum of squares over all weights of all devices, each weight counted once."""

    def squares(place: Placement, part: jax.Array) -> jax.Array:
        n_equal = jax.lax.axis_size(place.copies) if place.copies and place.zero_dim is None else 1
        return jnp.sum(jnp.square(part.astype(jnp.float32))) / n_equal

    local = jax.tree.leaves(jax.tree.map(squares, placements, parts))
    return jnp.sqrt(jax.lax.psum(jnp.sum(jnp.stack(local)), ALL))


def by_matrix(change: Callable[[jax.Array], jax.Array], part: jax.Array, place: Placement, n_stacked: int) -> jax.Array:
    """This device's part of what `change` makes of the whole matrices of a weight, from its part of the weight.

    Each matrix is changed once, by one of the devices that hold parts of it.

    Args:
        change: of whole matrices [n, ...] to others of the same shape, each by itself; zeros are changed to zeros.
        part: laid out as `Placement.state_spec` says.
        place: of the weight.
        n_stacked: leading axes along which the weight is a stack of matrices.
    """
    stack = part.reshape(-1, *part.shape[n_stacked:])
    entries = enumerate(place.state_spec[n_stacked:], 1)
    cuts = [(dim, axes if isinstance(axes, tuple) else (axes,)) for dim, axes in entries if axes]
    return _by_owner(change, stack, cuts).reshape(part.shape)


def _by_owner(change: Callable[[jax.Array], jax.Array], stack: jax.Array, cuts: Sequence) -> jax.Array:
    """`change` of matrices that are cut along dimensions over mesh axes: `cuts` are pairs (dimension, axes)."""
    if not cuts:
        return change(stack)
    (dim, axes), *others = cuts
    n = len(stack)
    filled = jnp.pad(stack, [(0, -n % jax.lax.axis_size(axes)), *[(0, 0)] * (stack.ndim - 1)])
    own = jax.lax.all_to_all(filled, axes, split_axis=0, concat_axis=dim, tiled=True)
    changed = _by_owner(change, own, others)
    return jax.lax.all_to_all(changed, axes, split_axis=dim, concat_axis=0, tiled=True)[:n]
