"""A weight that stays in FP4, as V4 publishes its experts: two codes per byte, and one scale per 32 of a row.

Products dequantise what they need, one expert's matrix at a time. `in_fp8` takes every number over to FP8, where the
scales allow that (`precision.fp4`): products then may use the kernels for FP8.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.precision import fp4
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.precision.quantize import E8M0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["layout"])
@dataclass(frozen=True)
class Fp4Weight(Fp8Weight):
    """A weight in FP4.

    Attributes:
        codes: packed, uint8 [..., rows, columns / 2]; before these the axes of layers and experts, if there are any.
        scale: E8M0 as uint8, [..., rows, columns / 32].
        layout: what rows and columns are.
    """

    bits: ClassVar[int] = 4

    def numbers(self, codes: jax.Array, scale: jax.Array, dtype: DTypeLike) -> jax.Array:
        """See `Fp8Weight`."""
        return fp4.dequantize(codes, _as_scale(scale), dtype)


def encoded(weight: jax.Array, layout: Any) -> Fp4Weight:
    """Returns a weight [..., *layout.shape] in FP4, rounded to nearest."""
    codes, scale = fp4.quantize(layout.as_matrix(weight))
    return Fp4Weight(codes, jax.lax.bitcast_convert_type(scale, jnp.uint8), layout)


def fits_fp8(weight: Fp4Weight) -> jax.Array:
    """Returns whether `in_fp8` is exact, for each matrix [...]."""
    return fp4.fits_fp8(weight.codes, _as_scale(weight.scale))


def in_fp8(weight: Fp4Weight) -> Fp8Weight:
    """Returns the same numbers in FP8, if `fits_fp8`."""
    codes, scale = fp4.to_fp8(weight.codes, _as_scale(weight.scale))
    return Fp8Weight(codes, scale.astype(jnp.float32), weight.layout)


def _as_scale(scale: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.asarray(scale), E8M0)
