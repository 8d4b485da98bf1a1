"""A seed as a key of jax: all 64 bits of it count, whatever integers jax is set to."""

import jax

from deepseek_jax.bounds import SEED

WORD_BITS = 32


def random_key(seed: int) -> jax.Array:
    """Returns the key of a seed; up to 2^32 - 1 it is `jax.random.key(seed)`.

    jax makes a key of 32 bits where it computes with 32: seeds that differ in the upper bits alone would draw the same.

    Raises UserError for anything but an integer from 0 to 2^64 - 1.
    """
    high, low = divmod(SEED.check("seed", int(seed) if _is_integer(seed) else seed), 1 << WORD_BITS)
    key = jax.random.key(jax.numpy.uint32(low))
    return jax.random.fold_in(key, jax.numpy.uint32(high)) if high else key


def _is_integer(seed: object) -> bool:
    """Whether this is an integer, numpy's too; True and False are none."""
    return hasattr(seed, "__index__") and not isinstance(seed, bool)
