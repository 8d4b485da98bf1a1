"""The next token from its logits: temperature and nucleus (top-p) sampling.

    p = softmax(logits / temperature);   nucleus = the fewest tokens, likeliest first, whose p add up to top_p

Temperature 0 takes the likeliest token. Every row is sampled with its own key, so that a sequence does not depend on
its neighbours in the batch. Everything is in float32. Paper: Holtzman et al., "The Curious Case of Neural Text
Degeneration", arXiv 1904.09751.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from deepseek_jax.seeds import random_key


def row_keys(seed: int, n_rows: int) -> jax.Array:
    """Returns key_B: one key per row, a function of the seed and the row's number only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(random_key(seed), jnp.arange(n_rows))


def sample(logits_BV: jax.Array, key_B: jax.Array, temperature: ArrayLike, top_p: ArrayLike) -> jax.Array:
    """Samples one token per row.

    Args:
        logits_BV: logits in any float dtype.
        key_B: one key per row (`row_keys`).
        temperature: one for all rows, or one per row; 0 takes the argmax.
        top_p: one for all rows, or one per row; 1 keeps every token, 0 only the likeliest.

    Returns id_B, int32.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    temperature_B, top_p_B = (
        jnp.broadcast_to(jnp.asarray(value, jnp.float32), logits_BV.shape[:1]) for value in (temperature, top_p)
    )
    order_BV = jnp.argsort(logits_BV, axis=-1, stable=True, descending=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    sorted_BV = sorted_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    rank_B = jax.vmap(jax.random.categorical)(key_B, keep_nucleus(sorted_BV, top_p_B))
    rank_B = jnp.where(temperature_B > 0, rank_B, 0)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def keep_nucleus(sorted_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns descending logits with -inf outside the nucleus; the first one is always kept."""
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    kept_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1.0)
    return jnp.where(kept_BV.at[:, 0].set(True), sorted_BV, -jnp.inf)
