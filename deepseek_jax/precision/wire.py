"""The formats in which activations travel to the experts of other devices and back, and their gradients.

    tokens on their way to the experts                          `Wire` of the run's matmul
    results on their way back                                   as they are
    gradients of the results, on their way to the experts       `Wire` again
    gradients of the tokens, on their way back                  as they are

With FP8 a token is D codes of one byte and D / 128 scales, powers of two, of one byte each: half of bfloat16. A code
times a power of two is exact in bfloat16, and quantising the result again, with power-of-two scales, gives the same
numbers: experts compute with exactly what was sent. Where nothing travels the same rounding takes place, so that a
model does not depend on its mesh.
Paper: V3 section 3.3.3, "Low-Precision Communication".
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from deepseek_jax.precision.quantize import E4M3, E8M0, dequantize_blocks, quantize_blocks

BLOCK = (1, 128)
SMALLEST_AMAX = 1e-24  # of activations and gradients; that of published weights would turn small gradients to zeros


class Carry(Protocol):
    """Moves rows of any dtype; a pytree of what it depends on besides them."""

    def __call__(self, rows_AD: jax.Array) -> jax.Array:
        """Returns the rows where they arrive."""

    @property
    def back(self) -> "Carry":
        """Its transpose: moves rows the other way."""


class Wire(Protocol):
    """A format of rows that travel; static and hashable."""

    def encode(self, x_AD: jax.Array) -> jax.Array:
        """Returns what is sent for these rows, an array with the same first axis."""

    def decode(self, sent: jax.Array, dtype: DTypeLike, width: int) -> jax.Array:
        """Returns the rows of `width` numbers that were sent."""


@dataclass(frozen=True)
class AsIs:
    """Rows travel in their own dtype."""

    def encode(self, x_AD: jax.Array) -> jax.Array:
        """See `Wire`."""
        return x_AD

    def decode(self, sent: jax.Array, dtype: DTypeLike, width: int) -> jax.Array:
        """See `Wire`."""
        return sent


@dataclass(frozen=True)
class Codes:
    """E4M3 codes and power-of-two scales, as bytes: first the codes of a row, then its scales."""

    def encode(self, x_AD: jax.Array) -> jax.Array:
        """See `Wire`."""
        parts = quantize_blocks(x_AD, BLOCK, "ue8m0", SMALLEST_AMAX)
        return jnp.concatenate([jax.lax.bitcast_convert_type(part, jnp.uint8) for part in parts], axis=1)

    def decode(self, sent: jax.Array, dtype: DTypeLike, width: int) -> jax.Array:
        """See `Wire`."""
        codes, scales = jnp.split(sent, [width], axis=1)
        codes, scales = jax.lax.bitcast_convert_type(codes, E4M3), jax.lax.bitcast_convert_type(scales, E8M0)
        return dequantize_blocks(codes, scales, dtype, BLOCK)


AS_IS = AsIs()


def carried(x_AD: jax.Array, there: Wire, back: Wire, carry: Carry) -> jax.Array:
    """The rows after `carry`, which moves what `there` makes of them; their gradient comes through `back`.

    Args:
        x_AD: rows.
        there: format of the rows.
        back: format of the gradient.
        carry: moves rows of any dtype.
    """
    return _carried(there, back, carry, x_AD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _carried(there: Wire, back: Wire, carry: Carry, x_AD: jax.Array) -> jax.Array:
    return there.decode(carry(there.encode(x_AD)), x_AD.dtype, x_AD.shape[1])


def _backward(there: Wire, back: Wire, carry: Carry, g_AD: jax.Array) -> tuple:
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), carry)
    return nothing, _carried(back, there, carry.back, g_AD)


_carried.defvjp(lambda there, back, carry, x_AD: (_carried(there, back, carry, x_AD), carry), _backward)
