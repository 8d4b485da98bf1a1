"""The FP8 cache: latents in E4M3 with a float32 scale per 128 numbers, rotary keys in bfloat16.

    entry of a token:  C codes | C / 128 scales of 4 bytes | P rotary numbers of 2 bytes        656 bytes for V3
    scale = max |c| / 448 over a block,    code = round(c / scale)

as in the cache that DeepSeek published with FlashMLA for V3.2. A pool is uint8 [pages, 64, bytes of an entry].
An indexer's key lies in a cache of its own: 128 codes and one scale, a power of two, 132 bytes for V3.2.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # numbers with one scale
LARGEST = 448.0  # of E4M3


def entry_bytes(width: int, rope: int) -> int:
    """Returns the bytes of an entry with a latent of `width` numbers and `rope` rotary ones."""
    return width + 4 * (width // BLOCK) + 2 * rope


def encode(c: jax.Array, rope: jax.Array) -> jax.Array:
    """Returns the entries, uint8 [..., bytes], of latents [..., C] and rotary keys [..., P].

    Raises ValueError if C is not a multiple of 128.
    """
    if c.shape[-1] % BLOCK:
        raise ValueError(f"latents of {c.shape[-1]} numbers: an FP8 cache needs a multiple of {BLOCK}.")
    blocks = c.astype(jnp.float32).reshape(*c.shape[:-1], -1, BLOCK)
    top = jnp.max(jnp.abs(blocks), axis=-1)
    scale = jnp.where(top > 0, top / LARGEST, 1.0)
    codes = (blocks / scale[..., None]).astype(jnp.float8_e4m3fn)
    parts = codes.reshape(c.shape), scale, rope.astype(jnp.bfloat16)
    return jnp.concatenate([_bytes(part) for part in parts], axis=-1)


def decode(entries: jax.Array, rope: int) -> tuple[jax.Array, jax.Array]:
    """Returns (latents [..., C], rotary keys [..., P]), both bfloat16, of entries with `rope` rotary numbers."""
    n_blocks = (entries.shape[-1] - 2 * rope) // (BLOCK + 4)
    width = n_blocks * BLOCK
    codes = lax.bitcast_convert_type(entries[..., :width], jnp.float8_e4m3fn).astype(jnp.float32)
    scale = _numbers(entries[..., width : width + 4 * n_blocks], jnp.float32)
    c = codes.reshape(*scale.shape, BLOCK) * scale[..., None]
    return c.reshape(codes.shape).astype(jnp.bfloat16), _numbers(entries[..., width + 4 * n_blocks :], jnp.bfloat16)


def encode_key(k: jax.Array) -> jax.Array:
    """Returns uint8 [..., Q + 4 Q / 128] of an indexer's keys [..., Q]: codes, then scales.

    Raises ValueError if Q is not a multiple of 128.
    """
    if k.shape[-1] % BLOCK:
        raise ValueError(f"keys of {k.shape[-1]} numbers: an FP8 cache needs a multiple of {BLOCK}.")
    blocks = k.astype(jnp.float32).reshape(*k.shape[:-1], -1, BLOCK)
    top = jnp.max(jnp.abs(blocks), axis=-1)
    mantissa, exponent = jnp.frexp(jnp.where(top > 0, top / LARGEST, 0.5))
    scale = jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5))  # the power of two that is not less
    codes = (blocks / scale[..., None]).astype(jnp.float8_e4m3fn).reshape(k.shape)
    return jnp.concatenate([_bytes(codes), _bytes(scale)], axis=-1)


def decode_key(entries: jax.Array) -> jax.Array:
    """Returns keys [..., Q], float32, of what `encode_key` made of them."""
    n_blocks = entries.shape[-1] // (BLOCK + 4)
    width = n_blocks * BLOCK
    codes = lax.bitcast_convert_type(entries[..., :width], jnp.float8_e4m3fn).astype(jnp.float32)
    scale = _numbers(entries[..., width:], jnp.float32)
    return (codes.reshape(*scale.shape, BLOCK) * scale[..., None]).reshape(codes.shape)


def _bytes(x: jax.Array) -> jax.Array:
    """The bytes of each number, side by side."""
    found = lax.bitcast_convert_type(x, jnp.uint8)
    return found if found.ndim == x.ndim else found.reshape(*x.shape[:-1], -1)


def _numbers(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers of several bytes each."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, jnp.dtype(dtype).itemsize), dtype)
