"""Seeds of 64 bits: each draws its own, the first 2^32 as jax does, others are refused."""

import jax
import numpy as np
import pytest

from deepseek_jax.bounds import shown
from deepseek_jax.errors import UserError
from deepseek_jax.seeds import key_data, random_key
from deepseek_jax.serve.sampler import row_keys


def numbers(key: jax.Array) -> tuple[int, ...]:
    return tuple(jax.random.key_data(key).tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_a_seed_of_32_bits_is_jaxs_own(seed):
    assert numbers(random_key(seed)) == numbers(jax.random.key(np.uint32(seed)))


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, *(2**bit + low for bit in (31, 32, 33, 62, 63) for low in (0, 1)), 2**64 - 1]
    assert len({numbers(random_key(seed)) for seed in seeds}) == len(seeds)
    assert numbers(random_key(np.uint64(2**63))) == numbers(random_key(2**63))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**61 + 12345, 2**64 - 1, np.uint64(2**63)])
@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_the_data_of_a_key_needs_no_device(seed, kind):
    with jax.default_prng_impl(kind):
        expected = jax.random.key_data(random_key(seed))
        found = key_data(seed)
    np.testing.assert_array_equal(found, expected, strict=True)


def test_the_data_of_a_key_follows_jaxs_settings():
    jax.config.update("jax_random_seed_offset", 3)
    try:
        np.testing.assert_array_equal(key_data(5), jax.random.key_data(random_key(5)), strict=True)
    finally:
        jax.config.update("jax_random_seed_offset", 0)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**5000, 1.5, float("nan"), "7", None, True, [1]], ids=shown)
def test_what_is_no_seed_is_refused_in_a_line(seed):
    with pytest.raises(UserError, match=r"^seed=.*: expected a whole number from 0 to 2\^64 - 1\.$"):
        row_keys(seed, 1)
