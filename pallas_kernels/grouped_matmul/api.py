"""The public functions: arguments are checked once, then the named implementation runs.

All of them take rows sorted by group and `count_X`, int32 [X]: how many rows each group has. The counts may be any
numbers, 0 included, and are read on the device when the kernel runs. With `align` 1 the groups follow one another;
otherwise each begins at a multiple of `align` (`layout.groups`). Rows of no group may hold anything, NaN included.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import reference

BLOCK = 128
IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")


def grouped_matmul(
    x_AD: jax.Array,
    w_XDF: jax.Array,
    count_X: jax.Array,
    *,
    implementation: str,
    transposed: bool = False,
    align: int = 1,
) -> jax.Array:
    """Returns y [A, F], y[r] = x[r] w[g] for the rows r of group g and 0 for rows of no group. Differentiable.

    Sums are float32. The gradient of x is this function with the weights transposed; the gradient of w is
    `grouped_weight_gradient` in the dtype of w.

    Args:
        x_AD: [A, D].
        w_XDF: [X, D, F] in the dtype of x; [X, F, D] if `transposed`.
        count_X: int32 [X], rows of each group.
        implementation: "reference" (any device, any dtype), "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take
            bfloat16, D and F multiples of 128. There is no fallback from one to another.
        transposed: each group multiplies by the transpose of its weights.
        align: rows to a multiple of which each group begins.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    contracted = w_XDF.shape[-1] if transposed else w_XDF.shape[-2]
    if x_AD.ndim != 2 or w_XDF.ndim != 3 or x_AD.shape[1] != contracted or x_AD.dtype != w_XDF.dtype:
        form = "[X, F, D]" if transposed else "[X, D, F]"
        raise ValueError(
            f"x is {x_AD.dtype} {x_AD.shape}, w {w_XDF.dtype} {w_XDF.shape}: expected [A, D] and {form} with the same "
            "D and dtype."
        )
    _check_groups(count_X, w_XDF.shape[0], align, 1)
    _check_implementation(implementation)
    return _matmul(x_AD, w_XDF, count_X, implementation, transposed, align)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _matmul(
    x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array, implementation: str, transposed: bool, align: int
) -> jax.Array:
    if implementation == "reference":
        return reference.grouped_matmul(x_AD, w_XDF, count_X, transposed=transposed, align=align)
    kernel = _kernel("grouped_matmul", implementation)
    return kernel(x_AD, w_XDF, count_X, transposed=transposed, align=align)


def _matmul_forward(
    x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array, implementation: str, transposed: bool, align: int
) -> tuple:
    return _matmul(x_AD, w_XDF, count_X, implementation, transposed, align), (x_AD, w_XDF, count_X)


def _matmul_backward(implementation: str, transposed: bool, align: int, saved: tuple, dy_AF: jax.Array) -> tuple:
    x_AD, w_XDF, count_X = saved
    dx_AD = _matmul(dy_AF, w_XDF, count_X, implementation, not transposed, align)
    left, right = (dy_AF, x_AD) if transposed else (x_AD, dy_AF)
    dw_XDF = grouped_weight_gradient(
        left, right, count_X, implementation=implementation, align=align, out_dtype=w_XDF.dtype
    )
    return dx_AD, dw_XDF, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_weight_gradient(
    x_AD: jax.Array,
    dy_AF: jax.Array,
    count_X: jax.Array,
    *,
    implementation: str,
    align: int = 1,
    out_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns dw [X, D, F], dw[g] = sum over the rows r of group g of x[r]^T dy[r]; 0 for an empty group.

    Args:
        x_AD: [A, D].
        dy_AF: [A, F] in the dtype of x.
        count_X: int32 [X], rows of each group.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take bfloat16, D and F
            multiples of 128. No fallback.
        align: rows to a multiple of which each group begins.
        out_dtype: of the result; sums are float32. The kernels take bfloat16 and float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if x_AD.ndim != 2 or dy_AF.ndim != 2 or x_AD.shape[0] != dy_AF.shape[0] or x_AD.dtype != dy_AF.dtype:
        raise ValueError(
            f"x is {x_AD.dtype} {x_AD.shape}, dy {dy_AF.dtype} {dy_AF.shape}: expected [A, D] and [A, F] with the same "
            "A and dtype."
        )
    _check_groups(count_X, count_X.size, align, 1)
    _check_implementation(implementation)
    if implementation == "reference":
        return reference.grouped_weight_gradient(x_AD, dy_AF, count_X, align=align, out_dtype=out_dtype)
    kernel = _kernel("grouped_weight_gradient", implementation)
    return kernel(x_AD, dy_AF, count_X, align=align, out_dtype=out_dtype)


def grouped_fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    count_X: jax.Array,
    *,
    implementation: str,
    align: int = 1,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Returns y [A, N], y[r] = (x[r] * its scales) (w[g] * its scales)^T, promoted to float32 every 128 of K.

    Forward and input gradient are this function with other operands, as in `pallas_kernels.fp8_matmul`:

        forward           y  = x W^T        x 1 x 128 along K,      W [X, N, K] 128 x 128
        input gradient    dx = dy W         dy 1 x 128 along N,     W^T [X, K, N] 128 x 128, scales transposed too

    Args:
        x: E4M3 [A, K].
        x_scale: float32 [ceil(K / 128), A], blocks first.
        w: E4M3 [X, N, K].
        w_scale: float32 [X, ceil(N / 128), ceil(K / 128)].
        count_X: int32 [X], rows of each group.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take multiples of 128 for N
            and K. No fallback.
        align: rows to a multiple of which each group begins.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"x {x.shape} and w {w.shape}: expected [A, K] and [X, N, K] with the same K.")
    (a, k), (n_groups, n, _) = x.shape, w.shape
    blocks = -(-k // BLOCK)
    _check_codes({"x": (x, x_scale, (blocks, a)), "w": (w, w_scale, (n_groups, -(-n // BLOCK), blocks))})
    _check_out(out_dtype)
    _check_groups(count_X, n_groups, align, 1)
    _check_implementation(implementation)
    if implementation == "reference":
        return reference.grouped_fp8_matmul(x, x_scale, w, w_scale, count_X, align=align, out_dtype=out_dtype)
    kernel = _kernel("grouped_fp8_matmul", implementation)
    return kernel(x, x_scale, w, w_scale, count_X, align=align, out_dtype=out_dtype)


def grouped_fp8_weight_gradient(
    x_t: jax.Array,
    x_t_scale: jax.Array,
    dy_t: jax.Array,
    dy_t_scale: jax.Array,
    count_X: jax.Array,
    *,
    implementation: str,
    align: int = BLOCK,
    out_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns dw [X, D, F], dw[g] = sum over the rows r of group g of x[r]^T dy[r], 0 for an empty group.

    Both operands are transposed, because 8-bit tensor cores contract the last axis, and scaled in 1 x 128 blocks along
    the rows. A block has one scale, so it must not straddle two groups: each group begins at a multiple of 128 rows
    (`align`), and the rows that fill up its last block must have the code 0 and finite scales in both operands. Rows of
    zeros, quantised with the others (`pallas_kernels.quantize`), have both.

    Args:
        x_t: E4M3 [D, A].
        x_t_scale: float32 [A / 128, D].
        dy_t: E4M3 [F, A].
        dy_t_scale: float32 [A / 128, F].
        count_X: int32 [X], rows of each group.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take multiples of 128 for D
            and F. No fallback.
        align: a multiple of 128.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if x_t.ndim != 2 or dy_t.ndim != 2 or x_t.shape[1] != dy_t.shape[1] or x_t.shape[1] % BLOCK:
        raise ValueError(
            f"x_t {x_t.shape} and dy_t {dy_t.shape}: expected [D, A] and [F, A] with the same A, a multiple of {BLOCK}."
        )
    (d, a), f = x_t.shape, dy_t.shape[0]
    _check_codes({"x_t": (x_t, x_t_scale, (a // BLOCK, d)), "dy_t": (dy_t, dy_t_scale, (a // BLOCK, f))})
    _check_out(out_dtype)
    _check_groups(count_X, count_X.size, align, BLOCK)
    _check_implementation(implementation)
    operands = (x_t, x_t_scale, dy_t, dy_t_scale, count_X)
    if implementation == "reference":
        return reference.grouped_fp8_weight_gradient(*operands, align=align, out_dtype=out_dtype)
    kernel = _kernel("grouped_fp8_weight_gradient", implementation)
    return kernel(*operands, align=align, out_dtype=out_dtype)


def _kernel(function: str, implementation: str) -> Callable:
    """The kernel called `function` for the default device."""
    if implementation == "mosaic_tpu":
        from pallas_kernels import mosaic_tpu
        from pallas_kernels.grouped_matmul import tpu

        native = mosaic_tpu.check_tpu(implementation)
        return functools.partial(getattr(tpu, function), **({"native": native} if "fp8" in function else {}))
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build

    processors = mosaic_gpu.check_hopper(implementation)
    from pallas_kernels.grouped_matmul import pipeline, rows, weights

    module = weights if function.endswith("gradient") else rows
    return functools.partial(getattr(module, function), run=pipeline.Run(n_processors=processors))


def _check_implementation(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")


def _check_groups(count_X: jax.Array, n_groups: int, align: int, unit: int) -> None:
    if count_X.shape != (n_groups,) or n_groups == 0 or count_X.dtype != jnp.int32:
        raise ValueError(f"count is {count_X.dtype} {count_X.shape}: expected int32 ({max(n_groups, 1)},).")
    if align < 1 or align % unit:
        raise ValueError(f"align={align}: expected a positive multiple of {unit}.")


def _check_codes(operands: dict) -> None:
    for name, (codes, scale, expected) in operands.items():
        if codes.dtype != jnp.float8_e4m3fn:
            raise ValueError(f"{name} is {codes.dtype}: expected float8_e4m3fn. Quantise it first.")
        if scale.shape != expected or scale.dtype != jnp.float32:
            raise ValueError(
                f"{name}_scale is {scale.dtype} {scale.shape}: expected float32 {expected} for {name} {codes.shape}."
            )


def _check_out(out_dtype: DTypeLike) -> None:
    if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype).name}: expected bfloat16 or float32.")
