"""A vocabulary divided over the devices of a mesh axis: rows of the embedding, columns of the head.

Each device along the axis holds as many ids as the others, in their order. All of them work on the same tokens: a sum
over the axis puts together what each looked up or computed for its own ids.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Vocabulary:
    """Where the ids are; its functions run inside `per_device`, on all devices along the axis alike."""

    axis: str | None = None  # mesh axis over which they are divided; None: every device holds all

    def index(self, ids: jax.Array, n_here: int) -> jax.Array:
        """Returns the index of each id among the `n_here` ids of this device; one outside of these is elsewhere."""
        return ids if self.axis is None else ids - jax.lax.axis_index(self.axis) * n_here

    def local(self, ids: jax.Array, n_here: int) -> tuple[jax.Array, jax.Array]:
        """Returns (index among the `n_here` ids of this device, whether the id is one of them) of each id."""
        index = self.index(ids, n_here)
        is_here = (index >= 0) & (index < n_here)
        return jnp.where(is_here, index, 0), is_here

    def picked(self, x_MV: jax.Array, ids_M: jax.Array) -> jax.Array:
        """Returns from each row the number of its id; `x_MV` are the columns that are here."""
        if self.axis is None:
            return jnp.take_along_axis(x_MV, ids_M[:, None], axis=-1)[:, 0]
        index_M, is_here_M = self.local(ids_M, x_MV.shape[1])
        return self.total(jnp.where(is_here_M, jnp.take_along_axis(x_MV, index_M[:, None], axis=-1)[:, 0], 0))

    def total(self, x: jax.Array) -> jax.Array:
        """Returns the sum over the devices."""
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def largest(self, x: jax.Array) -> jax.Array:
        """Returns the largest over the devices, element by element."""
        return x if self.axis is None else jax.lax.pmax(x, self.axis)


WHOLE = Vocabulary()
