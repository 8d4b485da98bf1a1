"""4-bit weights and their scales, as V4 publishes its experts.

    w[i, j] = E2M1[code[i, j]] * 2^(scale[i, j // 32] - 127)

A byte holds two codes of a row, the first in its low four bits; files call it I8. A scale is one byte too (F8_E8M0).
Every number is exact in bfloat16.
"""

import numpy as np

from deepseek_jax.convert.safetensors.dequantize import aligned
from deepseek_jax.convert.safetensors.format import Info
from deepseek_jax.errors import UserError

BLOCK = (1, 32)  # rows and columns with one scale
PACKED = "I8"  # what files call two codes
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are their negatives


def shape_of(packed: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a weight from that of its packed codes."""
    return (*packed[:-1], 2 * packed[-1])


def check_scale_info(packed: Info, scales: Info, where: str) -> None:
    """Raises UserError unless shape and dtype of the scales fit the packed codes; `where` names the scales."""
    shape = shape_of(packed.shape)
    if len(shape) < 2 or shape[-1] % BLOCK[1] or scales.shape != (*shape[:-1], shape[-1] // BLOCK[1]):
        raise UserError(
            f"{where}: shape {list(scales.shape)} for codes of shape {list(packed.shape)}: expected one scale for 16 "
            "bytes of a row, which hold 32 codes."
        )
    if scales.dtype != "F8_E8M0":
        raise UserError(f"{where}: dtype {scales.dtype}: expected scales in F8_E8M0.")


def check_scales(scales: np.ndarray, where: str) -> None:
    """Raises UserError for a scale that is NaN, or too large for the largest code in bfloat16."""
    exponents = scales.view(np.uint8)
    if exponents.size and exponents.max() > 127 + 125:
        at = [int(i) for i in np.argwhere(exponents > 127 + 125)[0]]
        raise UserError(f"{where}: byte {exponents[tuple(at)]} at {at} is not a valid scale.")


def dequantize(packed: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the weight [..., rows, columns] of packed codes [..., rows, columns / 2] and scales, checked before."""
    signed = np.array([*MAGNITUDES, *(-value for value in MAGNITUDES)], np.float32)
    pairs = np.stack([np.tile(signed, 16), np.repeat(signed, 16)], axis=-1)  # of each byte
    found = aligned(2 * packed.size * dtype.itemsize).view(dtype).reshape(*scales.shape, BLOCK[1])
    values = pairs[packed.view(np.uint8)].reshape(found.shape)
    np.multiply(values, scales.astype(np.float32)[..., None], out=values)
    found[...] = values
    return found.reshape(shape_of(packed.shape))
