"""The public functions: arguments are checked once, then the named implementation runs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.coded_matmul import reference
from pallas_kernels.coded_matmul.tiles import BLOCK, UNIT_COLUMNS
from pallas_kernels.grouped_matmul.layout import Groups, Scaled

IMPLEMENTATIONS = ("reference", "mosaic_gpu")


def coded_matmul(
    x_AK: jax.Array,
    w: Scaled,
    groups: Groups,
    *,
    implementation: str,
    block_rows: int = BLOCK,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Returns y [A, N], y[r] = x[r] (codes[g] * scales[g])^T for the rows r of group g, 0 for rows of no group.

    Sums are float32. Weights lie as they are published, outputs first, and stay codes in memory. Not differentiable.

    Args:
        x_AK: [A, K], rows sorted by group.
        w: E4M3 codes [M, N, K] without NaN; float32 scales [M, ceil(N / block_rows), ceil(K / 128)].
        groups: of the rows of x; `groups.matrix_X` says which of the M matrices are theirs. None: group g has the g-th.
        implementation: "reference" (any device, any dtype of x) or "mosaic_gpu" (Hopper; x in bfloat16, K a multiple of
            128, N and block_rows of 64). There is no fallback from one to the other.
        block_rows: outputs that share a scale.
        out_dtype: of y; None: that of x.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    _check(x_AK.shape, w, block_rows)
    how: dict[str, Any] = {"block_rows": block_rows, "out_dtype": x_AK.dtype if out_dtype is None else out_dtype}
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "reference":
        return reference.coded_matmul(x_AK, w, groups, **how)
    from pallas_kernels import mosaic_gpu  # Mosaic GPU is not part of every JAX build

    processors = mosaic_gpu.check_hopper(implementation)
    _check_kernel(x_AK, w, block_rows)
    from pallas_kernels.coded_matmul import gpu

    return gpu.coded_matmul(x_AK, w, groups, **how, n_processors=processors)


def coded_experts(
    x_AK: jax.Array,
    weights: tuple[Scaled, Scaled, Scaled],
    factor_A: jax.Array,
    groups: Groups,
    *,
    implementation: str,
    block_rows: tuple[int, int] = (BLOCK, BLOCK),
) -> jax.Array:
    """Returns y [A, K], y[r] = (f_r silu(x[r] gate_g^T) * (x[r] up_g^T)) down_g^T for the rows r of group g, else 0.

    The kernel multiplies with gate and up in one pass, and rounds the hidden layer once, to bfloat16. Where a tile
    would have over 32 rows it is three products, each rounded.

    Args:
        x_AK: [A, K], rows sorted by group.
        weights: gate and up, codes [M, F, K], and down, [M, K, F]; scales as for `coded_matmul`.
        factor_A: f, of each row's hidden layer; any finite number in rows of no group.
        groups, implementation: as for `coded_matmul`; F is a multiple of 128 as well.
        block_rows: outputs that share a scale, of gate and up, and of down.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    (n_rows, k), f = x_AK.shape, weights[0].codes.shape[1]
    for w, width, rows in zip(weights, (k, k, f), (block_rows[0], *block_rows), strict=True):
        _check((n_rows, width), w, rows)
    shapes = [w.codes.shape for w in weights]
    if shapes[:2] != [shapes[0]] * 2 or shapes[2] != (shapes[0][0], k, f) or factor_A.shape != (n_rows,):
        raise ValueError(
            f"gate, up, down {shapes}, factor {factor_A.shape}: expected [M, F, K] twice, [M, K, F], [{n_rows}]."
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "reference":
        return reference.experts(x_AK, weights, factor_A, groups, block_rows=block_rows)
    from pallas_kernels import mosaic_gpu

    processors = mosaic_gpu.check_hopper(implementation)
    for w, rows in zip(weights, (block_rows[0], *block_rows), strict=True):
        _check_kernel(x_AK, w, rows)
    from pallas_kernels.coded_matmul import gpu

    return gpu.experts(x_AK, weights, factor_A, groups, block_rows=block_rows, n_processors=processors)


def _check(of_x: tuple[int, ...], w: Scaled, block_rows: int) -> None:
    of_w = w.codes.shape
    if len(of_x) != 2 or len(of_w) != 3 or of_x[1] != of_w[2] or w.codes.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"x {of_x} and w {w.codes.dtype} {of_w}: expected [A, K] and float8_e4m3fn [M, N, K].")
    of_scale = of_w[0], -(-of_w[1] // block_rows), -(-of_w[2] // BLOCK)
    if w.scale.shape != of_scale or w.scale.dtype != jnp.float32:
        raise ValueError(f"scales {w.scale.dtype} {w.scale.shape}: expected float32 {of_scale} for codes {of_w}.")


def _check_kernel(x: jax.Array, w: Scaled, block_rows: int) -> None:
    of_w = w.codes.shape
    if x.dtype != jnp.bfloat16 or of_w[2] % BLOCK or of_w[1] % UNIT_COLUMNS or block_rows % UNIT_COLUMNS:
        raise ValueError(
            f"implementation='mosaic_gpu': x {x.dtype} {x.shape}, w {of_w} in blocks of {block_rows} outputs; "
            f"expected bfloat16, K a multiple of {BLOCK}, outputs and their blocks multiples of {UNIT_COLUMNS}."
        )
