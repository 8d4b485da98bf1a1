"""Products with FP8 weights for Hopper, in Pallas Mosaic GPU: codes are read once and become bfloat16 in registers.

    y[r, n] = sum over blocks b of the contraction:  scale[n, b] * sum over k in b of x[r, k] code[n, k]

Few rows meet many weights, so the weights are the operand with 64 rows and the product is transposed: 64 outputs by as
many rows of x as a job has. A code becomes bfloat16 exactly; its block's scale multiplies the block's sum in float32.

A CTA stays on its processor and walks over jobs: a tile of rows of one group (`grouped_matmul.layout`) by some outputs.
One warpgroup loads blocks of codes and of x into a ring of stages (TMA); of the others some lie side by side along the
outputs, and some share the contraction: each takes every n-th block, and their sums are added in shared memory.

`swiglu` multiplies with two matrices, gate and up, at once: a job has outputs of both, and what it writes is the hidden
layer, silu(gate) * up times the factor of the row, in the order in which the product with down reads it.
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
from pallas_kernels.coded_matmul.tiles import BLOCK, UNIT_COLUMNS, Tiles, choose, choose_gated
from pallas_kernels.grouped_matmul.layout import FIELDS, UNIT, Groups, Scaled, table

SWIZZLE = 128  # bytes
REGISTERS = 65536  # of a processor
LOADER_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    m: int  # rows of x
    n: int
    k: int
    block_rows: int  # of a block of codes: outputs with one scale
    out_dtype: DTypeLike
    tiles: Tiles
    n_matrices: int  # that a row is multiplied with: 2 are gate and up
    n_ctas: int
    on_chip: bool  # interpreted otherwise: no inlined PTX

    @property
    def columns(self) -> int:
        """Outputs of a job."""
        return UNIT_COLUMNS * self.tiles.across

    @property
    def warpgroups(self) -> int:
        """That compute."""
        return self.tiles.across * self.tiles.along

    @property
    def compute_registers(self) -> int:
        """Registers of a thread that computes: what is left of the CTA's by the loading warpgroup."""
        at_start = REGISTERS // (128 * (self.warpgroups + 1)) // 8 * 8 * (self.warpgroups + 1)
        return min((at_start - LOADER_REGISTERS) // self.warpgroups // 8 * 8, 240)

    def call(self, interpret: object) -> Callable:
        """The kernel as a function of table, x, codes as int8, scales, and the factors of rows of two matrices.

        Its result is [parts * m, n].
        """
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct((self.tiles.parts * self.m, self.n), self.out_dtype),
            scratch_types=self.scratch(),
            grid=(self.n_ctas,),
            grid_names=("ctas",),
            n_warpgroups=self.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers, in the order of `Refs`."""
        rows, stages, columns = self.tiles.rows, self.tiles.stages, self.n_matrices * self.columns
        swizzled = plgpu.SwizzleTransform(SWIZZLE)
        others = max(self.tiles.along - 1, 1)  # that share a contraction with the first
        return [
            plgpu.SMEM((stages, rows, BLOCK), jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), swizzled)),
            plgpu.SMEM((stages, columns, BLOCK), jnp.int8, transforms=(plgpu.TilingTransform((8, 128)), swizzled)),
            plgpu.SMEM((others, columns if self.tiles.along > 1 else 8, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + self.n_matrices, num_barriers=stages),
            plgpu.Barrier(num_arrivals=self.tiles.across, num_barriers=stages),
            plgpu.Barrier(num_arrivals=others, num_barriers=self.tiles.across),
            plgpu.Barrier(num_arrivals=1, num_barriers=self.tiles.across),
        ]


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    table: Any  # of row tiles, int32
    x: Any  # [m, k]
    codes: tuple  # one or two: [matrices, n, k]
    scales: tuple  # of each: [matrices, blocks of n, blocks of k]
    factor: Any  # of rows, [m + rows of a tile], float32; None for one matrix
    y: Any  # [parts * m, n]
    x_stages: Any
    code_stages: Any
    sums: Any  # of the warpgroups that share a contraction with the first
    loaded: Any  # per stage
    free: Any  # per stage
    summed: Any  # per warpgroup of a row: the others' sums are there
    added: Any  # and have been read


@dataclasses.dataclass(frozen=True)
class Job:
    """A tile of the result."""

    matrix: jax.Array
    row: jax.Array
    column: jax.Array
    low: jax.Array  # of the rows that are written the first, the one after the last, and the first that is 0
    high: jax.Array
    end: jax.Array
    first_block: jax.Array
    n_blocks: jax.Array
    part: jax.Array


def coded_matmul(
    x_AK: jax.Array,
    w: Scaled,
    groups: Groups,
    *,
    block_rows: int = BLOCK,
    out_dtype: DTypeLike = jnp.bfloat16,
    tiles: Tiles | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> jax.Array:
    """Returns y [A, N]; arguments as in `pallas_kernels.coded_matmul.coded_matmul`.

    A that is not a multiple of 8 is filled up first, which costs a copy.

    Args:
        x_AK, w, groups, block_rows, out_dtype: see there.
        tiles: chosen by the sizes unless given.
        n_processors: of the chip.
        interpret: parameters with which the kernel runs on a CPU (JAX 0.11 and later).
    """
    x = _whole(mosaic_gpu.evens_first(x_AK))
    n, k = w.codes.shape[1:]
    tiles = tiles or choose(groups.n, len(x_AK), n, k, n_processors)
    y = multiplied(x, (w,), None, groups, block_rows, tiles, n_processors, interpret, out_dtype)
    return y[: len(x_AK)]


def experts(
    x_AK: jax.Array,
    weights: tuple[Scaled, Scaled, Scaled],
    factor_A: jax.Array,
    groups: Groups,
    *,
    block_rows: tuple[int, int] = (BLOCK, BLOCK),
    tiles: tuple[Tiles, Tiles] | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> jax.Array:
    """Returns y [A, K]; arguments as in `pallas_kernels.coded_matmul.coded_experts`.

    Many rows are multiplied with gate and with up one after the other, whose sums are too many for one warpgroup.

    Args:
        x_AK, weights, factor_A, groups: see there.
        block_rows: of gate and up, and of down.
        tiles: of the first product and of the second, chosen by the sizes unless given.
        n_processors, interpret: as for `coded_matmul`.
    """
    gate, up, down = weights
    (n_rows, k), f = x_AK.shape, gate.codes.shape[1]
    run = functools.partial(multiplied, n_processors=n_processors, interpret=interpret)
    x = _whole(mosaic_gpu.evens_first(x_AK))
    factor = jnp.pad(factor_A.astype(jnp.float32), (0, len(x) - n_rows))
    first, second = tiles or (choose_gated(groups.n, n_rows, f, k, n_processors), None)
    if first is None:
        by_gate, by_up = (
            run(x, (w,), None, groups, block_rows[0], choose(groups.n, n_rows, f, k, n_processors)) for w in (gate, up)
        )
        hidden = mosaic_gpu.evens_first(jax.nn.silu(by_gate) * by_up * factor[:, None].astype(x.dtype))
    else:
        hidden = run(x, (gate, up), factor, groups, block_rows[0], first)
    second = second or choose(groups.n, n_rows, k, f, n_processors)
    return run(hidden, (down,), None, groups, block_rows[1], second)[:n_rows]


def _whole(x_AK: jax.Array) -> jax.Array:
    """Fills rows up to a multiple of 8."""
    return jnp.pad(x_AK, ((0, -len(x_AK) % UNIT), (0, 0)))


def multiplied(
    x: jax.Array,
    weights: tuple[Scaled, ...],
    factor: jax.Array | None,
    groups: Groups,
    block_rows: int,
    tiles: Tiles,
    n_processors: int,
    interpret: object,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Returns x times one matrix, [m, n], or the hidden layer of gate and up with the evens first; so is x."""
    m, (_, n, k) = len(x), weights[0].codes.shape
    of_parts = out_dtype if tiles.parts == 1 else jnp.float32
    # A CTA has a processor to itself, also one that has no job: where there are few, others are left to other kernels.
    most_jobs = (-(-m // tiles.rows) + groups.n - 1) * -(-n // (UNIT_COLUMNS * tiles.across)) * tiles.parts
    n_ctas = min(n_processors, most_jobs)
    plan = Plan(m, n, k, block_rows, of_parts, tiles, len(weights), n_ctas, not interpret)
    codes = (lax.bitcast_convert_type(w.codes, jnp.int8) for w in weights)
    more = () if factor is None else (jnp.pad(factor, (0, tiles.rows)),)
    y = plan.call(interpret)(table(groups, m, tiles.rows), x, *codes, *(w.scale for w in weights), *more)
    return jnp.sum(y.reshape(tiles.parts, m, n), axis=0).astype(out_dtype) if tiles.parts > 1 else y


def _kernel(plan: Plan, table: Any, x: Any, *refs: Any) -> None:
    n = plan.n_matrices
    codes, scales, rest = refs[:n], refs[n : 2 * n], refs[2 * n :]
    factor, rest = (rest[0], rest[1:]) if n > 1 else (None, rest)
    named = Refs(table, x, codes, scales, factor, *rest)
    lax.cond(
        lax.axis_index("warpgroup") < plan.warpgroups,
        functools.partial(_compute, plan, named),
        functools.partial(_load, plan, named),
    )


def _my_jobs(plan: Plan, refs: Refs) -> jax.Array:
    """How many jobs this CTA has: every n-th one."""
    per_tile = -(-plan.n // plan.columns) * plan.tiles.parts
    n_jobs = refs.table[FIELDS.index("n_tiles")] * per_tile
    return lax.div(n_jobs - lax.axis_index("ctas") + plan.n_ctas - 1, plan.n_ctas)


def _tile(plan: Plan, refs: Refs, i: jax.Array) -> tuple[jax.Array, ...]:
    """What the table says of the tile of this CTA's i-th job; the last one's where there is no such job."""
    per_tile = -(-plan.n // plan.columns) * plan.tiles.parts
    tile = lax.div(lax.axis_index("ctas") + i * plan.n_ctas, per_tile)
    tile = jnp.minimum(tile, refs.table.shape[0] // len(FIELDS) - 1)
    return tuple(refs.table[tile * len(FIELDS) + n] for n in range(5))


def _job(plan: Plan, i: jax.Array, tile: tuple[jax.Array, ...]) -> Job:
    """This CTA's i-th job, of which the table says `tile`."""
    linear, n_columns = lax.axis_index("ctas") + i * plan.n_ctas, -(-plan.n // plan.columns)
    rest = lax.rem(linear, n_columns * plan.tiles.parts)
    column, part = lax.div(rest, plan.tiles.parts), lax.rem(rest, plan.tiles.parts)
    matrix, row, low, high, end = tile
    blocks = plan.k // BLOCK
    first = lax.div(part * blocks, plan.tiles.parts)
    has_rows = end > jnp.maximum(row, low)  # the rows after all groups may begin in the same 8 as the last group ends
    n_blocks = jnp.where(has_rows, lax.div((part + 1) * blocks, plan.tiles.parts) - first, 0)
    return Job(matrix, row, column * plan.columns, low, high, end, first, n_blocks, part)


def _load(plan: Plan, refs: Refs) -> None:
    """The loading warpgroup, of which one warp works."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    mosaic_gpu.by_one_warp(functools.partial(_load_jobs, plan, refs))


def _load_jobs(plan: Plan, refs: Refs) -> None:
    """Fills stage after stage, each as soon as it is free."""

    def load_job(i: jax.Array, state: tuple) -> tuple:
        n_loaded, tile = state
        job, following = _job(plan, i, tile), _tile(plan, refs, i + 1)  # from global memory, so read early
        rows = pl.ds(lax.div(job.row, UNIT) * UNIT, plan.tiles.rows)  # a multiple of 8, also for the compiler

        def load_block(step: jax.Array, n_loaded: jax.Array) -> jax.Array:
            stage, depth = lax.rem(n_loaded, plan.tiles.stages), pl.ds((job.first_block + step) * BLOCK, BLOCK)
            pl.when(n_loaded >= plan.tiles.stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
            loaded = refs.loaded.at[stage]
            for n, codes in enumerate(refs.codes):
                target = refs.code_stages.at[stage, pl.ds(n * plan.columns, plan.columns)]
                plgpu.copy_gmem_to_smem(codes.at[job.matrix, pl.ds(job.column, plan.columns), depth], target, loaded)
            plgpu.copy_gmem_to_smem(refs.x.at[rows, depth], refs.x_stages.at[stage], loaded)
            return n_loaded + 1

        return lax.fori_loop(0, job.n_blocks, load_block, n_loaded), following

    state = jnp.int32(0), _tile(plan, refs, jnp.int32(0))
    n_loaded, _ = lax.fori_loop(0, _my_jobs(plan, refs), load_job, state)

    def wait(i: jax.Array, _: None) -> None:
        plgpu.barrier_wait(refs.free.at[lax.rem(i, plan.tiles.stages)])

    lax.fori_loop(jnp.maximum(n_loaded - plan.tiles.stages, 0), n_loaded, wait, None)


def _compute(plan: Plan, refs: Refs) -> None:
    """A computing warpgroup: its blocks of each job; the first of those that share a contraction writes the result."""
    plgpu.set_max_registers(plan.compute_registers, action="increase")
    warpgroup = lax.axis_index("warpgroup")
    beside, turn = lax.rem(warpgroup, plan.tiles.across), lax.div(warpgroup, plan.tiles.across)

    def compute_job(i: jax.Array, state: tuple) -> tuple:
        n_before, tile, next_tile, scale = state
        job = _job(plan, i, tile)
        n_after = n_before + job.n_blocks
        # What the next job needs first lies in global memory: the table is read two jobs ahead, the scale one.
        following = _tile(plan, refs, i + 2)
        next_scale = _scale(plan, refs, _job(plan, i + 1, next_tile), _first(plan, n_after, turn), beside)
        factor = _factor(plan, refs, job)
        totals = _sums(plan, refs, job, n_before, beside, turn, scale)
        if plan.tiles.along == 1:
            _store(plan, refs, job, beside, totals, factor)
        else:
            pl.when(turn > 0)(functools.partial(_hand_over, plan, refs, beside, turn, i, totals))
            pl.when(turn == 0)(functools.partial(_add_and_store, plan, refs, job, beside, totals, factor))
        return n_after, next_tile, following, next_scale

    zero = jnp.int32(0)
    first, second = (_tile(plan, refs, zero + n) for n in range(2))
    scale = _scale(plan, refs, _job(plan, zero, first), _first(plan, zero, turn), beside)
    n_jobs = _my_jobs(plan, refs)
    lax.fori_loop(0, n_jobs, compute_job, (zero, first, second, scale))
    if plan.tiles.along > 1:
        pl.when((turn > 0) & (n_jobs > 0))(lambda: plgpu.barrier_wait(refs.added.at[beside]))


def _first(plan: Plan, n_before: jax.Array, turn: jax.Array) -> jax.Array:
    """Which block of a job is a warpgroup's first one, where `n_before` blocks were loaded for earlier jobs.

    A warpgroup's are those of every n-th block since the beginning: so a stage is always the same one's.
    """
    return lax.rem(turn - lax.rem(n_before, plan.tiles.along) + plan.tiles.along, plan.tiles.along)


def _scale(plan: Plan, refs: Refs, job: Job, block: jax.Array, beside: jax.Array) -> tuple[jax.Array, ...]:
    """Each matrix's scale of a block of a job's contraction; the last one's where there is no such block."""
    _, last_row, last_block = (size - 1 for size in refs.scales[0].shape)
    row = jnp.minimum(lax.div(job.column + beside * UNIT_COLUMNS, plan.block_rows), last_row)
    return tuple(scale[job.matrix, row, jnp.minimum(job.first_block + block, last_block)] for scale in refs.scales)


def _factor(plan: Plan, refs: Refs, job: Job) -> jax.Array | None:
    """The factors of a job's rows, read before its products."""
    if refs.factor is None:
        return None
    return mosaic_gpu.load(refs.factor.at[pl.ds(job.row, plan.tiles.rows)], plgpu.Layout.WGMMA.reduce(0))


def _sums(
    plan: Plan, refs: Refs, job: Job, n_before: jax.Array, beside: jax.Array, turn: jax.Array, scale: tuple
) -> tuple[jax.Array, ...]:
    """Each matrix's sum over this warpgroup's blocks of a job, [64, rows]; `scale` are those of its first block."""
    skipped = _first(plan, n_before, turn)
    n_own = lax.div(jnp.maximum(job.n_blocks - skipped, 0) + plan.tiles.along - 1, plan.tiles.along)

    def add(i: jax.Array, state: tuple) -> tuple:
        scale, totals = state
        stage = lax.rem(n_before + skipped + i * plan.tiles.along, plan.tiles.stages)
        plgpu.barrier_wait(refs.loaded.at[stage])
        following = _scale(plan, refs, job, skipped + (i + 1) * plan.tiles.along, beside)  # read early as well
        products = []
        for own in _own(plan, beside):
            weights = mosaic_gpu.numbers_evens_first(refs.code_stages.at[stage, own], plan.on_chip)
            products.append(mosaic_gpu.product(weights, refs.x_stages.at[stage], plan.on_chip))
        plgpu.barrier_arrive(refs.free.at[stage])
        return following, tuple(t + p * s for t, p, s in zip(totals, products, scale, strict=True))

    zero = plgpu.layout_cast(jnp.zeros((UNIT_COLUMNS, plan.tiles.rows), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, n_own, add, (scale, (zero,) * plan.n_matrices))[1]


def _own(plan: Plan, beside: jax.Array) -> list:
    """A warpgroup's outputs of each matrix among those of the CTA."""
    return [pl.ds(n * plan.columns + beside * UNIT_COLUMNS, UNIT_COLUMNS) for n in range(plan.n_matrices)]


def _hand_over(plan: Plan, refs: Refs, beside: jax.Array, turn: jax.Array, i: jax.Array, totals: tuple) -> None:
    """Leaves sums in shared memory, once those of the job before have been read."""
    pl.when(i > 0)(lambda: plgpu.barrier_wait(refs.added.at[beside]))
    for own, total in zip(_own(plan, beside), totals, strict=True):
        refs.sums.at[turn - 1, own][...] = total
    plgpu.barrier_arrive(refs.summed.at[beside])


def _add_and_store(
    plan: Plan, refs: Refs, job: Job, beside: jax.Array, totals: tuple, factor: jax.Array | None
) -> None:
    plgpu.barrier_wait(refs.summed.at[beside])
    sums = list(totals)
    for turn in range(plan.tiles.along - 1):
        for n, own in enumerate(_own(plan, beside)):
            sums[n] += mosaic_gpu.load(refs.sums.at[turn, own], plgpu.Layout.WGMMA)
    plgpu.barrier_arrive(refs.added.at[beside])
    _store(plan, refs, job, beside, tuple(sums), factor)


def _store(plan: Plan, refs: Refs, job: Job, beside: jax.Array, totals: tuple, factor: jax.Array | None) -> None:
    """Writes the rows that belong to the job, 0 in those of no group."""
    total = totals[0]
    if factor is not None:
        total = total / (1 + jnp.exp(-total)) * totals[1] * lax.broadcast_in_dim(factor, total.shape, [1])
    row_of = plgpu.broadcasted_iota(jnp.int32, total.shape, 1, layout=plgpu.Layout.WGMMA)
    values = jnp.where(row_of < job.end - job.row, total, 0.0).astype(plan.out_dtype)
    column, shift, is_hidden = job.column + beside * UNIT_COLUMNS, job.part * plan.m, factor is not None
    if plan.on_chip:
        bounds = job.low + shift, job.high + shift
        mosaic_gpu.store_rows(
            values, refs.y, job.row + shift, column, *bounds, transposed=True, with_evens_first=is_hidden
        )
        return
    for r in range(plan.tiles.rows):

        @pl.when((job.low <= job.row + r) & (job.row + r < job.high) & (column < plan.n))
        def _(r: int = r) -> None:
            row = mosaic_gpu.evens_first(values[:, r][None])[0] if is_hidden else values[:, r]
            refs.y[job.row + shift + r, pl.ds(column, UNIT_COLUMNS)] = row
