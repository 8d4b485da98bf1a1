"""The choice of held-out documents depends on their text alone."""

import numpy as np
import pytest

from deepseek_jax.data.holdout import divide, held_out, whole
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


def sides(lengths, rate, hashes=None):
    """Both sides as lists of (document, token) pairs."""
    lengths = np.array(lengths, np.int64)
    hashes = noise(3, at=np.arange(len(lengths))) if hashes is None else np.array(hashes, np.uint64)
    return [
        [(int(d), t) for d, a, b in zip(*pieces, strict=True) for t in range(a, b)]
        for pieces in divide(hashes, lengths, 2 * lengths, rate)
    ]


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.1, 0.5])
@pytest.mark.parametrize(
    "lengths",
    [[1000], [999, 1001, 998], [100_000, 1, 1, 1], [1, 1, 1, 100_000], [200] * 7, [120] * 400, [300] * 3 + [2] * 50],
)
def test_sides_are_disjoint_and_all_of_the_text_and_near_the_rate(rate, lengths):
    training, evaluation = sides(lengths, rate)
    assert sorted(training + evaluation) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert len(training) + len(evaluation) == sum(lengths)
    share = len(evaluation) / sum(lengths)
    assert rate / 8 <= share <= 8 * rate and share < 0.95


def test_one_document_keeps_its_end_for_evaluation():
    training, evaluation = sides([100], 0.1)
    assert training == [(0, t) for t in range(90)] and evaluation == [(0, t) for t in range(90, 100)]


def test_copies_of_one_document_hold_out_the_same_part():
    training, evaluation = sides([100, 100], 0.1, hashes=[5, 5])
    assert {t for _, t in training}.isdisjoint(t for _, t in evaluation)


def test_many_documents_stay_whole():
    lengths = np.full(20_000, 10)
    training, evaluation = divide(HASHES, lengths, lengths, 0.02)
    assert all(np.array_equal(side.lengths, lengths[side.documents]) for side in (training, evaluation))
    assert set(evaluation.documents) == set(np.flatnonzero(held_out(HASHES, 0.02)))


def test_no_rate_holds_nothing_out():
    lengths = np.array([3, 4])
    training, evaluation = divide(np.array([2, 1], np.uint64), lengths, lengths, 0.0)
    assert training.documents.tolist() == [1, 0] and not len(evaluation.documents)
    assert all(np.array_equal(a, b) for a, b in zip(training, whole(np.array([1, 0]), lengths), strict=True))


def test_too_little_text_to_cut():
    with pytest.raises(UserError, match="too short to hold out"):
        sides([5, 4], 0.02)
