"""What is known of the tokens that run through a model, besides the vectors: one argument instead of four."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """The tokens of a batch; every block is given them, and reads what it needs."""

    ids_BT: jax.Array  # token ids, int32; -1 where there is none
    positions_BT: jax.Array  # their positions in their documents, int32
    # their documents, int32: attention stays inside one; None lets a token see all before it
    segments_BT: jax.Array | None = None
    # which of them are text and not padding, bool: padding visits no expert; None: all are text
    real_BT: jax.Array | None = None
    # the experts that each visits in the block that reads this, where that is decided; None: its router chooses
    experts_BTK: jax.Array | None = None

    @classmethod
    def of(
        cls,
        ids_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        real_BT: jax.Array | None = None,
    ) -> "Tokens":
        """Tokens whose positions are 0..T-1 by default."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1], dtype=jnp.int32), ids_BT.shape)
        return cls(ids_BT, positions_BT, segments_BT, real_BT)


def at(tree: Any, place_B: jax.Array) -> Any:
    """Returns one token of each sequence, the one at `place_B`: arrays with axes B and T first, with T = 1."""

    def one(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, place_B.reshape(-1, *[1] * (array.ndim - 1)), axis=1)

    return jax.tree.map(one, tree)
