"""8-bit weights and their scales.

    w[i, j] = q[i, j] * scale_inv[i // 128, j // 128]

Both factors are taken to float32, multiplied there and rounded once. A code has 256 values, so each block gets a table
of 256 results and the rest is table look-up: 0.7 to 0.9 GB of codes per second and core, five times as fast as the
plain expression in numpy.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from deepseek_jax.convert.safetensors.format import DTYPES, Info, shown
from deepseek_jax.errors import UserError

BLOCK = (128, 128)
# 8-bit floats that are weights: how many of their positive codes are finite numbers (they come first).
FINITE_CODES = {"F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
ALIGNMENT = 64  # bytes; with it JAX can use an array on the CPU without a copy
THREADS = min(8, os.cpu_count() or 1)
TABLE_CODES = 1 << 18  # codes looked up at once, so that their indices stay in the cache


def dequantize(
    read_rows: Callable[[int, np.ndarray], None],
    info: Info,
    scales: np.ndarray,
    dtype: np.dtype,
    block: tuple[int, int],
    where: str,
) -> np.ndarray:
    """Returns 8-bit codes times their scales, `round(float32(q) * float32(scale_inv))`.

    Memory: the result and a few MB for each of `THREADS` threads. Raises UserError if a code is NaN or infinite.

    Args:
        read_rows: `read_rows(row, codes)` fills an array of uint8 with the rows from `row` on, all matrices in a row.
        info: dtype and shape of the codes; the blocks divide the last two axes, and the last blocks may be partial.
        scales: float32, `blocks_of(shape, block)`.
        dtype, block, where: dtype of the result; rows and columns of a block; name of the tensor in messages.
    """
    *leading, rows, columns = info.shape
    matrices, limit = math.prod(leading), FINITE_CODES[info.dtype]
    values = np.arange(256, dtype=np.uint8).view(DTYPES[info.dtype]).astype(np.float32)
    scales = scales.reshape(matrices, *scales.shape[-2:])
    result = aligned(math.prod(info.shape) * dtype.itemsize).view(dtype).reshape(matrices, rows, columns)

    def one_row_of_blocks(matrix: int, i: int) -> None:
        start, stop = i * block[0], min((i + 1) * block[0], rows)
        codes = np.empty((stop - start, columns), np.uint8)
        read_rows(matrix * rows + start, codes)
        if (codes & 0x7F).max() >= limit:
            row, column = np.argwhere((codes & 0x7F) >= limit)[0]
            raise UserError(f"{where}: NaN or infinity in row {start + row}, column {column}. The file is damaged.")
        with np.errstate(all="ignore"):  # the table also holds the codes that do not occur
            table = (scales[matrix, i, :, None] * values).astype(dtype).reshape(-1)
        _look_up(table, codes, block[1], result[matrix, start:stop])

    if result.size:
        jobs = [(matrix, i) for matrix in range(matrices) for i in range(scales.shape[1])]
        with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
            list(pool.map(lambda job: one_row_of_blocks(*job), jobs))
    return result.reshape(info.shape)


def _look_up(table: np.ndarray, codes: np.ndarray, width: int, result: np.ndarray) -> None:
    """result[i, j] = table[256 * (j // width) + codes[i, j]], some rows at a time."""
    rows, columns = codes.shape
    first = np.arange(columns) // width * 256
    step = max(1, min(rows, TABLE_CODES // columns))
    for i in range(0, rows, step):
        indices = codes[i : i + step].astype(np.intp)
        indices += first
        np.take(table, indices, out=result[i : i + step], mode="clip")


def check_scale_info(codes: Info, scales: Info, block: tuple[int, int], name: str, where: str) -> None:
    """Raises UserError unless shape and dtype of the scales fit the codes called `name`; `where` names the scales."""
    shape = codes.shape
    if len(shape) < 2 or scales.shape != blocks_of(shape, block):
        expected = f"{list(blocks_of(shape, block))}" if len(shape) > 1 else "two axes or more"
        raise UserError(
            f"{where}: shape {list(scales.shape)}: expected {expected}, because {shown(name)} has shape {list(shape)} "
            f"and blocks of {block[0]}x{block[1]}."
        )
    if scales.dtype not in SCALE_DTYPES:
        raise UserError(f"{where}: dtype {scales.dtype}: expected scales in {' or '.join(SCALE_DTYPES)}.")


def check_scales(scales: np.ndarray, codes: Info, dtype: np.dtype, where: str) -> None:
    """Raises UserError for scales that are negative, not finite, or too large for the largest code in `dtype`."""
    largest = float(ml_dtypes.finfo(DTYPES[codes.dtype]).max)
    valid = (scales >= 0) & (scales * np.float64(largest) <= float(ml_dtypes.finfo(dtype).max))  # False for NaN
    if not valid.all():
        at = [int(i) for i in np.argwhere(~valid)[0]]
        raise UserError(f"{where}: {scales[tuple(at)]} at {at} is not a valid scale for {dtype.name}.")


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Returns the shape of the scales of codes of this shape."""
    return (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], block, strict=False)))


def aligned(nbytes: int) -> np.ndarray:
    """Returns uninitialised bytes that start at a multiple of `ALIGNMENT`."""
    try:
        space = np.empty(nbytes + ALIGNMENT, np.uint8)
    except MemoryError:
        raise UserError(f"not enough memory for one tensor of {nbytes / 2**30:.1f} GiB.") from None
    start = -space.ctypes.data % ALIGNMENT
    return space[start : start + nbytes]
