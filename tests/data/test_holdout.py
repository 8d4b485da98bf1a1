"""Which documents are kept for evaluation depends on their text alone."""

import numpy as np
import pytest

from deepseek_jax.data.holdout import held_out
from deepseek_jax.data.noise import noise
from deepseek_jax.errors import UserError

HASHES = noise(7, at=np.arange(20_000))


def test_rate():
    assert held_out(HASHES, 0.02).mean() == pytest.approx(0.02, abs=0.005)
    assert not held_out(HASHES, 0.0).any()


def test_depends_on_nothing_but_the_document():
    whole = held_out(HASHES, 0.02)
    np.testing.assert_array_equal(held_out(HASHES[::-1], 0.02), whole[::-1])
    np.testing.assert_array_equal(held_out(HASHES[:9000], 0.02), whole[:9000])


def test_at_least_one_and_copies_stay_together():
    few = np.array([5, 9, 5], np.uint64) << np.uint64(58)
    np.testing.assert_array_equal(held_out(few, 1e-6), [True, False, True])


def test_nothing_left_to_train_on():
    with pytest.raises(UserError, match="holds out every document"):
        held_out(np.array([4, 4], np.uint64), 0.1)
