"""4-bit floats with one scale per 32: V4's experts as published, and experts trained to be rounded to them.

    E2M1     0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; code 8 is -0
    scale    2^ceil(log2(amax / 6)) over 32 numbers of a row: one byte, E8M0 (UE8M0)
    bytes    two codes each along a row, the first of them in the low four bits

A row lies along what a product sums over. 4.25 bits per number; products dequantise.

FP4 to FP8. One scale per 128 x 128, 2^-6 of the largest in that tile, takes every number over unchanged as long as the
scales of a tile differ by 2^6 at most: 6 * 2^6 = 384 is below 448, and 0.5 stays a normal E4M3. Otherwise `to_fp8` has
nothing exact to return, and `fits_fp8` says so.

Training (`rounded`): forward with the numbers that FP4 will hold, made from the float32 masters in each step; the
gradient passes as if nothing were rounded, to the masters. `config.precision=fp4` rounds routed experts, and queries
and keys of V4's indexer as a cache in FP8 stores these keys (`layers.entry_codes`). Paper: V4 section 5.2.1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision.fp8 import POWERS_OF_TWO, BlockMatmul, Operand
from deepseek_jax.precision.quantize import E4M3, E8M0

BLOCK = 32  # numbers with one scale
TILE = 128  # rows and columns with one scale in FP8
LARGEST = 6.0
SMALLEST_AMAX = LARGEST * 2.0**-126  # below it a scale would not be a normal float32
SPREAD = 6  # powers of two by which the scales of a tile may differ in FP8
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7


def quantize(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (packed, scale): uint8 [..., rows, columns / 2] and E8M0 [..., rows, columns / 32].

    `w` is [..., rows, columns] of any float dtype; raises ValueError unless columns are a multiple of 32. Ties are
    rounded to even. A NaN or an infinity makes the scale of its block NaN.
    """
    codes, scale = _coded(_blocks(w))
    codes = codes.reshape(w.shape).astype(jnp.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale


def dequantize(packed: jax.Array, scale: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Returns the numbers [..., rows, columns] that `quantize` has packed; exact in bfloat16 and in float32."""
    values = _values(codes_of(packed)).reshape(*scale.shape, BLOCK) * scale.astype(jnp.float32)[..., None]
    return values.reshape(*packed.shape[:-1], -1).astype(dtype)


def codes_of(packed: jax.Array) -> jax.Array:
    """Returns the codes 0 to 15, uint8 [..., columns], of packed ones [..., columns / 2]."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def fits_fp8(packed: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns whether `to_fp8` is exact for each matrix [...]; blocks of zeros alone need no scale."""
    return jnp.all(_spread(packed, scale)[0], axis=(-2, -1))


def to_fp8(packed: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (E4M3 codes [..., rows, columns], E8M0 scales per 128 x 128) of the same numbers, if `fits_fp8`."""
    _, largest = _spread(packed, scale)
    of_tile = jnp.exp2(jnp.maximum(largest - SPREAD, -127).astype(jnp.float32))
    rows, blocks = scale.shape[-2:]
    over = jnp.repeat(jnp.repeat(of_tile, TILE, -2)[..., :rows, :], TILE // BLOCK, -1)[..., :blocks]
    values = _values(codes_of(packed)).reshape(*scale.shape, BLOCK) * (scale.astype(jnp.float32) / over)[..., None]
    return values.reshape(*packed.shape[:-1], -1).astype(E4M3), of_tile.astype(E8M0)


@jax.custom_vjp
def rounded(w: jax.Array) -> jax.Array:
    """Returns w [..., rows, columns] as FP4 holds it, in its dtype; its gradient passes unchanged (straight-through).

    A last block of fewer than 32 columns counts as filled up with zeros.
    """
    extra = -w.shape[-1] % BLOCK
    blocks = _blocks(jnp.pad(w, [*[(0, 0)] * (w.ndim - 1), (0, extra)]) if extra else w)
    codes, scale = _coded(blocks)
    values = _values(codes) * scale.astype(jnp.float32)[..., None]
    return values.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]].astype(w.dtype)


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@dataclass(frozen=True)
class Fp4Experts(BlockMatmul):
    """V3's products in FP8, with the weights of routed experts rounded to FP4 first: V4's training for FP4.

    Scales of FP8 are powers of two, so that what FP4 holds is not rounded again. Weights are gathered as they are: the
    scales of FP4 need whole rows.
    """

    scale: str = POWERS_OF_TWO

    index_in_fp4: ClassVar[bool] = True

    @property
    def codes(self) -> None:
        """See `Matmul`."""
        return None

    def grouped(self, x_AD: Operand, w_XDF: Any, count_X: jax.Array) -> jax.Array:
        """See `Matmul`; rows of FP4 lie along D, which the product sums over."""
        return super().grouped(x_AD, rounded(w_XDF.mT).mT, count_X)


def _blocks(w: jax.Array) -> jax.Array:
    """[..., columns] -> float32 [..., columns / 32, 32]."""
    if w.shape[-1] % BLOCK:
        raise ValueError(f"{w.shape[-1]} columns: FP4 has one scale per {BLOCK}, so expected a multiple of {BLOCK}")
    return w.astype(jnp.float32).reshape(*w.shape[:-1], -1, BLOCK)


def _coded(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes 0 to 15 as float32, scales) of blocks [..., 32].

    The scale by integers, as a logarithm may round across: 6 = 1.5 * 2^2, so amax = m * 2^e needs the exponent e - 2,
    and one more where m > 1.5.
    """
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), SMALLEST_AMAX)
    bits = jax.lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000)
    scale = jax.lax.bitcast_convert_type(jnp.where(jnp.isfinite(amax), exponent, 0xFF).astype(jnp.uint8), E8M0)
    magnitude = jnp.minimum(jnp.abs(blocks) / scale.astype(jnp.float32)[..., None], LARGEST)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1.0, 2.0))
    nearest = jnp.round(magnitude / step) * step  # ties to even
    code = jnp.where(nearest <= 2, 2 * nearest, jnp.where(nearest <= 4, nearest + 2, 7))
    return code + 8 * jnp.signbit(blocks), scale


def _values(codes: jax.Array) -> jax.Array:
    """The numbers of codes 0 to 15, float32."""
    code = codes.astype(jnp.int32)
    magnitude = jnp.asarray(MAGNITUDES, jnp.float32)[code & 7]
    return jnp.where(code & 8, -magnitude, magnitude)


def _spread(packed: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether the scales of each tile of 128 x 128 differ by 2^6 at most, exponent of the largest of them, int32)."""
    exponent = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.int32) - 127
    used = jnp.any((codes_of(packed) & 7).reshape(*scale.shape, BLOCK) != 0, axis=-1)
    rows, blocks = scale.shape[-2:]
    fill = [*[(0, 0)] * (scale.ndim - 2), (0, -rows % TILE), (0, -blocks % (TILE // BLOCK))]

    def over_tiles(x: jax.Array, unused: int, reduce: Any) -> jax.Array:
        x = jnp.pad(jnp.where(used, x, unused), fill, constant_values=unused)
        *leading, height, width = x.shape
        return reduce(x.reshape(*leading, height // TILE, TILE, width * BLOCK // TILE, TILE // BLOCK), axis=(-3, -1))

    least, largest = over_tiles(exponent, 1000, jnp.min), over_tiles(exponent, -127, jnp.max)
    return largest - least <= SPREAD, largest
