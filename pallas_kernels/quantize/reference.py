"""Quantisation of activations in 1 x 128 blocks, along both axes, in plain jax.numpy: the definition.

    amax[b, m]  = max(max_{k in block b} |x[m, k]|, 1e-4)
    scale[b, m] = amax / 448                           "fp32"
                = 2^ceil(log2(amax / 448))             "ue8m0": a power of two, so that products with it are exact
    q[m, k]     = E4M3(clip(x / scale, -448, 448))

and the same for the transpose of x, which is what a weight gradient contracts: 8-bit tensor cores read both operands
with the contraction last. Scales are float32, with the blocks first: the kernels copy runs of consecutive rows.
The floor of amax, 1e-4 above, is an argument: gradients of a mean over many tokens may all be smaller than that.

`quantize_swiglu` does the same for x = silu(gate) * up * factor, which is float32 and kept in no other form.
`quantize_squares` gives a block of 128 x 128 one scale, as weights have: both directions then have the same codes.
Paper: V3 sections 3.3.2 and 3.3.3 (outputs of SwiGLU are computed again); V3.1 for power-of-two scales.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
LARGEST = 448.0
AMAX_FLOOR = 1e-4


class Quantized(NamedTuple):
    """Both quantisations of a matrix x [M, K]."""

    q: jax.Array  # E4M3 [M, K]
    scale: jax.Array  # float32 [ceil(K / 128), M]
    q_t: jax.Array  # E4M3 [K, M]: x transposed, its blocks along M
    scale_t: jax.Array  # float32 [ceil(M / 128), K]


class Squares(NamedTuple):
    """Codes of weights w [..., K, N] and of their transposes, with one scale per 128 x 128 block."""

    q: jax.Array  # E4M3 [..., K, N]
    q_t: jax.Array  # E4M3 [..., N, K]: the same codes
    scale: jax.Array  # float32 [..., ceil(K / 128), ceil(N / 128)]


def quantize(x: jax.Array, *, scale: str = "fp32", floor: float = AMAX_FLOOR) -> Quantized:
    """Returns both quantisations of x [M, K]; see `pallas_kernels.quantize`."""
    return Quantized(*quantize_rows(x, scale=scale, floor=floor), *quantize_rows(x.T, scale=scale, floor=floor))


def quantize_swiglu(
    gate: jax.Array,
    up: jax.Array | None = None,
    factor: jax.Array | None = None,
    *,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
) -> Quantized:
    """Returns both quantisations of silu(gate) * up * factor [M, F]; see `pallas_kernels.quantize_swiglu`."""
    gate, up = jnp.split(gate, 2, axis=1) if up is None else (gate, up)
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    x = gate / (1 + jnp.exp(-gate)) * up
    if factor is not None:
        x *= factor.astype(jnp.float32)[:, None]
    return quantize(x, scale=scale, floor=floor)


def quantize_squares(w: jax.Array, *, scale: str = "fp32", floor: float = AMAX_FLOOR) -> Squares:
    """Returns the codes of w [..., K, N] and of its transpose; see `pallas_kernels.quantize_squares`."""
    *leading, k, n = w.shape
    counts = -(-k // BLOCK), -(-n // BLOCK)
    extra = [(0, count * BLOCK - size) for count, size in zip(counts, (k, n), strict=True)]
    filled = jnp.pad(w.astype(jnp.float32), [(0, 0)] * len(leading) + extra)
    blocks = filled.reshape(*leading, counts[0], BLOCK, counts[1], BLOCK)
    scales = block_scale(_largest_magnitude(_largest_magnitude(blocks), axis=-2), scale, floor)
    q = encode(blocks, scales[..., :, None, :, None]).reshape(filled.shape)[..., :k, :n]
    return Squares(q, q.mT, scales)


def quantize_rows(x: jax.Array, *, scale: str = "fp32", floor: float = AMAX_FLOOR) -> tuple[jax.Array, jax.Array]:
    """Returns q [M, K] and scale [ceil(K / 128), M]: blocks of 128 along the last axis."""
    rows, k = x.shape
    count = -(-k // BLOCK)
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, count * BLOCK - k))).reshape(rows, count, BLOCK)
    scales = block_scale(_largest_magnitude(blocks), scale, floor)
    codes = encode(blocks, scales[..., None]).reshape(rows, count * BLOCK)[:, :k]
    return codes, scales.T


def _largest_magnitude(blocks: jax.Array, axis: int = -1) -> jax.Array:
    """max |x| along an axis, NaN if one is NaN.

    Compared as integers, magnitudes have the same order and a NaN is the largest; a maximum of floats may lose it.
    """
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis), jnp.float32)


def block_scale(amax: jax.Array, scale: str, floor: float = AMAX_FLOOR) -> jax.Array:
    """The float32 scales of blocks whose largest magnitudes are `amax`."""
    amax = jnp.where(amax < floor, floor, amax)
    return {"fp32": lambda: divide(amax, LARGEST), "ue8m0": lambda: _power_of_two(amax)}[scale]()


def encode(values: jax.Array, scales: jax.Array) -> jax.Array:
    """E4M3 codes of values / scales; beyond 448 they saturate."""
    return jnp.clip(divide(values, scales), -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, correctly rounded on a CPU; a GPU's division is off by up to two ulp.

    XLA rewrites division by a constant or a broadcast value as multiplication by its reciprocal, which is off by an
    ulp. Writing the divisor as 0 * x + y prevents the rewrite.
    """
    return x / (0.0 * x + y)


def _power_of_two(amax: jax.Array) -> jax.Array:
    """2^ceil(log2(amax / 448)), by integers, as a logarithm may round across a power of two.

    448 = 1.75 * 2^8. So amax = m * 2^e with 1 <= m < 2 needs the exponent e - 8, and one more where m > 1.75.
    """
    bits = jax.lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000)
    power = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.where(jnp.isfinite(amax), power, jnp.nan)
