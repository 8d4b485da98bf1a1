"""Products with FP8 weights in plain jax.numpy: the definition.

y[r] = x[r] (codes[g] * scales[g])^T    for the rows r of group g; 0 for rows of no group
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.layout import Groups, Scaled

BLOCK = 128


def coded_matmul(
    x_AK: jax.Array, w: Scaled, groups: Groups, *, block_rows: int = BLOCK, out_dtype: DTypeLike | None = None
) -> jax.Array:
    """Returns y [A, N] in `out_dtype`, or in the dtype of x, from float32 weights and sums."""
    n, k = w.codes.shape[1:]
    scale = jnp.repeat(jnp.repeat(w.scale, block_rows, axis=1)[:, :n], BLOCK, axis=2)[:, :, :k]
    weights = w.codes.astype(jnp.float32) * scale
    y_AN = reference.grouped_matmul(x_AK.astype(jnp.float32), weights, groups, transposed=True)
    return y_AN.astype(x_AK.dtype if out_dtype is None else out_dtype)


def experts(
    x_AK: jax.Array,
    weights: tuple[Scaled, Scaled, Scaled],
    factor_A: jax.Array,
    groups: Groups,
    *,
    block_rows: tuple[int, int],
) -> jax.Array:
    """Returns y [A, K]; the hidden layer is rounded to the dtype of x."""
    gate, up = (coded_matmul(x_AK, w, groups, block_rows=block_rows[0]).astype(jnp.float32) for w in weights[:2])
    hidden_AF = (jax.nn.silu(gate) * up * factor_A[:, None]).astype(x_AK.dtype)
    return coded_matmul(hidden_AF, weights[2], groups, block_rows=block_rows[1])
