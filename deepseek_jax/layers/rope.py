"""Rotary position embedding, and the ways of stretching it to longer contexts.

RoPE rotates each pair i of numbers by the angle t * theta_i, theta_i = base^(-2i/P): the dot product of a rotated query
and a rotated key depends on their distance only. MLA pairs neighbours (x_2i, x_2i+1), Llama halves (x_i, x_i+P/2):
the two layouts are not interchangeable for given weights.

Longer contexts than a model was trained on are reached by slower angles:
    linear    all of them divided by a factor (DeepSeek-Coder: 4)
    Llama 3.1 low frequencies divided, high ones kept, a blend by wavelength between
    YaRN      the same by the number of the pair; the rotary values, or all logits, grow with the factor (`Yarn`)
Paper: Su et al. 2021; Peng et al. 2023; V2 section 3.1.4, V3 section 4.3; Llama 3.1's released code.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Yarn:
    """Context extension."""

    factor: float  # how many times the original context (s in the paper; V3: 40)
    original_length: int  # tokens of the context before extension (V3: 4096)
    beta_fast: float = 32.0  # rotations over the original context above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is divided by `factor`
    mscale: float = 1.0  # temperature of the rotated values (in the numerator of their scale)
    # temperature in the denominator of that scale; latent attention multiplies all logits by its square, (0.1
    # mscale_all_dim ln(factor) + 1)^2
    mscale_all_dim: float = 1.0
    # scale of the rotated values in place of that ratio of temperatures; None for the ratio
    attention_factor: float | None = None
    truncate: bool = True  # whether the band between kept and divided frequencies begins and ends at a whole pair


@dataclass(frozen=True)
class Llama3:
    """Context extension of Llama 3.1."""

    factor: float  # what low frequencies are divided by (8)
    low_freq_factor: float  # turns over the original context below which a frequency is low (1)
    high_freq_factor: float  # turns above which it is kept (4)
    original_length: int  # tokens of the context before extension (8192)


def temperature(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(query_width: int, yarn: Yarn | None) -> float:
    """The factor of the attention logits: query_width^-0.5, times the squared temperature under YaRN.

    V3 with its 40-fold extension: 192^-0.5 * 1.368888^2 = 0.135234.
    """
    scale = query_width**-0.5
    return scale * temperature(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn else scale


def rotary_scale(yarn: Yarn | None) -> float:
    """The factor of the rotated values: under YaRN the ratio of the two temperatures, unless the factor is given."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)


def plain(width: int, base: float) -> np.ndarray:
    """Angles per token theta_i = base^(-2i/width) of the `width // 2` pairs, float64 radians."""
    return base ** (-np.arange(0, width, 2) / width)


def llama3(theta: np.ndarray, c: Llama3) -> np.ndarray:
    """The angles `theta` as Llama 3.1 slows them, by how often a pair turns over the original context."""
    turns = c.original_length * theta / (2 * math.pi)
    keep = np.clip((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor), 0.0, 1.0)
    return theta * keep + theta / c.factor * (1.0 - keep)


def frequencies(width: int, base: float, yarn: Yarn | None = None) -> np.ndarray:
    """Angles per token theta_i of the `width // 2` pairs, float64 radians, under YaRN if there is one."""
    theta = plain(width, base)
    if yarn is None:
        return theta

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times over the original context."""
        return width * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretch = np.clip((np.arange(width // 2) - low) / (high - low or 1e-3), 0.0, 1.0)
    return theta / yarn.factor * stretch + theta * (1.0 - stretch)


def rotate(x: jax.Array, positions: jax.Array, theta: np.ndarray, scale: float = 1.0) -> jax.Array:
    """Rotates neighbouring pairs of the last axis by `positions * theta`, in float32.

    Args:
        x: (..., T, P) or (..., T, H, P); the axes before T match those of `positions`.
        positions: (..., T) integers.
        theta: angles per token of the P/2 pairs.
        scale: factor of the result (`rotary_scale`).

    Returns an array like `x`, in its dtype.
    """
    cos, sin = (part * scale for part in _cos_sin(x, positions, theta))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: jax.Array, positions: jax.Array, theta: np.ndarray, scale: float = 1.0) -> jax.Array:
    """Rotates the pairs (x_i, x_i+P/2) of the last axis by `positions * theta`, in float32; arguments as `rotate`'s."""
    cos, sin = (part * scale for part in _cos_sin(x, positions, theta))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def _cos_sin(x: jax.Array, positions: jax.Array, theta: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the angles, ready to be multiplied with the pairs of `x`, with or without an axis of heads."""
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(theta, jnp.float32)
    if x.ndim == angle.ndim + 1:
        angle = angle[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)
