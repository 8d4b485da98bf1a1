"""Products with weights in FP8 (`precision.fp8_weight`), by name: XLA on any device, or the kernel for Hopper GPUs.

Activations are not quantised. XLA dequantises a matrix where it is used: one expert's at a time, or one layer's of
another weight. The kernel reads the codes themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.precision import grouped
from deepseek_jax.precision.fp8_weight import BLOCK, Fp8Weight
from deepseek_jax.precision.grouped import OfLayer
from pallas_kernels import coded_matmul as kernel
from pallas_kernels.grouped_matmul import Groups, Scaled

Multiply = Callable[..., jax.Array]


def is_fp8(w: Any) -> bool:
    """Returns whether these weights are in FP8, those of a layer in a stack included."""
    return isinstance(w.stack_LXDF if isinstance(w, OfLayer) else w, Fp8Weight)


def by_xla(x_AK: jax.Array, w_XKN: Fp8Weight | OfLayer, count_X: jax.Array) -> jax.Array:
    """Returns y_AN: rows sorted by expert, `count_X` of each, times the weights of their expert; 0 for other rows."""
    matrices, matrix_X = matrices_of(w_XKN)

    def times(rows: jax.Array, expert: jax.Array) -> jax.Array:
        codes, scale = (grouped.layer_of(part, matrix_X[expert]) for part in (matrices.codes, matrices.scale))
        weights = matrices.numbers(codes, scale, rows.dtype)
        return lax.dot_general(rows, weights, (((1,), (1,)), ((), ())))

    return grouped.by_chunks(x_AK, matrices.layout.matrix[0], count_X, times)


def on_hopper(
    x_AK: jax.Array, w_XKN: Fp8Weight | OfLayer, count_X: jax.Array, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """As `by_xla`, for bfloat16, and matrices of a multiple of 64 rows and whole blocks of columns.

    The result is in `out_dtype`, or in that of x.
    Raises UserError on another device, and for another dtype or size.
    """
    matrices, matrix_X = matrices_of(w_XKN)
    refuse_fp4("coded_matmul", matrices)
    groups = Groups(count_X, matrix_X=matrix_X if isinstance(w_XKN, OfLayer) else None)
    try:
        how = {"block_rows": matrices.layout.block_rows, "out_dtype": out_dtype}
        return _lowered_once(x_AK, Scaled(matrices.codes, matrices.scale), groups, **how)
    except ValueError as error:
        raise UserError(
            f"kernels.coded_matmul='mosaic_gpu': {error} In a run, config.kernels.coded_matmul=xla."
        ) from error


def refuse_fp4(name: str, *weights: Fp8Weight) -> None:
    """Raises UserError if some of these are in FP4, which the kernel for the operation `name` does not read."""
    if any(w.bits != 8 for w in weights):
        raise UserError(
            f"kernels.{name}='mosaic_gpu': these weights are in FP4, and the kernel reads FP8. Load them with "
            "weights='fp8', which keeps every number, or weights='wide'."
        )


@functools.partial(jax.jit, static_argnames=("block_rows", "out_dtype"))  # for all layers of a program
def _lowered_once(
    x_AK: jax.Array, w: Scaled, groups: Groups, block_rows: int, out_dtype: DTypeLike | None
) -> jax.Array:
    how: dict[str, Any] = {"block_rows": block_rows, "out_dtype": out_dtype}
    return kernel.coded_matmul(x_AK, w, groups, implementation="mosaic_gpu", **how)


def matrices_of(w: Fp8Weight | OfLayer) -> tuple[Fp8Weight, jax.Array]:
    """Returns the matrices of all layers, or of the one that there is, and which of them is each expert's."""
    if not isinstance(w, OfLayer):
        return w, jnp.arange(len(w.codes))
    stack: Any = w.stack_LXDF
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), stack), w.matrix_X


def einsum(
    multiply: Multiply, equation: str, x: jax.Array, w: Fp8Weight, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """Returns y of an einsum such as "BTD,DHQ->BTHQ"; `multiply` as `by_xla` or `on_hopper`.

    y is in `out_dtype`, or in the dtype of x.

    The kernel multiplies where x ends with what the columns of w are, and y with what its rows are, and where columns
    are whole blocks. XLA dequantises the matrices of the others: of the absorbed form of latent attention, a small
    product per head, and hidden layers that are not filled up (`on_device`: on several devices).
    """
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    letters = [of_w[w.layout.order.index(axis)] for axis in range(len(of_w))]
    rows, columns = "".join(letters[: len(w.layout.rows)]), "".join(letters[len(w.layout.rows) :])
    k, is_plain = w.layout.matrix[1], of_x.endswith(columns) and of_y == of_x.removesuffix(columns) + rows
    if multiply is by_xla or not is_plain or k % BLOCK:
        return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=out_dtype)
    x_AK, one = x.reshape(-1, k), jax.tree.map(lambda part: part[None], w)
    options = {} if out_dtype is None else {"out_dtype": out_dtype}
    y = multiply(x_AK, one, jnp.full((1,), len(x_AK), jnp.int32), **options)
    return y.reshape(*x.shape[: len(of_x) - len(columns)], *w.layout.rows)
