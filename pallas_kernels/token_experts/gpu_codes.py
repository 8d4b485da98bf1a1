"""The chosen experts of one token for Hopper in Pallas Mosaic GPU, from weights that stay FP8 codes.

    h = g silu(gate x) * (up x)        y = down h        each block of 128 x 128 codes times its scale

As in `gpu.py` a CTA takes 64 columns of an expert's hidden layer through all three products, and XLA adds the parts of
y up. Here the weights lie as they are published, outputs first: 64 rows of gate and of up, 64 columns of down.

One warp loads. Two warpgroups multiply with gate and two with up, every second block each, on the tensor cores: the
codes of a block become bfloat16 in registers, the block's sum is scaled in float32. Each then takes a quarter of the
rows of down, on the CUDA cores, so that the hidden layer stays float32. It takes so many because a code becomes a
number in three instructions, and a warp waits for some of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul.layout import Scaled

PART = 64  # columns of an expert's hidden layer that a CTA takes
BLOCK = 128  # rows and columns of codes with one scale
WARPGROUPS = 4  # that multiply
ROWS = WARPGROUPS * PART  # of down that are loaded at a time
MOST = 8192  # D: parts of y lie in shared memory
# Blocks of gate and up in shared memory: an even number, so that a stage is always that of the same two warpgroups,
# which then see each phase of its barriers.
WIDE_STAGES = 6
NARROW_STAGES = 5  # of down
UNIT = 8  # rows of x that the tensor cores take; all but the first are 0


def check(dtype: DTypeLike, d: int, f: int) -> None:
    """Raises ValueError for a dtype and widths that the kernel does not take."""
    if dtype != jnp.bfloat16 or d % ROWS or f % PART or d > MOST:
        raise ValueError(
            f"implementation='mosaic_gpu' of token_experts in codes: {jnp.dtype(dtype).name}, D={d}, F={f}; expected "
            f"bfloat16 and multiples of {ROWS}, up to {MOST}, and {PART}. Use implementation='reference'."
        )


class Refs(NamedTuple):
    """Global memory, a CTA's shared memory, and its barriers."""

    x: Any  # [8, D]
    gate: Any  # codes [X, F, D] as int8
    up: Any
    down: Any  # [X, D, F]
    gate_scale: Any  # [X, blocks of F, blocks of D]
    up_scale: Any
    down_scale: Any  # [X, blocks of D, blocks of F]
    chosen: Any
    weight: Any
    y: Any  # [parts, D / 256, 256]
    x_stages: Any
    wide: Any  # blocks of gate and up
    narrow: Any  # of down
    sums: Any  # of each warpgroup, of gate or up
    result: Any  # this part of y
    wide_loaded: Any
    wide_free: Any
    narrow_loaded: Any
    narrow_free: Any
    met: Any  # all that multiply have come here


class Part(NamedTuple):
    """What a CTA computes."""

    choice: jax.Array  # which of the chosen experts
    expert: jax.Array
    column: jax.Array  # the first of the hidden layer
    on_chip: bool  # interpreted otherwise: no inlined PTX


def experts(
    x_D: jax.Array,
    gate: Scaled,
    up: Scaled,
    down: Scaled,
    chosen_K: jax.Array,
    weight_K: jax.Array,
    interpret: object = None,
) -> jax.Array:
    """Returns y_D; arguments as in `pallas_kernels.token_experts.experts_in_codes`.

    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    _, f, d = gate.codes.shape
    n_parts, folded = chosen_K.size * (f // PART), (d // ROWS, ROWS)
    call = mosaic_gpu.kernel(
        functools.partial(_kernel, not interpret),
        out_type=jax.ShapeDtypeStruct((n_parts, *folded), jnp.float32),
        scratch_types=_scratch(folded),
        grid=(n_parts,),
        grid_names=("part",),
        n_warpgroups=WARPGROUPS + 1,
        interpret=interpret,
    )
    weights = gate, up, down
    codes = (lax.bitcast_convert_type(w.codes, jnp.int8) for w in weights)
    x = jnp.pad(x_D[None], ((0, UNIT - 1), (0, 0)))
    parts = call(x, *codes, *(w.scale for w in weights), chosen_K, weight_K)
    return jnp.sum(parts.reshape(n_parts, d), axis=0).astype(x_D.dtype)


def _scratch(folded: tuple[int, int]) -> list:
    """Shared memory and barriers, in the order of `Refs`."""

    def swizzled(shape: tuple[int, ...], dtype: DTypeLike, columns: int) -> Any:
        n_bytes = columns * jnp.dtype(dtype).itemsize
        return plgpu.SMEM(
            shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(n_bytes))
        )

    return [
        swizzled((WIDE_STAGES, UNIT, BLOCK), jnp.bfloat16, 64),
        swizzled((WIDE_STAGES, 2, PART, BLOCK), jnp.int8, 128),
        swizzled((NARROW_STAGES, ROWS, PART), jnp.int8, 64),
        plgpu.SMEM((WARPGROUPS, PART), jnp.float32),
        plgpu.SMEM(folded, jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=WIDE_STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=WIDE_STAGES),
        plgpu.Barrier(num_arrivals=1, num_barriers=NARROW_STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=NARROW_STAGES),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]


def _kernel(on_chip: bool, *arrays: Any) -> None:
    refs = Refs(*arrays)
    n_columns = refs.gate.shape[1] // PART
    number = lax.axis_index("part")
    choice, column = lax.div(number, n_columns), lax.rem(number, n_columns) * PART
    part = Part(choice, refs.chosen[choice], pl.multiple_of(column, PART), on_chip)
    lax.cond(
        lax.axis_index("warpgroup") < WARPGROUPS,
        functools.partial(_multiply, refs, part),
        lambda: mosaic_gpu.by_one_warp(functools.partial(_load, refs, part)),
    )


def _load(refs: Refs, part: Part) -> None:
    """The loading warp: blocks of the token, of gate and up, then rows of down."""
    n_blocks, n_rows = refs.x.shape[1] // BLOCK, refs.result.shape[0]
    columns = pl.ds(part.column, PART)

    def load_wide(i: jax.Array, _: None) -> None:
        stage, depth = lax.rem(i, WIDE_STAGES), pl.ds(i * BLOCK, BLOCK)
        pl.when(i >= WIDE_STAGES)(lambda: plgpu.barrier_wait(refs.wide_free.at[stage]))
        loaded = refs.wide_loaded.at[stage]
        plgpu.copy_gmem_to_smem(refs.x.at[:, depth], refs.x_stages.at[stage], loaded)
        for n, codes in enumerate((refs.gate, refs.up)):
            plgpu.copy_gmem_to_smem(codes.at[part.expert, columns, depth], refs.wide.at[stage, n], loaded)

    def load_narrow(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, NARROW_STAGES)
        pl.when(i >= NARROW_STAGES)(lambda: plgpu.barrier_wait(refs.narrow_free.at[stage]))
        rows = refs.down.at[part.expert, pl.ds(i * ROWS, ROWS), columns]
        plgpu.copy_gmem_to_smem(rows, refs.narrow.at[stage], refs.narrow_loaded.at[stage])

    lax.fori_loop(0, n_blocks, load_wide, None)
    lax.fori_loop(0, n_rows, load_narrow, None)


def _multiply(refs: Refs, part: Part) -> None:
    """A warpgroup that multiplies: with gate or with up, then with a quarter of the rows of down."""
    warpgroup = lax.axis_index("warpgroup")
    refs.sums.at[warpgroup][...] = jnp.sum(_wide(refs, part, warpgroup), axis=1)  # the other columns are 0
    _meet(refs)
    sums = [mosaic_gpu.load(refs.sums.at[n], plgpu.Layout.WGMMA.reduce(0)) for n in range(WARPGROUPS)]
    gate, up = sums[0] + sums[2], sums[1] + sums[3]
    _down(refs, part, warpgroup, refs.weight[part.choice] * up * gate / (1 + jnp.exp(-gate)))
    plgpu.commit_smem()
    _meet(refs)

    @pl.when(warpgroup == 0)
    def _() -> None:
        plgpu.copy_smem_to_gmem(refs.result, refs.y.at[lax.axis_index("part")])
        plgpu.wait_smem_to_gmem(0)


def _meet(refs: Refs) -> None:
    """Waits for the other warpgroups that multiply."""
    plgpu.barrier_arrive(refs.met)
    plgpu.barrier_wait(refs.met)


def _wide(refs: Refs, part: Part, warpgroup: jax.Array) -> jax.Array:
    """64 sums over every second block of D, of gate or up, [64, 8]; the first column is the token's."""
    n_blocks, row = refs.x.shape[1] // BLOCK, lax.div(part.column, BLOCK)
    matrix, turn = lax.rem(warpgroup, 2), lax.div(warpgroup, 2)

    def scale_of(i: jax.Array) -> jax.Array:
        block = part.expert, row, jnp.minimum(i, n_blocks - 1)
        return jnp.where(matrix == 0, refs.gate_scale[block], refs.up_scale[block])

    def add(own: jax.Array, state: tuple) -> tuple:
        scale, total = state
        i = 2 * own + turn
        stage = lax.rem(i, WIDE_STAGES)
        plgpu.barrier_wait(refs.wide_loaded.at[stage])
        following = scale_of(i + 2)  # from global memory, so read early
        codes = mosaic_gpu.load(refs.wide.at[stage, matrix], plgpu.Layout.WGMMA)
        weights = mosaic_gpu.numbers_of(codes, part.on_chip)
        products = mosaic_gpu.product(weights, refs.x_stages.at[stage], part.on_chip)
        pl.when(i + WIDE_STAGES < n_blocks)(lambda: plgpu.barrier_arrive(refs.wide_free.at[stage]))
        return following, total + products * scale

    zero = plgpu.layout_cast(jnp.zeros((PART, UNIT), jnp.float32), plgpu.Layout.WGMMA)
    return lax.fori_loop(0, n_blocks // 2, add, (scale_of(turn), zero))[1]


def _down(refs: Refs, part: Part, warpgroup: jax.Array, hidden: jax.Array) -> None:
    """A quarter of the rows of down times the hidden layer, into shared memory."""
    n_loads, column, rows = refs.result.shape[0], lax.div(part.column, BLOCK), pl.ds(warpgroup * PART, PART)

    def scale_of(i: jax.Array) -> jax.Array:
        row = jnp.minimum(i, n_loads - 1) * (ROWS // BLOCK) + lax.div(warpgroup * PART, BLOCK)
        return refs.down_scale[part.expert, row, column]

    def add(i: jax.Array, scale: jax.Array) -> jax.Array:
        stage = lax.rem(i, NARROW_STAGES)
        plgpu.barrier_wait(refs.narrow_loaded.at[stage])
        following = scale_of(i + 1)
        codes = mosaic_gpu.load(refs.narrow.at[stage, rows], plgpu.Layout.WGMMA)
        weights = mosaic_gpu.numbers_of(codes, part.on_chip).astype(jnp.float32)
        products = weights * lax.broadcast_in_dim(hidden, weights.shape, [1])
        refs.result.at[i, rows][...] = scale * jnp.sum(products, axis=1)
        pl.when(i + NARROW_STAGES < n_loads)(lambda: plgpu.barrier_arrive(refs.narrow_free.at[stage]))
        return following

    lax.fori_loop(0, n_loads, add, scale_of(jnp.int32(0)))
