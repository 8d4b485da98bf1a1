"""The grouped weight gradient for Hopper, whose result has one matrix per group: bfloat16 and FP8.

    dw[g] = sum_{r in group g}  x[r]^T dy[r]

Each job is a tile of one group's matrix; its contraction runs over the rows of the group, in blocks of 64 (bfloat16) or
128 (FP8); see `pipeline.py`.

bfloat16: blocks begin at a multiple of 8 rows, so the first and the last may hold rows of other groups. These two come
first, and the computing warpgroups overwrite the foreign rows in shared memory with zeros before they multiply: a
product with zero would keep a NaN. FP8: every group begins at a multiple of 128 rows, so no block has foreign rows.
"""

import dataclasses
import functools
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
from pallas_kernels.grouped_matmul.layout import UNIT, Groups, Scaled
from pallas_kernels.grouped_matmul.pipeline import CHUNK_ROWS, RUN, Job, Plan, Refs, Run
from pallas_kernels.grouped_matmul.tiles import choose_for_weights

PIECE = 64  # columns that are cleared at once


def grouped_weight_gradient(
    x_AD: jax.Array,
    dy_AF: jax.Array,
    groups: Groups,
    *,
    out_dtype: DTypeLike = jnp.float32,
    run: Run = RUN,
) -> jax.Array:
    """Returns dw [X, D, F]; arguments as in `pallas_kernels.grouped_matmul.grouped_weight_gradient`.

    A that is not a multiple of 8 is filled up first, which costs a copy.
    """
    if x_AD.dtype != jnp.bfloat16 or jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(
            f"implementation='mosaic_gpu' of grouped_weight_gradient: {x_AD.dtype} to {jnp.dtype(out_dtype).name}, "
            "expected bfloat16 to bfloat16 or float32. Cast the operands or use implementation='reference'."
        )
    d, f = x_AD.shape[1], dy_AF.shape[1]
    pipeline.check_multiples("grouped_weight_gradient", D=d, F=f)
    extra = -x_AD.shape[0] % UNIT
    if extra:
        x_AD, dy_AF = (jnp.pad(rows, ((0, extra), (0, 0))) for rows in (x_AD, dy_AF))
    return _run((x_AD, dy_AF), groups, d, f, out_dtype, run)


def grouped_fp8_weight_gradient(
    x_t: Scaled, dy_t: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.float32, run: Run = RUN
) -> jax.Array:
    """Returns dw [X, D, F]; arguments as in `pallas_kernels.grouped_matmul.grouped_fp8_weight_gradient`."""
    d, f = x_t.codes.shape[0], dy_t.codes.shape[0]
    pipeline.check_multiples("grouped_fp8_weight_gradient", D=d, F=f)
    return _run((x_t.codes, dy_t.codes, x_t.scale, dy_t.scale), groups, d, f, out_dtype, run)


def _run(operands: tuple, groups: Groups, d: int, f: int, out_dtype: DTypeLike, run: Run) -> jax.Array:
    dtype = operands[0].dtype
    tiles = run.tiles or choose_for_weights(dtype, out_dtype)
    plan = WeightsPlan(groups.n, d, f, dtype, out_dtype, tiles, run.n_processors, not run.interpret)
    table = jnp.stack(groups.bounds(), axis=1).reshape(-1).astype(jnp.int32)
    return plan.call(run.interpret)(table, *operands)


@dataclasses.dataclass(frozen=True)
class WeightsPlan(Plan):
    """A grouped matmul whose result has one matrix per group."""

    @property
    def by_row(self) -> bool:
        """See `Plan`."""
        return self.scaled

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """See `Plan`."""
        return self.n_groups, self.m, self.n

    @property
    def operand_shapes(self) -> tuple:
        """See `Plan`."""
        rows, columns = self.tiles.cta
        if self.scaled:  # the contraction comes last
            return (rows, self.depth), (columns, self.depth)
        return (self.depth, rows), (self.depth, columns)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of a cluster along rows and columns of a group's matrix."""
        rows, columns = self.tiles.span
        return -(-self.m // rows), -(-self.n // columns)

    def n_jobs(self, refs: Refs) -> int:
        """See `Plan`."""
        return self.n_groups * self.grid[0] * self.grid[1]

    def job(self, refs: Refs, linear: jax.Array) -> Job:
        """See `Plan`; the job's `extra` is first row and end of the group, and where its blocks begin."""
        per_group = self.grid[0] * self.grid[1]
        group = lax.div(linear, per_group)
        indices = plgpu.planar_snake(lax.rem(linear, per_group), self.grid, self.tiles.minor, self.tiles.raster)
        row, column = pipeline.first_of_cta(self, indices)
        first, end = refs.table[2 * group], refs.table[2 * group + 1]
        begin = lax.div(first, UNIT) * UNIT
        n_steps = jnp.where(end > first, lax.div(end - begin + self.depth - 1, self.depth), 0)
        return Job(group, row, column, n_steps, (first, end, begin))

    def _borders(self, job: Job) -> tuple:
        """Whether the first and whether the last block, if it is another one, hold foreign rows."""
        first, end, begin = job.extra
        only = job.n_steps == 1
        partial = lax.rem(end - begin, self.depth) != 0
        head = (job.n_steps > 0) & ((first > begin) | (only & partial))
        tail = (job.n_steps > 1) & partial
        return head.astype(jnp.int32), tail.astype(jnp.int32)

    def add_borders(self, refs: Refs, job: Job, stage: jax.Array, add: Callable) -> tuple:
        """Adds the blocks with foreign rows, after these have been overwritten with zeros."""

        def add_border(step: jax.Array, stage: jax.Array) -> jax.Array:
            plgpu.barrier_wait(refs.loaded.at[stage])
            self._clear(refs, job, step, stage)
            add(stage)
            return pipeline.next_stage(self, stage)

        head, tail = self._borders(job)
        return head + tail, lax.fori_loop(0, head + tail, add_border, stage)

    def _first_row(self, job: Job, step: jax.Array) -> jax.Array:
        """First row of the block of a step: blocks with foreign rows, then the others in order."""
        *_, begin = job.extra
        head, tail = self._borders(job)
        n_border = head + tail
        border = jnp.where((step == 0) & (head == 1), 0, job.n_steps - 1)
        return begin + jnp.where(step < n_border, border, step - n_border + head) * self.depth

    def copies(self, refs: Refs, job: Job, step: jax.Array) -> tuple:
        """See `Plan`."""
        rows, columns = (pl.ds(at, size) for at, size in zip((job.row, job.column), self.tiles.cta, strict=True))
        if self.scaled:
            first, *_ = job.extra
            block = lax.div(first, self.depth) + step
            depth = pl.ds(block * self.depth, self.depth)
            scales = refs.x_scale.at[block, rows], refs.w_scale.at[block, columns]
            return refs.x.at[rows, depth], refs.w.at[columns, depth], *scales
        row = lax.div(self._first_row(job, step), UNIT) * UNIT  # as `begin` is; this says so to the compiler
        depth = pl.ds(row, self.depth)
        return refs.x.at[depth, rows], refs.w.at[depth, columns]

    def _clear(self, refs: Refs, job: Job, step: jax.Array, stage: jax.Array) -> None:
        """The warpgroups share the columns of both operands among them, then wait for one another."""
        first, end, _ = job.extra
        row = self._first_row(job, step)
        warpgroup, warpgroups = lax.axis_index("warpgroup"), self.tiles.warpgroups
        for stages, width in zip((refs.x_stages, refs.w_stages), self.tiles.cta, strict=True):
            for piece in range(0, width // PIECE, warpgroups):
                column = (piece + warpgroup) * PIECE
                pl.when(column < width)(functools.partial(self._clear_piece, stages.at[stage], column, row, first, end))
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.cleared)
        plgpu.barrier_wait(refs.cleared)

    def _clear_piece(
        self,
        block: Any,
        column: int | jax.Array,
        row: int | jax.Array,
        first: int | jax.Array,
        end: int | jax.Array,
    ) -> None:
        """Zeros in the rows of some columns of a block, which begins at `row`, that are not in first ... end - 1."""
        part = block.at[:, pl.ds(column, PIECE)]
        row_of = lax.broadcasted_iota(jnp.int32, (self.depth, PIECE), 0)
        row_of = row + plgpu.layout_cast(row_of, plgpu.Layout.WGMMA)
        values = mosaic_gpu.load(part, plgpu.Layout.WGMMA)
        part[...] = jnp.where((first <= row_of) & (row_of < end), values, jnp.zeros((), self.dtype))

    def operands(
        self, refs: Refs, stage: jax.Array, own_row: int | jax.Array, own_column: int | jax.Array, columns: int
    ) -> tuple:
        """See `Plan`."""
        if self.scaled:
            w = refs.w_stages.at[stage, pl.ds(own_column, columns)]
            return refs.x_stages.at[stage, pl.ds(own_row, CHUNK_ROWS)], mosaic_gpu.transpose(w)
        x = refs.x_stages.at[stage, :, pl.ds(own_row, self.tiles.rows)]
        return mosaic_gpu.transpose(x), refs.w_stages.at[stage, :, pl.ds(own_column, columns)]

    def store(self, refs: Refs, job: Job, own_row: int | jax.Array, own_column: int | jax.Array, sums: dict) -> None:
        """See `Plan`."""
        per_row = self.tiles.columns // self.tiles.store_columns
        for i, r in enumerate(range(0, self.tiles.rows, CHUNK_ROWS)):
            rows, column = pl.ds(job.row + own_row + r, CHUNK_ROWS), job.column + own_column

            def target(c: int, width: int, rows: Any = rows, column: int | jax.Array = column) -> Any:
                return refs.y.at[job.group, rows, pl.ds(column + c, width)]

            pipeline.store_staged(self, refs, i * per_row, r, sums, target)
