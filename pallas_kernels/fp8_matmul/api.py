"""The public function: arguments are checked once, then the named implementation runs."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.fp8_matmul import reference

BLOCK = 128
IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    implementation: str,
    w_block: tuple[int, int] = (BLOCK, BLOCK),
    out_dtype: DTypeLike = jnp.bfloat16,
    add_to: jax.Array | None = None,
) -> jax.Array:
    """Returns y [M, N] = (x * its scales) (w * its scales)^T, promoted to float32 every 128 of the contraction.

    The three matmuls of a linear layer y = x W^T are one function with other operands (V3 section 3.3.2, figure 6):

        forward           y  = x W^T        x 1 x 128 along K,         W [N, K] 128 x 128
        input gradient    dx = dy W         dy 1 x 128 along N,        W^T [K, N] 128 x 128, scales transposed too
        weight gradient   dW = dy^T x       dy^T 1 x 128 along tokens, x^T 1 x 128 along tokens: w_block (1, 128)

    Args:
        x: E4M3 [M, K].
        x_scale: float32 [ceil(K / 128), M], blocks first: row m of block b is multiplied by x_scale[b, m].
        w: E4M3 [N, K].
        w_scale: float32 [ceil(N / 128), ceil(K / 128)], or [ceil(K / 128), N] if w_block is (1, 128).
        implementation: "reference" (any device), "mosaic_gpu" (Hopper) or "mosaic_tpu" (K a multiple of 128). There is
            no fallback from one to another.
        w_block: the block that shares a scale in w, (128, 128) or (1, 128).
        out_dtype: bfloat16 or float32.
        add_to: float32 [M, N] that y is added to, in place if its buffer is donated; out_dtype is float32 then. Weight
            gradients of micro-batches are summed so.

    Raises:
        ValueError: arguments that do not fit together, or an implementation that does not run on this device.
    """
    _check(x, x_scale, w, w_scale, w_block, out_dtype)
    _check_sum(add_to, (x.shape[0], w.shape[0]), out_dtype)
    if implementation == "reference":
        y = reference.fp8_matmul(x, x_scale, w, w_scale, w_block=w_block, out_dtype=out_dtype)
        return y if add_to is None else add_to + y
    if implementation == "mosaic_gpu":
        from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build
        from pallas_kernels.fp8_matmul import gpu

        processors = mosaic_gpu.check_hopper(implementation)
        return gpu.fp8_matmul(
            x, x_scale, w, w_scale, w_block=w_block, out_dtype=out_dtype, add_to=add_to, n_processors=processors
        )
    if implementation == "mosaic_tpu":
        from pallas_kernels import mosaic_tpu
        from pallas_kernels.fp8_matmul import tpu

        native = mosaic_tpu.check_tpu(implementation)
        return tpu.fp8_matmul(
            x, x_scale, w, w_scale, w_block=w_block, out_dtype=out_dtype, add_to=add_to, native=native
        )
    raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")


def _check(
    x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array, w_block: tuple[int, int], out_dtype: DTypeLike
) -> None:
    if w_block not in ((BLOCK, BLOCK), (1, BLOCK)):
        raise ValueError(f"w_block={w_block}: expected (128, 128) or (1, 128).")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape}: expected [M, K] and [N, K] with the same K.")
    for name, codes in (("x", x), ("w", w)):
        if codes.dtype != jnp.float8_e4m3fn:
            raise ValueError(f"{name} is {codes.dtype}: expected float8_e4m3fn. Quantise it first.")
    (m, k), n = x.shape, w.shape[0]
    blocks = -(-k // BLOCK)
    expected = {"x_scale": (blocks, m), "w_scale": (-(-n // BLOCK), blocks) if w_block[0] > 1 else (blocks, n)}
    for name, scale in (("x_scale", x_scale), ("w_scale", w_scale)):
        if scale.shape != expected[name] or scale.dtype != jnp.float32:
            hint = " Transpose it." if scale.shape == expected[name][::-1] else ""
            raise ValueError(
                f"{name} is {scale.dtype} {scale.shape}: expected float32 {expected[name]} for x {x.shape} and "
                f"w {w.shape}.{hint}"
            )
    if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype).name}: expected bfloat16 or float32.")


def _check_sum(add_to: jax.Array | None, shape: tuple[int, int], out_dtype: DTypeLike) -> None:
    if add_to is None:
        return
    if add_to.shape != shape or add_to.dtype != jnp.float32 or jnp.dtype(out_dtype) != jnp.float32:
        raise ValueError(
            f"add_to is {add_to.dtype} {add_to.shape}, out_dtype {jnp.dtype(out_dtype).name}: expected float32 {shape} "
            "and out_dtype float32."
        )
