"""Weights gathered in FP8 codes: each device quantises its part, and one byte per number travels.

The codes and scales are those of quantising the whole weight, to the bit, wherever it is cut. A block of 128 x 128 that
lies on several devices has one scale: these agree on the largest magnitude in it, which takes 4 bytes per block and
loses nothing, since a maximum does not depend on the order. Works inside `per_device`.
"""

import math

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.sharding import Placement
from pallas_kernels.quantize.reference import BLOCK, block_scale, encode, quantize_squares


def gather_codes(part: jax.Array, place: Placement, matrix: tuple[int, int], scale: str) -> tuple[jax.Array, jax.Array]:
    """Returns (E4M3 codes of the whole weight as uint8, its scales [..., ceil(K / 128), ceil(N / 128)], float32).

    Args:
        part: this device's part of the weight, bfloat16 or float32.
        place: of the weight, which is cut (`zero_dim`).
        matrix: how many of its first axes are a stack's, and how many of the rest make K (`layers.base.matrix_axes`).
        scale: "fp32" or "ue8m0".
    """
    dim, copies, (n_stacked, n_contracted) = place.zero_dim, place.copies, matrix
    assert dim is not None
    stack, rows, columns = part.shape[:n_stacked], part.shape[n_stacked:][:n_contracted], part.shape[sum(matrix) :]
    w = part.reshape(*stack, math.prod(rows), math.prod(columns)).astype(jnp.float32)
    if dim < n_stacked:
        q, _, scales = quantize_squares(w, scale=scale)
        scales = jax.lax.all_gather(scales, copies, axis=dim, tiled=True)
    elif dim < n_stacked + n_contracted:
        q, scales = _cut_by_rows(w, _numbers(rows, dim - n_stacked, copies), _whole(rows, copies), copies, scale)
    else:
        numbers = _numbers(columns, dim - n_stacked - n_contracted, copies)
        q, scales = (a.mT for a in _cut_by_rows(w.mT, numbers, _whole(columns, copies), copies, scale))
    bits = jax.lax.bitcast_convert_type(q, jnp.uint8).reshape(part.shape)
    return jax.lax.all_gather(bits, copies, axis=dim, tiled=True), scales


def _whole(shape: tuple[int, ...], copies: tuple[str, ...]) -> int:
    """The rows of the whole matrix, of which the devices have equally many."""
    return math.prod(shape) * jax.lax.axis_size(copies)


def _numbers(shape: tuple[int, ...], cut: int, copies: tuple[str, ...]) -> jax.Array:
    """The number in the whole matrix of each row here; `shape` are the axes of its rows, `cut` the one that is cut."""
    numbers = jnp.zeros((), jnp.int32)
    for dim, n in enumerate(shape):
        n_parts, first = (jax.lax.axis_size(copies), n * jax.lax.axis_index(copies)) if dim == cut else (1, 0)
        numbers = numbers[..., None] * (n * n_parts) + first + jnp.arange(n, dtype=jnp.int32)
    return numbers.reshape(-1)


def _cut_by_rows(
    w: jax.Array, numbers: jax.Array, n_rows: int, copies: tuple[str, ...], scale: str
) -> tuple[jax.Array, jax.Array]:
    """(codes of these rows, scales of the whole matrices) of w [..., rows here, columns]."""
    n_columns = w.shape[-1]
    n_blocks, extra, block = -(-n_columns // BLOCK), -n_columns % BLOCK, numbers // BLOCK
    magnitudes = jax.lax.bitcast_convert_type(w, jnp.int32) & 0x7FFFFFFF  # in order as integers, NaN the largest
    filled = jnp.pad(magnitudes, [(0, 0)] * (w.ndim - 1) + [(0, extra)])
    by_row = jnp.max(filled.reshape(*w.shape[:-1], n_blocks, BLOCK), axis=-1)
    here = jax.ops.segment_max(jnp.moveaxis(by_row, -2, 0), block, num_segments=-(-n_rows // BLOCK))
    largest = jnp.moveaxis(jax.lax.pmax(jnp.maximum(here, 0), copies), 0, -2)
    scales = block_scale(jax.lax.bitcast_convert_type(largest, jnp.float32), scale)
    of_numbers = jnp.repeat(jnp.take(scales, block, axis=-2), BLOCK, axis=-1)[..., :n_columns]
    return encode(w, of_numbers), scales
