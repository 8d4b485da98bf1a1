"""The public functions: arguments are checked once, then the named implementation runs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import AMAX_FLOOR, Quantized, Squares

IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")
SCALES = ("fp32", "ue8m0")
SMALLEST_FLOOR = 1e-30  # with which scales and their reciprocals are normal numbers


def quantize(x: jax.Array, *, implementation: str, scale: str = "fp32", floor: float = AMAX_FLOOR) -> Quantized:
    """Returns the E4M3 codes and scales of x and of its transpose, in 1 x 128 blocks of each.

    Args:
        x: bfloat16 or float32 [M, K].
        implementation: "reference" (any device), "mosaic_gpu" (Hopper) or "mosaic_tpu", which pass over x once. No
            fallback.
        scale: "fp32", amax / 448, or "ue8m0", the next power of two.
        floor: of amax: blocks whose values are all smaller are scaled as if they held it.

    Raises:
        ValueError: arguments that are invalid, or that the implementation does not support.
    """
    _check_matrix("x", x)
    _check_scale(scale, floor)
    if implementation == "reference":
        return reference.quantize(x, scale=scale, floor=floor)
    return _kernel("quantize", implementation)(x, scale=scale, floor=floor)


def quantize_swiglu(
    gate: jax.Array,
    up: jax.Array | None = None,
    factor: jax.Array | None = None,
    *,
    implementation: str,
    scale: str = "fp32",
    floor: float = AMAX_FLOOR,
) -> Quantized:
    """Returns both quantisations of y = silu(gate) * up * factor, as `quantize` of it; y itself is never stored.

    y is float32, where two steps would round it to the dtype of the inputs first.

    Args:
        gate: bfloat16 or float32 [M, F], or gate and up side by side [M, 2 F].
        up: [M, F] in the dtype of gate; None if gate holds both.
        factor: of each row, [M]; None for 1. The routing weights of experts' rows.
        implementation: "reference" (any device), "mosaic_gpu" (Hopper) or "mosaic_tpu", which pass over gate and up
            once. No fallback.
        scale: "fp32", amax / 448, or "ue8m0", the next power of two.
        floor: of amax.

    Raises:
        ValueError: arguments that are invalid, or that the implementation does not support.
    """
    _check_matrix("gate", gate)
    if up is None and gate.shape[1] % 2:
        raise ValueError(f"gate is {gate.shape} without up: expected gate and up side by side, [M, 2 F].")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(f"up is {up.dtype} {up.shape}: expected {gate.dtype} {gate.shape}, as gate.")
    if factor is not None and factor.shape != gate.shape[:1]:
        raise ValueError(f"factor is {factor.shape}: expected {gate.shape[:1]}, one number per row.")
    _check_scale(scale, floor)
    if implementation == "reference":
        return reference.quantize_swiglu(gate, up, factor, scale=scale, floor=floor)
    return _kernel("quantize_swiglu", implementation)(gate, up, factor, scale=scale, floor=floor)


def quantize_squares(w: jax.Array, *, implementation: str, scale: str = "fp32", floor: float = AMAX_FLOOR) -> Squares:
    """Returns the E4M3 codes of w and of its transpose, with one scale per 128 x 128 block.

    Args:
        w: bfloat16 or float32 [K, N], or several [X, K, N].
        implementation: "reference" (any device), "mosaic_gpu" (Hopper) or "mosaic_tpu", which pass over w once. No
            fallback.
        scale: "fp32", amax / 448, or "ue8m0", the next power of two.
        floor: of amax.

    Raises:
        ValueError: arguments that are invalid, or that the implementation does not support.
    """
    _check_matrix("w", w, several=True)
    _check_scale(scale, floor)
    if implementation == "reference":
        return reference.quantize_squares(w, scale=scale, floor=floor)
    return _kernel("quantize_squares", implementation)(w, scale=scale, floor=floor)


def _kernel(function: str, implementation: str) -> Callable:
    """The kernel called `function` for the default device."""
    if implementation == "mosaic_tpu":
        from pallas_kernels import mosaic_tpu
        from pallas_kernels.quantize import tpu

        mosaic_tpu.check_tpu(implementation)
        return getattr(tpu, function)
    if implementation == "mosaic_gpu":
        from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build

        n_processors = mosaic_gpu.check_hopper(implementation)
        from pallas_kernels.quantize import gpu

        return functools.partial(getattr(gpu, function), n_processors=n_processors)
    raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")


def _check_matrix(name: str, x: jax.Array, several: bool = False) -> None:
    if x.ndim not in ((2, 3) if several else (2,)) or x.dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(
            f"{name} is {x.dtype} {x.shape}: expected a matrix{' or several' * several} of bfloat16 or float32."
        )


def _check_scale(scale: str, floor: float) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: unknown. Choose one of {', '.join(SCALES)}.")
    if not SMALLEST_FLOOR <= floor < float("inf"):
        raise ValueError(f"floor={floor}: expected a finite number of at least {SMALLEST_FLOOR}.")
