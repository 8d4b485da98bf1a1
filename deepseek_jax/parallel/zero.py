"""ZeRO-1: weights are gathered, their gradients summed and scattered, and each device updates its part.

All functions work inside `per_device`.
Paper: Rajbhandari et al. 2020; used by V3 (section 3.2).
"""

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
