"""The public functions: arguments are checked once, then the named implementation runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer import reference
from pallas_kernels.indexer.reference import Segments

IMPLEMENTATIONS = ("reference", "mosaic_gpu")
WIDTH = 128  # of a block with one scale
LARGEST = 448.0  # of E4M3


class Codes(NamedTuple):
    """Numbers in E4M3, [..., 128], and the scale of each row, float32 [...]."""

    codes: jax.Array
    scale: jax.Array


def encode(x: jax.Array) -> Codes:
    """Returns rows [..., 128] in E4M3, each with the least power of two as its scale with which none is above 448.

    Exact for rows that were rounded in this way before. Rows of zeros have the scale of a largest number of 1e-4.
    Source: V3.2's inference code, `act_quant` with scales in UE8M0.
    """
    wide = x.astype(jnp.float32)
    top = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-4) / LARGEST
    bits = lax.bitcast_convert_type(top, jnp.int32)
    power = (bits >> 23) + ((bits & 0x7FFFFF) > 0).astype(jnp.int32)  # of two, not below
    scale = lax.bitcast_convert_type(power << 23, jnp.float32)
    return Codes((wide / scale[..., None]).astype(jnp.float8_e4m3fn), scale)


def logits(
    q_BTHQ: Codes,
    k_BSQ: Codes,
    weight_BTH: jax.Array,
    *,
    implementation: str,
    q_offset: int | jax.Array = 0,
    segments: Segments | None = None,
) -> jax.Array:
    """Scores of a lightning indexer: I_ts = sum_h weight_th max(q_th . k_s, 0).

    Args:
        q_BTHQ: query heads, codes [B, T, H, 128] and scales [B, T, H].
        k_BSQ: keys, codes [B, S, 128] and scales [B, S].
        weight_BTH: of the heads, with all constant factors.
        implementation: "reference" (any device; the scores of all heads exist in between) or "mosaic_gpu" (Hopper; H
            divides 128 and is a multiple of 8). There is no fallback from one to another.
        q_offset: of the first query among the keys: query t sees keys up to t + q_offset.
        segments: integers (of queries [B, T], of keys [B, S]): a query sees keys of its own segment alone.

    Returns I_BTS, float32; -inf where a query does not see a key.
    Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1, eq. 1.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    _check(q_BTHQ, k_BSQ, weight_BTH, segments)
    weight_BTH = weight_BTH * q_BTHQ.scale
    arguments = q_BTHQ.codes, k_BSQ.codes, k_BSQ.scale, weight_BTH, q_offset, segments
    if implementation == "reference":
        return reference.logits(*arguments)
    from pallas_kernels import mosaic_gpu  # not part of every JAX build
    from pallas_kernels.indexer import gpu

    gpu.check(q_BTHQ.codes)
    return gpu.logits(*arguments, n_processors=mosaic_gpu.check_hopper(implementation))


def _check(q: Codes, k: Codes, weight: jax.Array, segments: Segments | None) -> None:
    shapes = f"q {q.codes.shape}, {q.scale.shape}, k {k.codes.shape}, {k.scale.shape}, weights {weight.shape}"
    if q.codes.ndim != 4 or k.codes.ndim != 3 or 0 in (*q.codes.shape, *k.codes.shape):
        raise ValueError(f"{shapes}: expected q [B, T, H, 128] and k [B, S, 128], no empty axis.")
    if q.codes.shape[0] != k.codes.shape[0] or {q.codes.shape[-1], k.codes.shape[-1]} != {WIDTH}:
        raise ValueError(f"{shapes}: expected one B, and heads and keys that are {WIDTH} wide.")
    if q.scale.shape != q.codes.shape[:-1] or k.scale.shape != k.codes.shape[:-1] or weight.shape != q.scale.shape:
        raise ValueError(f"{shapes}: expected a scale for each row of q and k, and a weight for each head.")
    if not q.codes.dtype == k.codes.dtype == jnp.float8_e4m3fn:
        raise ValueError(f"codes {q.codes.dtype} and {k.codes.dtype}: expected float8_e4m3fn, as `encode` gives.")
    if segments is not None and tuple(x.shape for x in segments) != (q.codes.shape[:2], k.codes.shape[:2]):
        raise ValueError(f"{shapes}, segments {[x.shape for x in segments]}: expected [B, T] and [B, S].")
