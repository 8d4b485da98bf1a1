"""Sinkhorn's normalisation on GPUs in Pallas Triton: the matrices of a block of tokens stay in registers.

A thread has the matrix of one token, all O x J numbers, so that sums over rows and columns need no other thread. What
bounds it, with few tokens, is the time of one launch: 20 times 4 x 4 numbers are 40 dependent sums and divisions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

TOKENS = 32  # of a program, one per thread of a warp

Matrix = list[list[jax.Array]]  # numbers by row and column, [TOKENS] each


def doubly_stochastic(logits: jax.Array, n_steps: int, eps: float, *, interpret: bool = False) -> jax.Array:
    """See `pallas_kernels.sinkhorn`."""
    n_rows, n_columns = logits.shape[:2]
    n_tokens = logits.size // (n_rows * n_columns)
    options: dict[str, Any] = {"interpret": True}
    if not interpret:
        options = {"compiler_params": plt.CompilerParams(num_warps=1, num_stages=1)}
    call = pl.pallas_call(
        functools.partial(_kernel, (n_rows, n_columns, n_tokens), n_steps, eps),
        out_shape=jax.ShapeDtypeStruct((logits.size,), jnp.float32),
        grid=(pl.cdiv(n_tokens, TOKENS),),
        name="doubly_stochastic",
        **options,
    )
    return call(logits.reshape(-1)).reshape(logits.shape)


def _kernel(sizes: tuple[int, int, int], n_steps: int, eps: float, logits: Any, out: Any) -> None:
    n_rows, n_columns, n_tokens = sizes
    # threads behind the last token do what its own does, and write the same
    token = jnp.minimum(pl.program_id(0) * TOKENS + jnp.arange(TOKENS), n_tokens - 1)

    def at(i: int, j: int) -> jax.Array:
        return (i * n_columns + j) * n_tokens + token

    made = [_softmax([logits[at(i, j)] for j in range(n_columns)], eps) for i in range(n_rows)]
    made = lax.fori_loop(0, n_steps - 1, lambda _, made: _columns(_rows(made, eps), eps), _columns(made, eps))
    for i in range(n_rows):
        for j in range(n_columns):
            out[at(i, j)] = made[i][j]


def _softmax(row: list[jax.Array], eps: float) -> list[jax.Array]:
    largest = functools.reduce(jnp.maximum, row)
    powers = [jnp.exp(x - largest) for x in row]
    total = functools.reduce(jnp.add, powers)
    return [x / total + eps for x in powers]


def _rows(made: Matrix, eps: float) -> Matrix:
    totals = [functools.reduce(jnp.add, row) + eps for row in made]
    return [[x / total for x in row] for row, total in zip(made, totals, strict=True)]


def _columns(made: Matrix, eps: float) -> Matrix:
    turned = _rows([list(column) for column in zip(*made, strict=True)], eps)
    return [list(row) for row in zip(*turned, strict=True)]
