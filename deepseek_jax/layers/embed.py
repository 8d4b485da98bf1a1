"""Token embedding and output head: two tables, untied in every DeepSeek model."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jax.typing import DTypeLike

from deepseek_jax.layers.base import param
from deepseek_jax.parallel.vocabulary import WHOLE, Vocabulary


class Embedding(nnx.Module):
    """x_t = table[id_t]."""

    def __init__(self, vocab_size: int, d_model: int, std: float, *, rngs: nnx.Rngs):
        self.table_VD = param(rngs, (vocab_size, d_model), ("vocab", "embed"), normal(std), role="table")

    @jax.named_scope("embedding")
    def __call__(self, ids_BT: jax.Array, dtype: DTypeLike, vocabulary: Vocabulary = WHOLE) -> jax.Array:
        """Returns x_BTD in `dtype`; ids below 0 (nothing there) read row 0. `vocabulary`: which rows are here."""
        return rows(self.table_VD[...], ids_BT, vocabulary).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows(table_VD: jax.Array, ids_BT: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Returns the rows of a table; ids below 0 read row 0."""
    if vocabulary.axis is None:
        return jnp.take(table_VD, jnp.maximum(ids_BT, 0), axis=0)
    index_BT, is_here_BT = vocabulary.local(jnp.maximum(ids_BT, 0), len(table_VD))
    return vocabulary.total(jnp.where(is_here_BT[..., None], jnp.take(table_VD, index_BT, axis=0), 0))


def rows_gradient(ids_BT: jax.Array, d_x_BTD: jax.Array, n_here: int, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Returns the gradient of the rows that are here, float32: of a row that is read many times the sum."""
    index_BT = jnp.maximum(ids_BT, 0)
    if vocabulary.axis is not None:
        index_BT, is_here_BT = vocabulary.local(index_BT, n_here)
        d_x_BTD = jnp.where(is_here_BT[..., None], d_x_BTD, 0)
    d_table_VD = jnp.zeros((n_here, d_x_BTD.shape[-1]), jnp.promote_types(d_x_BTD.dtype, jnp.float32))
    return d_table_VD.at[index_BT].add(d_x_BTD.astype(d_table_VD.dtype))


def _forward(table_VD: jax.Array, ids_BT: jax.Array, vocabulary: Vocabulary) -> tuple[jax.Array, tuple]:
    return rows(table_VD, ids_BT, vocabulary), (ids_BT, jnp.zeros((len(table_VD), 0), table_VD.dtype))


def _backward(vocabulary: Vocabulary, saved: tuple, g_BTD: jax.Array) -> tuple[jax.Array, None]:
    ids_BT, like = saved
    return rows_gradient(ids_BT, g_BTD, len(like), vocabulary).astype(like.dtype), None


rows.defvjp(_forward, _backward)


class Head(nnx.Module):
    """logits = h W, in float32.  Paper: V3 section 3.3.1 keeps the head in high precision."""

    def __init__(self, d_model: int, vocab_size: int, std: float, *, rngs: nnx.Rngs):
        self.weight_DV = param(rngs, (d_model, vocab_size), ("embed", "vocab"), normal(std), role="head")

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        """Returns float32 logits_BTV; the operands are in the dtype of `h_BTD`."""
        weight_DV = self.weight_DV[...].astype(h_BTD.dtype)
        return jnp.einsum("BTD,DV->BTV", h_BTD, weight_DV, preferred_element_type=jnp.float32)
