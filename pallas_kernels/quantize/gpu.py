"""Both quantisations of a matrix in one pass over it, for Hopper in Pallas Mosaic GPU.

A CTA walks over tiles of 128 x 128 and copies each once into shared memory (TMA). One warpgroup reads the tile as it
lies and writes codes and scales by row; another reads it transposed (`ldmatrix` does that for 16-bit values), after
which columns are rows and the same code applies. Per value 2 bytes are read and 2 written (bfloat16), so the bound is
the memory's bandwidth.

Codes and scales are those of the reference on a CPU, where divisions are correctly rounded. A GPU's fast division is
not (`div.full`, 2 ulp), and its exact one takes ten instructions. With r = 1 / s, rounded correctly, this takes three:

    q0 = x r,    q = q0 + r (x - q0 s)        each bracket fused into one operation, without rounding in between

and q is x / s, correctly rounded (Markstein 1990). The same step corrects r = 1 / s and s = amax / 448 themselves.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu
from pallas_kernels.quantize.reference import AMAX_FLOOR, BLOCK, LARGEST, Quantized

ROWS = 64  # that a warpgroup holds in registers at a time
STAGES = 2  # tiles of x in shared memory
CODE = jnp.float8_e4m3fn


def quantize(x: jax.Array, *, scale: str = "fp32", n_processors: int = 132, interpret: object = None) -> Quantized:
    """Returns both quantisations of x [M, K]; see `pallas_kernels.quantize`.

    M and K that are no multiples of 128 are filled up first, which costs a copy. `interpret` runs the kernel on a CPU
    (JAX 0.11 and later).
    """
    m, k = x.shape
    filled = jnp.pad(x, ((0, -m % BLOCK), (0, -k % BLOCK))) if m % BLOCK or k % BLOCK else x
    rows, columns = filled.shape
    q, scales, q_t, scales_t = _call(rows, columns, x.dtype, scale, n_processors, interpret)(filled)
    if filled is x:
        return Quantized(q, scales, q_t, scales_t)
    return Quantized(q[:m, :k], scales[:, :m], q_t[:k, :m], scales_t[:, :k])


def _call(rows: int, columns: int, dtype, scale: str, n_processors: int, interpret: object):
    """The kernel as a function of x [M, K], both multiples of 128."""
    tiles, number = (rows // BLOCK, columns // BLOCK), jnp.float32
    n_ctas = min(n_processors * (4 // jnp.dtype(dtype).itemsize), tiles[0] * tiles[1])  # two fit with bfloat16
    size = jnp.dtype(dtype).itemsize
    x_layout = (plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128))
    code_layout = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    mode: dict[str, Any] = {"interpret": interpret} if interpret else {}
    return plgpu.kernel(
        functools.partial(_kernel, tiles, scale, n_ctas),
        out_type=[
            jax.ShapeDtypeStruct((rows, columns), CODE),
            jax.ShapeDtypeStruct((columns // BLOCK, rows), number),
            jax.ShapeDtypeStruct((columns, rows), CODE),
            jax.ShapeDtypeStruct((rows // BLOCK, columns), number),
        ],
        scratch_types=[
            plgpu.SMEM((STAGES, BLOCK, BLOCK), dtype, transforms=x_layout),
            plgpu.SMEM((2, BLOCK, BLOCK), CODE, transforms=code_layout),
            plgpu.SMEM((2, BLOCK), number),
            plgpu.Barrier(num_arrivals=1, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        grid=(n_ctas,),
        grid_names=("ctas",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **mode,
    )


@dataclasses.dataclass(frozen=True)
class Refs:
    """Global memory, a CTA's shared memory, and its barriers."""

    x: Any
    q: Any
    scales: Any
    q_t: Any
    scales_t: Any
    x_stages: Any
    codes: Any  # of both warpgroups, on their way out
    numbers: Any  # scales, likewise
    loaded: Any  # per stage: the tile has arrived
    free: Any  # per stage: both warpgroups have read it


def _kernel(tiles: tuple[int, int], scale: str, n_ctas: int, *arguments) -> None:
    refs = Refs(*arguments)
    cta, warpgroup = lax.axis_index("ctas"), lax.axis_index("warpgroup")
    n_mine = lax.div(tiles[0] * tiles[1] - cta + n_ctas - 1, n_ctas)

    def tile(i):
        linear = cta + i * n_ctas
        return lax.div(linear, tiles[1]) * BLOCK, lax.rem(linear, tiles[1]) * BLOCK

    def load(i, stage):
        row, column = tile(i)
        source = refs.x.at[pl.ds(row, BLOCK), pl.ds(column, BLOCK)]
        plgpu.copy_gmem_to_smem(source, refs.x_stages.at[stage], refs.loaded.at[stage])

    @pl.when(warpgroup == 0)
    def _():
        for stage in range(STAGES):
            pl.when(stage < n_mine)(functools.partial(load, stage, stage))

    def quantize_tile(i, _):
        stage = lax.rem(i, STAGES)
        row, column = tile(i)
        plgpu.barrier_wait(refs.loaded.at[stage])
        lax.cond(
            warpgroup == 0,
            lambda: _by_row(refs, refs.x_stages.at[stage], 0, refs.q, refs.scales, row, column, stage, scale),
            lambda: _by_row(
                refs,
                mosaic_gpu.transpose(refs.x_stages.at[stage]),
                1,
                refs.q_t,
                refs.scales_t,
                column,
                row,
                stage,
                scale,
            ),
        )

        @pl.when((warpgroup == 0) & (i + STAGES < n_mine))
        def _():
            plgpu.barrier_wait(refs.free.at[stage])
            load(i + STAGES, stage)

    lax.fori_loop(0, n_mine, quantize_tile, None)
    plgpu.wait_smem_to_gmem(0)


def _by_row(refs: Refs, x, slot: int, q, scales, row, column, stage, scale: str) -> None:
    """Codes and scales of the rows of a tile in shared memory, whose place in q is (row, column)."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the tile before left in the buffers
    for first in range(0, BLOCK, ROWS):
        values = mosaic_gpu.load(x.at[pl.ds(first, ROWS)], plgpu.Layout.WGMMA).astype(jnp.float32)
        if first == BLOCK - ROWS:
            plgpu.barrier_arrive(refs.free.at[stage])
        row_scales = _block_scale(_largest_magnitude(values), scale)
        refs.numbers.at[slot, pl.ds(first, ROWS)][...] = row_scales
        refs.codes.at[slot, pl.ds(first, ROWS)][...] = _encode(values, row_scales)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.codes.at[slot], q.at[pl.ds(row, BLOCK), pl.ds(column, BLOCK)])
    plgpu.copy_smem_to_gmem(refs.numbers.at[slot], scales.at[lax.div(column, BLOCK), pl.ds(row, BLOCK)])


def _largest_magnitude(values: jax.Array) -> jax.Array:
    """max |x| of each row, NaN if one is NaN; as integers, for the reason given in the reference."""
    bits = lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=1), jnp.float32)


def _block_scale(amax: jax.Array, scale: str) -> jax.Array:
    """Scales of blocks with these largest magnitudes; NaN where one is not finite."""
    amax = jnp.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
    if scale == "ue8m0":  # 2^ceil(log2(amax / 448)), as in the reference
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
        scales = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    else:
        scales = _divide(amax, LARGEST, 1 / LARGEST)
    return jnp.where(amax < jnp.inf, scales, jnp.nan)


def _encode(values: jax.Array, scales: jax.Array) -> jax.Array:
    """E4M3 codes; no quotient is above 448 by more than a rounding error, which the cast rounds back."""
    r = 1.0 / scales
    r += r * (1.0 - r * scales)
    s, r = (lax.broadcast_in_dim(a, values.shape, [0]) for a in (scales, r))
    return _divide(values, s, r).astype(CODE)


def _divide(x: jax.Array, s: jax.Array | float, r: jax.Array | float) -> jax.Array:
    """x / s, where r = 1 / s is rounded correctly."""
    quotients = x * r
    return quotients + r * (x - quotients * s)
