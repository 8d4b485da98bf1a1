"""Estimates from samples against what they estimate, counted out."""

import itertools
from math import comb

import pytest

from deepseek_jax.rl.estimates import estimate, majority, pass_at_k, wilson


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (6, 1)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
        assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k))  # Chen et al. 2021, eq. 1


def test_many_samples_overflow_nothing():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        (["right", "right", "a"], 1.0),
        (["right", "a", "a"], 0.0),
        (["right", "a", None, None], 0.5),
        (["right", "a", "b"], 1 / 3),
        (["a", "b", "b", "a"], 0.0),
        ([None, None], 0.0),
        ([], 0.0),
    ],
)
def test_most_votes_win_and_equals_share(votes, share):
    assert majority(votes, "right") == pytest.approx(share)


def test_intervals_of_wilson():
    """Newcombe 1998, table I: 81 of 263, and 0 of 20."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson(1.0, 20)
    assert low == pytest.approx(1 - 0.1611, abs=5e-5) and high == pytest.approx(1.0)


def test_an_interval_holds_a_mean_of_shares_as_often_as_it_says():
    """Problems with shares of right answers that differ: the interval is too wide, if anything."""
    import numpy as np

    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        shares = rng.beta(0.5, 0.5, 40)
        found = estimate((rng.binomial(4, shares) / 4).tolist())
        held += found.low <= 0.5 <= found.high
    assert held / 400 >= 0.94
