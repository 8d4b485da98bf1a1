"""The chosen experts of one token, or of a few, for Hopper in Pallas Mosaic GPU.

    h = g silu(gate^T x) * (up^T x)        y = down^T h

64 columns of an expert's hidden layer need 64 columns of gate and up and 64 rows of down, and nothing of the other
columns but their part of y. So a CTA takes one such part through all three products: it waits for no other CTA, and
the memory reads on from the first product into the last. V2-Lite's 6 experts of 1,408 columns are 132 parts, one for
each processor of the chip; those of a second token follow. Of an expert that both have chosen the first token's CTAs
compute the parts of both, so that it is read once. XLA adds the parts of y up.

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
MOST_OF_TWO = 7168  # D up to which two tokens fit in shared memory
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


class Part(NamedTuple):
    """What a CTA has to do: a part of an expert of one token, of both, or nothing; all scalars."""

    token: jax.Array
    expert: jax.Array
    column: jax.Array  # the first of the part's
    choice: jax.Array  # among those of all tokens
    other: jax.Array  # the second token's choice of the same expert, if it is computed here too
    is_double: Any  # whether it is
    is_here: Any  # whether anything is, and not all by another CTA


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
    folded, n_held = (d // WIDTH, WIDTH), 2 if n_tokens == 2 and d <= MOST_OF_TWO else 1
    n_parts = chosen_MK.size * (f // PART)
    call = mosaic_gpu.kernel(
        lambda *refs: _kernel(Refs(*refs)),
        out_type=jax.ShapeDtypeStruct((n_parts, *folded), jnp.float32),
        scratch_types=[
            plgpu.SMEM((n_held, d // BLOCK, BLOCK), x_MD.dtype),
            plgpu.SMEM((STAGES, 2, BLOCK, PART), x_MD.dtype),
            plgpu.SMEM((STAGES, _n_rows(d, x_MD.dtype), *folded), x_MD.dtype),
            plgpu.SMEM((n_held, PART), jnp.float32),
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
    roles = [functools.partial(role, refs, _part(refs)) for role in (_multiply, _load)]
    lax.cond(lax.axis_index("warpgroup") == 0, *roles)


def _part(refs: Refs) -> Part:
    """This CTA's part. Choices of one expert by two tokens are a pair if each is its token's first of that expert."""
    n_columns, top_k = refs.gate.shape[2] // PART, refs.chosen.shape[0] // refs.x.shape[0]
    number = lax.axis_index("part")
    choice, column = lax.div(number, n_columns), pl.multiple_of(lax.rem(number, n_columns) * PART, PART)
    token, expert, no = lax.div(choice, top_k), refs.chosen[choice], jnp.bool_(False)
    if refs.x_blocks.shape[0] == 1:
        return Part(token, expert, column, choice, choice, no, ~no)
    is_first, found = ~no, jnp.int32(-1)
    for k in reversed(range(top_k)):
        is_first &= (refs.chosen[token * top_k + k] != expert) | (token * top_k + k >= choice)
        found = jnp.where(refs.chosen[(1 - token) * top_k + k] == expert, k, found)
    is_pair = is_first & (found >= 0)
    return Part(token, expert, column, choice, top_k + found, is_pair & (token == 0), ~is_pair | (token == 0))


def _load(refs: Refs, part: Part) -> None:
    """The loading warpgroup, of which one warp works."""
    mosaic_gpu.by_one_warp(lambda: pl.when(part.is_here)(functools.partial(_load_part, refs, part)))


def _load_part(refs: Refs, part: Part) -> None:
    """The tokens, the columns of gate and up, then the rows of down."""
    n_held, n_rows = refs.x_blocks.shape[0], refs.narrow.shape[1]
    plgpu.copy_gmem_to_smem(refs.x.at[pl.ds(0 if n_held > 1 else part.token, n_held)], refs.x_blocks, refs.x_loaded)

    def load_wide(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(refs.wide_free.at[stage]))
        for n, weights in enumerate((refs.gate, refs.up)):
            block = weights.at[part.expert, pl.ds(i * BLOCK, BLOCK), pl.ds(part.column, PART)]
            plgpu.copy_gmem_to_smem(block, refs.wide.at[stage, n], refs.wide_loaded.at[stage])

    def load_narrow(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, STAGES)
        pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(refs.narrow_free.at[stage]))
        rows = refs.down.at[part.expert, pl.ds(part.column + i * n_rows, n_rows)]
        plgpu.copy_gmem_to_smem(rows, refs.narrow.at[stage], refs.narrow_loaded.at[stage])

    lax.fori_loop(0, refs.x_blocks.shape[1], load_wide, None)
    lax.fori_loop(0, PART // n_rows, load_narrow, None)


def _multiply(refs: Refs, part: Part) -> None:
    """The warpgroup that multiplies."""
    if refs.x_blocks.shape[0] == 1:
        _multiply_by(refs, part, (jnp.int32(0),), (part.choice,))
        return
    both = jnp.int32(0), jnp.int32(1)
    alone = functools.partial(_multiply_by, refs, part, (part.token,), (part.choice,))
    pl.when(part.is_double)(functools.partial(_multiply_by, refs, part, both, (part.choice, part.other)))
    pl.when(part.is_here & ~part.is_double)(alone)


def _multiply_by(refs: Refs, part: Part, tokens: tuple, choices: tuple) -> None:
    """h of the part, then its part of y, for these of the tokens that are held and their choices."""
    sums = _gate_and_up(refs, tokens)
    for n, choice in enumerate(choices):
        gate, up = (jnp.sum(total, axis=0) for total in sums[2 * n : 2 * n + 2])  # over the rows of a block
        refs.hidden.at[n][...] = refs.weight[choice] * up * gate / (1 + jnp.exp(-gate))
    plgpu.commit_smem()  # all warps have written
    n_columns = refs.gate.shape[2] // PART
    for choice, total in zip(choices, _down(refs, len(tokens)), strict=True):
        refs.y.at[choice * n_columns + lax.div(part.column, PART)][...] = total


def _gate_and_up(refs: Refs, tokens: tuple) -> tuple:
    """The products of gate and up with each token, for each row of a block its sum over the blocks."""
    n_blocks = refs.x_blocks.shape[1]
    plgpu.barrier_wait(refs.x_loaded)

    def add(i: jax.Array, sums: tuple) -> tuple:
        stage, rows = lax.rem(i, STAGES), []
        for token in tokens:
            x = mosaic_gpu.load(refs.x_blocks.at[token, i], BY_ROW.reduce(1)).astype(jnp.float32)
            rows.append(lax.broadcast_in_dim(x, (BLOCK, PART), [0]))
        plgpu.barrier_wait(refs.wide_loaded.at[stage])
        blocks = [mosaic_gpu.load(refs.wide.at[stage, n], BY_ROW).astype(jnp.float32) for n in range(2)]
        pairs = [(x, block) for x in rows for block in blocks]
        sums = tuple(total + x * block for total, (x, block) in zip(sums, pairs, strict=True))
        pl.when(i + STAGES < n_blocks)(lambda: plgpu.barrier_arrive(refs.wide_free.at[stage]))
        return sums

    zero = plgpu.layout_cast(jnp.zeros((BLOCK, PART), jnp.float32), BY_ROW)
    return lax.fori_loop(0, n_blocks, add, (zero,) * (2 * len(tokens)))


def _down(refs: Refs, n_tokens: int) -> tuple:
    """Of each token the sum of the rows of down, each times its number of the hidden layer, as in shared memory."""
    n_rows, *shape = refs.narrow.shape[1:]
    layout = plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=2 if shape[0] % 4 else 8)

    def add(i: jax.Array, totals: tuple) -> tuple:
        stage = lax.rem(i, STAGES)
        plgpu.barrier_wait(refs.narrow_loaded.at[stage])
        for row in range(n_rows):
            values = mosaic_gpu.load(refs.narrow.at[stage, row], layout).astype(jnp.float32)
            totals = tuple(total + refs.hidden[n, i * n_rows + row] * values for n, total in enumerate(totals))
        pl.when((i + STAGES) * n_rows < PART)(lambda: plgpu.barrier_arrive(refs.narrow_free.at[stage]))
        return totals

    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
    return lax.fori_loop(0, PART // n_rows, add, (zero,) * n_tokens)
