"""Where the rows of each group lie, and the row tiles that cover them: small integer arrays, computed on the device.

Groups follow one another. With `align` 1 there is nothing between them; otherwise each begins at a multiple of `align`,
and what lies between its last row and the next group belongs to nobody ("padding"), as do rows after the last group.

A tile begins at a multiple of 8 rows, because TMA copies swizzled rows in units of 8. So the first tile of a group may
begin up to 7 rows before the group.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNIT = 8


class Scaled(NamedTuple):
    """Matrices as E4M3 codes, with the float32 scales of their blocks."""

    codes: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """How many rows each group has, which may be known only when a program runs.

    Attributes:
        count_X: int32 [X]: any numbers, 0 included.
        align: rows to a multiple of which each group begins.
        matrix_X: int32 [X]: which of the matrices in w is each group's, where w holds others as well (`grouped_matmul`
            alone); None: w holds one matrix per group.
    """

    count_X: jax.Array
    align: int = dataclasses.field(default=1, metadata={"static": True})
    matrix_X: jax.Array | None = None

    @property
    def n(self) -> int:
        """How many groups there are."""
        return self.count_X.size

    @property
    def room_X(self) -> jax.Array:
        """Rows from the first of a group to the first of the next."""
        return -(-self.count_X // self.align) * self.align

    def bounds(self) -> tuple[jax.Array, jax.Array]:
        """Returns the first row of each group, and the row after its last."""
        room_X = self.room_X
        first_X = jnp.cumsum(room_X) - room_X
        return first_X, first_X + self.count_X


FIELDS = ("group", "row", "low", "high", "end", "n_tiles")


def row_tiles(groups: Groups, n_rows: int, tile_rows: int) -> jax.Array:
    """Returns the tiles of `tile_rows` rows that cover a matrix of `n_rows` rows, each row exactly once.

    A last group holds the rows after all groups. Sums are written as comparisons, which XLA makes few kernels of.

    Returns:
        int32 [T, 6]: for each tile its group, first row (a multiple of 8), and of the rows that it writes the first
        (`low`), the one after the last (`high`) and the one from which on they are 0 (`end`); and how many tiles count.
    """
    n_groups, count_X, room_X = groups.n, groups.count_X, groups.room_X
    index_Y = jnp.arange(n_groups + 1, dtype=jnp.int32)  # the groups and the rows after them
    before_YX = index_Y[:n_groups] < index_Y[:, None]
    low_Y = jnp.minimum(jnp.sum(jnp.where(before_YX, room_X, 0), axis=1), n_rows)
    through_YX = index_Y[:n_groups] <= index_Y[:, None]
    high_Y = jnp.minimum(jnp.sum(jnp.where(through_YX, room_X, 0), axis=1), n_rows)
    high_Y = jnp.where(index_Y < n_groups, high_Y, n_rows)
    end_Y = low_Y + jnp.where(index_Y < n_groups, count_X[jnp.minimum(index_Y, n_groups - 1)], 0)
    begin_Y = low_Y // UNIT * UNIT
    tiles_Y = jnp.where(high_Y > low_Y, -(-(high_Y - begin_Y) // tile_rows), 0)
    last_Y = jnp.sum(jnp.where(index_Y <= index_Y[:, None], tiles_Y, 0), axis=1)
    most = (n_rows + (n_groups + 1) * (tile_rows + UNIT - 2)) // tile_rows
    tile_T = jnp.arange(most, dtype=jnp.int32)
    group_T = jnp.minimum(jnp.sum(tile_T[:, None] >= last_Y, axis=1, dtype=jnp.int32), n_groups)
    row_T = begin_Y[group_T] + (tile_T - (last_Y - tiles_Y)[group_T]) * tile_rows
    n_tiles_T = jnp.broadcast_to(last_Y[-1], tile_T.shape)
    fields = (jnp.minimum(group_T, n_groups - 1), row_T, low_Y[group_T], high_Y[group_T], end_Y[group_T], n_tiles_T)
    return jnp.stack(fields, axis=1).astype(jnp.int32)


def table(groups: Groups, n_rows: int, tile_rows: int) -> jax.Array:
    """Returns `row_tiles` as kernels read it, int32 [T * 6], with a tile's matrix in place of its group."""
    group_T, *others_T = row_tiles(groups, n_rows, tile_rows).T
    matrix_T = group_T if groups.matrix_X is None else groups.matrix_X[group_T]
    return jnp.stack([matrix_T, *others_T], axis=1).reshape(-1)
