"""Both quantisations of a matrix in one pass, for Hopper in Pallas Mosaic GPU; the matrix may be a SwiGLU's output.

A CTA walks over tiles of 128 x 128 and copies each once into shared memory (TMA). One warpgroup reads the tile as it
lies and writes codes and scales by row; another reads it transposed (`ldmatrix` does that for 16-bit values), after
which columns are rows and the same code applies. Per value 2 bytes are read and 2 written (bfloat16), so the bound is
the memory's bandwidth. Of a SwiGLU both warpgroups read the tiles of gate and up, and both compute it: 4 bytes are read
and 2 written, where two kernels would move 10.

Codes and scales of a matrix are those of the reference on a CPU, where divisions are correctly rounded. A GPU's fast
division is not (`div.full`, 2 ulp), and its exact one takes ten instructions. With r = 1 / s, rounded correctly, this
takes three:

    q0 = x r,    q = q0 + r (x - q0 s)        each bracket fused into one operation, without rounding in between

and q is x / s, correctly rounded (Markstein 1990). The same step corrects r = 1 / s and s = amax / 448 themselves.
A SwiGLU's exponential is the chip's approximate one (2 ulp): one code in some million differs by a step.

Of a weight a block of 128 x 128 shares a scale, the same in both directions. Each warpgroup leaves the largest
magnitudes of its half of the tile's rows, or columns, in shared memory and takes the largest of all, once every
warpgroup has done so.
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
from pallas_kernels.quantize.reference import AMAX_FLOOR, BLOCK, LARGEST, Quantized, Squares
from pallas_kernels.quantize.whole_blocks import cropped, cropped_squares, filled, inputs_of_swiglu

ROWS = 64  # that a warpgroup holds in registers at a time
CODE = jnp.float8_e4m3fn
COPIED = 32  # float32 numbers: 128 bytes, what a copy moves at least


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How a call uses a processor.

    Attributes:
        stages: tiles of each input in shared memory.
        halves: warpgroups that divide the rows of a tile, in each of the two directions: 1 or 2.
        ctas: per processor.
    """

    stages: int
    halves: int
    ctas: int


def choose(n_inputs: int, dtype: DTypeLike) -> Tuning:
    """Returns the tuning for a matrix, or for the two inputs of a SwiGLU.

    Measured on an H200: four warpgroups with two tiles to work on hide most latency, and 128 registers per thread
    suffice for them. Two CTAs of two warpgroups each take 2 to 4 % longer for a matrix, one of two 50 % for a SwiGLU.
    """
    wide = jnp.dtype(dtype).itemsize > 2
    if n_inputs == 1:
        return Tuning(stages=2, halves=1 if wide else 2, ctas=1)
    return Tuning(stages=1 if wide else 2, halves=2, ctas=1)


def quantize(
    x: jax.Array,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    n_processors: int = 132,
    tuning: Tuning | None = None,
    interpret: object = None,
) -> Quantized:
    """Returns both quantisations of x [M, K]; see `pallas_kernels.quantize`.

    M and K that are no multiples of 128 are filled up first, which costs a copy. `tuning` is chosen unless given.
    `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    m, k = x.shape
    whole = filled(x)
    tuning = tuning or choose(1, x.dtype)
    rows, columns = whole.shape
    plan = Plan(rows, columns, x.dtype, (0,), False, scale, floor, n_processors, tuning)
    return cropped(plan.call(interpret)(whole), m, k)


def quantize_swiglu(
    gate: jax.Array,
    up: jax.Array | None = None,
    factor: jax.Array | None = None,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    n_processors: int = 132,
    tuning: Tuning | None = None,
    interpret: object = None,
) -> Quantized:
    """Returns both quantisations of silu(gate) * up * factor [M, F]; see `pallas_kernels.quantize_swiglu`.

    As `quantize`.
    """
    inputs, first, f = inputs_of_swiglu(gate, up)
    m, columns = gate.shape[0], (0, first)
    rows, width = inputs[0].shape[0], -(-f // BLOCK) * BLOCK
    tuning = tuning or choose(2, gate.dtype)
    plan = Plan(rows, width, gate.dtype, columns, factor is not None, scale, floor, n_processors, tuning)
    factors = () if factor is None else (jnp.pad(factor.astype(jnp.float32), (0, rows - m)),)
    return cropped(plan.call(interpret)(*inputs, *factors), m, f)


def quantize_squares(
    w: jax.Array,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    n_processors: int = 132,
    tuning: Tuning | None = None,
    interpret: object = None,
) -> Squares:
    """Returns the codes of w [..., K, N] and of its transpose; see `pallas_kernels.quantize_squares`. As `quantize`."""
    whole = filled(w)
    k, n = whole.shape[-2:]
    rows = whole.size // n
    tuning = tuning or Tuning(stages=2 if jnp.dtype(w.dtype).itemsize == 2 else 1, halves=2, ctas=1)
    plan = Plan(rows, n, w.dtype, (0,), False, scale, floor, n_processors, tuning, square=k)
    q, scales, q_t = plan.call(interpret)(whole.reshape(rows, n))
    leading, blocks = w.shape[:-2], (k // BLOCK, n // BLOCK)
    found = Squares(q.reshape(whole.shape), q_t.reshape(*leading, n, k), scales[:, 0].reshape(*leading, *blocks))
    return cropped_squares(found, *w.shape[-2:])


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a call before it runs.

    Attributes:
        rows, columns: of the matrix that is quantised, multiples of 128.
        dtype: of the inputs.
        first_columns: of the part of each input: one for a matrix, those of gate and up for a SwiGLU.
        scaled: there is a factor per row.
        square: 0, or the rows of each of the weights that lie one below the other, whose blocks are 128 x 128.
    """

    rows: int
    columns: int
    dtype: DTypeLike
    first_columns: tuple[int, ...]
    scaled: bool
    scale: str
    floor: float
    n_processors: int
    tuning: Tuning
    square: int = 0

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along rows and columns."""
        return self.rows // BLOCK, self.columns // BLOCK

    @property
    def n_ctas(self) -> int:
        """Each walks over every n_ctas-th tile."""
        return min(self.n_processors * self.tuning.ctas, self.tiles[0] * self.tiles[1])

    def call(self, interpret: object) -> Callable:
        """The kernel, a function of the inputs and the factors of their rows, if there are any."""
        return mosaic_gpu.kernel(
            functools.partial(_kernel, self),
            out_type=self.outputs(),
            scratch_types=self.scratch(),
            grid=(self.n_ctas,),
            grid_names=("ctas",),
            n_warpgroups=2 * self.tuning.halves,
            approx_math=len(self.first_columns) > 1,
            interpret=interpret,
        )

    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Codes and scales by row, then by column; of weights codes, a scale per tile, codes of the transposes."""
        codes, n_tiles = jax.ShapeDtypeStruct((self.rows, self.columns), CODE), self.tiles[0] * self.tiles[1]
        if self.square:
            transposed = (self.rows // self.square * self.columns, self.square)
            scales = jax.ShapeDtypeStruct((n_tiles, COPIED), jnp.float32)
            return [codes, scales, jax.ShapeDtypeStruct(transposed, CODE)]
        return [
            codes,
            jax.ShapeDtypeStruct((self.columns // BLOCK, self.rows), jnp.float32),
            jax.ShapeDtypeStruct((self.columns, self.rows), CODE),
            jax.ShapeDtypeStruct((self.rows // BLOCK, self.columns), jnp.float32),
        ]

    def scratch(self) -> list:
        """Shared memory and barriers of a CTA, in the order of `Refs`."""
        size, n_inputs = jnp.dtype(self.dtype).itemsize, len(self.first_columns)
        x_layout = (plgpu.TilingTransform((8, 128 // size)), plgpu.SwizzleTransform(128))
        code_layout = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
        return [
            [plgpu.SMEM((self.tuning.stages, BLOCK, BLOCK), self.dtype, transforms=x_layout)] * n_inputs,
            plgpu.SMEM((2, BLOCK, BLOCK), CODE, transforms=code_layout),
            plgpu.SMEM((2, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=n_inputs + self.scaled, num_barriers=self.tuning.stages),
            plgpu.Barrier(num_arrivals=2 * self.tuning.halves, num_barriers=self.tuning.stages),
            plgpu.SMEM((self.tuning.stages, BLOCK), jnp.float32) if self.scaled else None,
            *(self.exchange() if self.square else (None, None)),
        ]

    def exchange(self) -> tuple:
        """Where warpgroups leave the largest magnitudes of a tile, for every other one in turns."""
        return plgpu.SMEM((2, 2, BLOCK), jnp.float32), plgpu.Barrier(num_arrivals=2 * self.tuning.halves)


@dataclasses.dataclass(frozen=True)
class Refs:
    """A CTA's shared memory and its barriers."""

    stages: Any  # of each input
    codes: Any  # in both directions, on their way out
    numbers: Any  # scales, likewise
    loaded: Any  # per stage: the tile has arrived
    free: Any  # per stage: all warpgroups have read it
    factors: Any  # of a stage's rows
    maxima: Any  # of a tile's rows and columns
    found: Any  # all warpgroups have left theirs


@dataclasses.dataclass(frozen=True)
class Direction:
    """One of the two quantisations of a tile: `slot` 0 by row, 1 by column, where columns count as rows."""

    slot: int
    q: Any
    scales: Any
    row: Any
    column: Any
    tile: Any  # number of the tile among those of the CTA


def _kernel(plan: Plan, *arguments: Any) -> None:
    n_inputs = len(plan.first_columns)
    inputs, rest = arguments[:n_inputs], arguments[n_inputs:]
    factors, rest = (rest[0], rest[1:]) if plan.scaled else (None, rest)
    n_outputs = len(plan.outputs())
    (q, scales, q_t, scales_t), refs = (*rest[:n_outputs], None)[:4], Refs(*rest[n_outputs:])
    cta, warpgroup = lax.axis_index("ctas"), lax.axis_index("warpgroup")
    n_mine = lax.div(plan.tiles[0] * plan.tiles[1] - cta + plan.n_ctas - 1, plan.n_ctas)

    def tile(i: int | jax.Array) -> tuple:
        linear = cta + i * plan.n_ctas
        return lax.div(linear, plan.tiles[1]) * BLOCK, lax.rem(linear, plan.tiles[1]) * BLOCK

    def load(i: int | jax.Array, stage: int | jax.Array) -> None:
        row, column = tile(i)
        for source, first, stages in zip(inputs, plan.first_columns, refs.stages, strict=True):
            part = source.at[pl.ds(row, BLOCK), pl.ds(column + first, BLOCK)]
            plgpu.copy_gmem_to_smem(part, stages.at[stage], refs.loaded.at[stage])
        if factors is not None:
            plgpu.copy_gmem_to_smem(factors.at[pl.ds(row, BLOCK)], refs.factors.at[stage], refs.loaded.at[stage])

    @pl.when(warpgroup == 0)
    def _begin() -> None:
        for stage in range(plan.tuning.stages):
            pl.when(stage < n_mine)(functools.partial(load, stage, stage))

    def quantize_tile(i: jax.Array, _: None) -> None:
        stage = lax.rem(i, plan.tuning.stages)
        row, column = tile(i)
        plgpu.barrier_wait(refs.loaded.at[stage])
        lax.cond(
            warpgroup < plan.tuning.halves,
            lambda: _quantize_tile(plan, refs, stage, warpgroup, Direction(0, q, scales, row, column, i)),
            lambda: _quantize_tile(
                plan, refs, stage, warpgroup, Direction(1, q_t, scales_t, *_transposed(plan, row, column), i)
            ),
        )

        @pl.when((warpgroup == 0) & (i + plan.tuning.stages < n_mine))
        def _load_next() -> None:
            plgpu.barrier_wait(refs.free.at[stage])
            load(i + plan.tuning.stages, stage)

    lax.fori_loop(0, n_mine, quantize_tile, None)

    @pl.when(warpgroup == 0)
    def _end() -> None:  # a barrier is waited for as often as it completes
        for stage in range(plan.tuning.stages):
            pl.when(stage < n_mine)(functools.partial(plgpu.barrier_wait, refs.free.at[stage]))

    plgpu.wait_smem_to_gmem(0)


def _transposed(plan: Plan, row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row and column of the transposed tile; the transposes of several weights lie one below the other."""
    if not plan.square:
        return column, row
    return lax.div(row, plan.square) * plan.columns + column, lax.rem(row, plan.square)


def _quantize_tile(plan: Plan, refs: Refs, stage: jax.Array, warpgroup: jax.Array, to: Direction) -> None:
    """Codes and scales of a tile in one direction, or of this warpgroup's half of its rows."""
    n_rows = BLOCK // plan.tuning.halves
    own = lax.rem(warpgroup, plan.tuning.halves) * n_rows if plan.tuning.halves > 1 else 0
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the tile before left in the buffers
    for first in range(0, n_rows, ROWS):
        rows = pl.ds(own + first, ROWS)
        values = _values(plan, refs, stage, rows, to.slot)
        if first == n_rows - ROWS:
            plgpu.barrier_arrive(refs.free.at[stage])
        amax = _largest_magnitude(values)
        amax = _largest_of_tile(refs, amax, rows, to) if plan.square else amax
        row_scales = _block_scale(amax, plan.scale, plan.floor)
        refs.numbers.at[to.slot, rows][...] = row_scales
        refs.codes.at[to.slot, rows][...] = _encode(values, row_scales)
    plgpu.commit_smem()
    own_rows, target = pl.ds(own, n_rows), pl.ds(to.row + own, n_rows)
    plgpu.copy_smem_to_gmem(refs.codes.at[to.slot, own_rows], to.q.at[target, pl.ds(to.column, BLOCK)])
    if not plan.square:
        plgpu.copy_smem_to_gmem(refs.numbers.at[to.slot, own_rows], to.scales.at[lax.div(to.column, BLOCK), target])
    elif to.slot == 0:
        pl.when(warpgroup == 0)(functools.partial(_copy_scale, plan, refs, to))


def _copy_scale(plan: Plan, refs: Refs, to: Direction) -> None:
    """The scale of a tile, as often as a copy needs it."""
    number = lax.div(to.row, BLOCK) * plan.tiles[1] + lax.div(to.column, BLOCK)
    plgpu.copy_smem_to_gmem(refs.numbers.at[to.slot, pl.ds(0, COPIED)], to.scales.at[number])


def _largest_of_tile(refs: Refs, own: jax.Array, rows: Any, to: Direction) -> jax.Array:
    """The largest magnitude of a tile, for each of 64 rows, from those of the rows that each warpgroup has."""
    maxima = refs.maxima.at[lax.rem(to.tile, 2), to.slot]
    maxima.at[rows][...] = own
    plgpu.commit_smem()  # one thread speaks for the warpgroup
    plgpu.barrier_arrive(refs.found)
    plgpu.barrier_wait(refs.found)
    # As if they were numbers of the tile's columns: then they are reduced along a row, within four threads.
    across = mosaic_gpu.load(maxima, plgpu.Layout.WGMMA.reduce(0))
    return _largest_magnitude(lax.broadcast_in_dim(across, (ROWS, BLOCK), [1]))


def _values(plan: Plan, refs: Refs, stage: jax.Array, rows: Any, slot: int) -> jax.Array:
    """What is quantised, in float32: 64 rows of the tile, or columns if `slot` is 1."""

    def read(stages: Any) -> jax.Array:
        ref = mosaic_gpu.transpose(stages.at[stage]) if slot else stages.at[stage]
        return mosaic_gpu.load(ref.at[rows], plgpu.Layout.WGMMA).astype(jnp.float32)

    values = _swiglu(*map(read, refs.stages)) if len(refs.stages) > 1 else read(refs.stages[0])
    if plan.scaled:
        own = refs.factors.at[stage] if slot else refs.factors.at[stage, rows]
        factors = mosaic_gpu.load(own, plgpu.Layout.WGMMA.reduce(0 if slot else 1))
        values *= lax.broadcast_in_dim(factors, values.shape, [1 if slot else 0])
    return values


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate / (1.0 + jnp.exp(-gate)) * up


def _largest_magnitude(values: jax.Array) -> jax.Array:
    """max |x| of each row, NaN if one is NaN; as integers, for the reason given in the reference."""
    bits = lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=1), jnp.float32)


def _block_scale(amax: jax.Array, scale: str, floor: float) -> jax.Array:
    """Scales of blocks with these largest magnitudes; NaN where one is not finite."""
    amax = jnp.where(amax < floor, floor, amax)
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
