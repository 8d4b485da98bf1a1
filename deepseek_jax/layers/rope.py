"""Rotary position embedding, and YaRN, which stretches it to longer contexts.

RoPE rotates the pair (x_2i, x_2i+1) by the angle t * theta_i, theta_i = base^(-2i/P): the dot product of a rotated
query and a rotated key depends on their distance only.  MLA pairs neighbours ("interleaved"), unlike Llama's halves.

YaRN slows the low frequencies by `factor`, keeps the high ones and blends those between; the logits grow by mscale^2.
Paper: Su et al. 2021; Peng et al. 2023; V2 section 3.1.4, V3 section 4.3.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Yarn:
    """Context extension.

    Attributes:
        factor: how many times the original context (s in the paper; V3: 40).
        original_length: tokens of the context before extension (V3: 4096).
        beta_fast: rotations over the original context above which a frequency is kept.
        beta_slow: rotations below which a frequency is divided by `factor`.
        mscale: temperature of the rotated values (in the numerator of their scale).
        mscale_all_dim: temperature of all logits: they grow by (0.1 mscale_all_dim ln(factor) + 1)^2.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


def temperature(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(query_width: int, yarn: Yarn | None) -> float:
    """The factor of the attention logits: query_width^-0.5, times the squared temperature under YaRN.

    V3 with its 40-fold extension: 192^-0.5 * 1.368888^2 = 0.135234.
    """
    scale = query_width**-0.5
    return scale * temperature(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def frequencies(width: int, base: float, yarn: Yarn | None = None) -> np.ndarray:
    """Angles per token theta_i of the `width // 2` pairs, float64 radians."""
    theta = base ** (-np.arange(0, width, 2) / width)
    if yarn is None:
        return theta

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        return width * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    stretch = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return theta / yarn.factor * stretch + theta * (1.0 - stretch)


def rotate(x: jax.Array, positions: jax.Array, theta: np.ndarray, scale: float = 1.0) -> jax.Array:
    """Rotates neighbouring pairs of the last axis by `positions * theta`, in float32.

    Args:
        x: (..., T, P) or (..., T, H, P); the axes before T match those of `positions`.
        positions: (..., T) integers.
        theta: angles per token of the P/2 pairs.
        scale: factor of the result (YaRN: ratio of the two temperatures; 1 in every released model).

    Returns:
        An array like `x`, in its dtype.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(theta, jnp.float32)
    if x.ndim == angle.ndim + 1:
        angle = angle[..., None, :]
    cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
