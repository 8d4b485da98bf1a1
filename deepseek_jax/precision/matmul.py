"""The one function through which activations meet weights: y = x W, in the activations' dtype.

Low-precision formats enter here and nowhere else: layers call `einsum` and stay as they are.
"""

import jax
import jax.numpy as jnp


def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, w)` with the float32 master weight `w` cast to the dtype of the activations `x`.

    The product is accumulated in float32 by every backend and returned in the dtype of `x`.
    """
    return jnp.einsum(equation, x, w.astype(x.dtype))
