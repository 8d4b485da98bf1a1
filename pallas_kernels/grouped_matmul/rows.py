"""The grouped matmul for Hopper whose result has the rows of x: forward and input gradient, bfloat16 and FP8.

    y[r] = x[r] w[g]   for the rows r of group g, 0 for rows of no group

Each job is a tile of rows of one group (`layout.table`) by a tile of columns; see `pipeline.py` for how it is
computed. A tile's rows that belong to other groups are computed with the wrong weights and not written. Chunks of 64
rows that belong to the group entirely, nearly all in a large group, leave through shared memory and TMA. The others,
at the borders of groups, are written by the threads that hold them, row by row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import pipeline
from pallas_kernels.grouped_matmul.layout import FIELDS, UNIT, Groups, Scaled, table
from pallas_kernels.grouped_matmul.pipeline import CHUNK_ROWS, RUN, Job, Plan, Refs, Run
from pallas_kernels.grouped_matmul.tiles import choose


def grouped_matmul(
    x_AD: jax.Array,
    w_XDF: jax.Array,
    groups: Groups,
    *,
    transposed: bool = False,
    run: Run = RUN,
) -> jax.Array:
    """Returns y [A, F]; arguments as in `pallas_kernels.grouped_matmul.grouped_matmul`.

    A that is not a multiple of 8 is filled up first, which costs a copy.
    """
    if x_AD.dtype != jnp.bfloat16:
        raise ValueError(
            f"implementation='mosaic_gpu' of grouped_matmul: x is {x_AD.dtype}, expected bfloat16. Cast the operands "
            "or use implementation='reference'."
        )
    k, n = w_XDF.shape[1:][::-1] if transposed else w_XDF.shape[1:]
    pipeline.check_multiples("grouped_matmul", D=k, F=n)
    return _run((x_AD, w_XDF), groups, n, k, transposed, x_AD.dtype, run)


def grouped_fp8_matmul(
    x: Scaled, w: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.bfloat16, run: Run = RUN
) -> jax.Array:
    """Returns y [A, N]; arguments as in `pallas_kernels.grouped_matmul.grouped_fp8_matmul`.

    A that is not a multiple of 8 is filled up first, which costs a copy.
    """
    n, k = w.codes.shape[1:]
    pipeline.check_multiples("grouped_fp8_matmul", N=n, K=k)
    return _run((x.codes, w.codes, x.scale, w.scale), groups, n, k, True, out_dtype, run)


def _run(
    operands: tuple, groups: Groups, n: int, k: int, transposed: bool, out_dtype: DTypeLike, run: Run
) -> jax.Array:
    x, w, *scales = operands
    n_rows, extra = x.shape[0], -x.shape[0] % UNIT
    if extra:
        x = jnp.pad(x, ((0, extra), (0, 0)))
        scales = [jnp.pad(scales[0], ((0, 0), (0, extra))), scales[1]] if scales else []
    tiles = run.tiles or choose(x.dtype, out_dtype, groups.n, x.shape[0], n, k)
    plan = RowsPlan(
        groups.n,
        x.shape[0],
        n,
        x.dtype,
        out_dtype,
        tiles,
        run.n_processors,
        not run.interpret,
        k=k,
        transposed=transposed,
    )
    y = plan.call(run.interpret)(table(groups, x.shape[0], tiles.span[0]), x, w, *scales)
    return y[:n_rows] if extra else y


@dataclasses.dataclass(frozen=True)
class RowsPlan(Plan):
    """A grouped matmul whose result has the rows of x."""

    k: int
    transposed: bool  # w has the contraction last

    @property
    def by_row(self) -> bool:
        """See `Plan`."""
        return False

    @property
    def out_shape(self) -> tuple[int, int]:
        """See `Plan`."""
        return self.m, self.n

    @property
    def operand_shapes(self) -> tuple:
        """See `Plan`."""
        rows, columns = self.tiles.cta
        return (rows, self.depth), (columns, self.depth) if self.transposed else (self.depth, columns)

    @property
    def grid_columns(self) -> int:
        """Tiles of a cluster along the columns."""
        return -(-self.n // self.tiles.span[1])

    def _n_row_tiles(self, refs: Refs) -> jax.Array:
        return refs.table[FIELDS.index("n_tiles")]

    def n_jobs(self, refs: Refs) -> jax.Array:
        """See `Plan`."""
        return self._n_row_tiles(refs) * self.grid_columns

    def job(self, refs: Refs, linear: jax.Array) -> Job:
        """See `Plan`; the job's `extra` is low, high, end of the table."""
        shape = (self._n_row_tiles(refs), self.grid_columns)
        tile, column_tile = plgpu.planar_snake(linear, shape, self.tiles.minor, self.tiles.raster)
        group, row, low, high, end = (refs.table[tile * len(FIELDS) + i] for i in range(5))
        offset, column = pipeline.first_of_cta(self, (0, column_tile))
        n_steps = jnp.where(end > row, self.k // self.depth, 0)  # the same for both CTAs of a cluster
        return Job(group, row + offset, column, n_steps, (low, high, end))

    def steps(self, job: Job, own_row: int | jax.Array) -> jax.Array:
        """See `Plan`."""
        low, high, _ = job.extra
        row = job.row + own_row
        return jnp.where((low < row + self.tiles.rows) & (row < high), job.n_steps, 0)

    def copies(self, refs: Refs, job: Job, step: jax.Array) -> tuple:
        """See `Plan`."""
        rows, columns = self.tiles.cta
        depth = pl.ds(step * self.depth, self.depth)
        # TMA copies from rows that are multiples of 8; `layout` makes them so, and this says so to the compiler.
        x = refs.x.at[pl.ds(lax.div(job.row, UNIT) * UNIT, rows), depth]
        across = pl.ds(job.column, columns)
        w = refs.w.at[job.group, across, depth] if self.transposed else refs.w.at[job.group, depth, across]
        return (x, w, refs.x_scale.at[step, pl.ds(job.row, rows)]) if self.scaled else (x, w)

    def operands(
        self, refs: Refs, stage: jax.Array, own_row: int | jax.Array, own_column: int | jax.Array, columns: int
    ) -> tuple:
        """See `Plan`."""
        rows = CHUNK_ROWS if self.scaled else self.tiles.rows
        x = refs.x_stages.at[stage, pl.ds(own_row, rows)]
        if self.transposed:
            return x, mosaic_gpu.transpose(refs.w_stages.at[stage, pl.ds(own_column, columns)])
        return x, refs.w_stages.at[stage, :, pl.ds(own_column, columns)]

    def store(self, refs: Refs, job: Job, own_row: int | jax.Array, own_column: int | jax.Array, sums: dict) -> None:
        """See `Plan`."""
        low, high, end = job.extra
        per_row = self.tiles.columns // self.tiles.store_columns
        for i, r in enumerate(range(0, self.tiles.rows, CHUNK_ROWS)):
            row, column = pl.multiple_of(job.row + own_row + r, UNIT), job.column + own_column
            whole = (low <= row) & (row + CHUNK_ROWS <= jnp.minimum(high, end))

            def target(c: int, width: int, row: int | jax.Array = row, column: int | jax.Array = column) -> Any:
                return refs.y.at[pl.ds(row, CHUNK_ROWS), pl.ds(column + c, width)]

            @pl.when(whole)
            def _(i: int = i, r: int = r, target: Callable = target) -> None:
                pipeline.store_staged(self, refs, i * per_row, r, sums, target)

            @pl.when(jnp.logical_not(whole) & (low < row + CHUNK_ROWS) & (row < high))
            def _(r: int = r, row: int | jax.Array = row, column: int | jax.Array = column) -> None:
                for (chunk_row, c), total in sums.items():
                    if chunk_row == r:
                        self._store_border(refs, job, row, column + c, total)

    def _store_border(
        self, refs: Refs, job: Job, row: int | jax.Array, column: int | jax.Array, total: jax.Array
    ) -> None:
        """Writes those rows of a chunk that belong to the job, 0 in those of no group."""
        low, high, end = job.extra
        row_of = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, total.shape, 0), plgpu.Layout.WGMMA)
        values = jnp.where(row_of < end - row, total, 0.0).astype(self.out_dtype)
        if self.on_chip:
            mosaic_gpu.store_rows(values, refs.y, row, column, low, high)
            return
        for i in range(CHUNK_ROWS):

            @pl.when((low <= row + i) & (row + i < high) & (column < self.n))
            def _(i: int = i) -> None:
                refs.y[row + i, pl.ds(column, total.shape[1])] = values[i]
