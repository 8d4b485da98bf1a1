"""Grouped matmuls in plain jax.numpy: the definition that every kernel is tested against.

    y[r]  = x[r] w[g]                          for the rows r of group g; 0 for rows of no group
    dw[g] = sum_{r in group g}  x[r]^T dy[r]   0 for an empty group

Each group costs a matmul over all rows here: this is for reading and for testing.
In FP8 the products are those of `fp8_matmul`: E4M3 codes, scales per block, promoted to float32 every 128.
Paper: V3 sections 2.1.2 (experts) and 3.3.2 (FP8).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.fp8_matmul import reference as fp8
from pallas_kernels.grouped_matmul.layout import Groups, Scaled


def grouped_matmul(x_AD: jax.Array, w_XDF: jax.Array, groups: Groups, *, transposed: bool = False) -> jax.Array:
    """Returns y [A, F] in the dtype of x; with `transposed` each w[g] is [F, D]."""

    def product(w: jax.Array) -> jax.Array:
        w = w.T if transposed else w
        return jnp.matmul(x_AD, w, precision="highest", preferred_element_type=jnp.float32).astype(x_AD.dtype)

    if groups.matrix_X is not None:
        w_XDF = w_XDF[groups.matrix_X]
    return _by_rows(product, w_XDF, x_AD.shape[0], groups)


def grouped_fp8_matmul(x: Scaled, w: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.bfloat16) -> jax.Array:
    """Returns y [A, N]; for shapes see `pallas_kernels.grouped_matmul.grouped_fp8_matmul`."""

    def product(one: Any) -> jax.Array:
        return fp8.fp8_matmul(*x, *one, out_dtype=out_dtype)

    return _by_rows(product, w, x.codes.shape[0], groups)


def _by_rows(product: Callable, weights: Any, n_rows: int, groups: Groups) -> jax.Array:
    """The rows of each group from `product` of its weights."""

    def add_group(y: jax.Array, group: tuple) -> tuple:
        one, first, end = group
        return jnp.where(_mine(first, end, n_rows)[:, None], product(one), y), None

    shape = jax.eval_shape(product, jax.tree.map(lambda w: w[0], weights))
    y, _ = lax.scan(add_group, jnp.zeros(shape.shape, shape.dtype), (weights, *groups.bounds()))
    return y


def _mine(first: jax.Array, end: jax.Array, n: int, size: int = 1) -> jax.Array:
    """Which of `n` rows, or of `n` blocks of `size` rows, a group has rows in."""
    row = jnp.arange(n) * size
    return (first // size * size <= row) & (row < end)


def grouped_weight_gradient(
    x_AD: jax.Array,
    dy_AF: jax.Array,
    groups: Groups,
    *,
    out_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns dw [X, D, F], summed in float32."""

    def of_group(group: tuple) -> jax.Array:
        first, end = group
        mine = _mine(first, end, x_AD.shape[0])[:, None]
        x, dy = jnp.where(mine, x_AD, 0), jnp.where(mine, dy_AF, 0)
        return jnp.matmul(x.T, dy, precision="highest", preferred_element_type=jnp.float32).astype(out_dtype)

    return lax.map(of_group, groups.bounds())


def grouped_fp8_weight_gradient(
    x_t: Scaled, dy_t: Scaled, groups: Groups, *, out_dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns dw [X, D, F]; for shapes see `pallas_kernels.grouped_matmul.grouped_fp8_weight_gradient`."""

    def of_group(group: tuple) -> jax.Array:
        first, end = group
        (n_rows,), blocks = x_t.codes.shape[1:], x_t.scale.shape[0]
        rows, row_blocks = _mine(first, end, n_rows), _mine(first, end, blocks, fp8.BLOCK)[:, None]
        x, dy = (Scaled(jnp.where(rows, a.codes, 0), jnp.where(row_blocks, a.scale, 0)) for a in (x_t, dy_t))
        return fp8.fp8_matmul(*x, *dy, w_block=(1, fp8.BLOCK), out_dtype=out_dtype)

    return lax.map(of_group, groups.bounds())
