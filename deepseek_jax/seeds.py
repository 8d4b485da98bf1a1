"""A seed as a key of jax: all 64 bits of it count, whatever integers jax is set to."""

from typing import Any

import jax
import numpy as np

from deepseek_jax.bounds import SEED

WORD_BITS = 32
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Threefry-2x32
PARITY = 0x1BD11BDA


def random_key(seed: int) -> jax.Array:
    """Returns the key of a seed; up to 2^32 - 1 it is `jax.random.key(seed)`.

    jax makes a key of 32 bits where it computes with 32: seeds that differ in the upper bits alone would draw the same.

    Raises UserError for anything but an integer from 0 to 2^64 - 1.
    """
    high, low = _words(seed)
    key = jax.random.key(jax.numpy.uint32(low))
    return jax.random.fold_in(key, jax.numpy.uint32(high)) if high else key


def key_data(seed: int) -> np.ndarray:
    """Returns `jax.random.key_data(random_key(seed))`, uint32 [2], without a device.

    On a device it would wait for the programs that are running there.

    Raises UserError as `random_key` does.
    """
    settings: Any = jax.config
    if settings.jax_default_prng_impl != "threefry2x32" or settings.jax_random_seed_offset:
        return np.asarray(jax.random.key_data(random_key(seed)))
    high, low = _words(seed)
    return np.array(_threefry((0, low), (0, high)) if high else (0, low), np.uint32)


def _words(seed: int) -> tuple[int, int]:
    return divmod(SEED.check("seed", int(seed) if _is_integer(seed) else seed), 1 << WORD_BITS)


def _threefry(key: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32 of 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; section 3.3)."""
    most = (1 << WORD_BITS) - 1
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = (block[0] + keys[0]) & most, (block[1] + keys[1]) & most
    for turn in range(5):
        for shift in ROTATIONS[turn % 2]:
            x = (x + y) & most
            y = x ^ ((y << shift | y >> WORD_BITS - shift) & most)
        x, y = (x + keys[(turn + 1) % 3]) & most, (y + keys[(turn + 2) % 3] + turn + 1) & most
    return x, y


def _is_integer(seed: object) -> bool:
    """Whether this is an integer, numpy's too; True and False are none."""
    return hasattr(seed, "__index__") and not isinstance(seed, bool)
