"""Block-scaled FP8 matmul for Hopper in Pallas Mosaic GPU.

    y[m, n] = sum_b  sx[b, m] * sw[b, n] * ( sum_{k in block b}  x[m, k] w[n, k] )

A CTA stays on its processor and walks over output tiles. One warpgroup loads (TMA): for each block b of 128 along K
the codes of x and w and the scales of x, into the next of a ring of stages; two CTAs of a cluster that need the same
operand load half of it each, for both. The other warpgroups compute, each a part of the tile, in chunks of 64 rows by
up to 128 columns: the tensor cores sum a chunk's 128 products per output (four wgmma of m64 n128 k32), then the CUDA
cores multiply by the scales and add to the float32 sum that a thread keeps in registers ("promotion").

Promotion takes a third as long as the tensor cores need for a chunk. It is hidden behind the products of the other
warpgroups. With `Tiles.alternate` these take turns: each issues its four wgmma only when the one before has issued its
own. On an H100 turns made the kernel faster with some tiles and slower with others: the table of tiles decides.

Tensor cores take 8-bit operands only with K last, so both operands have it last; see `pallas_kernels.quantize` for the
transposed codes that the weight gradient needs. A float32 result is off by 1.3e-4 of its norm, whatever K is (measured
on an H100): probably the tensor cores' own sums within a block, which keep fewer bits than float32. bfloat16 rounds 13
times as coarsely. Run on hardware so far: M and N that are multiples of 64, K of 128.
Paper: V3 section 3.3.2.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.fp8_matmul.tiles import BLOCK, Tiles, choose

CHUNK_ROWS = 64  # of one wgmma
REGISTERS = 512  # of a processor, per thread of one warpgroup
TURN = 8  # the first of the hardware's named barriers that Mosaic GPU leaves free


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
    tiles: Tiles | None = None,
    n_processors: int = 132,
    interpret: object = None,
) -> jax.Array:
    """Returns y [M, N]; arguments as in `pallas_kernels.fp8_matmul`.

    M that is no multiple of 8, N of 64 (128 if smaller) and K of 128 are filled up first, which costs a copy.
    `tiles` are chosen from the shape unless given. `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (m, k), n = x.shape, w.shape[0]
    x, x_scale = _filled(x, 8, BLOCK), _filled(x_scale, 1, 8)
    # A copy drops the coordinate of an axis with one swizzled tile: what lies beyond would land on that tile.
    fill = 64 if n > 64 else 128
    w, w_scale = _filled(w, fill, BLOCK), _filled(w_scale, 1, fill if w_block[0] == 1 else 1)
    tiles = tiles or choose(m, n, k, w_block, out_dtype, n_processors)
    plan = Plan(
        x.shape[0], w.shape[0], x_scale.shape[0], tiles, w_block[0] == 1, out_dtype, n_processors, not interpret
    )
    parts = plan.call(interpret)(x, x_scale, w, w_scale)
    y = parts[0] if len(parts) == 1 else jnp.sum(parts, axis=0).astype(out_dtype)
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
    n_processors: int
    on_chip: bool  # interpreted otherwise: no named barriers, and none needed

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of a cluster along M and N."""
        spans = (cta * ctas for cta, ctas in zip(self.tiles.cta, self.tiles.cluster_shape, strict=True))
        return tuple(-(-size // span) for size, span in zip((self.m, self.n), spans, strict=True))

    @property
    def blocks_per_split(self) -> int:
        """Blocks of the contraction in each of its parts."""
        return -(-self.blocks // self.tiles.splits)

    @property
    def splits(self) -> int:
        """Parts of the contraction, none of them empty."""
        return -(-self.blocks // self.blocks_per_split)

    @property
    def stages(self) -> int:
        """Buffers between the loading and the computing warpgroups."""
        return min(self.tiles.stages, self.blocks_per_split)

    @property
    def n_tiles(self) -> int:
        """Tiles of all clusters and parts of the contraction."""
        return self.grid[0] * self.grid[1] * self.splits

    @property
    def n_clusters(self) -> int:
        """That run at the same time, each over every n_clusters-th tile."""
        rows, columns = self.tiles.cluster_shape
        return min(self.n_processors // (rows * columns), self.n_tiles)

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First row and column of each chunk of a warpgroup's part of the tile."""
        return list(
            itertools.product(range(0, self.tiles.rows, CHUNK_ROWS), range(0, self.tiles.columns, self.chunk_columns))
        )

    @property
    def chunk_columns(self) -> int:
        """Columns of a chunk, those of one block at most."""
        return min(self.tiles.columns, BLOCK)

    @property
    def store_dtype(self) -> DTypeLike:
        """Parts of a split contraction are added in float32."""
        return self.out_dtype if self.splits == 1 else jnp.float32

    def call(self, interpret: object) -> Callable:
        """The kernel as a function of x, x_scale, w, w_scale to y [splits, M, N]."""
        tiles = self.tiles
        return plgpu.kernel(
            functools.partial(_kernel, self),
            out_type=jax.ShapeDtypeStruct((self.splits, self.m, self.n), self.store_dtype),
            scratch_types=self.scratch(),
            grid=(self.n_clusters,),
            grid_names=("clusters",),
            cluster=(max(tiles.cluster_shape),),
            cluster_names=("cta",),
            num_threads=tiles.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
            ),
            **({"interpret": interpret} if interpret else {}),
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
            plgpu.SMEM(staging, self.store_dtype, transforms=_tiled(tiles.store_columns, self.store_dtype)),
            plgpu.Barrier(num_arrivals=3 + self.by_row, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=tiles.warpgroups, num_barriers=stages),
            *([plgpu.SMEM((stages, columns), jnp.float32)] if self.by_row else []),
        ]


def _tiled(columns: int, dtype: DTypeLike) -> tuple:
    """The layout in shared memory that tensor cores and TMA read without bank conflicts."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(min(columns * size, 128) * 8)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    x: object
    x_scale: object
    w: object
    w_scale: object
    y: object
    x_stages: object
    x_scale_stages: object
    w_stages: object
    staging: object
    loaded: object  # per stage: its copies have arrived
    free: object  # per stage: all warpgroups that read it, of both CTAs, are done
    w_scale_stages: object = None


def _kernel(plan: Plan, *refs) -> None:
    refs = Refs(*refs)
    lax.cond(
        lax.axis_index("warpgroup") < plan.tiles.warpgroups,
        functools.partial(_compute, plan, refs),
        functools.partial(_load, plan, refs),
    )


def _my_tiles(plan: Plan) -> jax.Array:
    """How many tiles this cluster computes."""
    return lax.div(plan.n_tiles - lax.axis_index("clusters") + plan.n_clusters - 1, plan.n_clusters)


def _tile(plan: Plan, i: jax.Array) -> tuple:
    """(part, first row, first column) of this CTA's i-th tile; `part` numbers the parts of the contraction."""
    linear = lax.axis_index("clusters") + i * plan.n_clusters
    part = 0
    if plan.splits > 1:
        per_part = plan.grid[0] * plan.grid[1]
        part, linear = lax.div(linear, per_part), lax.rem(linear, per_part)
    indices = plgpu.planar_snake(linear, plan.grid, plan.tiles.minor, plan.tiles.raster)
    cta = lax.axis_index("cta")
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
    """The loading warpgroup: fills stage after stage, each as soon as it is free."""
    plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")

    def load_tile(i, state):
        part, row, column = _tile(plan, i)
        first_block, n_blocks = _blocks_of(plan, part)

        def load_block(b, state):
            stage, n_loaded = state
            pl.when(n_loaded >= plan.stages)(lambda: plgpu.barrier_wait(refs.free.at[stage]))
            _copy_stage(plan, refs, stage, first_block + b, row, column)
            return _next(plan, stage), n_loaded + 1

        return lax.fori_loop(0, n_blocks, load_block, state)

    stage, n_loaded = lax.fori_loop(0, _my_tiles(plan), load_tile, (jnp.int32(0), jnp.int32(0)))

    # The other CTA of the cluster may still read or signal: leave only when every stage has come back.
    def wait(_, stage):
        plgpu.barrier_wait(refs.free.at[stage])
        return _next(plan, stage)

    oldest = jnp.where(n_loaded >= plan.stages, stage, 0)
    lax.fori_loop(0, jnp.minimum(n_loaded, plan.stages), wait, oldest)


def _copy_stage(plan: Plan, refs: Refs, stage, block, row, column) -> None:
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
    tiles = plan.tiles
    registers = (REGISTERS - tiles.producer_registers) // tiles.warpgroups // 8 * 8
    plgpu.set_max_registers(min(registers, 240), action="increase")
    warpgroup = lax.axis_index("warpgroup")
    own_row = warpgroup * tiles.rows if tiles.stack == "rows" else 0
    own_column = warpgroup * tiles.columns if tiles.stack == "columns" else 0

    def compute_tile(i, stage):
        part, row, column = _tile(plan, i)
        first_block, n_blocks = _blocks_of(plan, part)

        def add_block(b, state):
            stage, sums = state
            sums = _add_block(plan, refs, stage, first_block + b, own_row, own_column, column, sums)
            return _next(plan, stage), sums

        zero = plgpu.layout_cast(jnp.zeros((CHUNK_ROWS, plan.chunk_columns), jnp.float32), plgpu.Layout.WGMMA)
        stage, sums = lax.fori_loop(0, n_blocks, add_block, (stage, [zero] * len(plan.chunks)))
        _store(plan, refs, part, row + own_row, column + own_column, sums)
        return stage

    _first_turn(plan)
    lax.fori_loop(0, _my_tiles(plan), compute_tile, jnp.int32(0))
    _last_turn(plan)
    plgpu.wait_smem_to_gmem(0)


def _add_block(plan: Plan, refs: Refs, stage, block, own_row, own_column, column, sums: list) -> list:
    """Adds one block of K to the sums of a warpgroup's chunks."""
    plgpu.barrier_wait(refs.loaded.at[stage])
    row_scales = {
        r: mosaic_gpu.load(refs.x_scale_stages.at[stage, pl.ds(own_row + r, CHUNK_ROWS)], plgpu.Layout.WGMMA.reduce(1))
        for r, _ in plan.chunks
    }
    column_scales = {
        c: _column_scale(plan, refs, stage, block, own_column + c, column + own_column + c) for _, c in plan.chunks
    }
    added = []
    for (r, c), total in zip(plan.chunks, sums, strict=True):

        def multiply(products, r=r, c=c):
            w = refs.w_stages.at[stage, pl.ds(own_column + c, plan.chunk_columns)]
            plgpu.wgmma(products, refs.x_stages.at[stage, pl.ds(own_row + r, CHUNK_ROWS)], mosaic_gpu.transpose(w))
            _pass_turn(plan)
            return products[...]  # waits for the tensor cores

        _wait_turn(plan)
        products = pl.run_scoped(multiply, plgpu.ACC((CHUNK_ROWS, plan.chunk_columns), jnp.float32))
        if len(added) == len(sums) - 1:  # One thread speaks for its warpgroup: a wgmma has all four warps in step.
            plgpu.barrier_arrive(refs.free.at[stage])
        added.append(_promoted(plan, total, products, row_scales[r], column_scales[c]))
    return added


def _column_scale(plan: Plan, refs: Refs, stage, block, own_column, column) -> jax.Array:
    """The scales of w for a chunk's columns: a vector, or one number that they share."""
    if plan.by_row:
        columns = pl.ds(own_column, plan.chunk_columns)
        return mosaic_gpu.load(refs.w_scale_stages.at[stage, columns], plgpu.Layout.WGMMA.reduce(0))
    last = refs.w_scale.shape[0] - 1  # a tile may reach beyond the matrix
    return refs.w_scale[jnp.minimum(lax.div(column, BLOCK), last), block]


def _promoted(plan: Plan, total, products, row_scale, column_scale) -> jax.Array:
    """total + products * scales, in float32."""
    if plan.by_row:
        products = products * lax.broadcast_in_dim(column_scale, products.shape, [1])
    else:
        row_scale = row_scale * column_scale
    return total + products * lax.broadcast_in_dim(row_scale, products.shape, [0])


def _store(plan: Plan, refs: Refs, part, row, column, sums: list) -> None:
    """Writes a warpgroup's part of the output, by way of staging buffers in shared memory."""
    tiles = plan.tiles
    units = itertools.product(range(0, tiles.rows, CHUNK_ROWS), range(0, tiles.columns, tiles.store_columns))
    for i, (r, c) in enumerate(units):
        buffer = refs.staging.at[lax.axis_index("warpgroup"), i % tiles.store_slots]
        plgpu.wait_smem_to_gmem(tiles.store_slots - 1, wait_read_only=True)
        for (chunk_row, chunk_column), total in zip(plan.chunks, sums, strict=True):
            low = max(c, chunk_column)
            high = min(c + tiles.store_columns, chunk_column + plan.chunk_columns)
            if chunk_row == r and low < high:
                values = total[:, low - chunk_column : high - chunk_column].astype(plan.store_dtype)
                buffer.at[:, pl.ds(low - c, high - low)][...] = values
        plgpu.commit_smem()
        target = refs.y.at[part, pl.ds(row + r, CHUNK_ROWS), pl.ds(column + c, tiles.store_columns)]
        plgpu.copy_smem_to_gmem(buffer, target)


# Turns at the tensor cores. Warpgroup i waits on named barrier TURN + i, where the one before it arrives after issuing.
# They order nothing that the results depend on.


def _turn(plan: Plan, instruction: str, index: jax.Array) -> None:
    if plan.tiles.alternate and plan.on_chip:
        mosaic_gpu.named_barrier(instruction, TURN + index, 2 * 128)


def _wait_turn(plan: Plan) -> None:
    _turn(plan, "bar.sync", lax.axis_index("warpgroup"))


def _pass_turn(plan: Plan) -> None:
    _turn(plan, "bar.arrive", lax.rem(lax.axis_index("warpgroup") + 1, plan.tiles.warpgroups))


def _first_turn(plan: Plan) -> None:
    """The last warpgroup lets the first begin."""
    last = plan.tiles.warpgroups - 1
    pl.when(lax.axis_index("warpgroup") == last)(lambda: _turn(plan, "bar.arrive", jnp.int32(0)))


def _last_turn(plan: Plan) -> None:
    """The first warpgroup takes the turn that the last one has passed on, so that every arrival is waited for."""
    pl.when(lax.axis_index("warpgroup") == 0)(lambda: _turn(plan, "bar.sync", jnp.int32(0)))
