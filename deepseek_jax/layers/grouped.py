"""Many small feed-forwards at once: rows sorted by expert, two grouped matmuls, and back to the tokens.

Gathers are paired with their inverse, so that the backward pass gathers too and never scatters.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.precision.fp8_weight import BLOCK
from deepseek_jax.precision.fp8_weight_kernels import is_fp8, refuse_fp4
from deepseek_jax.precision.fp8_weight_kernels import matrices_of as fp8_matrices
from deepseek_jax.precision.grouped import Matrices, OfLayer, matrices_of
from deepseek_jax.precision.matmul import PLAIN, Matmul, clamped
from pallas_kernels import token_experts
from pallas_kernels.coded_matmul import coded_experts
from pallas_kernels.grouped_matmul import Groups, Scaled

LARGEST_KEY = 2**31  # sort keys are int32
MOST_COUNTED = 128  # assignments, up to which the lesser ones are counted: on a GPU half as long as a sort
Weights = tuple[OfLayer, OfLayer, OfLayer]  # gate, up and down


class Order(NamedTuple):
    """Assignments (token, chosen expert) sorted by expert."""

    assignment_A: jax.Array  # assignment in each sorted row; M * K, one past the last, in rows that only fill up
    row_MK: jax.Array  # sorted row of each assignment; past the last row for some that are assigned to no expert
    count_X: jax.Array  # rows of each expert; those after the last (assigned to no expert) are never touched


def sort_by_expert(experts_MK: jax.Array, n_experts: int, align: int = 1, n_rows: int | None = None) -> Order:
    """Sorts the assignments by expert, stably; expert `n_experts` means none and comes last.

    Each expert's rows begin at a multiple of `align`. At most `n_rows` assignments are to an expert; None: all may be.
    """
    expert_A = experts_MK.reshape(-1)
    assignment_A, row_A = _sorted(expert_A, n_experts)
    count_X = jnp.sum(jnp.arange(n_experts)[:, None] == expert_A, axis=1, dtype=jnp.int32)
    if align > 1:
        assignment_A, row_A = _aligned(row_A, expert_A, count_X, align, n_rows)
    elif n_rows is not None:
        assignment_A = assignment_A[:n_rows]
    return Order(assignment_A, row_A.reshape(experts_MK.shape), count_X)


def _sorted(expert_A: jax.Array, n_experts: int) -> tuple[jax.Array, jax.Array]:
    """(assignment in each row, row of each assignment)."""
    rows = jnp.arange(expert_A.size, dtype=jnp.int32)
    key_A = expert_A * expert_A.size + rows  # one integer a row sorts quicker than argsort's pairs
    if expert_A.size <= MOST_COUNTED:
        row_A = jnp.sum(key_A < key_A[:, None], axis=1, dtype=jnp.int32)
        return jnp.zeros_like(rows).at[row_A].set(rows, unique_indices=True), row_A
    is_small = (n_experts + 1) * expert_A.size < LARGEST_KEY
    assignment_A = jnp.sort(key_A) % expert_A.size if is_small else jnp.argsort(expert_A, stable=True)
    return assignment_A, jnp.zeros_like(rows).at[assignment_A].set(rows, unique_indices=True)


def _aligned(
    row_A: jax.Array, expert_A: jax.Array, count_X: jax.Array, align: int, n_rows: int | None
) -> tuple[jax.Array, jax.Array]:
    """(assignment in each row, row of each assignment) once empty rows fill up each expert's to a multiple."""
    filled_X = jnp.cumsum(-count_X % align)
    row_A = row_A + jnp.concatenate([jnp.zeros_like(filled_X[:1]), filled_X])[expert_A]
    n_rows = -(-((n_rows or row_A.size) + count_X.size * (align - 1)) // align) * align
    assignment_A = jnp.full((n_rows,), row_A.size, jnp.int32)
    return assignment_A.at[row_A].set(jnp.arange(row_A.size, dtype=jnp.int32), unique_indices=True), row_A


def _no_gradient(tree: object) -> object:
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def to_rows(x_MD: jax.Array, order: Order) -> jax.Array:
    """x_AD: the token of each sorted row; zeros in rows that only fill up."""
    return _rows(x_MD, order.assignment_A // order.row_MK.shape[1], order)


@jax.custom_vjp
def to_tokens(y_AD: jax.Array, order: Order) -> jax.Array:
    """y_MD: the sum of each token's rows."""
    return functools.reduce(jnp.add, (_of_assignments(y_AD, k, order) for k in range(order.row_MK.shape[1])))


@jax.custom_vjp
def sort_weights(weights_MK: jax.Array, order: Order) -> jax.Array:
    """weights_A: the factor of each sorted row."""
    return _rows(weights_MK.reshape(-1), order.assignment_A, order)


def _rows(source: jax.Array, index_A: jax.Array, order: Order) -> jax.Array:
    """source[index], 0 past its end, where the rows that only fill up point."""
    if order.assignment_A.size == order.row_MK.size:  # there are none
        return source[index_A]
    return jnp.take(source, index_A, axis=0, mode="fill", fill_value=0)


def _of_assignments(rows: jax.Array, choice: int | slice, order: Order) -> jax.Array:
    """The rows of each token's assignments, all of them or the k-th, 0 for those that have no row."""
    index = order.row_MK[:, choice]
    if order.assignment_A.size >= order.row_MK.size:  # all have one
        return rows[index]
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


to_rows.defvjp(lambda x, order: (to_rows(x, order), order), lambda order, g: (to_tokens(g, order), _no_gradient(order)))
to_tokens.defvjp(
    lambda y, order: (to_tokens(y, order), order), lambda order, g: (to_rows(g, order), _no_gradient(order))
)
sort_weights.defvjp(
    lambda w, order: (sort_weights(w, order), order),
    lambda order, g: (_of_assignments(g, slice(None), order), _no_gradient(order)),
)


@jax.named_scope("experts")
def grouped_swiglu(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    n_rows: int | None = None,
    *,
    gate_XDF: Matrices,
    up_XDF: Matrices,
    down_XFD: Matrices,
    matmul: Matmul = PLAIN,
    limit: float = 0.0,
) -> jax.Array:
    """y_m = sum_k weights_mk * SwiGLU_experts_mk(x_m).

    Args:
        x_MD: tokens.
        experts_MK: experts of each token, 0..X-1; X means none.
        weights_MK: factor of each expert's output.
        n_rows: most pairs of a token and an expert that is not none; None: all may be.
        gate_XDF, up_XDF, down_XFD: the experts' weights; of a layer in a stack (`OfLayer`), only those chosen are read.
        matmul: multiplies rows with them.
        limit: bounds what is multiplied (`precision.matmul.clamped`); 0: nothing does.

    Returns y_MD in the dtype of `x_MD`.
    """
    if isinstance(gate_XDF, OfLayer) and x_MD.shape[0] <= _most_alone(gate_XDF, matmul):
        return _swiglu_of_few(x_MD, experts_MK, weights_MK, (gate_XDF, up_XDF, down_XFD), matmul, limit)
    order = sort_by_expert(experts_MK, gate_XDF.shape[0], matmul.align, n_rows)
    x_AD, weights_A = to_rows(x_MD, order), sort_weights(weights_MK, order)
    if is_fp8(gate_XDF):
        experts = matmul.kernels["coded_experts"]
        chosen = gate_XDF, up_XDF, down_XFD
        return to_tokens(experts(x_AD, weights_A, order.count_X, chosen, matmul, limit), order)
    if isinstance(gate_XDF, OfLayer):
        gate_AF, up_AF = (matmul.grouped(x_AD, w_XDF, order.count_X) for w_XDF in (gate_XDF, up_XDF))
        hidden_AF = matmul.swiglu(*clamped(gate_AF, up_AF, limit), weights_A)
    else:
        # one loop instead of two; codes and scales of weights in codes lie side by side like the weights
        gate_and_up_XDF = jax.tree.map(lambda *w: jnp.concatenate(w, axis=-1), gate_XDF, up_XDF)
        both_AF = matmul.grouped(x_AD, gate_and_up_XDF, order.count_X)
        hidden_AF = matmul.swiglu(*clamped(both_AF, None, limit), weights_A)
    return to_tokens(matmul.grouped(hidden_AF, down_XFD, order.count_X), order)


def is_one_expert(weights: tuple[Any, ...], matmul: Matmul) -> bool:
    """Whether the kernel for experts computes a dense feed-forward: in FP8, its hidden layer of whole blocks.

    `weights` are its gate, up and down.
    """
    if matmul.kernels.chosen["coded_experts"] == "xla" or not all(is_fp8(w) and w.bits == 8 for w in weights):
        return False
    return weights[0].layout.matrix[0] % BLOCK == 0


def swiglu_in_codes(x_MD: jax.Array, weights: tuple[Any, ...], matmul: Matmul, limit: float = 0.0) -> jax.Array:
    """y_MD of a dense feed-forward that `is_one_expert`: of one that has all rows."""
    of_one = jax.tree.map(lambda part: part[None], weights)
    count_X, factor_M = jnp.full((1,), len(x_MD), jnp.int32), jnp.ones(len(x_MD), jnp.float32)
    return matmul.kernels["coded_experts"](x_MD, factor_M, count_X, of_one, matmul, limit)


def by_three_grouped_products(
    x_AD: jax.Array,
    factor_A: jax.Array,
    count_X: jax.Array,
    weights: tuple[Matrices, ...],
    matmul: Matmul,
    limit: float = 0.0,
) -> jax.Array:
    """Returns y_AD, of each row f SwiGLU(x) of its expert; 0 for rows of none.

    Args:
        x_AD: rows sorted by expert.
        factor_A: f.
        count_X: rows of each expert.
        weights: gate, up and down, in FP8.
        matmul: multiplies rows with them.
        limit: as for `grouped_swiglu`.
    """
    gate_XDF, up_XDF, down_XFD = weights
    gate_AF, up_AF = (matmul.grouped(x_AD, w_XDF, count_X) for w_XDF in (gate_XDF, up_XDF))
    return matmul.grouped(matmul.swiglu(*clamped(gate_AF, up_AF, limit), factor_A), down_XFD, count_X)


def by_two_passes_on_hopper(
    x_AD: jax.Array,
    factor_A: jax.Array,
    count_X: jax.Array,
    weights: tuple[Matrices, ...],
    matmul: Matmul,
    limit: float = 0.0,
) -> jax.Array:
    """As `by_three_grouped_products`, with gate and up in one pass.

    Raises UserError on another device than a Hopper GPU, for another dtype than bfloat16, other widths, a `limit`, or
    weights in FP4.
    """
    del matmul
    _refuse_limit("coded_experts", limit)
    (gate, matrix_X), (up, _), (down, _) = map(fp8_matrices, weights)
    refuse_fp4("coded_experts", gate, up, down)
    groups = Groups(count_X, matrix_X=matrix_X if isinstance(weights[0], OfLayer) else None)
    scaled = tuple(Scaled(w.codes, w.scale) for w in (gate, up, down))
    block_rows = gate.layout.block_rows, down.layout.block_rows
    with _refusing("coded_experts"):
        return _in_codes_lowered_once(
            x_AD, scaled, factor_A, groups, block_rows=block_rows, implementation="mosaic_gpu"
        )


def _operation(gate_XDF: OfLayer) -> str:
    """The operation that computes the experts of one token."""
    return "coded_token_experts" if is_fp8(gate_XDF) else "token_experts"


def _most_alone(gate_XDF: OfLayer, matmul: Matmul) -> int:
    """Most tokens whose experts are computed token by token: two, as drafts make them, by a kernel that reads as fast.

    Two tokens seldom choose the same experts; one of both is read once (`pallas_kernels.token_experts`).
    """
    return 1 if matmul.kernels.chosen[_operation(gate_XDF)] == "xla" else 2


def _swiglu_of_few(
    x_MD: jax.Array, expert_MK: jax.Array, weight_MK: jax.Array, weights: Weights, matmul: Matmul, limit: float = 0.0
) -> jax.Array:
    """`grouped_swiglu` of one or two tokens, by the implementation of `_operation` that the run names.

    Where there is no expert, the output is that of the last one, times 0.
    """
    n_experts = weights[0].shape[0]
    factor_MK = jnp.where(expert_MK < n_experts, weight_MK, 0)
    chosen_A = jnp.minimum(expert_MK, n_experts - 1).reshape(-1)
    chosen: Any = tuple(w._replace(chosen_X=chosen_A) for w in weights)
    return matmul.kernels[_operation(weights[0])](x_MD, factor_MK, chosen, matmul, limit)


def by_three_products(
    x_MD: jax.Array, factor_MK: jax.Array, chosen: Weights, matmul: Matmul, limit: float = 0.0
) -> jax.Array:
    """Returns y_MD, of each token sum_k factor_k SwiGLU_k(x), a row per expert and token: nothing is sorted.

    Args:
        x_MD: the tokens.
        factor_MK: of each chosen expert's output.
        chosen: gate, up and down of the chosen experts, token by token.
        matmul: multiplies rows with them.
        limit: as for `grouped_swiglu`.
    """
    gate_ADF, up_ADF, down_AFD = chosen
    m, k = factor_MK.shape
    x_AD, count_A = jnp.repeat(x_MD, k, axis=0), jnp.ones(m * k, jnp.int32)
    gate_AF, up_AF = (matmul.grouped(x_AD, w_ADF, count_A) for w_ADF in (gate_ADF, up_ADF))
    hidden_AF = matmul.swiglu(*clamped(gate_AF, up_AF, limit), factor_MK.reshape(-1))
    y_AD = matmul.grouped(hidden_AF, down_AFD, count_A)
    return functools.reduce(jnp.add, (y_AD[i::k] for i in range(k)))


# for all layers of a program
_lowered_once = jax.jit(token_experts.experts, static_argnames="implementation")
_in_codes_lowered_once = jax.jit(coded_experts, static_argnames=("block_rows", "implementation"))
_of_codes_lowered_once = jax.jit(token_experts.experts_in_codes, static_argnames="implementation")


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns a kernel's refusal into the user's error: what to choose for the operation `name` instead."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"kernels.{name}='mosaic_gpu': {error} In a run, config.kernels.{name}=xla.") from error


def _refuse_limit(name: str, limit: float) -> None:
    """Raises UserError for a model whose SwiGLU is bounded, which the kernels do not know."""
    if limit:
        raise UserError(
            f"kernels.{name}='mosaic_gpu': expected a SwiGLU without bounds, got limit={limit}. In a run, "
            f"config.kernels.{name}=xla."
        )


def in_one_pass_on_hopper(
    x_MD: jax.Array, factor_MK: jax.Array, chosen: Weights, matmul: Matmul, limit: float = 0.0
) -> jax.Array:
    """As `by_three_products`, by a kernel that reads each expert's weights once and keeps float32 in between.

    Raises UserError on another device than a Hopper GPU, for another dtype than bfloat16, other widths, or a `limit`.
    """
    del matmul
    _refuse_limit("token_experts", limit)
    matrices = (matrices_of(w.astype(x_MD.dtype)) for w in chosen)
    (gate, matrix_A), (up, _), (down, _) = matrices
    matrix_MK = matrix_A.reshape(factor_MK.shape)
    with _refusing("token_experts"):
        return _lowered_once(x_MD, gate, up, down, matrix_MK, factor_MK, implementation="mosaic_gpu")


def of_codes_on_hopper(
    x_MD: jax.Array, factor_MK: jax.Array, chosen: Weights, matmul: Matmul, limit: float = 0.0
) -> jax.Array:
    """As `in_one_pass_on_hopper`, with weights in FP8, which stay so in memory; UserError for FP4 as well."""
    del matmul
    _refuse_limit("coded_token_experts", limit)
    matrices = [fp8_matrices(w) for w in chosen]
    refuse_fp4("coded_token_experts", *(w for w, _ in matrices))
    (gate, matrix_A), (up, _), (down, _) = ((Scaled(w.codes, w.scale), at) for w, at in matrices)
    of_one = functools.partial(_of_codes_lowered_once, implementation="mosaic_gpu")
    of_each = zip(x_MD, matrix_A.reshape(factor_MK.shape), factor_MK, strict=True)
    with _refusing("coded_token_experts"):
        return jnp.stack([of_one(x_D, gate, up, down, matrix_K, factor_K) for x_D, matrix_K, factor_K in of_each])
