"""Where the rows of each group lie, and the row tiles that cover them: small integer arrays, computed on the device.

Groups follow one another. With `align` 1 there is nothing between them; otherwise each begins at a multiple of `align`,
and what lies between its last row and the next group belongs to nobody ("padding"), as do rows after the last group.

A tile begins at a multiple of 8 rows, because TMA copies swizzled rows in units of 8. So the first tile of a group may
begin up to 7 rows before the group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

UNIT = 8


class Groups(NamedTuple):
    """First row of each group, and the row after its last."""

    first_X: jax.Array
    end_X: jax.Array


def groups(count_X: jax.Array, align: int = 1) -> Groups:
    """Returns where the groups of `count_X` rows lie."""
    room_X = -(-count_X // align) * align
    first_X = jnp.cumsum(room_X) - room_X
    return Groups(first_X, first_X + count_X)


class RowTiles(NamedTuple):
    """Tiles that cover every row exactly once.

    Attributes:
        table_TF: int32, for each tile its group, first row (a multiple of 8), and of the rows that it writes the first
            (`low`), the one after the last (`high`) and the one from which on they are 0 (`end`).
        n_tiles: [1], how many entries of the table count.
    """

    table_TF: jax.Array
    n_tiles: jax.Array


def row_tiles(count_X: jax.Array, n_rows: int, tile_rows: int, align: int = 1) -> RowTiles:
    """Returns the tiles of `tile_rows` rows over a matrix of `n_rows`; a last group holds the rows after all groups."""
    n_groups = count_X.size
    first_X, end_X = groups(count_X.astype(jnp.int32), align)
    total = jnp.minimum(first_X[-1] + -(-count_X[-1] // align) * align, n_rows).astype(jnp.int32)
    low_X = jnp.concatenate([jnp.minimum(first_X, n_rows), total[None]])
    high_X = jnp.concatenate([low_X[1:], jnp.array([n_rows], jnp.int32)])
    end_X = jnp.concatenate([end_X, total[None]])
    begin_X = low_X // UNIT * UNIT
    tiles_X = jnp.where(high_X > low_X, -(-(high_X - begin_X) // tile_rows), 0)
    last_X = jnp.sum(jnp.where(jnp.arange(n_groups + 1) <= jnp.arange(n_groups + 1)[:, None], tiles_X, 0), axis=1)
    tile_T = jnp.arange((n_rows + (n_groups + 1) * (tile_rows + UNIT - 2)) // tile_rows, dtype=jnp.int32)
    group_T = jnp.minimum(jnp.sum(tile_T[:, None] >= last_X, axis=1), n_groups)
    row_T = begin_X[group_T] + (tile_T - (last_X - tiles_X)[group_T]) * tile_rows
    fields = (jnp.minimum(group_T, n_groups - 1), row_T, low_X[group_T], high_X[group_T], end_X[group_T])
    return RowTiles(jnp.stack(fields, axis=1).astype(jnp.int32), last_X[-1:].astype(jnp.int32))
