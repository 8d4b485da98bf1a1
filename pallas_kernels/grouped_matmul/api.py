"""The public functions: arguments are checked once, then the named implementation runs.

All of them take rows sorted by group and `Groups`: how many rows each group has, which is read on the device when the
kernel runs. With `align` 1 the groups follow one another; otherwise each begins at a multiple of `align`. Rows of no
group may hold anything, NaN included. Matrices in FP8 are `Scaled`: E4M3 codes with the scales of their blocks.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.layout import Groups, Scaled

BLOCK = 128
IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")


def grouped_matmul(
    x_AD: jax.Array,
    w_XDF: jax.Array,
    groups: Groups,
    *,
    implementation: str,
    transposed: bool = False,
) -> jax.Array:
    """Returns y [A, F], y[r] = x[r] w[g] for the rows r of group g and 0 for rows of no group. Differentiable.

    Sums are float32. The gradient of x is this function with the weights transposed; the gradient of w is
    `grouped_weight_gradient` in the dtype of w.

    Args:
        x_AD: [A, D].
        w_XDF: [X, D, F] in the dtype of x; [X, F, D] if `transposed`.
        groups: of the rows of x. With `groups.matrix_X` w may hold other matrices than those of the groups;
            this has no gradient, and no implementation for TPUs.
        implementation: "reference" (any device, any dtype), "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take
            bfloat16, D and F multiples of 128. There is no fallback from one to another.
        transposed: each group multiplies by the transpose of its weights.

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
    if groups.matrix_X is None:
        _check_groups(groups, w_XDF.shape[0], 1)
        return _matmul(x_AD, w_XDF, groups, implementation, transposed)
    _check_groups(groups, groups.n, 1)
    if groups.matrix_X.shape != (groups.n,) or implementation == "mosaic_tpu":
        raise ValueError(
            f"{groups.n} groups with the numbers {groups.matrix_X.shape} of their matrices, by {implementation!r}: "
            "expected a number per group, and reference or mosaic_gpu. For a TPU give the matrices of the groups alone."
        )
    return _function("grouped_matmul", implementation)(x_AD, w_XDF, groups, transposed=transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _matmul(x_AD: jax.Array, w_XDF: jax.Array, groups: Groups, implementation: str, transposed: bool) -> jax.Array:
    return _function("grouped_matmul", implementation)(x_AD, w_XDF, groups, transposed=transposed)


def _matmul_forward(x_AD: jax.Array, w_XDF: jax.Array, groups: Groups, implementation: str, transposed: bool) -> tuple:
    return _matmul(x_AD, w_XDF, groups, implementation, transposed), (x_AD, w_XDF, groups)


def _matmul_backward(implementation: str, transposed: bool, saved: tuple, dy_AF: jax.Array) -> tuple:
    x_AD, w_XDF, groups = saved
    dx_AD = _matmul(dy_AF, w_XDF, groups, implementation, not transposed)
    left, right = (dy_AF, x_AD) if transposed else (x_AD, dy_AF)
    dw_XDF = grouped_weight_gradient(left, right, groups, implementation=implementation, out_dtype=w_XDF.dtype)
    return dx_AD, dw_XDF, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def grouped_weight_gradient(
    x_AD: jax.Array,
    dy_AF: jax.Array,
    groups: Groups,
    *,
    implementation: str,
    out_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns dw [X, D, F], dw[g] = sum over the rows r of group g of x[r]^T dy[r]; 0 for an empty group.

    Args:
        x_AD: [A, D].
        dy_AF: [A, F] in the dtype of x.
        groups: of the rows of x and dy.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take bfloat16, D and F
            multiples of 128. No fallback.
        out_dtype: of the result; sums are float32. The kernels take bfloat16 and float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if x_AD.ndim != 2 or dy_AF.ndim != 2 or x_AD.shape[0] != dy_AF.shape[0] or x_AD.dtype != dy_AF.dtype:
        raise ValueError(
            f"x is {x_AD.dtype} {x_AD.shape}, dy {dy_AF.dtype} {dy_AF.shape}: expected [A, D] and [A, F] with the same "
            "A and dtype."
        )
    _check_groups(groups, groups.n, 1)
    return _function("grouped_weight_gradient", implementation)(x_AD, dy_AF, groups, out_dtype=out_dtype)


def grouped_fp8_matmul(
    x: Scaled, w: Scaled, groups: Groups, *, implementation: str, out_dtype: DTypeLike = jnp.bfloat16
) -> jax.Array:
    """Returns y [A, N], y[r] = (x[r] * its scales) (w[g] * its scales)^T, promoted to float32 every 128 of K.

    Forward and input gradient are this function with other operands, as in `pallas_kernels.fp8_matmul`:

        forward           y  = x W^T        x 1 x 128 along K,      W [X, N, K] 128 x 128
        input gradient    dx = dy W         dy 1 x 128 along N,     W^T [X, K, N] 128 x 128, scales transposed too

    Args:
        x: E4M3 [A, K]; float32 scales [ceil(K / 128), A], blocks first.
        w: E4M3 [X, N, K]; float32 scales [X, ceil(N / 128), ceil(K / 128)].
        groups: of the rows of x.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take multiples of 128 for N
            and K. No fallback.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    of_x, of_w = x.codes.shape, w.codes.shape
    if len(of_x) != 2 or len(of_w) != 3 or of_x[1] != of_w[2]:
        raise ValueError(f"x {of_x} and w {of_w}: expected [A, K] and [X, N, K] with the same K.")
    (a, k), (n_groups, n, _) = of_x, of_w
    blocks = -(-k // BLOCK)
    _check_codes("x", x, (blocks, a))
    _check_codes("w", w, (n_groups, -(-n // BLOCK), blocks))
    _check_out(out_dtype)
    _check_groups(groups, n_groups, 1)
    return _function("grouped_fp8_matmul", implementation)(x, w, groups, out_dtype=out_dtype)


def grouped_fp8_weight_gradient(
    x_t: Scaled, dy_t: Scaled, groups: Groups, *, implementation: str, out_dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns dw [X, D, F], dw[g] = sum over the rows r of group g of x[r]^T dy[r], 0 for an empty group.

    Both operands are transposed, because 8-bit tensor cores contract the last axis, and scaled in 1 x 128 blocks along
    the rows. A block has one scale, so it must not straddle two groups: each group begins at a multiple of 128 rows,
    and the rows that fill up its last block must have the code 0 and finite scales in both operands. Rows of zeros,
    quantised with the others (`pallas_kernels.quantize`), have both.

    Args:
        x_t: E4M3 [D, A]; float32 scales [A / 128, D].
        dy_t: E4M3 [F, A]; float32 scales [A / 128, F].
        groups: of the rows, aligned to a multiple of 128.
        implementation: "reference", "mosaic_gpu" (Hopper) or "mosaic_tpu"; both of these take multiples of 128 for D
            and F. No fallback.
        out_dtype: bfloat16 or float32.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    of_x, of_dy = x_t.codes.shape, dy_t.codes.shape
    if len(of_x) != 2 or len(of_dy) != 2 or of_x[1] != of_dy[1] or of_x[1] % BLOCK:
        raise ValueError(
            f"x_t {of_x} and dy_t {of_dy}: expected [D, A] and [F, A] with the same A, a multiple of {BLOCK}."
        )
    for name, operand in (("x_t", x_t), ("dy_t", dy_t)):
        _check_codes(name, operand, (of_x[1] // BLOCK, operand.codes.shape[0]))
    _check_out(out_dtype)
    _check_groups(groups, groups.n, BLOCK)
    return _function("grouped_fp8_weight_gradient", implementation)(x_t, dy_t, groups, out_dtype=out_dtype)


def _function(name: str, implementation: str) -> Callable:
    """The function called `name` of an implementation, for the default device."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "reference":
        return getattr(reference, name)
    if implementation == "mosaic_tpu":
        from pallas_kernels import mosaic_tpu
        from pallas_kernels.grouped_matmul import tpu

        native = mosaic_tpu.check_tpu(implementation)
        return functools.partial(getattr(tpu, name), **({"native": native} if "fp8" in name else {}))
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build

    processors = mosaic_gpu.check_hopper(implementation)
    from pallas_kernels.grouped_matmul import pipeline, rows, weights

    module = weights if name.endswith("gradient") else rows
    return functools.partial(getattr(module, name), run=pipeline.Run(n_processors=processors))


def _check_groups(groups: Groups, n: int, unit: int) -> None:
    count_X, align = groups.count_X, groups.align
    if count_X.shape != (n,) or n == 0 or count_X.dtype != jnp.int32:
        raise ValueError(f"count is {count_X.dtype} {count_X.shape}: expected int32 ({max(n, 1)},).")
    if align < 1 or align % unit:
        raise ValueError(f"align={align}: expected a positive multiple of {unit}.")


def _check_codes(name: str, operand: Scaled, of_scale: tuple[int, ...]) -> None:
    codes, scale = operand
    if codes.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"{name} is {codes.dtype}: expected float8_e4m3fn. Quantise it first.")
    if scale.shape != of_scale or scale.dtype != jnp.float32:
        raise ValueError(
            f"{name}'s scale is {scale.dtype} {scale.shape}: expected float32 {of_scale} for {name} {codes.shape}."
        )


def _check_out(out_dtype: DTypeLike) -> None:
    if jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        raise ValueError(f"out_dtype={jnp.dtype(out_dtype).name}: expected bfloat16 or float32.")
