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
        return jnp.take(self.table_VD[...], jnp.maximum(ids_BT, 0), axis=0).astype(dtype)


class Head(nnx.Module):
    """logits = h W, in float32.  Paper: V3 section 3.3.1 keeps the head in high precision."""

    def __init__(self, d_model: int, vocab_size: int, std: float, *, rngs: nnx.Rngs):
        self.weight_DV = param(rngs, (d_model, vocab_size), ("embed", "vocab"), normal(std), role="head")

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits_BTV; the operands are in the dtype of `h_BTD`."""
        weight_DV = self.weight_DV[...].astype(h_BTD.dtype)
        return jnp.einsum("BTD,DV->BTV", h_BTD, weight_DV, preferred_element_type=jnp.float32)
