"""The chosen experts of one token, or of a few, for Hopper in Pallas Mosaic GPU.

    h = g silu(gate^T x) * (up^T x)        y = down^T h

64 columns of an expert's hidden layer need 64 columns of gate and up and 64 rows of down, and nothing of the other
columns but their part of y. So a CTA takes one such part through all three products: it waits for no other CTA, and
the memory reads on from the first product into the last. V2-Lite's 6 experts of 1,408 columns are 132 parts, one for
each processor of the chip; those of a second token follow. XLA adds the parts of y up.

One warp loads (TMA), up to 16 KB at a time, into one ring for gate and up and one for down. One warpgroup multiplies
on the CUDA cores, in float32: 2 operations for each 2 bytes that are read are a fifth of what they can do in that
time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu

PART = 64  # columns of an expert's hidden layer that a CTA takes
BLOCK = 64  # rows of gate and up that are loaded at a time
STAGE_BYTES = 16384  # of down that are loaded at a time at most
MOST = STAGE_BYTES // 2  # D: a row of down is loaded at once
WIDTH = 256  # of a TMA copy at most: rows of down and y are several of these
STAGES = 6  # blocks of gate and up in shared memory, and as many of down
# Of a block: a thread has 4 columns of a row, a warp 2 rows of 64.
BY_ROW = plgpu.Layout.TILED(
    fragmented_array.Tiling(((64, 64), (16, 64), (2, 64), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1
)


def check(dtype: DTypeLike, d: int, f: int) -> None:
    """Raises ValueError for a dtype and widths that the kernel does not take."""
    if dtype != jnp.bfloat16 or d % WIDTH or f % PART or d > MOST:
        raise ValueError(
            f"implementation='mosaic_gpu' of token_experts: {jnp.dtype(dtype).name}, D={d}, F={f}; expected bfloat16 "
            f"and multiples of {WIDTH}, up to {MOST}, and {PART}. Use implementation='reference'."
        )


class Refs(NamedTuple):
    """Global memory, a CTA's shared memory, and its barriers."""

    x: Any
    gate: Any
    up: Any
    down: Any
    chosen: Any
    weight: Any
    y: Any
    x_blocks: Any
    wide: Any  # blocks of gate and up
    narrow: Any  # rows of down
    hidden: Any
    x_loaded: Any
    wide_loaded: Any
    wide_free: Any
    narrow_loaded: Any
    narrow_free: Any


def experts(
    x_MD: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    chosen_MK: jax.Array,
    weight_MK: jax.Array,
    interpret: object = None,
) -> jax.Array:
    """Returns y_MD; arguments as in `pallas_kernels.token_experts.experts`.

    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    (n_experts, d, f), n_tokens = gate_XDF.shape, len(x_MD)
    folded = d // WIDTH, WIDTH
    n_parts = chosen_MK.size * (f // PART)
    call = mosaic_gpu.kernel(
        lambda *refs: _kernel(Refs(*refs)),
        out_type=jax.ShapeDtypeStruct((n_parts, *folded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((d // BLOCK, BLOCK), x_MD.dtype),
            plgpu.SMEM((STAGES, 2, BLOCK, PART), x_MD.dtype),
            plgpu.SMEM((STAGES, _n_rows(d, x_MD.dtype), *folded), x_MD.dtype),
            plgpu.SMEM((PART,), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
        ],
        grid=(n_parts,),
        grid_names=("part",),
        n_warpgroups=2,
        reduction_scratch_bytes=16384,
        interpret=interpret,
    )
    down = down_XFD.reshape(n_experts, f, *folded)
    x = x_MD.reshape(n_tokens, -1, BLOCK)
    parts = call(x, gate_XDF, up_XDF, down, chosen_MK.reshape(-1), weight_MK.reshape(-1))
    return jnp.sum(parts.reshape(n_tokens, -1, d), axis=1).astype(x_MD.dtype)


def _n_rows(d: int, dtype: DTypeLike) -> int:
    """Rows of down that are loaded at a time: a power of two, so that it divides those of a part."""
    return 1 << (STAGE_BYTES // (d * jnp.dtype(dtype).itemsize)).bit_length() - 1


def _kernel(refs: Refs) -> None:
    n_columns = refs.gate.shape[2] // PART
    part = lax.axis_index("part")
    choice, column = lax.div(part, n_columns), lax.rem(part, n_columns) * PART
    roles = [functools.partial(role, refs, choice, column) for role in (_multiply, _load)]
    lax.cond(lax.axis_index("warpgroup") == 0, *roles)


def _load(refs: Refs, choice: jax.Array, column: jax.Array) -> None:
    """The loading warpgroup, of which one warp works."""
    where = _token(refs, choice), refs.chosen[choice], pl.multiple_of(column, PART)
    mosaic_gpu.by_one_warp(functools.partial(_load_part, refs, *where))


def _token(refs: Refs, choice: jax.Array) -> jax.Array:
    return lax.div(choice, refs.chosen.shape[0] // refs.x.shape[0])


def _load_part(refs: Refs, token: jax.Array, expert: jax.Array, column: jax.Array) -> None:
    """The token, the columns of gate and up, then the rows of down."""
    plgpu.copy_gmem_to_smem(refs.x.at[token], refs.x_blocks, refs.x_loaded)

    def load_wide(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(refs.wide_free.at[stage]))
        for n, weights in enumerate((refs.gate, refs.up)):
            block = weights.at[expert, pl.ds(i * BLOCK, BLOCK), pl.ds(column, PART)]
            plgpu.copy_gmem_to_smem(block, refs.wide.at[stage, n], refs.wide_loaded.at[stage])

    n_rows = refs.narrow.shape[1]

    def load_narrow(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(refs.narrow_free.at[stage]))
        rows = refs.down.at[expert, pl.ds(column + i * n_rows, n_rows)]
        plgpu.copy_gmem_to_smem(rows, refs.narrow.at[stage], refs.narrow_loaded.at[stage])

    lax.fori_loop(0, refs.x_blocks.shape[0], load_wide, None)
    lax.fori_loop(0, PART // n_rows, load_narrow, None)


def _multiply(refs: Refs, choice: jax.Array, column: jax.Array) -> None:
    """The warpgroup that multiplies: h of the part, then its part of y."""
    del column  # what is there has been loaded
    gate, up = (jnp.sum(total, axis=0) for total in _gate_and_up(refs))  # over the rows of a block
    refs.hidden[...] = refs.weight[choice] * up * gate / (1 + jnp.exp(-gate))
    plgpu.commit_smem()  # all warps have written
    refs.y.at[lax.axis_index("part")][...] = _down(refs)


def _gate_and_up(refs: Refs) -> tuple:
    """The products of gate and up, for each row of a block its sum over the blocks."""
    n_blocks = refs.x_blocks.shape[0]
    plgpu.barrier_wait(refs.x_loaded)

    def add(i: jax.Array, sums: tuple) -> tuple:
        stage = lax.rem(i, STAGES)
        x = mosaic_gpu.load(refs.x_blocks.at[i], BY_ROW.reduce(1)).astype(jnp.float32)
        x = lax.broadcast_in_dim(x, (BLOCK, PART), [0])
        plgpu.barrier_wait(refs.wide_loaded.at[stage])
        blocks = [mosaic_gpu.load(refs.wide.at[stage, n], BY_ROW) for n in range(2)]
        sums = tuple(total + x * block.astype(jnp.float32) for total, block in zip(sums, blocks, strict=True))
        pl.when(i + STAGES < n_blocks)(lambda: plgpu.barrier_arrive(refs.wide_free.at[stage]))
        return sums

    zero = plgpu.layout_cast(jnp.zeros((BLOCK, PART), jnp.float32), BY_ROW)
    return lax.fori_loop(0, n_blocks, add, (zero, zero))


def _down(refs: Refs) -> jax.Array:
    """The sum of the rows of down, each times its number of the hidden layer, folded as in shared memory."""
    n_rows, *shape = refs.narrow.shape[1:]
    layout = plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=2 if shape[0] % 4 else 8)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        stage = lax.rem(i, STAGES)
        plgpu.barrier_wait(refs.narrow_loaded.at[stage])
        for row in range(n_rows):
            values = mosaic_gpu.load(refs.narrow.at[stage, row], layout).astype(jnp.float32)
            total = total + refs.hidden[i * n_rows + row] * values
        pl.when((i + STAGES) * n_rows < PART)(lambda: plgpu.barrier_arrive(refs.narrow_free.at[stage]))
        return total

    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    return lax.fori_loop(0, PART // n_rows, add, zero)
