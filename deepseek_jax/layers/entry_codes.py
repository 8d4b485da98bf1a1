"""How keys, compressed entries and an indexer's keys are stored by V4's attention.

    as they are    `Exact`
    584 bytes      `Fp8`: 448 codes of E4M3 | 64 rotary numbers in bfloat16 | 7 scales, one for 64 codes | 1 of padding
    68 bytes       `Fp4`: 128 codes of E2M1, two to a byte, the first in the low half | 4 scales, one for 32 codes

A scale is a power of two, the smallest with which nothing is larger than the largest code, and takes one byte (E8M0).
An indexer's key is turned by a Hadamard matrix first, as its queries are. `TrainedFp4` is what training reads of both:
the numbers of `Fp4`, and the gradient as if nothing were rounded.
Sizes: DeepSeek's FlashMLA (which puts the scales of a page behind all its codes) and the released code of V4.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.layers.indexer import hadamard
from deepseek_jax.precision.fp4 import rounded

FP8_BLOCK, FP4_BLOCK = 64, 32  # codes with one scale
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what the codes from 0 on mean; 8 more is the sign
ALIGNED = 8  # bytes of which an entry takes a multiple


class Codes(Protocol):
    """How vectors of one kind are stored."""

    def pack(self, x: jax.Array) -> jax.Array:
        """Returns [..., bytes or numbers] of vectors [..., Q]."""

    def unpack(self, stored: jax.Array) -> jax.Array:
        """Returns the vectors of what `pack` gave."""


@dataclass(frozen=True)
class Exact:
    """Vectors as they are, in `dtype`."""

    dtype: DTypeLike

    def pack(self, x: jax.Array) -> jax.Array:
        """See `Codes`."""
        return x.astype(self.dtype)

    def unpack(self, stored: jax.Array) -> jax.Array:
        """See `Codes`."""
        return stored


@dataclass(frozen=True)
class Fp8:
    """Vectors of `width` numbers, of which the last `rope_width` keep 16 bits."""

    width: int
    rope_width: int
    dtype: DTypeLike  # of what is read

    def pack(self, x: jax.Array) -> jax.Array:
        """See `Codes`; uint8."""
        blocks = _blocks(x[..., : -self.rope_width].astype(jnp.float32), FP8_BLOCK)
        exponent = _exponent(blocks, LARGEST_E4M3)
        codes = jnp.ldexp(blocks, -exponent[..., None]).astype(jnp.float8_e4m3fn).reshape(*x.shape[:-1], -1)
        codes = lax.bitcast_convert_type(codes[..., : self.width - self.rope_width], jnp.uint8)
        rope = lax.bitcast_convert_type(x[..., -self.rope_width :].astype(jnp.bfloat16), jnp.uint8)
        parts = codes, rope.reshape(*x.shape[:-1], -1), (exponent + 127).astype(jnp.uint8)
        packed = jnp.concatenate(parts, axis=-1)
        return jnp.pad(packed, [(0, 0)] * (x.ndim - 1) + [(0, -packed.shape[-1] % ALIGNED)])

    def unpack(self, stored: jax.Array) -> jax.Array:
        """See `Codes`."""
        width, end = self.width - self.rope_width, self.width + self.rope_width
        codes = lax.bitcast_convert_type(stored[..., :width], jnp.float8_e4m3fn)
        blocks = _blocks(codes.astype(jnp.float32), FP8_BLOCK)
        exponent = stored[..., end : end + blocks.shape[-2]].astype(jnp.int32) - 127
        numbers = jnp.ldexp(blocks, exponent[..., None]).reshape(*stored.shape[:-1], -1)[..., :width]
        pairs = stored[..., width:end].reshape(*stored.shape[:-1], -1, 2)
        rope = lax.bitcast_convert_type(pairs, jnp.bfloat16)
        return jnp.concatenate([numbers.astype(self.dtype), rope.astype(self.dtype)], axis=-1)


@dataclass(frozen=True)
class Fp4:
    """An indexer's keys, of a power of two of numbers; what is read is turned by the Hadamard matrix."""

    width: int
    dtype: DTypeLike  # of what is read

    def pack(self, x: jax.Array) -> jax.Array:
        """See `Codes`; uint8."""
        blocks = _blocks(hadamard(x.astype(jnp.float32)), FP4_BLOCK)
        exponent = _exponent(blocks, LARGEST_E2M1)
        codes = to_e2m1(jnp.ldexp(blocks, -exponent[..., None])).reshape(*x.shape[:-1], -1)[..., : self.width]
        pairs = codes[..., ::2] | codes[..., 1::2] << 4
        return jnp.concatenate([pairs, (exponent + 127).astype(jnp.uint8)], axis=-1)

    def unpack(self, stored: jax.Array) -> jax.Array:
        """See `Codes`."""
        pairs, scale = stored[..., : self.width // 2], stored[..., self.width // 2 :]
        codes = jnp.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*stored.shape[:-1], self.width)
        exponent = scale.astype(jnp.int32)[..., None] - 127
        numbers = jnp.ldexp(_blocks(from_e2m1(codes), FP4_BLOCK), exponent).reshape(*codes.shape[:-1], -1)
        return numbers[..., : self.width].astype(self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns queries of such keys, turned and rounded as these are."""
        return self.unpack(self.pack(x)).astype(x.dtype)


@dataclass(frozen=True)
class TrainedFp4:
    """The numbers that `Fp4` gives back, in `dtype`; a gradient passes the rounding unchanged (V4 section 5.2.1)."""

    dtype: DTypeLike

    def pack(self, x: jax.Array) -> jax.Array:
        """See `Codes`; turned and rounded."""
        return rounded(hadamard(x.astype(jnp.float32))).astype(self.dtype)

    def unpack(self, stored: jax.Array) -> jax.Array:
        """See `Codes`."""
        return stored

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns queries of such keys."""
        return self.pack(x).astype(x.dtype)


def to_e2m1(x: jax.Array) -> jax.Array:
    """Codes 0..15, uint8, of float32 numbers up to 6 in size: the nearest, of two as near the even code."""
    size = jnp.abs(x)
    steps = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0)
    return sum(step.astype(jnp.uint8) for step in steps) + (8 * (x < 0)).astype(jnp.uint8)


def from_e2m1(codes: jax.Array) -> jax.Array:
    """The numbers, float32, that codes 0..15 mean."""
    return jnp.asarray((*E2M1, *(-x for x in E2M1)), jnp.float32)[codes]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., n, size], the last one filled up with zeros."""
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return filled.reshape(*x.shape[:-1], -1, size)


def _exponent(blocks: jax.Array, largest: float) -> jax.Array:
    """The exponent e of each block's scale: the least with max |x| <= largest * 2^e; int32."""
    top = jnp.max(jnp.abs(blocks), axis=-1)
    mantissa, exponent = jnp.frexp(jnp.where(top > 0, top / largest, 0.5))
    return jnp.clip(exponent - (mantissa == 0.5), -126, 127).astype(jnp.int32)
