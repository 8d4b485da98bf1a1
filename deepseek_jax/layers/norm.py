"""RMSNorm: y = w * x / sqrt(mean(x^2) + eps), in float32 whatever the dtype of x.

Replaces LayerNorm's mean and bias. Paper: Zhang & Sennrich 2019; DeepSeek uses eps = 1e-6, some students of R1
have 1e-5. The keys of V3.2's indexer have a LayerNorm all the same: y = w * (x - mean x) / sqrt(var x + eps) + b.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.nn.initializers import ones, zeros

from deepseek_jax.layers.base import param


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, with a gain whose logical axis is `axis`."""

    def __init__(self, width: int, eps: float, *, axis: str | None = None, rngs: nnx.Rngs):
        self.gain = param(rngs, (width,), (axis,), ones, role="gain")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array like `x`, in its dtype, with the numbers of a token side by side in memory.

        Weight gradients contract over tokens; for their sake XLA on a GPU would store the whole residual stream with
        the tokens side by side, where norms and gathers of tokens run several times slower.
        """
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        y = (wide * self.gain[...]).astype(x.dtype)
        return with_layout_constraint(y, Layout(major_to_minor=tuple(range(y.ndim))))


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, with a gain and a bias. Paper: Ba et al. 2016, arXiv 1607.06450."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.gain = param(rngs, (width,), (None,), ones, role="gain")
        self.bias = param(rngs, (width,), (None,), zeros, role="bias")
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array like `x`, in its dtype; computed in float32."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.gain[...] + self.bias[...]).astype(x.dtype)
