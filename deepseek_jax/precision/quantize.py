"""8-bit floats with one scale a block: what DeepSeek's FP8 weights are, and FP8 training computes in.

    amax[b]  = max(max |w| over the block, 1e-4)             keeps the scale valid for empty or tiny blocks
    scale[b] = amax / 448                                    "fp32":  V3, R1
             = 2^ceil(log2(amax / 448))                      "ue8m0": V3.1 and later; products with it are exact
    q        = E4M3(clip(w / scale, -448, 448))              448 is the largest E4M3; beyond 464 a cast gives NaN
    w'       = q * scale                                     in float32, rounded once

Blocks tile the last two axes: (128, 128) for weights, (1, 128) for activations. The last block of an axis may be
partial and counts as filled up with zeros. Scales are named `scale_inv` as in the published files: they multiply.
A NaN or an infinity makes its whole block NaN. Compared with one scale per tensor this costs 1/4096 more bytes
(128 x 128, float32), and an outlier loses precision only in its own block.
Paper: V3 section 3.3.2; V3.1 for power-of-two scales.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

E4M3, E8M0 = jnp.float8_e4m3fn, jnp.float8_e8m0fnu
LARGEST = 448.0
AMAX_FLOOR = 1e-4


def quantize_blocks(
    w: jax.Array, block: tuple[int, int] = (128, 128), scale: str = "fp32", floor: float = AMAX_FLOOR
) -> tuple[jax.Array, jax.Array]:
    """Returns (q, scale_inv): E4M3 codes, and one scale a block in float32 ("fp32") or E8M0 ("ue8m0").

    `w`, of any float dtype, and `q` are [..., rows, columns]; `scale_inv` is [..., ceil(rows / block[0]),
    ceil(columns / block[1])].
    """
    tiles = _tiles(jnp.asarray(w, jnp.float32), block)
    amax = jnp.maximum(jnp.max(jnp.abs(tiles), axis=(-3, -1)), floor)
    scale_inv = {"fp32": _exact_scale, "ue8m0": _power_of_two}[scale](amax)
    q = jnp.clip(_divide(tiles, _over_tiles(scale_inv)), -LARGEST, LARGEST).astype(E4M3)
    return _untiled(q, w.shape), scale_inv


def dequantize_blocks(
    q: jax.Array, scale_inv: jax.Array, dtype: DTypeLike = jnp.bfloat16, block: tuple[int, int] = (128, 128)
) -> jax.Array:
    """Returns q * scale_inv in `dtype`; scales of float32, bfloat16 or E8M0.

    The same to the last bit as the reader of published files (convert/safetensors), except that XLA on a CPU flushes
    what is smaller than 2^-126 to zero.
    """
    tiles = _tiles(jnp.asarray(q, jnp.float32), block) * _over_tiles(scale_inv)
    return _untiled(tiles.astype(dtype), q.shape)


def _exact_scale(amax: jax.Array) -> jax.Array:
    return _divide(amax, LARGEST)


def _power_of_two(amax: jax.Array) -> jax.Array:
    """2^ceil(log2(amax / 448)) as E8M0, whose code is the exponent + 127; by integers, as a logarithm may round across.

    448 = 1.75 * 2^8.  So amax = m * 2^e with 1 <= m < 2 needs the exponent e - 8, and one more where m > 1.75.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.uint32)
    biased_exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    code = biased_exponent - 8 + (mantissa > 0x600000)
    code = jnp.where(jnp.isfinite(amax), code, 0xFF)  # E8M0's NaN
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), E8M0)


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, correctly rounded and so the same on every device, compiled or not.

    XLA rewrites a division by a constant or a broadcast value as a product with its reciprocal, which is off by one
    ulp. Writing the divisor as 0 * x + y prevents that.
    """
    return x / (0.0 * x + y)


def _tiles(w: jax.Array, block: tuple[int, int]) -> jax.Array:
    """[..., rows, columns] -> [..., rows of blocks, block[0], columns of blocks, block[1]], filled up with zeros."""
    counts = [-(-size // b) for size, b in zip(w.shape[-2:], block, strict=True)]
    extra = [count * b - size for count, b, size in zip(counts, block, w.shape[-2:], strict=True)]
    if any(extra):
        w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, n) for n in extra])
    return w.reshape(*w.shape[:-2], counts[0], block[0], counts[1], block[1])


def _over_tiles(scale_inv: jax.Array) -> jax.Array:
    return jnp.asarray(scale_inv, jnp.float32)[..., :, None, :, None]


def _untiled(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    *leading, rows, height, columns, width = tiles.shape
    return tiles.reshape(*leading, rows * height, columns * width)[..., : shape[-2], : shape[-1]]
