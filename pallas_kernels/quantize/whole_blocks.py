"""Matrices filled up to whole blocks of 128 x 128, which the kernels take, and what of the result belongs to them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import BLOCK, Quantized, Squares


def filled(x: jax.Array) -> jax.Array:
    """Returns `x` [..., M, K] with zeros appended until M and K are multiples of 128."""
    extra = tuple(-size % BLOCK for size in x.shape[-2:])
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in extra]) if any(extra) else x


def inputs_of_swiglu(gate: jax.Array, up: jax.Array | None) -> tuple[tuple[jax.Array, jax.Array], int, int]:
    """Returns the matrices that hold gate and up, filled up; the first column of up in its own; and F.

    Gate and up that lie side by side in one matrix are read from there if F is a multiple of 128.
    """
    f = gate.shape[1] // (2 if up is None else 1)
    if up is not None:
        return (filled(gate), filled(up)), 0, f
    if f % BLOCK:
        return (filled(gate[:, :f]), filled(gate[:, f:])), 0, f
    return (filled(gate),) * 2, f, f


def cropped(outputs: Sequence[jax.Array], m: int, k: int) -> Quantized:
    """Returns what belongs to a matrix [m, k] of the quantisations of a filled one."""
    found = Quantized(*outputs)
    if found.q.shape == (m, k):
        return found
    return Quantized(found.q[:m, :k], found.scale[:, :m], found.q_t[:k, :m], found.scale_t[:, :k])


def cropped_squares(found: Squares, k: int, n: int) -> Squares:
    """Returns what belongs to weights [..., k, n] of the codes of filled ones; the scales are the same."""
    if found.q.shape[-2:] == (k, n):
        return found
    return Squares(found.q[..., :k, :n], found.q_t[..., :n, :k], found.scale)
