"""What the grouped kernels for Hopper share, in Pallas Mosaic GPU: a ring of stages, and sums over them.

A CTA stays on its processor and walks over output tiles ("jobs"). One warpgroup loads (TMA): for each block of 128
bytes along the contraction, a tile of either operand and the scales, into the next of a ring of stages; two CTAs of a
cluster that need the same operand load half of it each, for both. The other warpgroups compute, each a part of the
output tile, in chunks of 64 rows by up to 128 columns.

bfloat16: the tensor cores keep the sum. FP8: they sum a chunk's 128 products per output, then the CUDA cores multiply
by the scales and add to the float32 sum that a thread keeps in registers ("promotion", V3 section 3.3.2). Promotion
hides behind the products of the other warpgroups.

How many blocks a job has is known only when the kernel runs; both roles read it from the same table in device memory.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul.tiles import BLOCK, Tiles
from pallas_kernels.in_flight import one_after_another

CHUNK_ROWS = 64  # of one wgmma
STAGE_BYTES = 128  # of a row of an operand, per block of the contraction: what TMA can swizzle
REGISTERS = 65536  # of a processor


@dataclasses.dataclass(frozen=True)
class Run:
    """How a kernel is run."""

    tiles: Tiles | None = None  # chosen by dtypes and sizes unless given
    n_processors: int = 132
    interpret: object = None  # parameters with which it runs on a CPU (JAX 0.11 and later)


RUN = Run()


def check_multiples(name: str, **sizes: int) -> None:
    """Raises ValueError unless every size is a multiple of 128."""
    wrong = {size_name: size for size_name, size in sizes.items() if size % BLOCK or not size}
    if wrong:
        text = ", ".join(f"{size_name}={size}" for size_name, size in wrong.items())
        raise ValueError(
            f"implementation='mosaic_gpu' of {name}: {text}, expected positive multiples of {BLOCK}. Pad the operands "
            "with zeros or use implementation='reference'."
        )


def tiled(columns: int, dtype: DTypeLike) -> tuple:
    """The layout in shared memory that tensor cores and TMA read without bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(min(columns * size, STAGE_BYTES) * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    table: Any  # of jobs, int32
    x: Any
    w: Any
    x_scale: Any
    w_scale: Any
    y: Any
    x_stages: Any
    w_stages: Any
    x_scale_stages: Any
    w_scale_stages: Any
    staging: Any
    loaded: Any  # per stage: its copies have arrived
    free: Any  # per stage: all warpgroups that read it, of both CTAs, are done
    cleared: Any  # foreign rows of a stage have been overwritten with zeros


@dataclasses.dataclass(frozen=True)
class Plan(abc.ABC):
    """All that is known of a call before it runs."""

    n_groups: int
    m: int  # rows of the output, per group if it has one matrix per group
    n: int
    dtype: DTypeLike  # of the operands
    out_dtype: DTypeLike
    tiles: Tiles
    n_processors: int
    on_chip: bool  # interpreted otherwise: no inlined PTX

    @property
    def scaled(self) -> bool:
        """Whether the operands are FP8 codes with scales."""
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def depth(self) -> int:
        """Of a block of the contraction."""
        return STAGE_BYTES // jnp.dtype(self.dtype).itemsize

    @property
    def n_clusters(self) -> int:
        """That run at the same time, each over every n_clusters-th job."""
        return self.n_processors // max(self.tiles.cluster_shape)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First row and column of each chunk of a warpgroup's part of the tile."""
        rows, columns = range(0, self.tiles.rows, CHUNK_ROWS), range(0, self.tiles.columns, self.tiles.chunk_columns)
        return list(itertools.product(rows, columns))

    @property
    def waits_ahead(self) -> bool:
        """Whether a block is waited for while the one before is multiplied.

        With several chunks ptxas would then clear their registers before each product, and spill.
        """
        return self.tiles.ahead and len(self.chunks) == 1 and self.tiles.in_flight == 1

    # What a kernel defines.

    @property
    @abc.abstractmethod
    def by_row(self) -> bool:
        """Whether w has a scale per 1 x 128 as x does, not one per 128 x 128."""

    @property
    @abc.abstractmethod
    def operand_shapes(self) -> tuple:
        """Of a stage of x and of w."""

    @property
    @abc.abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """Of the result."""

    @abc.abstractmethod
    def n_jobs(self, refs: Refs) -> int | jax.Array:
        """How many jobs there are, over all clusters."""

    @abc.abstractmethod
    def job(self, refs: Refs, linear: jax.Array) -> "Job":
        """One of them, for this CTA."""

    @abc.abstractmethod
    def copies(self, refs: Refs, job: "Job", step: jax.Array) -> tuple:
        """What step number `step` of a job loads: slices of x, w, and of the scales that are copied."""

    @abc.abstractmethod
    def operands(
        self, refs: Refs, stage: jax.Array, own_row: int | jax.Array, own_column: int | jax.Array, columns: int
    ) -> tuple:
        """The operands of a product in shared memory, [rows, depth] and [depth, columns]."""

    @abc.abstractmethod
    def store(self, refs: Refs, job: "Job", own_row: int | jax.Array, own_column: int | jax.Array, sums: dict) -> None:
        """Writes a warpgroup's part of the tile."""

    def steps(self, job: "Job", own_row: int | jax.Array) -> int | jax.Array:
        """How many steps of a job a warpgroup computes: none if none of its rows is written."""
        return job.n_steps

    def add_borders(self, refs: Refs, job: "Job", stage: jax.Array, add: Callable) -> tuple:
        """Adds the first steps of a job if these need more than a product: `add(stage)` does the product.

        Returns how many these are, and the next stage.
        """
        return 0, stage

    def call(self, interpret: object) -> Callable:
        """The kernel as a function of table, x, w and, in FP8, x_scale, w_scale."""
        tiles = self.tiles
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct(self.out_shape, self.out_dtype),
            scratch_types=self.scratch(),
            grid=(self.n_clusters,),
            grid_names=("clusters",),
            cluster=(max(tiles.cluster_shape),),
            cluster_names=("cta",),
            n_warpgroups=tiles.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order in which `_refs` takes them."""
        tiles, stages = self.tiles, self.tiles.stages
        staging = (tiles.warpgroups, tiles.store_slots, CHUNK_ROWS, tiles.store_columns)
        x_shape, w_shape = self.operand_shapes
        return [
            plgpu.SMEM((stages, *x_shape), self.dtype, transforms=tiled(x_shape[1], self.dtype)),
            plgpu.SMEM((stages, *w_shape), self.dtype, transforms=tiled(w_shape[1], self.dtype)),
            plgpu.SMEM(staging, self.out_dtype, transforms=tiled(tiles.store_columns, self.out_dtype)),
            plgpu.Barrier(num_arrivals=2 + self.scaled + self.by_row, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=tiles.warpgroups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=tiles.warpgroups),
            *([plgpu.SMEM((stages, tiles.cta[0]), jnp.float32)] if self.scaled else []),
            *([plgpu.SMEM((stages, tiles.cta[1]), jnp.float32)] if self.by_row else []),
        ]


@dataclasses.dataclass(frozen=True)
class Job:
    """A tile of the output of one CTA."""

    group: jax.Array
    row: jax.Array  # its first, of the matrix that is written
    column: jax.Array
    n_steps: int | jax.Array  # blocks of the contraction
    extra: tuple = ()  # what else its kernel needs


def _kernel(plan: Plan, *refs: Any) -> None:
    named = _refs(plan, refs)
    lax.cond(
        lax.axis_index("warpgroup") < plan.tiles.warpgroups,
        functools.partial(_compute, plan, named),
        functools.partial(_load, plan, named),
    )


def _refs(plan: Plan, refs: tuple) -> Refs:
    n_inputs = 5 if plan.scaled else 3
    table, x, w, *scales = refs[:n_inputs]
    y, x_stages, w_stages, staging, loaded, free, cleared, *scale_stages = refs[n_inputs:]
    x_scale, w_scale = scales or (None, None)
    x_scale_stages, w_scale_stages = (*scale_stages, None, None)[:2]
    return Refs(
        table, x, w, x_scale, w_scale, y, x_stages, w_stages, x_scale_stages, w_scale_stages, staging, loaded, free,
        cleared,
    )  # fmt: skip


def _my_jobs(plan: Plan, refs: Refs) -> jax.Array:
    """How many jobs this cluster has."""
    return lax.div(plan.n_jobs(refs) - lax.axis_index("clusters") + plan.n_clusters - 1, plan.n_clusters)


def _job(plan: Plan, refs: Refs, i: jax.Array) -> Job:
    return plan.job(refs, lax.axis_index("clusters") + i * plan.n_clusters)


def first_of_cta(plan: Plan, indices: tuple) -> list:
    """First row and column of this CTA's part of the cluster's tile number `indices`."""
    cta = lax.axis_index("cta")
    shapes = zip(indices, plan.tiles.cta, plan.tiles.cluster_shape, strict=True)
    return [(index * ctas + (cta if ctas > 1 else 0)) * size for index, size, ctas in shapes]


def next_stage(plan: Plan, stage: jax.Array) -> jax.Array:
    """Returns the stage after this one in the ring."""
    return jnp.where(stage == plan.tiles.stages - 1, 0, stage + 1)


def _load(plan: Plan, refs: Refs) -> None:
    """The loading warpgroup, of which one warp works: the others would take issue slots from those that compute."""
    plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")
    mosaic_gpu.by_one_warp(functools.partial(_load_jobs, plan, refs))


def _load_jobs(plan: Plan, refs: Refs) -> None:
    """Fills stage after stage, each as soon as it is free."""

    def load_job(i: jax.Array, state: tuple) -> tuple:
        job = _job(plan, refs, i)

        def load_step(step: jax.Array, state: tuple) -> tuple:
            stage, n_loaded = state
            pl.when(n_loaded >= plan.tiles.stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
            _copy_stage(plan, refs, stage, plan.copies(refs, job, step))
            return next_stage(plan, stage), n_loaded + 1

        return lax.fori_loop(0, job.n_steps, load_step, state)

    stage, n_loaded = lax.fori_loop(0, _my_jobs(plan, refs), load_job, (jnp.int32(0), jnp.int32(0)))

    # The other CTA of the cluster may still read or signal: leave only when every stage has come back.
    def wait(_, stage: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs.free.at[stage])
        return next_stage(plan, stage)

    oldest = jnp.where(n_loaded >= plan.tiles.stages, stage, 0)
    lax.fori_loop(0, jnp.minimum(n_loaded, plan.tiles.stages), wait, oldest)


def _copy_stage(plan: Plan, refs: Refs, stage: jax.Array, sources: tuple) -> None:
    """Starts the copies of one step; what both CTAs of a cluster need is loaded once."""
    shared = {"rows": (None, "cta"), "columns": ("cta", None), "": (None, None)}[plan.tiles.cluster]
    targets = (refs.x_stages, refs.w_stages, refs.x_scale_stages, refs.w_scale_stages)
    for source, target, axes in zip(sources, targets, (*shared, None, None), strict=False):
        plgpu.copy_gmem_to_smem(source, target.at[stage], refs.loaded.at[stage], collective_axes=axes)


def compute_registers(tiles: Tiles) -> int:
    """Registers of a thread that computes: what is left of the CTA's by the loading warpgroup.

    A CTA starts with a multiple of 8 registers per thread, and asking for more than it started with waits for ever.
    """
    at_start = REGISTERS // (128 * (tiles.warpgroups + 1)) // 8 * 8 * (tiles.warpgroups + 1)
    return min((at_start - tiles.producer_registers) // tiles.warpgroups // 8 * 8, 240)


def _compute(plan: Plan, refs: Refs) -> None:
    """A computing warpgroup: its part of each job's sums, then its part of the output."""
    tiles = plan.tiles
    plgpu.set_max_registers(compute_registers(tiles), action="increase")
    warpgroup = lax.axis_index("warpgroup")
    own_row = warpgroup * tiles.rows if tiles.stack == "rows" else 0
    own_column = warpgroup * tiles.columns if tiles.stack == "columns" else 0
    sum_up = _promoted_sums if plan.scaled else _sums

    def compute_job(i: jax.Array, stage: jax.Array) -> jax.Array:
        job = _job(plan, refs, i)
        stage, sums = sum_up(plan, refs, job, stage, own_row, own_column)
        plan.store(refs, job, own_row, own_column, sums)
        return stage

    lax.fori_loop(0, _my_jobs(plan, refs), compute_job, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _sums(
    plan: Plan, refs: Refs, job: Job, stage: jax.Array, own_row: int | jax.Array, own_column: int | jax.Array
) -> tuple:
    """The sums of a job's chunks without scales; the tensor cores keep them all the while."""
    n_steps = plan.steps(job, own_row)

    def multiply(products: Any) -> Any:
        def add_alone(stage: jax.Array) -> None:
            plgpu.wgmma(products, *plan.operands(refs, stage, own_row, own_column, plan.tiles.columns))
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.free.at[stage])

        n_border, begin = plan.add_borders(refs, job, stage, add_alone)

        def add(step: jax.Array, state: tuple) -> tuple:
            stage, previous = state
            plgpu.barrier_wait(refs.loaded.at[stage])
            plgpu.wgmma(products, *plan.operands(refs, stage, own_row, own_column, plan.tiles.columns))
            plgpu.wgmma_wait(1)  # the products before these are done
            pl.when(step > n_border)(lambda: plgpu.barrier_arrive(refs.free.at[previous]))
            return next_stage(plan, stage), stage

        end, last = lax.fori_loop(n_border, n_steps, add, (begin, begin))
        plgpu.wgmma_wait(0)
        pl.when(n_steps > n_border)(lambda: plgpu.barrier_arrive(refs.free.at[last]))
        return products[...], end

    sums, end = pl.run_scoped(multiply, plgpu.ACC((plan.tiles.rows, plan.tiles.columns), jnp.float32))
    end = _pass_by(plan, refs, n_steps, job, end)
    return end, {(r, c): sums[r : r + CHUNK_ROWS, c : c + plan.tiles.chunk_columns] for r, c in plan.chunks}


def _pass_by(plan: Plan, refs: Refs, n_done: int | jax.Array, job: Job, stage: jax.Array) -> jax.Array:
    """Gives back the stages of the other steps of a job, unread; returns the next stage."""

    def give_back(_, stage: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs.loaded.at[stage])
        plgpu.commit_smem()  # so that no warp lags by a whole turn of the ring
        plgpu.barrier_arrive(refs.free.at[stage])
        return next_stage(plan, stage)

    return lax.fori_loop(n_done, job.n_steps, give_back, stage)


def _promoted_sums(
    plan: Plan, refs: Refs, job: Job, stage: jax.Array, own_row: int | jax.Array, own_column: int | jax.Array
) -> tuple:
    """The sums of a job's chunks, scaled and added up in float32 after each block."""

    def add(step: jax.Array, state: tuple) -> tuple:
        stage, block_scales, sums = state
        added = _add_block(plan, refs, job, step, stage, own_row, own_column, block_scales, sums)
        return next_stage(plan, stage), *added

    n_steps = plan.steps(job, own_row)
    if plan.waits_ahead:
        pl.when(n_steps > 0)(lambda: plgpu.barrier_wait(refs.loaded.at[stage]))
    zero = plgpu.layout_cast(jnp.zeros((CHUNK_ROWS, plan.tiles.chunk_columns), jnp.float32), plgpu.Layout.WGMMA)
    state = stage, _block_scales(plan, refs, job, jnp.int32(0), own_column), dict.fromkeys(plan.chunks, zero)
    stage, _, sums = lax.fori_loop(0, n_steps, add, state)
    return _pass_by(plan, refs, n_steps, job, stage), sums


def _add_block(
    plan: Plan,
    refs: Refs,
    job: Job,
    step: jax.Array,
    stage: jax.Array,
    own_row: int | jax.Array,
    own_column: int | jax.Array,
    block_scales: dict,
    sums: dict,
) -> tuple[dict, dict]:
    """Adds a block of the contraction to the sums of a warpgroup's chunks; returns the scales for the next as well.

    While the tensor cores work on a chunk, scales are read, and the next block is waited for with `waits_ahead`; with
    two products in flight they also work on the next chunk while this one is promoted.
    """
    if not plan.waits_ahead:
        plgpu.barrier_wait(refs.loaded.at[stage])
    scales: list = []
    upcoming = _block_scales(plan, refs, job, step + 1, own_column)

    def begin(accumulator: Any, i: int) -> None:
        r, c = plan.chunks[i]
        plgpu.wgmma(accumulator, *plan.operands(refs, stage, own_row + r, own_column + c, plan.tiles.chunk_columns))
        if i == 0:
            scales.append(_scales(plan, refs, stage, own_row, own_column, block_scales))

    def finish(products: jax.Array, i: int, sums: dict) -> dict:
        chunk = plan.chunks[i]
        if i == len(sums) - 1:  # One thread speaks for its warpgroup: a wgmma has all four warps in step.
            plgpu.barrier_arrive(refs.free.at[stage])
        return sums | {chunk: _promoted(plan, sums[chunk], products, *chunk, *scales[0])}

    def wait_ahead() -> None:
        if plan.waits_ahead:
            following = refs.loaded.at[next_stage(plan, stage)]
            pl.when(step + 1 < job.n_steps)(lambda: plgpu.barrier_wait(following))

    shape = CHUNK_ROWS, plan.tiles.chunk_columns
    sums = one_after_another(len(sums), plan.tiles.in_flight, shape, begin, finish, wait_ahead, sums)
    return upcoming, sums


def _block_scales(plan: Plan, refs: Refs, job: Job, step: jax.Array, own_column: int | jax.Array) -> dict:
    """The scales of w per 128 x 128 by first column; none if w has a scale per 1 x 128.

    They come from global memory, which may take longer than a chunk at the tensor cores: they are read a step ahead.
    """
    if plan.by_row:
        return {}
    _, last_row, last_step = (size - 1 for size in refs.w_scale.shape)  # a tile may reach beyond the matrix
    step = jnp.minimum(step, last_step)
    rows = {
        c: jnp.minimum(lax.div(job.column + own_column + c, BLOCK), last_row)
        for c in range(0, plan.tiles.columns, BLOCK)
    }
    return {c: refs.w_scale[job.group, row, step] for c, row in rows.items()}


def _scales(
    plan: Plan,
    refs: Refs,
    stage: jax.Array,
    own_row: int | jax.Array,
    own_column: int | jax.Array,
    block_scales: dict,
) -> tuple[dict, dict]:
    """The scales of x by first row of a chunk, and those of w by first column of a chunk."""
    rows = {
        r: mosaic_gpu.load(refs.x_scale_stages.at[stage, pl.ds(own_row + r, CHUNK_ROWS)], plgpu.Layout.WGMMA.reduce(1))
        for r in range(0, plan.tiles.rows, CHUNK_ROWS)
    }
    if not plan.by_row:
        return rows, block_scales
    unit = plan.tiles.chunk_columns
    at = {c: refs.w_scale_stages.at[stage, pl.ds(own_column + c, unit)] for c in range(0, plan.tiles.columns, unit)}
    return rows, {c: mosaic_gpu.load(ref, plgpu.Layout.WGMMA.reduce(0)) for c, ref in at.items()}


def _promoted(plan: Plan, total: jax.Array, products: Any, r: int, c: int, rows: dict, columns: dict) -> jax.Array:
    """total + products * scales, in float32."""
    if plan.by_row:
        row_scale, products = rows[r], products * lax.broadcast_in_dim(columns[c], products.shape, [1])
    else:
        row_scale = rows[r] * columns[c // BLOCK * BLOCK]
    return total + products * lax.broadcast_in_dim(row_scale, products.shape, [0])


def store_staged(plan: Plan, refs: Refs, first_unit: int, r: int, sums: dict, target: Callable) -> None:
    """Copies 64 rows of a warpgroup's part to `target(first column, columns)`, by way of shared memory."""
    tiles = plan.tiles
    for i, c in enumerate(range(0, tiles.columns, tiles.store_columns), first_unit):
        buffer = refs.staging.at[lax.axis_index("warpgroup"), i % tiles.store_slots]
        plgpu.wait_smem_to_gmem(tiles.store_slots - 1, wait_read_only=True)
        for (chunk_row, chunk_column), total in sums.items():
            low, high = max(c, chunk_column), min(c + tiles.store_columns, chunk_column + tiles.chunk_columns)
            if chunk_row == r and low < high:
                values = total[:, low - chunk_column : high - chunk_column].astype(plan.out_dtype)
                buffer.at[:, pl.ds(low - c, high - low)][...] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target(c, tiles.store_columns))
