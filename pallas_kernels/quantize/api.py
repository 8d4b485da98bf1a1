"""The public function: arguments are checked once, then the named implementation runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import Quantized

IMPLEMENTATIONS = ("reference", "mosaic_gpu")
SCALES = ("fp32", "ue8m0")


def quantize(x: jax.Array, *, implementation: str, scale: str = "fp32") -> Quantized:
    """Returns the E4M3 codes and scales of x and of its transpose, in 1 x 128 blocks of each.

    Args:
        x: bfloat16 or float32 [M, K].
        implementation: "reference" (any device) or "mosaic_gpu" (Hopper, one pass over x). There is no fallback.
        scale: "fp32", amax / 448, or "ue8m0", the next power of two.

    Raises:
        ValueError: arguments that are invalid, or that the implementation does not support.
    """
    if x.ndim != 2 or x.dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"x is {x.dtype} {x.shape}: expected a matrix of bfloat16 or float32.")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: unknown. Choose one of {', '.join(SCALES)}.")
    if implementation == "reference":
        return reference.quantize(x, scale=scale)
    if implementation == "mosaic_gpu":
        from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build
        from pallas_kernels.quantize import gpu

        return gpu.quantize(x, scale=scale, n_processors=mosaic_gpu.check_hopper(implementation))
    raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
