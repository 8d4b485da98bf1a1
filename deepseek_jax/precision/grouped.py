"""Grouped matmul: rows sorted by expert, each times the weights of its expert.

    y_a = x_a W_expert(a),   dx_a = g_a W_expert(a)^T,   dW_e = sum of x_a^T g_a over the rows of e

It is a loop over chunks of one expert's rows, which runs exactly as often as the routing needs (at most A / chunk + X
times): nothing is dropped, nothing is padded in memory and nothing is recompiled. Each turn is one plain matmul with
one expert's weights. A chunk that reaches past its expert's last row computes rows that the next chunk overwrites.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

import pallas_kernels.grouped_matmul as kernels
from deepseek_jax.errors import UserError

Matrices = Any  # the weights of the experts, w_XDF: an array, or `OfLayer`


class Chunks(NamedTuple):
    """The loop's plan: expert, first row and end of the expert's rows of each chunk, and how many chunks there are."""

    expert_I: jax.Array
    row_I: jax.Array
    end_I: jax.Array
    n_chunks: jax.Array


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for the products of a layer
def _plan(count_X: jax.Array, n_rows: int, chunk: int) -> Chunks:
    chunks_X = -(-count_X // chunk)
    ends_X, last_row_X = jnp.cumsum(chunks_X), jnp.cumsum(count_X)
    index_I = jnp.arange(n_rows // chunk + count_X.size)
    expert_I = jnp.minimum(jnp.sum(index_I[:, None] >= ends_X, axis=1), count_X.size - 1)
    row_I = (last_row_X - count_X)[expert_I] + (index_I - (ends_X - chunks_X)[expert_I]) * chunk
    return Chunks(expert_I, row_I, last_row_X[expert_I], ends_X[-1])


class OfLayer(NamedTuple):
    """The experts' weights of one layer, w_XDF, left where they are in the stack of all layers.

    A slice of the stack would be copied: all experts of the layer, where a few tokens choose a few of them.
    """

    stack_LXDF: jax.Array
    number: int | jax.Array  # of the layer
    # the experts whose weights these are, each once or more; None: all in their order
    chosen_X: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(X, D, F)."""
        n_experts, *sizes = self.stack_LXDF.shape[1:]
        return (n_experts if self.chosen_X is None else self.chosen_X.size, *sizes)

    def __getitem__(self, index: Any) -> "OfLayer":  # type: ignore[override]  # modules read weights as weight[...]
        assert index is ..., index
        return self

    def astype(self, dtype: DTypeLike) -> "OfLayer | jax.Array":
        """Itself if it has this dtype, else the layer's weights cast to it."""
        return self if self.stack_LXDF.dtype == dtype else self.copied().astype(dtype)

    def copied(self) -> jax.Array:
        """Returns w_XDF as an array of its own."""
        w_XDF = layer_of(self.stack_LXDF, self.number)
        return w_XDF if self.chosen_X is None else w_XDF[self.chosen_X]

    @property
    def matrix_X(self) -> jax.Array:
        """Which of the matrices of all layers, L X of them, is each expert's."""
        n_experts = self.stack_LXDF.shape[1]
        chosen_X = jnp.arange(n_experts) if self.chosen_X is None else self.chosen_X
        return jnp.asarray(self.number * n_experts + chosen_X, jnp.int32)


def layer_of(stack: Any, number: int | jax.Array) -> Any:
    """Returns one layer of a stack of them, arrays or trees of these; its number may be known only on the device."""
    if isinstance(number, int):
        return jax.tree.map(lambda a: a[number], stack)
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, 0, keepdims=False), stack)


@jax.custom_vjp
def grouped_matmul(x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
    """y_AF: each row times the weights of its expert.

    Args:
        x_AD: rows sorted by expert.
        w_XDF: the experts' weights, in the dtype of `x_AD`.
        count_X: rows of each expert; rows past their sum give 0.
    """
    return _rows_times(x_AD, w_XDF, count_X, contract=0)


def vjp_input(g_AF: jax.Array, w_XDF: jax.Array, count_X: jax.Array) -> jax.Array:
    """d_x_AD from g = dy: the first half of the backward pass."""
    return _rows_times(g_AF, w_XDF, count_X, contract=1)


def _rows_times(x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array, *, contract: int) -> jax.Array:
    matrices, matrix_X = matrices_of(w_XDF)

    def times(rows: jax.Array, expert: jax.Array) -> jax.Array:
        weights = lax.dynamic_index_in_dim(matrices, matrix_X[expert], 0, keepdims=False)
        return lax.dot_general(rows, weights, (((1,), (contract,)), ((), ())))

    return by_chunks(x_AD, w_XDF.shape[2 - contract], count_X, times)


def by_chunks(
    x_AD: jax.Array, width: int, count_X: jax.Array, times: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Returns y [A, width] from `times(rows, expert)` of chunks of one expert's rows; 0 in rows past their sum."""
    n_rows, chunk = x_AD.shape[0], chunk_rows(x_AD.shape[0], count_X.size)
    plan = _plan(count_X, n_rows, chunk)
    padded = jnp.pad(x_AD, ((0, chunk), (0, 0)))

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(padded, (plan.row_I[i], 0), (chunk, x_AD.shape[1]))
        return lax.dynamic_update_slice(out, times(rows, plan.expert_I[i]), (plan.row_I[i], 0))

    out = jnp.zeros((n_rows + chunk, width), x_AD.dtype)
    out = lax.fori_loop(0, plan.n_chunks, body, out)[:n_rows]
    return jnp.where((jnp.arange(n_rows) < jnp.sum(count_X))[:, None], out, 0)


def matrices_of(w_XDF: Matrices) -> tuple[jax.Array, jax.Array]:
    """Returns the matrices of all layers, or of the one that there is, and which of them is each expert's."""
    if not isinstance(w_XDF, OfLayer):
        return w_XDF, jnp.arange(len(w_XDF))
    return w_XDF.stack_LXDF.reshape(-1, *w_XDF.stack_LXDF.shape[2:]), w_XDF.matrix_X


def vjp_weight(x_AD: jax.Array, g_AF: jax.Array, count_X: jax.Array) -> jax.Array:
    """d_w_XDF from g = dy, an expert's chunks summed in float32 or wider: the second half of the backward pass."""
    chunk = chunk_rows(x_AD.shape[0], count_X.size)
    plan = _plan(count_X, x_AD.shape[0], chunk)
    summed = jnp.promote_types(x_AD.dtype, jnp.float32)
    x_padded, g_padded = (jnp.pad(rows, ((0, chunk), (0, 0))) for rows in (x_AD, g_AF))

    def body(i: jax.Array, d_w_XDF: jax.Array) -> jax.Array:
        start = (plan.row_I[i], 0)
        x = lax.dynamic_slice(x_padded, start, (chunk, x_AD.shape[1]))
        g = lax.dynamic_slice(g_padded, start, (chunk, g_AF.shape[1]))
        x = jnp.where((plan.row_I[i] + jnp.arange(chunk) < plan.end_I[i])[:, None], x, 0)
        product = lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=summed)
        old = lax.dynamic_index_in_dim(d_w_XDF, plan.expert_I[i], 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(d_w_XDF, old + product, plan.expert_I[i], 0)

    return lax.fori_loop(0, plan.n_chunks, body, jnp.zeros((count_X.size, x_AD.shape[1], g_AF.shape[1]), summed))


def _forward(x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array) -> tuple[jax.Array, tuple]:
    return grouped_matmul(x_AD, w_XDF, count_X), (x_AD, w_XDF, count_X)


def _backward(saved: tuple, g_AF: jax.Array) -> tuple:
    x_AD, w_XDF, count_X = saved
    d_count_X = np.zeros(count_X.shape, jax.dtypes.float0)
    return vjp_input(g_AF, w_XDF, count_X), vjp_weight(x_AD, g_AF, count_X).astype(w_XDF.dtype), d_count_X


grouped_matmul.defvjp(_forward, _backward)


def chunk_rows(n_rows: int, n_experts: int) -> int:
    """Rows of one matmul: a power of two near half of an expert's mean load, between 64 and 512.

    Where the mean is below 64, the next power of two above the mean, and 8 or more: most experts' rows still are one
    chunk, and a chunk has few rows that are computed for nothing.
    """
    power = 1 << ((n_rows // n_experts) | 1).bit_length() - 1
    return min(max(min(2 * power, 128), min(power // 2, 512), 8), n_rows)


def on_hopper(x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
    """As `grouped_matmul`, by the kernel for Hopper GPUs, for bfloat16 and widths that are multiples of 128.

    Raises UserError on another device, and for another dtype or width.
    """
    return _by_kernel("mosaic_gpu", x_AD, w_XDF, count_X)


def on_tpu(x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
    """As `on_hopper`, by the kernel for TPUs; of a stack of layers it takes a copy of the layer's weights."""
    if isinstance(w_XDF, OfLayer):
        w_XDF = w_XDF.copied()
    return _by_kernel("mosaic_tpu", x_AD, w_XDF, count_X)


_lowered_once = jax.jit(kernels.grouped_matmul, static_argnames="implementation")  # for all layers of a program


def _by_kernel(implementation: str, x_AD: jax.Array, w_XDF: Matrices, count_X: jax.Array) -> jax.Array:
    matrices, matrix_X = matrices_of(w_XDF)
    groups = kernels.Groups(count_X, matrix_X=matrix_X if isinstance(w_XDF, OfLayer) else None)
    try:
        return _lowered_once(x_AD, matrices, groups, implementation=implementation)
    except ValueError as error:
        raise UserError(
            f"kernels.grouped_matmul={implementation!r}: {error} In a run, config.kernels.grouped_matmul=xla."
        ) from error
