"""Rows sorted by group, and the table of row tiles, each by one small kernel for NVIDIA GPUs: Pallas Triton.

A decode step has few rows, so that what XLA makes of a sort, of counts and of sums costs the time to start a dozen
kernels, one after the other. Here a program finds the place of each row by comparing it with all others, and another
one has a lane per group, which writes the tiles of its own rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul.layout import FIELDS, UNIT, Groups, row_tiles

MOST_ROWS = 1024  # that one program compares
MOST_GROUPS = 512  # lanes of a program
MOST_IN_TABLE = 4096  # rows that a decode step may have
CHUNK = 16  # rows with which all rows are compared at a time


def takes(n_rows: int, n_groups: int) -> bool:
    """Returns whether `by_group` sorts so many rows of so many groups."""
    return n_rows <= MOST_ROWS and n_groups <= MOST_GROUPS


def by_group(group_A: jax.Array, n_groups: int, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row in each sorted place, place of each row, rows of each group), int32 [A], [A], [X].

    The sort is stable. Group `n_groups` means none: its rows come last and are not counted.
    """
    a = group_A.size
    width, lanes = _power(a), _power(n_groups)
    # Masked, an interpreted store writes as well: behind what counts.
    shapes = [(size + interpret,) for size in (a, a, n_groups)]
    call = pl.pallas_call(
        functools.partial(_sort, a, n_groups, width, lanes),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        grid=(1,),
        name="sort_by_group",
        **_options(min(max(width // 32, 4), 16), interpret),
    )
    sorted_A, place_A, count_X = call(group_A.astype(jnp.int32))
    return sorted_A[:a], place_A[:a], count_X[:n_groups]


def _sort(a: int, n_groups: int, width: int, lanes: int, groups: Any, *out: Any) -> None:
    sorted_ref, place_ref, count_ref = out
    i, x = jnp.arange(width), jnp.arange(lanes)
    group = plt.load(groups.at[pl.ds(0, width)], mask=i < a, other=n_groups + 1)

    def compare(n: jax.Array, state: tuple) -> tuple:
        before, same = state
        j = n * CHUNK + jnp.arange(CHUNK)
        other = plt.load(groups.at[pl.ds(n * CHUNK, CHUNK)], mask=j < a, other=n_groups + 1)
        earlier = (other[None] == group[:, None]) & (j[None] < i[:, None])
        before += ((other[None] < group[:, None]) | earlier).astype(jnp.int32)
        return before, same + (other[None] == x[:, None]).astype(jnp.int32)

    zeros = jnp.zeros((width, CHUNK), jnp.int32), jnp.zeros((lanes, CHUNK), jnp.int32)
    before, same = lax.fori_loop(0, width // CHUNK, compare, zeros)
    place = jnp.sum(before, axis=1)
    plt.store(place_ref.at[jnp.minimum(i, place_ref.shape[0] - 1)], place, mask=i < a)
    plt.store(sorted_ref.at[jnp.minimum(place, sorted_ref.shape[0] - 1)], i.astype(jnp.int32), mask=i < a)
    at = jnp.minimum(x, count_ref.shape[0] - 1)
    plt.store(count_ref.at[at], jnp.sum(same, axis=1), mask=x < n_groups)


def table(groups: Groups, n_rows: int, tile_rows: int, interpret: object = None) -> jax.Array:
    """Returns `layout.row_tiles` as kernels read it, int32 [T * 6], with a tile's matrix in place of its group.

    That of one group, of many rows or groups, and of interpreted kernels is computed by XLA.
    """
    if interpret or not 1 < groups.n < MOST_GROUPS or n_rows > MOST_IN_TABLE:
        group_T, *others_T = row_tiles(groups, n_rows, tile_rows).T
        matrix_T = group_T if groups.matrix_X is None else groups.matrix_X[group_T]
        return jnp.stack([matrix_T, *others_T], axis=1).reshape(-1)
    return tiles_of(groups, n_rows, tile_rows)


def tiles_of(groups: Groups, n_rows: int, tile_rows: int, interpret: bool = False) -> jax.Array:
    """Returns `table` by a lane per group; what follows the tiles that count are zeros."""
    most = (n_rows + (groups.n + 1) * (tile_rows + UNIT - 2)) // tile_rows
    given = [groups.count_X] if groups.matrix_X is None else [groups.count_X, groups.matrix_X]
    call = pl.pallas_call(
        functools.partial(_tiles, groups.n, groups.align, n_rows, tile_rows, most),
        out_shape=jax.ShapeDtypeStruct(((most + 1) * len(FIELDS),), jnp.int32),
        grid=(1,),
        name="row_tiles",
        **_options(4, interpret),
    )
    return call(*(x.astype(jnp.int32) for x in given))


def _tiles(n_groups: int, align: int, n_rows: int, tile_rows: int, most: int, *refs: Any) -> None:
    counts, *matrices, out = refs
    y = jnp.arange(_power(n_groups + 1))  # the groups, and the rows after them
    is_group = y < n_groups
    count = plt.load(counts.at[pl.ds(0, y.size)], mask=is_group, other=0)
    space = lax.div(count + (align - 1), align) * align
    through = jnp.cumsum(space)
    low = jnp.where(y <= n_groups, jnp.minimum(through - space, n_rows), n_rows)
    high = jnp.where(is_group, jnp.minimum(through, n_rows), n_rows)
    begin = lax.div(low, UNIT) * UNIT
    n_tiles = jnp.where(high > low, lax.div(high - begin + (tile_rows - 1), tile_rows), 0)
    first, total = jnp.cumsum(n_tiles) - n_tiles, jnp.sum(n_tiles)
    own = jnp.minimum(y, n_groups - 1)
    if matrices:
        own = plt.load(matrices[0].at[own])

    def write(j: jax.Array, _: None) -> None:
        fields = own, begin + j * tile_rows, low, high, low + count, jnp.broadcast_to(total, y.shape)
        at = jnp.where(j < n_tiles, first + j, most) * len(FIELDS)
        for n, value in enumerate(fields):
            plt.store(out.at[at + n], value.astype(jnp.int32), mask=j < n_tiles)

    lax.fori_loop(0, jnp.max(n_tiles), write, None)
    t = jnp.arange(_power((most + 1) * len(FIELDS)))
    behind = (t >= total * len(FIELDS)) & (t < (most + 1) * len(FIELDS))
    last = (most + 1) * len(FIELDS) - 1
    plt.store(out.at[jnp.where(behind, t, last)], jnp.zeros(t.shape, jnp.int32), mask=behind)


def _options(n_warps: int, interpret: bool) -> dict[str, Any]:
    if interpret:
        return {"interpret": True}
    return {"compiler_params": plt.CompilerParams(num_warps=n_warps, num_stages=1)}


def _power(n: int) -> int:
    return 1 << max(n - 1, CHUNK - 1).bit_length()
