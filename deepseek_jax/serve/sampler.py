"""The next token from its logits: temperature and nucleus (top-p) sampling.

    p = softmax(logits / temperature);   nucleus = the fewest tokens, likeliest first, whose p add up to top_p
    token = argmax over the nucleus of logits / temperature + g,   g_v Gumbel noise of the row's key

Temperature 0 takes the likeliest token. Every row is sampled with its own key, and every token of the vocabulary has
its own noise, so that a draw depends on nothing but key and logits: neither on the neighbours in the batch nor on how
the nucleus was found. Nothing is sorted. Everything is in float32. Paper: Holtzman et al., "The Curious Case of Neural
Text Degeneration", arXiv 1904.09751.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from deepseek_jax.seeds import random_key


def row_keys(seed: int, n_rows: int) -> jax.Array:
    """Returns key_B: one key per row, a function of the seed and the row's number only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(random_key(seed), jnp.arange(n_rows))


def sample(
    logits_BV: jax.Array, key_B: jax.Array, temperature: ArrayLike | None = None, top_p: ArrayLike | None = None
) -> jax.Array:
    """Samples one token per row.

    Args:
        logits_BV: logits in any float dtype.
        key_B: one key per row (`row_keys`).
        temperature: one for all rows, or one per row; 0 takes the argmax. None: 0 for all, and no noise is made.
        top_p: one for all rows, or one per row; 1 keeps every token, 0 only the likeliest. None: 1 for all, and no
            nucleus is searched.

    Returns id_B, int32.
    """
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if temperature is None:
        return likeliest_B
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), likeliest_B.shape)
    scaled_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    if top_p is not None:
        top_p_B = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), likeliest_B.shape)
        scaled_BV = jnp.where(nucleus(scaled_BV, top_p_B), scaled_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(key_B)
    drawn_B = jnp.argmax(scaled_BV + noise_BV, axis=-1).astype(jnp.int32)
    return jnp.where(temperature_B > 0, drawn_B, likeliest_B)


def permitted(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Returns the logits, -inf where bit v % 32 of word v // 32 of a row's `allowed_BW` (uint32) is not set."""
    token_V = jnp.arange(logits_BV.shape[1])
    bit_BV = allowed_BW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32) & 1
    return jnp.where(bit_BV == 1, logits_BV, -jnp.inf)


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns which tokens are in the nucleus, of equal ones the first; the likeliest always is.

    The smallest logit in it is found bit by bit: 32 sums over the vocabulary instead of a sort.
    """
    p_BV, order_BV = jax.nn.softmax(logits_BV, axis=-1), _ordered(logits_BV)
    most_B = jnp.max(order_BV, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # those from `low` on add up to top_p, those from `high` on do not
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, rounded down, without overflow
        is_enough_B = jnp.sum(jnp.where(order_BV >= middle_B[:, None], p_BV, 0), axis=-1) >= top_p_B
        return jnp.where(is_enough_B, middle_B, low_B), jnp.where(is_enough_B, high_B, middle_B)

    all_B = jnp.full_like(most_B, jnp.iinfo(jnp.int32).min)
    last_B, _ = lax.fori_loop(0, 32, halve, (all_B, jnp.maximum(most_B, 0x7F800000) + 1))
    last_B1 = jnp.minimum(last_B, most_B)[:, None]
    equal_BV = order_BV == last_B1
    above_B1 = jnp.sum(jnp.where(order_BV > last_B1, p_BV, 0), axis=-1, keepdims=True)
    number_BV = jnp.cumsum(equal_BV, axis=-1) - 1  # among the equal ones
    is_needed_BV = above_B1 + number_BV * p_BV < top_p_B[:, None]
    is_first_BV = (number_BV == 0) & (last_B1 == most_B[:, None])
    return (order_BV > last_B1) | (equal_BV & (is_needed_BV | is_first_BV)) | (top_p_B >= 1.0)[:, None]


def _ordered(x: jax.Array) -> jax.Array:
    """Returns float32 numbers as int32 ones in the same order."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
