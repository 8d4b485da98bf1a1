"""Many small feed-forwards at once: rows sorted by expert, and a loop over chunks of one expert's rows.

The loop runs exactly as often as the routing needs (at most A / chunk + X times), so nothing is dropped, nothing is
padded in memory and nothing is recompiled; each turn is one plain matmul with one expert's weights.  A chunk that
reaches past its expert's last row computes rows that the next chunk overwrites.

Gathers are paired with their inverse, so that the backward pass gathers too and never scatters.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST_KEY = 2**31  # sort keys are int32


class Order(NamedTuple):
    """Assignments (token, chosen expert) sorted by expert.

    Attributes:
        assignment_A: assignment in each sorted row.
        row_MK: sorted row of each assignment.
        count_X: rows of each expert; those after the last (assigned to no expert) are never touched.
    """

    assignment_A: jax.Array
    row_MK: jax.Array
    count_X: jax.Array


def sort_by_expert(experts_MK: jax.Array, n_experts: int) -> Order:
    """Sorts the assignments by expert, stably; expert `n_experts` means none and comes last."""
    expert_A = experts_MK.reshape(-1)
    rows = jnp.arange(expert_A.size, dtype=jnp.int32)
    if (n_experts + 1) * expert_A.size < LARGEST_KEY:  # one integer a row sorts quicker than argsort's pairs
        assignment_A = jnp.sort(expert_A * expert_A.size + rows) % expert_A.size
    else:
        assignment_A = jnp.argsort(expert_A, stable=True)
    row_A = jnp.zeros_like(rows).at[assignment_A].set(rows, unique_indices=True)
    count_X = jnp.sum(expert_A[:, None] == jnp.arange(n_experts), axis=0, dtype=jnp.int32)
    return Order(assignment_A, row_A.reshape(experts_MK.shape), count_X)


def _no_gradient(tree: object) -> object:
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def to_rows(x_MD: jax.Array, order: Order) -> jax.Array:
    """x_AD: the token of each sorted row."""
    return x_MD[order.assignment_A // order.row_MK.shape[1]]


@jax.custom_vjp
def to_tokens(y_AD: jax.Array, order: Order) -> jax.Array:
    """y_MD: the sum of each token's rows."""
    return sum(y_AD[order.row_MK[:, k]] for k in range(order.row_MK.shape[1]))


@jax.custom_vjp
def sort_weights(weights_MK: jax.Array, order: Order) -> jax.Array:
    """weights_A: the factor of each sorted row."""
    return weights_MK.reshape(-1)[order.assignment_A]


to_rows.defvjp(lambda x, order: (to_rows(x, order), order), lambda order, g: (to_tokens(g, order), _no_gradient(order)))
to_tokens.defvjp(
    lambda y, order: (to_tokens(y, order), order), lambda order, g: (to_rows(g, order), _no_gradient(order))
)
sort_weights.defvjp(
    lambda w, order: (sort_weights(w, order), order), lambda order, g: (g[order.row_MK], _no_gradient(order))
)


class Chunks(NamedTuple):
    """The loop's plan: expert, first row and end of the expert's rows of each chunk, and how many chunks there are."""

    expert_I: jax.Array
    row_I: jax.Array
    end_I: jax.Array
    n_chunks: jax.Array


def _plan(count_X: jax.Array, n_rows: int, chunk: int) -> Chunks:
    chunks_X = -(-count_X // chunk)
    ends_X, last_row_X = jnp.cumsum(chunks_X), jnp.cumsum(count_X)
    index_I = jnp.arange(n_rows // chunk + count_X.size)
    expert_I = jnp.minimum(jnp.sum(index_I[:, None] >= ends_X, axis=1), count_X.size - 1)
    row_I = (last_row_X - count_X)[expert_I] + (index_I - (ends_X - chunks_X)[expert_I]) * chunk
    return Chunks(expert_I, row_I, last_row_X[expert_I], ends_X[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array, chunk: int) -> jax.Array:
    """y_AF: each row times the weights of its expert.

    Args:
        x_AD: rows sorted by expert.
        w_XDF: the experts' weights, in the dtype of `x_AD`.
        count_X: rows of each expert; rows past their sum give 0.
        chunk: rows of one matmul.
    """
    return _rows_times(x_AD, w_XDF, count_X, chunk, contract=0)


def _rows_times(x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array, chunk: int, *, contract: int) -> jax.Array:
    n_rows, width = x_AD.shape
    plan = _plan(count_X, n_rows, chunk)
    padded = jnp.pad(x_AD, ((0, chunk), (0, 0)))

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(padded, (plan.row_I[i], 0), (chunk, width))
        weights = lax.dynamic_index_in_dim(w_XDF, plan.expert_I[i], 0, keepdims=False)
        product = lax.dot_general(rows, weights, (((1,), (contract,)), ((), ())))
        return lax.dynamic_update_slice(out, product, (plan.row_I[i], 0))

    out = jnp.zeros((n_rows + chunk, w_XDF.shape[2 - contract]), x_AD.dtype)
    out = lax.fori_loop(0, plan.n_chunks, body, out)[:n_rows]
    return jnp.where((jnp.arange(n_rows) < jnp.sum(count_X))[:, None], out, 0)


def _weight_gradient(x_AD: jax.Array, g_AF: jax.Array, count_X: jax.Array, chunk: int) -> jax.Array:
    """dW of each expert, summed over its chunks in float32."""
    plan = _plan(count_X, x_AD.shape[0], chunk)
    x_padded, g_padded = (jnp.pad(rows, ((0, chunk), (0, 0))) for rows in (x_AD, g_AF))

    def body(i: jax.Array, d_w_XDF: jax.Array) -> jax.Array:
        start = (plan.row_I[i], 0)
        x = lax.dynamic_slice(x_padded, start, (chunk, x_AD.shape[1]))
        g = lax.dynamic_slice(g_padded, start, (chunk, g_AF.shape[1]))
        x = jnp.where((plan.row_I[i] + jnp.arange(chunk) < plan.end_I[i])[:, None], x, 0)
        product = lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        old = lax.dynamic_index_in_dim(d_w_XDF, plan.expert_I[i], 0, keepdims=False)
        return lax.dynamic_update_index_in_dim(d_w_XDF, old + product, plan.expert_I[i], 0)

    return lax.fori_loop(0, plan.n_chunks, body, jnp.zeros((count_X.size, x_AD.shape[1], g_AF.shape[1]), jnp.float32))


def _forward(x_AD: jax.Array, w_XDF: jax.Array, count_X: jax.Array, chunk: int) -> tuple[jax.Array, tuple]:
    return _rows_times(x_AD, w_XDF, count_X, chunk, contract=0), (x_AD, w_XDF, count_X)


def _backward(chunk: int, saved: tuple, g_AF: jax.Array) -> tuple:
    x_AD, w_XDF, count_X = saved
    d_x_AD = _rows_times(g_AF, w_XDF, count_X, chunk, contract=1)
    d_w_XDF = _weight_gradient(x_AD, g_AF, count_X, chunk).astype(w_XDF.dtype)
    return d_x_AD, d_w_XDF, _no_gradient(count_X)


grouped_matmul.defvjp(_forward, _backward)


def chunk_rows(n_rows: int, n_experts: int) -> int:
    """Rows of one matmul: a power of two near half of an expert's mean load, between 128 and 512."""
    half = max(n_rows // n_experts // 2, 1)
    return min(max(1 << (half.bit_length() - 1), 128), 512, n_rows)


def grouped_swiglu(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
) -> jax.Array:
    """y_m = sum_k weights_mk * SwiGLU_experts_mk(x_m).

    Args:
        x_MD: tokens.
        experts_MK: experts of each token, 0..X-1; X means none.
        weights_MK: factor of each expert's output.
        gate_XDF, up_XDF, down_XFD: the experts' weights (cast to the dtype of `x_MD`).

    Returns:
        y_MD in the dtype of `x_MD`.
    """
    order = sort_by_expert(experts_MK, gate_XDF.shape[0])
    chunk = chunk_rows(experts_MK.size, gate_XDF.shape[0])

    def times(rows: jax.Array, w: jax.Array) -> jax.Array:
        return grouped_matmul(rows, w.astype(rows.dtype), order.count_X, chunk)

    both = times(to_rows(x_MD, order), jnp.concatenate([gate_XDF, up_XDF], axis=-1))  # one loop instead of two
    gate_AF, up_AF = jnp.split(both, 2, axis=-1)
    hidden_AF = jax.nn.silu(gate_AF) * up_AF
    hidden_AF = hidden_AF * sort_weights(weights_MK, order)[:, None].astype(hidden_AF.dtype)
    return to_tokens(times(hidden_AF, down_XFD), order)
