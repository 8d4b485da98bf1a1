"""Token embedding and output head: two tables, untied in every DeepSeek model."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import DTypeLike

from deepseek_jax.layers.base import param


class Embedding(nnx.Module):
    """x_t = table[id_t]."""

    def __init__(self, vocab_size: int, d_model: int, std: float, *, rngs: nnx.Rngs):
        self.table_VD = param(rngs, (vocab_size, d_model), ("vocab", "embed"), normal(std), role="table")

    @jax.named_scope("embedding")
    def __call__(self, ids_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns x_BTD in `dtype`; ids below 0 (nothing there) read row 0."""
        return _rows(self.table_VD[...], jnp.maximum(ids_BT, 0)).astype(dtype)


@jax.custom_vjp
def _rows(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows of a table. The gradient of a row that is read many times is summed in float32."""
    return jnp.take(table_VD, ids_BT, axis=0)


def _rows_forward(table_VD: jax.Array, ids_BT: jax.Array) -> tuple[jax.Array, tuple]:
    return _rows(table_VD, ids_BT), (ids_BT, jnp.zeros((len(table_VD), 0), table_VD.dtype))


def _rows_backward(saved: tuple, g_BTD: jax.Array) -> tuple[jax.Array, None]:
    ids_BT, like = saved
    d_table_VD = jnp.zeros((len(like), g_BTD.shape[-1]), jnp.promote_types(like.dtype, jnp.float32))
    return d_table_VD.at[ids_BT].add(g_BTD.astype(d_table_VD.dtype)).astype(like.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


class Head(nnx.Module):
    """logits = h W, in float32.  Paper: V3 section 3.3.1 keeps the head in high precision."""

    def __init__(self, d_model: int, vocab_size: int, std: float, *, rngs: nnx.Rngs):
        self.weight_DV = param(rngs, (d_model, vocab_size), ("embed", "vocab"), normal(std), role="head")

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits_BTV; the operands are in the dtype of `h_BTD`."""
        weight_DV = self.weight_DV[...].astype(h_BTD.dtype)
        return jnp.einsum("BTD,DV->BTV", h_BTD, weight_DV, preferred_element_type=jnp.float32)
