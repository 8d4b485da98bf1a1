"""Block-scaled FP8 matmul for Hopper in Pallas Mosaic GPU.

    y[m, n] = sum_b  sx[b, m] * sw[b, n] * ( sum_{k in block b}  x[m, k] w[n, k] )

A CTA stays on its processor and walks over output tiles. One warpgroup loads (TMA): for each block b of 128 along K
the codes of x and w and the scales of x, into the next of a ring of stages; two CTAs of a cluster that need the same
operand load half of it each, for both. The other warpgroups compute, each a part of the tile, in chunks of 64 rows by
up to 128 columns: the tensor cores sum a chunk's 128 products per output (four wgmma of m64 n128 k32), then the CUDA
cores multiply by the scales and add to the float32 sum that a thread keeps in registers ("promotion").

With few rows there are too few tiles to read w at the memory's speed. Then the CTAs of a cluster divide the contraction
and the first of them adds the sums of the others, which arrive in its shared memory, always in the same order.
A sum over calls (`add_to`) is made by the copy of the output itself, which adds to what global memory holds.

What bounds it (ncu on an H200, K 16,384): tensor cores are active in 82 % of the cycles, in 86 to 92 % of those in
which a processor has a tile. Promotion and wgmma both need the register file: a multiply-add takes 2 to 5 cycles beside
wgmma, not 1. Loads from memory and L2 do not bound it, nor do the other instructions: with one loading warp instead of
four there are 13 to 20 % fewer of all instructions and as many cycles. Under steady load the chip is at its limit of
700 W, at 1.3 to 1.5 GHz, and what takes less energy is faster: the one warp 1 to 6 % with SQUARE.

Tensor cores take 8-bit operands only with K last, so both operands have it last; see `pallas_kernels.quantize` for the
transposed codes that the weight gradient needs. A float32 result is off by 1.3e-4 of its norm, whatever K is (128 to
16,384, H100 and H200): the tensor cores keep fewer bits than float32 in the sums within a block. bfloat16 rounds 13
times as coarsely. Paper: V3 section 3.3.2.
"""

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
from pallas_kernels.fp8_matmul.tiles import BLOCK, Tiles, choose
from pallas_kernels.in_flight import one_after_another

CHUNK_ROWS = 64  # of one wgmma
REGISTERS = 65536  # of a processor


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
    add_to: jax.Array | None = None,
    tiles: Tiles | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> jax.Array:
    """Returns y [M, N]; arguments as in `pallas_kernels.fp8_matmul`.

    M that is not a multiple of 8, N of 64 (128 if smaller) and K of 128 are filled up first, which costs a copy.
    `tiles` are chosen from the shape unless given. `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (m, k), n = x.shape, w.shape[0]
    x, x_scale = _filled(x, 8, BLOCK), _filled(x_scale, 1, 8)
    # A copy drops the coordinate of an axis with one swizzled tile: what lies beyond would land on that tile.
    fill = 64 if n > 64 else 128
    w, w_scale = _filled(w, fill, BLOCK), _filled(w_scale, 1, fill if w_block[0] == 1 else 1)
    tiles = tiles or choose(m, n, k, w_block, out_dtype, n_processors)
    if not mosaic_gpu.can_exchange():
        tiles = dataclasses.replace(tiles, splits=1)
    sizes = x.shape[0], w.shape[0], x_scale.shape[0]
    plan = Plan(*sizes, tiles, w_block[0] == 1, out_dtype, add_to is not None, n_processors)
    if add_to is None:
        y = plan.call(interpret)(x, x_scale, w, w_scale)
    else:
        total = jax.new_ref(_filled(add_to, 8, fill))
        plan.call(interpret)(x, x_scale, w, w_scale, total)
        y = jax.freeze(total)
    return y if y.shape == (m, n) else y[:m, :n]


def _filled(matrix: jax.Array, rows: int, columns: int) -> jax.Array:
    """`matrix` with zeros appended until its sizes are multiples of `rows` and `columns`."""
    extra = (-matrix.shape[0] % rows, -matrix.shape[1] % columns)
    return jnp.pad(matrix, [(0, extra[0]), (0, extra[1])]) if any(extra) else matrix


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs."""

    m: int
    n: int
    blocks: int  # of 128 along K
    tiles: Tiles
    by_row: bool  # w has a scale per 1 x 128 block, not per 128 x 128
    out_dtype: DTypeLike
    adds: bool  # to what the output holds
    n_processors: int

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of a cluster along M and N."""
        return self.tiles.grid(self.m, self.n)

    @property
    def blocks_per_split(self) -> int:
        """Blocks of the contraction in each of its parts."""
        return -(-self.blocks // self.tiles.splits)

    @property
    def splits(self) -> int:
        """Parts of the contraction, none of them empty, each with a CTA of a cluster."""
        return -(-self.blocks // self.blocks_per_split)

    @property
    def stages(self) -> int:
        """Buffers between the loading and the computing warpgroups."""
        return min(self.tiles.stages, self.blocks_per_split)

    @property
    def n_tiles(self) -> int:
        """Output tiles of all clusters."""
        return self.grid[0] * self.grid[1]

    @property
    def n_clusters(self) -> int:
        """That run at the same time, each over every n_clusters-th tile."""
        clusters = self.n_tiles if self.splits > 1 else self.n_processors // max(self.tiles.cluster_shape)
        return min(clusters, self.n_tiles)

    @property
    def registers(self) -> int:
        """Of a thread that computes. More than the loading warpgroup gives back would be waited for without end."""
        warpgroups = self.tiles.warpgroups + 1
        at_start = REGISTERS // (128 * warpgroups) // 8 * 8
        return min((at_start * warpgroups - self.tiles.producer_registers) // self.tiles.warpgroups // 8 * 8, 240)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First row and column of each chunk of a warpgroup's part of the tile."""
        rows, columns = range(0, self.tiles.rows, CHUNK_ROWS), range(0, self.tiles.columns, self.chunk_columns)
        return list(itertools.product(rows, columns))

    @property
    def chunk_columns(self) -> int:
        """Columns of a chunk."""
        return min(self.tiles.columns, self.tiles.chunk_columns)

    @property
    def together(self) -> int:
        """Blocks of K that are added in one turn of the loop."""
        return self.tiles.together if self.splits == 1 else 1

    @property
    def waits_ahead(self) -> bool:
        """Whether a block is waited for while the one before is multiplied.

        With several chunks ptxas would then clear their registers before each product, and spill. It is one block that
        is waited for: where a turn adds several, all are waited for at its beginning.
        """
        return len(self.chunks) == 1 and self.tiles.in_flight == 1 and self.together == 1

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of x, x_scale, w, w_scale to y [M, N]; of a reference to y as well if it adds to y."""
        tiles = self.tiles
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=() if self.adds else jax.ShapeDtypeStruct((self.m, self.n), self.out_dtype),
            scratch_types=self.scratch(),
            grid=(self.n_clusters,),
            grid_names=("clusters",),
            cluster=(max(*tiles.cluster_shape, self.splits),),
            cluster_names=("cta",),
            n_warpgroups=tiles.warpgroups + 1,
            interpret=interpret,
        )

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order in which `_kernel` takes them."""
        tiles, stages, (rows, columns) = self.tiles, self.stages, self.tiles.cta
        staging = (tiles.warpgroups, tiles.store_slots, CHUNK_ROWS, tiles.store_columns)
        codes = _tiled(BLOCK, jnp.float8_e4m3fn)
        return [
            plgpu.SMEM((stages, rows, BLOCK), jnp.float8_e4m3fn, transforms=codes),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.SMEM((stages, columns, BLOCK), jnp.float8_e4m3fn, transforms=codes),
            plgpu.SMEM(staging, self.out_dtype, transforms=_tiled(tiles.store_columns, self.out_dtype)),
            plgpu.Barrier(num_arrivals=3 + self.by_row, num_barriers=stages),
            self.free_barrier(),
            plgpu.SMEM((stages, columns), jnp.float32) if self.by_row else None,
            *(self.exchange() if self.splits > 1 else (None, None)),
        ]

    def free_barrier(self) -> Any:
        """Per stage; CTAs that share what they load wait for one another."""
        arrivals, barriers = self.tiles.warpgroups, self.stages
        if self.splits > 1:
            return plgpu.Barrier(num_arrivals=arrivals, num_barriers=barriers)
        return plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=arrivals, num_barriers=barriers)

    def exchange(self) -> tuple:
        """Where the first CTA of a cluster receives the sums of the others."""
        tiles, n_sums = self.tiles, len(self.chunks)
        shape = (self.splits - 1, tiles.warpgroups, n_sums, CHUNK_ROWS, self.chunk_columns)
        sums = plgpu.SMEM(shape, jnp.float32, transforms=_tiled(self.chunk_columns, jnp.float32))
        return sums, plgpu.Barrier(num_arrivals=(self.splits - 1) * n_sums, num_barriers=tiles.warpgroups)


def _tiled(columns: int, dtype: DTypeLike) -> tuple:
    """The layout in shared memory that tensor cores and TMA read without bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(min(columns * size, 128) * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    x: Any
    x_scale: Any
    w: Any
    w_scale: Any
    y: Any
    x_stages: Any
    x_scale_stages: Any
    w_stages: Any
    staging: Any
    loaded: Any  # per stage: its copies have arrived
    free: Any  # per stage: all warpgroups that read it, of both CTAs, are done
    w_scale_stages: Any
    received: Any  # sums of the other parts of a split contraction
    arrived: Any  # per warpgroup: they are all there


def _kernel(plan: Plan, *refs: Any) -> None:
    named = Refs(*refs)
    lax.cond(
        lax.axis_index("warpgroup") < plan.tiles.warpgroups,
        functools.partial(_compute, plan, named),
        functools.partial(_load, plan, named),
    )


def _my_tiles(plan: Plan) -> jax.Array:
    """How many tiles this cluster computes."""
    return lax.div(plan.n_tiles - lax.axis_index("clusters") + plan.n_clusters - 1, plan.n_clusters)


def _tile(plan: Plan, i: jax.Array) -> tuple:
    """(part, first row, first column) of this CTA's i-th tile; `part` numbers the parts of the contraction."""
    linear = lax.axis_index("clusters") + i * plan.n_clusters
    indices = plgpu.planar_snake(linear, plan.grid, plan.tiles.minor, plan.tiles.raster)
    cta = lax.axis_index("cta")
    part = cta if plan.splits > 1 else 0
    first = [
        (index * ctas + (cta if ctas > 1 else 0)) * size
        for index, size, ctas in zip(indices, plan.tiles.cta, plan.tiles.cluster_shape, strict=True)
    ]
    return part, *first


def _blocks_of(plan: Plan, part: int | jax.Array) -> tuple:
    """First block of K of a part, and how many it has."""
    if plan.splits == 1:
        return 0, plan.blocks
    first = part * plan.blocks_per_split
    return first, jnp.minimum(plan.blocks_per_split, plan.blocks - first)


def _next(plan: Plan, stage: jax.Array) -> jax.Array:
    return jnp.where(stage == plan.stages - 1, 0, stage + 1)


def _load(plan: Plan, refs: Refs) -> None:
    """The loading warpgroup, of which one warp works: the others would take issue slots from those that compute."""
    plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")
    mosaic_gpu.by_one_warp(functools.partial(_load_tiles, plan, refs))


def _load_tiles(plan: Plan, refs: Refs) -> None:
    """Fills stage after stage, each as soon as it is free."""

    def load_tile(i: jax.Array, state: tuple) -> tuple:
        part, row, column = _tile(plan, i)
        first_block, n_blocks = _blocks_of(plan, part)

        def load_block(b: jax.Array, state: tuple) -> tuple:
            stage, n_loaded = state
            pl.when(n_loaded >= plan.stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
            _copy_stage(plan, refs, stage, first_block + b, row, column)
            return _next(plan, stage), n_loaded + 1

        return lax.fori_loop(0, n_blocks, load_block, state)

    stage, n_loaded = lax.fori_loop(0, _my_tiles(plan), load_tile, (jnp.int32(0), jnp.int32(0)))

    # The other CTA of the cluster may still read or signal: leave only when every stage has come back.
    def wait(_, stage: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs.free.at[stage])
        return _next(plan, stage)

    oldest = jnp.where(n_loaded >= plan.stages, stage, 0)
    lax.fori_loop(0, jnp.minimum(n_loaded, plan.stages), wait, oldest)


def _copy_stage(
    plan: Plan,
    refs: Refs,
    stage: jax.Array,
    block: int | jax.Array,
    row: int | jax.Array,
    column: int | jax.Array,
) -> None:
    """Starts the copies of one block of K; what both CTAs of a cluster need is loaded once."""
    n_rows, n_columns = plan.tiles.cta
    rows, columns, ks = pl.ds(row, n_rows), pl.ds(column, n_columns), pl.ds(block * BLOCK, BLOCK)
    shared = {"rows": (None, "cta"), "columns": ("cta", None), "": (None, None)}[plan.tiles.cluster]
    loaded = refs.loaded.at[stage]
    plgpu.copy_gmem_to_smem(refs.x.at[rows, ks], refs.x_stages.at[stage], loaded, collective_axes=shared[0])
    plgpu.copy_gmem_to_smem(refs.w.at[columns, ks], refs.w_stages.at[stage], loaded, collective_axes=shared[1])
    plgpu.copy_gmem_to_smem(refs.x_scale.at[block, rows], refs.x_scale_stages.at[stage], loaded)
    if plan.by_row:
        plgpu.copy_gmem_to_smem(refs.w_scale.at[block, columns], refs.w_scale_stages.at[stage], loaded)


def _compute(plan: Plan, refs: Refs) -> None:
    """A computing warpgroup: its part of each tile, then its part of the output."""
    plgpu.set_max_registers(plan.registers, action="increase")
    lax.fori_loop(0, _my_tiles(plan), functools.partial(_compute_tile, plan, refs), jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _compute_tile(plan: Plan, refs: Refs, i: jax.Array, stage: jax.Array) -> jax.Array:
    """This warpgroup's part of the i-th tile; returns the stage after the tile's last."""
    warpgroup = lax.axis_index("warpgroup")
    own_row = warpgroup * plan.tiles.rows
    part, row, column = _tile(plan, i)
    first_block, n_blocks = _blocks_of(plan, part)

    def add_blocks(n: int, b: jax.Array, state: tuple) -> tuple:
        stages = [state[0]]
        for _ in range(n):
            stages.append(_next(plan, stages[-1]))
        upcoming = stages.pop(), b * n + n < n_blocks
        at = Place(stages, first_block + b * n, own_row, column)
        return upcoming[0], _add_blocks(plan, refs, at, upcoming, state[1])

    zero = plgpu.layout_cast(jnp.zeros((CHUNK_ROWS, plan.chunk_columns), jnp.float32), plgpu.Layout.WGMMA)
    if plan.waits_ahead:
        plgpu.barrier_wait(refs.loaded.at[stage])
    turns, rest = (n_blocks, 0) if plan.together == 1 else divmod(n_blocks, plan.together)
    state = stage, dict.fromkeys(plan.chunks, zero)
    state = lax.fori_loop(0, turns, functools.partial(add_blocks, plan.together), state)
    for b in range(rest):
        state = add_blocks(1, turns * plan.together + b, state)
    if plan.splits == 1:
        _store(plan, refs, warpgroup, row + own_row, column, state[1])
    else:
        _gather(plan, refs, warpgroup, part, row + own_row, column, state[1])
    return state[0]


@dataclasses.dataclass(frozen=True)
class Place:
    """Which block of K a warpgroup adds, and where its operands and its part of the output are."""

    stages: list
    block: jax.Array
    own_row: jax.Array  # of the tile
    column: jax.Array  # of the output


def _add_blocks(plan: Plan, refs: Refs, at: Place, upcoming: tuple, sums: dict) -> dict:
    """Adds blocks of K, whose operands have arrived, to the sums of a warpgroup's chunks.

    While the tensor cores work on a chunk, its scales are read, and the next block is waited for during the last one:
    between two chunks of a warpgroup there is nothing but the promotion.
    """
    if not plan.waits_ahead:
        for stage in at.stages:
            plgpu.barrier_wait(refs.loaded.at[stage])
    products = list(itertools.product(range(len(at.stages)), plan.chunks))
    scales: dict = {}

    def begin(accumulator: Any, i: int) -> None:
        block, (r, c) = products[i]
        w = refs.w_stages.at[at.stages[block], pl.ds(c, plan.chunk_columns)]
        x = refs.x_stages.at[at.stages[block], pl.ds(at.own_row + r, CHUNK_ROWS)]
        plgpu.wgmma(accumulator, x, mosaic_gpu.transpose(w))
        if (r, c) == plan.chunks[0]:
            scales[block] = _scales(plan, refs, at, block)

    def finish(found: jax.Array, i: int, sums: dict) -> dict:
        block, chunk = products[i]
        if chunk == plan.chunks[-1]:  # One thread speaks for its warpgroup: a wgmma has all four warps in step.
            plgpu.barrier_arrive(refs.free.at[at.stages[block]])
        return sums | {chunk: _promoted(plan, sums[chunk], found, *chunk, *scales[block])}

    def wait_ahead() -> None:
        if plan.waits_ahead:
            pl.when(upcoming[1])(lambda: plgpu.barrier_wait(refs.loaded.at[upcoming[0]]))

    shape = CHUNK_ROWS, plan.chunk_columns
    return one_after_another(len(products), plan.tiles.in_flight, shape, begin, finish, wait_ahead, sums)


def _scales(plan: Plan, refs: Refs, at: Place, i: int) -> tuple[dict, dict]:
    """The scales of x by first row of a chunk, and those of w by first column of a chunk or a block."""
    stage, tiles = at.stages[i], plan.tiles
    rows, columns = {}, {}
    for r in range(0, tiles.rows, CHUNK_ROWS):
        ref = refs.x_scale_stages.at[stage, pl.ds(at.own_row + r, CHUNK_ROWS)]
        rows[r] = mosaic_gpu.load(ref, plgpu.Layout.WGMMA.reduce(1))
    if plan.by_row:
        for c in range(0, tiles.columns, plan.chunk_columns):
            ref = refs.w_scale_stages.at[stage, pl.ds(c, plan.chunk_columns)]
            columns[c] = mosaic_gpu.load(ref, plgpu.Layout.WGMMA.reduce(0))
        return rows, columns
    last = refs.w_scale.shape[0] - 1  # a tile may reach beyond the matrix
    for c in range(0, tiles.columns, BLOCK):
        columns[c] = refs.w_scale[jnp.minimum(lax.div(at.column + c, BLOCK), last), at.block + i]
    return rows, columns


def _promoted(plan: Plan, total: jax.Array, products: Any, r: int, c: int, rows: dict, columns: dict) -> jax.Array:
    """total + products * scales, in float32."""
    if plan.by_row:
        row_scale, products = rows[r], products * lax.broadcast_in_dim(columns[c], products.shape, [1])
    else:
        row_scale = rows[r] * columns[c // BLOCK * BLOCK]
    return total + products * lax.broadcast_in_dim(row_scale, products.shape, [0])


def _gather(
    plan: Plan,
    refs: Refs,
    warpgroup: jax.Array,
    part: int | jax.Array,
    row: int | jax.Array,
    column: int | jax.Array,
    sums: dict,
) -> None:
    """The first CTA of a cluster adds the sums of the other parts of the contraction, in their order, and writes."""

    def send() -> None:
        for i, total in enumerate(sums.values()):
            slot = refs.received.at[part - 1, warpgroup, i]
            first: Any = 0
            plgpu.async_store_smem(total, slot, refs.arrived.at[warpgroup], cluster_idx=first, cluster_dim="cta")

    def receive() -> None:
        plgpu.barrier_wait(refs.arrived.at[warpgroup])
        added = dict(sums)
        for other in range(plan.splits - 1):
            for i, key in enumerate(sums):
                added[key] += mosaic_gpu.load(refs.received.at[other, warpgroup, i], plgpu.Layout.WGMMA)
        _store(plan, refs, warpgroup, row, column, added)

    lax.cond(part == 0, receive, send)


def _store(
    plan: Plan, refs: Refs, warpgroup: jax.Array, row: int | jax.Array, column: int | jax.Array, sums: dict
) -> None:
    """Writes a warpgroup's part of the output, by way of staging buffers in shared memory."""
    tiles = plan.tiles
    units = itertools.product(range(0, tiles.rows, CHUNK_ROWS), range(0, tiles.columns, tiles.store_columns))
    for i, (r, c) in enumerate(units):
        buffer = refs.staging.at[warpgroup, i % tiles.store_slots]
        plgpu.wait_smem_to_gmem(tiles.store_slots - 1, wait_read_only=True)
        for (chunk_row, chunk_column), total in sums.items():
            low = max(c, chunk_column)
            high = min(c + tiles.store_columns, chunk_column + plan.chunk_columns)
            if chunk_row == r and low < high:
                values = total[:, low - chunk_column : high - chunk_column].astype(plan.out_dtype)
                buffer.at[:, pl.ds(low - c, high - low)][...] = values
        plgpu.commit_smem()
        target = refs.y.at[pl.ds(row + r, CHUNK_ROWS), pl.ds(column + c, tiles.store_columns)]
        plgpu.copy_smem_to_gmem(buffer, target, reduction_op="add" if plan.adds else None)
