"""Block-scaled FP8 matmul in plain jax.numpy: the definition that every kernel is tested against.

    y[m, n] = sum_b  sx[b, m] * sw[b, n] * ( sum_{k in block b}  x[m, k] w[n, k] )       b = 0 ... ceil(K / 128) - 1

x and w are E4M3 codes with the contraction K last. The inner sum runs over 128 products and is float32; so is the
outer one (what V3 calls promotion: a tensor core keeps fewer bits than that over a long sum). sw[b, n] is one value
per 128 x 128 block of weights, or one per 1 x 128 block as for x.
Paper: V3 section 3.3.2, "Increasing Accumulation Precision".
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

BLOCK = 128


def fp8_matmul(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    w_block: tuple[int, int] = (128, 128),
    out_dtype: DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """Returns y [M, N]; for shapes see `pallas_kernels.fp8_matmul`."""
    columns = w_scale if w_block == (1, BLOCK) else jnp.repeat(w_scale.T, BLOCK, axis=1)[:, : w.shape[0]]

    def add_block(y: jax.Array, operands: tuple) -> tuple:
        x_block, w_block, row_scale, column_scale = operands
        products = lax.dot_general(
            x_block.astype(jnp.float32), w_block.astype(jnp.float32), (((1,), (1,)), ((), ())), precision="highest"
        )
        return y + products * (row_scale[:, None] * column_scale[None, :]), None

    zero = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    y, _ = lax.scan(add_block, zero, (_blocks(x), _blocks(w), x_scale, columns))
    return y.astype(out_dtype)


def _blocks(codes: jax.Array) -> jax.Array:
    """[rows, K] -> [ceil(K / 128), rows, 128], filled up with zeros."""
    rows, k = codes.shape
    count = -(-k // BLOCK)
    filled = jnp.pad(codes, ((0, 0), (0, count * BLOCK - k)))
    return filled.reshape(rows, count, BLOCK).swapaxes(0, 1)
