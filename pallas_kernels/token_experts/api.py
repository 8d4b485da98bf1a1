"""The public functions: arguments are checked once, then the named implementation runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.layout import Scaled
from pallas_kernels.token_experts import reference

IMPLEMENTATIONS = ("reference", "mosaic_gpu")


def experts(
    x_MD: jax.Array,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    chosen_MK: jax.Array,
    weight_MK: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Returns y_MD in the dtype of x: of each token the weighted sum of its chosen experts' SwiGLUs.

    y = sum_k g_k down_k^T (silu(gate_k^T x) * (up_k^T x)), k over the chosen experts; sums are float32.

    Args:
        x_MD: a token or a few, each of which reads its experts by itself.
        gate_XDF, up_XDF, down_XFD: the weights of all experts in the dtype of x, of which the chosen ones are read.
        chosen_MK: numbers of the chosen experts, int32, 0 to X - 1.
        weight_MK: factor g of each one's output, float32.
        implementation: "reference" (any device, copies the chosen weights) or "mosaic_gpu" (Hopper: bfloat16, D a
            multiple of 256, F of 64). There is no fallback from one to another.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    (m, d), (x, f) = x_MD.shape, gate_XDF.shape[::2]
    shapes = [array.shape for array in (x_MD, gate_XDF, up_XDF, down_XFD, chosen_MK, weight_MK)]
    if shapes != [(m, d), (x, d, f), (x, d, f), (x, f, d), *[(m, *chosen_MK.shape[1:2])] * 2]:
        raise ValueError(
            f"x, gate, up, down, chosen, weight {shapes}: expected [M, D], [X, D, F] twice, [X, F, D], [M, K] twice."
        )
    if len({array.dtype for array in (x_MD, gate_XDF, up_XDF, down_XFD)}) > 1:
        raise ValueError(
            f"x {x_MD.dtype}, weights {gate_XDF.dtype}, {up_XDF.dtype}, {down_XFD.dtype}: expected one dtype."
        )
    _check_name(implementation)
    arrays = x_MD, gate_XDF, up_XDF, down_XFD, chosen_MK.astype(jnp.int32), weight_MK.astype(jnp.float32)
    if implementation == "reference":
        return reference.experts(*arrays).astype(x_MD.dtype)
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build
    from pallas_kernels.token_experts import gpu

    gpu.check(x_MD.dtype, d, f)
    mosaic_gpu.check_hopper(implementation)
    return gpu.experts(*arrays)


def experts_in_codes(
    x_D: jax.Array,
    gate: Scaled,
    up: Scaled,
    down: Scaled,
    chosen_K: jax.Array,
    weight_K: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Returns y_D in the dtype of x: as `experts`, from FP8 codes and the scales of their blocks of 128 x 128.

    Weights lie as they are published, outputs first, and stay codes in memory; sums are float32. Not differentiable.

    Args:
        x_D: one token.
        gate, up: of all experts: E4M3 codes [X, F, D] without NaN, float32 scales [X, ceil(F / 128), ceil(D / 128)].
        down: codes [X, D, F], scales [X, ceil(D / 128), ceil(F / 128)].
        chosen_K, weight_K: of this token, as for `experts`; so is `implementation`.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    (d,), (x, f) = x_D.shape, gate.codes.shape[:2]
    for name, w, n, k in (("gate", gate, f, d), ("up", up, f, d), ("down", down, d, f)):
        shapes = w.codes.shape, w.scale.shape
        expected = (x, n, k), (x, -(-n // reference.BLOCK), -(-k // reference.BLOCK))
        if shapes != expected or (w.codes.dtype, w.scale.dtype) != (jnp.float8_e4m3fn, jnp.float32):
            raise ValueError(
                f"{name}: {w.codes.dtype} and {w.scale.dtype} {shapes}: expected float8_e4m3fn and float32 {expected}."
            )
    if weight_K.shape != chosen_K.shape or chosen_K.ndim != 1:
        raise ValueError(f"chosen {chosen_K.shape}, weight {weight_K.shape}: expected [K] twice.")
    _check_name(implementation)
    arrays = x_D, gate, up, down, chosen_K.astype(jnp.int32), weight_K.astype(jnp.float32)
    if implementation == "reference":
        return reference.experts_in_codes(*arrays).astype(x_D.dtype)
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build
    from pallas_kernels.token_experts import gpu_codes

    gpu_codes.check(x_D.dtype, d, f)
    mosaic_gpu.check_hopper(implementation)
    return gpu_codes.experts(*arrays)


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
