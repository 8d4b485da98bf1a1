"""Grouped matmuls for TPUs in Pallas Mosaic TPU, in bfloat16 and in FP8.

    y[r]  = x[r] w[g]                           for the rows r of group g; 0 for rows of no group
    dw[g] = sum_{r in group g}  x[r]^T dy[r]

Rows are divided into tiles, and a tile in which groups meet is visited once for each of them. `visits` lists these
pairs in order, on the device; the grid is as long as the list is, and reads from it (scalar prefetch) which rows and
whose weights come next. Visits of one tile follow one another, so their results meet in the same block of y in VMEM;
visits of one group follow one another, so that dw[g] is summed in one place.

FP8 products and what the chips do with them: `fp8_matmul/tpu.py`. Not yet run on a TPU.
Paper: V3 sections 2.1.2 (experts) and 3.3.2 (FP8).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels import mosaic_tpu
from pallas_kernels.fp8_matmul.tpu import by_step, repeated, scaled_products
from pallas_kernels.grouped_matmul.layout import Groups, Scaled

BLOCK = 128
MOST = (512, 512, 1024)  # of a tile: rows, columns of the result, contraction


class Visits(NamedTuple):
    """Which ranges of rows are computed where: read by the kernels as they go."""

    range_V: jax.Array
    tile_V: jax.Array
    low_Y: jax.Array  # per range: first row,
    high_Y: jax.Array  # the row after the last,
    end_Y: jax.Array  # and the row from which on there is nothing but zeros
    n_visits: jax.Array


def visits(low_Y: jax.Array, high_Y: jax.Array, end_Y: jax.Array, n_rows: int, tile: int, least: int) -> Visits:
    """Returns the pairs of a range of rows and a tile that it has rows in; `least` pairs for an empty range."""
    n_tiles = pl.cdiv(n_rows, tile)
    first_Y = low_Y // tile
    count_Y = jnp.where(high_Y > low_Y, -(-high_Y // tile) - first_Y, least)
    through_Y = jnp.cumsum(count_Y)
    visit_V = jnp.arange(n_tiles + low_Y.size, dtype=jnp.int32)
    range_V = jnp.minimum(jnp.sum(visit_V[:, None] >= through_Y, axis=1, dtype=jnp.int32), low_Y.size - 1)
    tile_V = first_Y[range_V] + visit_V - (through_Y - count_Y)[range_V]
    return Visits(range_V, jnp.clip(tile_V, 0, n_tiles - 1), low_Y, high_Y, end_Y, through_Y[-1])


def _visits_of_rows(groups: Groups, n_rows: int, tile: int) -> Visits:
    """Visits that cover every row once: each group with what fills it up, and last the rows after all groups."""
    first_X, end_X = groups.bounds()
    after = first_X[-1:] + groups.room_X[-1:]
    low_Y = jnp.minimum(jnp.concatenate([first_X, after]), n_rows)
    high_Y = jnp.concatenate([low_Y[1:], jnp.array([n_rows], jnp.int32)])
    return visits(low_Y, high_Y, jnp.concatenate([end_X, after]), n_rows, tile, least=0)


def grouped_matmul(
    x_AD: jax.Array,
    w_XDF: jax.Array,
    groups: Groups,
    *,
    transposed: bool = False,
    most: tuple[int, int, int] = MOST,
    interpret: Any = False,
) -> jax.Array:
    """Returns y [A, F]; see `pallas_kernels.grouped_matmul.grouped_matmul`.

    `most`: the sizes of a tile, at most. `interpret` runs the kernel on a CPU.
    """
    (a, d), f = x_AD.shape, w_XDF.shape[1 if transposed else 2]
    check_sizes(x_AD.dtype, jnp.dtype(jnp.bfloat16), D=d, F=f)
    step, columns = mosaic_tpu.step(d, most[2]), mosaic_tpu.tile(f, most[1])
    if transposed:
        w_spec = Operand((None, columns, step), lambda g, t, j, s: (g, j, s))
    else:
        w_spec = Operand((None, step, columns), lambda g, t, j, s: (g, s, j))

    def add(x: Any, w: Any, total: Any) -> None:
        contracted = (((1,), (1 if transposed else 0,)), ((), ()))
        total[...] += lax.dot_general(x[...], w[...], contracted, preferred_element_type=jnp.float32)

    tile = mosaic_tpu.tile(a, most[0])
    specs = [Operand((tile, step), lambda g, t, j, s: (t, s)), w_spec]
    plan = Rows(add, specs, a, f, tile, columns, d // step, x_AD.dtype, interpret)
    return plan.call(groups, x_AD, w_XDF)


def grouped_fp8_matmul(
    x: Scaled,
    w: Scaled,
    groups: Groups,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    native: bool = False,
    most: tuple[int, int, int] = MOST,
    interpret: Any = False,
) -> jax.Array:
    """Returns y [A, N]; see `pallas_kernels.grouped_matmul.grouped_fp8_matmul`. `native`: the chip multiplies E4M3."""
    (a, k), n = x.codes.shape, w.codes.shape[1]
    check_sizes(x.codes.dtype, jnp.dtype(jnp.float8_e4m3fn), K=k, N=n)
    step, tile, columns = mosaic_tpu.step(k, most[2]), mosaic_tpu.tile(a, most[0]), mosaic_tpu.tile(n, most[1])
    blocks = step // BLOCK

    def add(x: Any, x_scale: Any, w: Any, w_scale: Any, total: Any) -> None:
        for b in range(blocks):
            total[...] += scaled_products(x, x_scale, w, w_scale, b, native)

    specs = [
        Operand((tile, step), lambda g, t, j, s: (t, s)),
        Operand((None, blocks, tile), lambda g, t, j, s: (s, 0, t)),
        Operand((None, columns, step), lambda g, t, j, s: (g, j, s)),
        Operand((None, None, blocks, columns), lambda g, t, j, s: (g, s, 0, j)),
    ]
    plan = Rows(add, specs, a, n, tile, columns, k // step, out_dtype, interpret)
    operands = x.codes, by_step(x.scale, step), w.codes, by_step(repeated(w.scale, n), step)
    return plan.call(groups, *operands)


class Operand(NamedTuple):
    """A block of an operand, and where it lies: a function of group, row tile, column tile and step."""

    shape: tuple
    at: Callable


class Rows(NamedTuple):
    """A kernel whose result has the rows of x."""

    add: Callable  # of the operands' blocks, to a float32 sum
    operands: Sequence[Operand]
    n_rows: int
    n_columns: int
    tile: int
    columns: int
    n_steps: int
    out_dtype: DTypeLike
    interpret: Any

    def call(self, groups: Groups, *operands: jax.Array) -> jax.Array:
        """Returns y."""
        plan = _visits_of_rows(groups, self.n_rows, self.tile)

        def spec(operand: Any) -> Any:
            def at(j: jax.Array, v: jax.Array, s: Any, range_V: jax.Array, tile_V: jax.Array, *_) -> tuple:
                group = jnp.minimum(range_V[v], groups.n - 1)  # the rows after all groups are multiplied by any
                return operand.at(group, tile_V[v], j, s)

            return pl.BlockSpec(operand.shape, at)

        return pl.pallas_call(
            functools.partial(_rows_kernel, self.add),
            out_shape=jax.ShapeDtypeStruct((self.n_rows, self.n_columns), self.out_dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=(pl.cdiv(self.n_columns, self.columns), plan.n_visits, self.n_steps),
                in_specs=[spec(operand) for operand in self.operands],
                out_specs=spec(Operand((self.tile, self.columns), lambda g, t, j, s: (t, j))),
                scratch_shapes=[pltpu.VMEM((self.tile, self.columns), jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
            interpret=self.interpret,
        )(*plan[:5], *operands)


def _rows_kernel(
    add: Callable,
    range_V: jax.Array,
    tile_V: jax.Array,
    low_Y: jax.Array,
    high_Y: jax.Array,
    end_Y: jax.Array,
    *refs: Any,
) -> None:
    *operands, y, total = refs
    visit, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    add(*operands, total)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        own, row = range_V[visit], _rows_of(tile_V[visit], y.shape)
        values = jnp.where(row < end_Y[own], total[...], 0.0)
        mine = (low_Y[own] <= row) & (row < high_Y[own])
        y[...] = jnp.where(mine, values, y[...].astype(jnp.float32)).astype(y.dtype)  # other visits wrote the others


def _rows_of(tile: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The row of the matrix that each place of a block belongs to."""
    return tile * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)


def grouped_weight_gradient(
    x_AD: jax.Array,
    dy_AF: jax.Array,
    groups: Groups,
    *,
    out_dtype: DTypeLike = jnp.float32,
    most: tuple[int, int, int] = MOST,
    interpret: Any = False,
) -> jax.Array:
    """Returns dw [X, D, F]; see `pallas_kernels.grouped_matmul.grouped_weight_gradient`."""
    (a, d), f = x_AD.shape, dy_AF.shape[1]
    check_sizes(x_AD.dtype, jnp.dtype(jnp.bfloat16), D=d, F=f)
    tile, rows, columns = mosaic_tpu.tile(a, most[2]), mosaic_tpu.tile(d, most[0]), mosaic_tpu.tile(f, most[1])

    def add(low: jax.Array, end: jax.Array, at: jax.Array, x: Any, dy: Any, total: Any) -> None:
        own_x, own_dy = (jnp.where(_mine(low, end, at, ref.shape), ref[...], 0) for ref in (x, dy))
        total[...] += lax.dot_general(own_x, own_dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    specs = [
        Operand((tile, rows), lambda g, t, i, j: (t, i)),
        Operand((tile, columns), lambda g, t, i, j: (t, j)),
    ]
    plan = Weights(add, specs, a, (groups.n, d, f), tile, (rows, columns), out_dtype, interpret)
    return plan.call(groups, x_AD, dy_AF)


def _mine(low: jax.Array, end: jax.Array, tile: jax.Array, shape: tuple[int, int]) -> jax.Array:
    row = _rows_of(tile, shape)
    return (low <= row) & (row < end)


def grouped_fp8_weight_gradient(
    x_t: Scaled,
    dy_t: Scaled,
    groups: Groups,
    *,
    out_dtype: DTypeLike = jnp.float32,
    native: bool = False,
    most: tuple[int, int, int] = MOST,
    interpret: Any = False,
) -> jax.Array:
    """Returns dw [X, D, F]; see `pallas_kernels.grouped_matmul.grouped_fp8_weight_gradient`."""
    (d, a), f = x_t.codes.shape, dy_t.codes.shape[0]
    check_sizes(x_t.codes.dtype, jnp.dtype(jnp.float8_e4m3fn), D=d, F=f)
    tile, rows, columns = mosaic_tpu.step(a, most[2]), mosaic_tpu.tile(d, most[0]), mosaic_tpu.tile(f, most[1])
    blocks = tile // BLOCK

    def add(
        low: jax.Array, end: jax.Array, at: jax.Array, x: Any, x_scale: Any, dy: Any, dy_scale: Any, total: Any
    ) -> None:
        for b in range(blocks):
            row = at * tile + b * BLOCK

            @pl.when((low <= row) & (row < end))  # a block has rows of one group only
            def _(b: int = b) -> None:
                total[...] += scaled_products(x, x_scale, dy, dy_scale, b, native)

    specs = [
        Operand((rows, tile), lambda g, t, i, j: (i, t)),
        Operand((None, blocks, rows), lambda g, t, i, j: (t, 0, i)),
        Operand((columns, tile), lambda g, t, i, j: (j, t)),
        Operand((None, blocks, columns), lambda g, t, i, j: (t, 0, j)),
    ]
    plan = Weights(add, specs, a, (groups.n, d, f), tile, (rows, columns), out_dtype, interpret)
    return plan.call(groups, x_t.codes, by_step(x_t.scale, tile), dy_t.codes, by_step(dy_t.scale, tile))


class Weights(NamedTuple):
    """A kernel whose result has one matrix per group."""

    add: Callable  # of first row, end, tile and the operands' blocks, to a float32 sum
    operands: Sequence[Operand]
    n_rows: int
    shape: tuple[int, int, int]
    tile: int
    block: tuple[int, int]
    out_dtype: DTypeLike
    interpret: Any

    def call(self, groups: Groups, *operands: jax.Array) -> jax.Array:
        """Returns dw."""
        first_X, end_X = groups.bounds()
        plan = visits(first_X, end_X, end_X, self.n_rows, self.tile, least=1)  # an empty group is written too

        def spec(operand: Any) -> Any:
            return pl.BlockSpec(operand.shape, lambda i, j, v, group, tile, *_: operand.at(group[v], tile[v], i, j))

        _, d, f = self.shape
        return pl.pallas_call(
            functools.partial(_weights_kernel, self.add),
            out_shape=jax.ShapeDtypeStruct(self.shape, self.out_dtype),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=4,
                grid=(pl.cdiv(d, self.block[0]), pl.cdiv(f, self.block[1]), plan.n_visits),
                in_specs=[spec(operand) for operand in self.operands],
                out_specs=spec(Operand((None, *self.block), lambda g, t, i, j: (g, i, j))),
                scratch_shapes=[pltpu.VMEM(self.block, jnp.float32)],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=self.interpret,
        )(*plan[:4], *operands)


def _weights_kernel(
    add: Callable, group_V: jax.Array, tile_V: jax.Array, first_X: jax.Array, end_X: jax.Array, *refs: Any
) -> None:
    *operands, dw, total = refs
    visit = pl.program_id(2)
    group = group_V[visit]

    @pl.when((visit == 0) | (group_V[jnp.maximum(visit - 1, 0)] != group))
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    add(first_X[group], end_X[group], tile_V[visit], *operands, total)
    dw[...] = total[...].astype(dw.dtype)


def check_sizes(dtype: jnp.dtype, expected: jnp.dtype, **sizes: int) -> None:
    """Raises ValueError unless operands have the dtype and their widths are positive multiples of 128."""
    if dtype != expected:
        raise ValueError(f"x is {dtype}: the TPU kernel expects {expected}. Cast it, or use 'reference'.")
    if any(size % BLOCK or not size for size in sizes.values()):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"{given}: the TPU kernel expects positive multiples of {BLOCK}. Fill the matrices up with zeros, or use "
            "implementation='reference'."
        )
