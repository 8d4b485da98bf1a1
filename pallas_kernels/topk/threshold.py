"""The k best of each row by a threshold that is found bit by bit, in plain jax: any device, nothing is sorted."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.topk.reference import NONE

LOWEST = -(2**31)


def ordered(x: jax.Array) -> jax.Array:
    """Integers with the order of float32 numbers; both zeros are one, NaN with a sign bit is below all, else above."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def chosen(scores_RS: jax.Array, k: int) -> jax.Array:
    """Which are the k best of each row, bool [R, S]; of equal ones the first; never those that are -inf."""
    keys_RS = ordered(scores_RS)

    def decide(i: jax.Array, threshold_R: jax.Array) -> jax.Array:
        trial_R = threshold_R | lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        count_R = jnp.sum(keys_RS >= (trial_R ^ LOWEST)[:, None], axis=1)
        return jnp.where(count_R >= k, trial_R, threshold_R)

    threshold_R = lax.fori_loop(0, 32, decide, jnp.zeros(len(keys_RS), jnp.int32)) ^ LOWEST
    above_RS, equal_RS = keys_RS > threshold_R[:, None], keys_RS == threshold_R[:, None]
    ties_R = k - jnp.sum(above_RS, axis=1)
    first_RS = jnp.cumsum(equal_RS, axis=1) <= ties_R[:, None]
    return (above_RS | equal_RS & first_RS) & (scores_RS > -jnp.inf)


def top_k(scores_RS: jax.Array, k: int) -> jax.Array:
    """Returns positions [R, k]; see `pallas_kernels.topk`."""
    chosen_RS = chosen(scores_RS, k)
    place_RS = jnp.where(chosen_RS, jnp.cumsum(chosen_RS, axis=1) - 1, k)
    at_S = jnp.broadcast_to(jnp.arange(scores_RS.shape[1], dtype=jnp.int32), scores_RS.shape)
    empty = jnp.full((len(scores_RS), k), NONE, jnp.int32)
    return jax.vmap(lambda out, place, at: out.at[place].set(at, mode="drop"))(empty, place_RS, at_S)
