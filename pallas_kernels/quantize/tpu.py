"""Both quantisations of a matrix, or of a SwiGLU's output, in one pass, for TPUs in Pallas Mosaic TPU.

The grid walks over tiles of the matrix, each read once into VMEM. Within a tile a block of 128 columns gives codes and
scales by row; a block of 128 rows, its largest magnitudes taken along the other axis, is divided by its scales and then
transposed. The output of a SwiGLU exists in VMEM only.

Codes are x * (1 / s): a division per number costs several times as much. With scales that are powers of two 1 / s is
exact, so codes are those of the reference; with float32 scales, themselves amax * (1 / 448), a code may differ by a
step where x / s lies next to the middle between two. Not yet run on a TPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_tpu
from pallas_kernels.quantize.reference import AMAX_FLOOR, BLOCK, LARGEST, Quantized, Squares
from pallas_kernels.quantize.whole_blocks import cropped, cropped_squares, filled, inputs_of_swiglu

MOST = (512, 512)  # of a tile along rows and columns
CODE = jnp.float8_e4m3fn


def quantize(
    x: jax.Array,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    most: tuple[int, int] = MOST,
    interpret: Any = False,
) -> Quantized:
    """Returns both quantisations of x [M, K]; see `pallas_kernels.quantize`.

    M and K that are not multiples of 128 are filled up first, which costs a copy. `most`: the sizes of a tile, at most.
    `interpret` runs the kernel on a CPU.
    """
    m, k = x.shape
    whole = filled(x)
    return cropped(_call((whole,), (0,), whole.shape[1], None, scale, floor, most, interpret), m, k)


def quantize_swiglu(
    gate: jax.Array,
    up: jax.Array | None = None,
    factor: jax.Array | None = None,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    most: tuple[int, int] = MOST,
    interpret: Any = False,
) -> Quantized:
    """Returns both quantisations of silu(gate) * up * factor [M, F]; see `pallas_kernels.quantize_swiglu`."""
    inputs, first, f = inputs_of_swiglu(gate, up)
    width = -(-f // BLOCK) * BLOCK
    return cropped(_call(inputs, (0, first), width, factor, scale, floor, most, interpret), gate.shape[0], f)


def quantize_squares(
    w: jax.Array,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
    most: tuple[int, int] = MOST,
    interpret: Any = False,
) -> Squares:
    """Returns the codes of w [..., K, N] and of its transpose; see `pallas_kernels.quantize_squares`. As `quantize`."""
    whole = filled(w)
    *leading, k, n = whole.shape
    tile = mosaic_tpu.step(k, most[0]), mosaic_tpu.step(n, most[1])
    count, n_tiles, blocks = math.prod(leading), (k // tile[0], n // tile[1]), tile[0] // BLOCK
    q, q_t, scales = pl.pallas_call(
        functools.partial(_squares_kernel, scale, floor),
        out_shape=[
            jax.ShapeDtypeStruct((count, k, n), CODE),
            jax.ShapeDtypeStruct((count, n, k), CODE),
            jax.ShapeDtypeStruct((count, n_tiles[0], blocks, n), jnp.float32),
        ],
        grid=(count, *n_tiles),
        in_specs=[pl.BlockSpec((None, *tile), lambda x, i, j: (x, i, j))],
        out_specs=[
            pl.BlockSpec((None, *tile), lambda x, i, j: (x, i, j)),
            pl.BlockSpec((None, *tile[::-1]), lambda x, i, j: (x, j, i)),
            pl.BlockSpec((None, None, blocks, tile[1]), lambda x, i, j: (x, i, 0, j)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
    )(whole.reshape(count, k, n))
    scales = scales.reshape(*leading, k // BLOCK, n)[..., ::BLOCK]
    found = Squares(q.reshape(whole.shape), q_t.reshape(*leading, n, k), scales)
    return cropped_squares(found, *w.shape[-2:])


def _call(
    inputs: tuple[jax.Array, ...],
    first_columns: tuple[int, ...],
    width: int,
    factor: jax.Array | None,
    scale: str,
    floor: float,
    most: tuple[int, int],
    interpret: Any,
) -> list[jax.Array]:
    """The four outputs for inputs whose parts of `width` columns begin at `first_columns`."""
    rows = inputs[0].shape[0]
    tile = mosaic_tpu.step(rows, most[0]), mosaic_tpu.step(width, most[1])
    blocks = tile[0] // BLOCK, tile[1] // BLOCK
    specs = [pl.BlockSpec(tile, functools.partial(_at, first // tile[1])) for first in first_columns]
    operands = list(inputs)
    if factor is not None:
        operands += [jnp.pad(factor.astype(jnp.float32), (0, rows - factor.size))[None]]
        specs += [pl.BlockSpec((1, tile[0]), lambda i, j: (0, i))]
    n_tiles = rows // tile[0], width // tile[1]
    q, scales, q_t, scales_t = pl.pallas_call(
        functools.partial(_kernel, len(inputs), scale, floor),
        out_shape=[
            jax.ShapeDtypeStruct((rows, width), CODE),
            jax.ShapeDtypeStruct((n_tiles[1], blocks[1], rows), jnp.float32),
            jax.ShapeDtypeStruct((width, rows), CODE),
            jax.ShapeDtypeStruct((n_tiles[0], blocks[0], width), jnp.float32),
        ],
        grid=n_tiles,
        in_specs=specs,
        out_specs=[
            pl.BlockSpec(tile, lambda i, j: (i, j)),
            pl.BlockSpec((None, blocks[1], tile[0]), lambda i, j: (j, 0, i)),
            pl.BlockSpec(tile[::-1], lambda i, j: (j, i)),
            pl.BlockSpec((None, blocks[0], tile[1]), lambda i, j: (i, 0, j)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(*operands)
    return [q, scales.reshape(-1, rows), q_t, scales_t.reshape(-1, width)]


def _at(first: int, i: Any, j: Any) -> tuple:
    return i, j + first


def _kernel(n_inputs: int, scale: str, floor: float, *refs: Any) -> None:
    inputs, (*factors, q, scales, q_t, scales_t) = refs[:n_inputs], refs[n_inputs:]
    values = [ref[...].astype(jnp.float32) for ref in inputs]
    x = values[0] if n_inputs == 1 else values[0] / (1.0 + jnp.exp(-values[0])) * values[1]
    if factors:
        x = x * factors[0][0][:, None]
    for b in range(scales.shape[0]):
        block = pl.ds(b * BLOCK, BLOCK)
        part = x[:, b * BLOCK : (b + 1) * BLOCK]
        block_scales, inverse = _scales(_largest_magnitude(part, 1), scale, floor)
        q[:, block] = _encode(part, inverse)
        scales[b] = block_scales[:, 0]
    for b in range(scales_t.shape[0]):
        part = x[b * BLOCK : (b + 1) * BLOCK]
        block_scales, inverse = _scales(_largest_magnitude(part, 0), scale, floor)
        q_t[:, pl.ds(b * BLOCK, BLOCK)] = _encode(part, inverse, transposed=True)
        scales_t[b] = block_scales[0]


def _squares_kernel(scale: str, floor: float, w: Any, q: Any, q_t: Any, scales: Any) -> None:
    for b in range(scales.shape[0]):
        for c in range(0, w.shape[1], BLOCK):
            rows, columns = pl.ds(b * BLOCK, BLOCK), pl.ds(c, BLOCK)
            part = w[rows, columns].astype(jnp.float32)
            amax = _largest_magnitude(_largest_magnitude(part, 0), 1)
            block_scale, inverse = _scales(jnp.broadcast_to(amax, (1, BLOCK)), scale, floor)
            q[rows, columns] = _encode(part, inverse)
            q_t[columns, rows] = _encode(part, inverse, transposed=True)
            scales[b, columns] = block_scale[0]


def _largest_magnitude(x: jax.Array, axis: int) -> jax.Array:
    """max |x| along an axis, which is kept; NaN if one is NaN: as integers, for the reason given in the reference."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=True), jnp.float32)


def _scales(amax: jax.Array, scale: str, floor: float) -> tuple[jax.Array, jax.Array]:
    """Scales of blocks with these largest magnitudes, and their inverses; NaN where one is not finite."""
    amax = jnp.where(amax < floor, floor, amax)
    if scale == "ue8m0":  # 2^ceil(log2(amax / 448)), as in the reference
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
        scales, inverse = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (exponent, 254 - exponent))
    else:
        scales, inverse = amax * (1 / LARGEST), LARGEST / amax
    finite = amax < jnp.inf
    return jnp.where(finite, scales, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def _encode(x: jax.Array, inverse: jax.Array, transposed: bool = False) -> jax.Array:
    codes = jnp.clip(x * inverse, -LARGEST, LARGEST)
    return (codes.T if transposed else codes).astype(CODE)
