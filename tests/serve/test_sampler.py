"""Sampling: its two limits are the argmax, and in between it samples from the right distribution."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax.serve import sampler
from deepseek_jax.serve.sampler import Penalties

LOGITS_V = np.log([0.05, 0.4, 0.25, 0.1, 0.2]).astype(np.float32)
N_DRAWS = 4096

draw, nucleus, likeliest = map(jax.jit, (sampler.sample, sampler.nucleus, sampler.likeliest))
penalised, biased = jax.jit(sampler.penalised), jax.jit(sampler.biased)
row_keys = functools.cache(sampler.row_keys)
scores = jax.jit(sampler.scores, static_argnums=2)


def drawn(temperature, top_p, seed=0, logits_V=LOGITS_V, key_B=None):
    """One sample per row; all rows have the same logits."""
    key_B = row_keys(seed, N_DRAWS) if key_B is None else key_B
    rows = (np.broadcast_to(np.asarray(number, np.float32), N_DRAWS) for number in (temperature, top_p))
    return np.asarray(draw(np.tile(logits_V, (N_DRAWS, 1)), key_B, *rows))


def counts(temperature, top_p, seed=0):
    return np.bincount(drawn(temperature, top_p, seed), minlength=len(LOGITS_V))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.0, 0.3), (1.0, 0.0), (5.0, 0.0), (1.0, 0.39)])
def test_temperature_0_and_a_small_nucleus_take_the_argmax(temperature, top_p):
    assert counts(temperature, top_p)[1] == N_DRAWS


def test_largest_is_argmax_and_an_entry_even_of_rows_with_nan():
    x_BV = np.random.default_rng(0).integers(-3, 4, (200, 17)).astype(np.float32)  # many ties
    x_BV[:3] = -np.inf
    x_BV[3:6, 4:] = np.inf
    np.testing.assert_array_equal(jax.jit(sampler.largest)(x_BV), x_BV.argmax(axis=-1))
    x_BV[:, 5] = np.nan
    assert np.all(jax.jit(sampler.largest)(x_BV) < 17)


def test_ties_go_to_the_first_as_with_argmax():
    for temperature, top_p in ((0.0, 1.0), (1.0, 0.0)):
        assert (drawn(temperature, top_p, logits_V=np.float32([1, 3, 3, 0, 2])) == 1).all()
        assert (drawn(temperature, top_p, logits_V=np.float32([2, 2, 2, 2, 2])) == 0).all()


@pytest.mark.parametrize(
    ("temperature", "top_p", "nucleus"),
    [(1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (1.0, 0.8, [1, 2, 4]), (2.0, 0.5, [1, 2])],
)
def test_the_draws_follow_the_distribution(temperature, top_p, nucleus):
    p_V = np.exp(LOGITS_V / temperature)
    p_V = np.where(np.isin(np.arange(5), nucleus), p_V, 0)
    expected_V = N_DRAWS * p_V / p_V.sum()
    observed_V = counts(temperature, top_p)
    assert observed_V[p_V == 0].sum() == 0
    kept = p_V > 0
    chi_squared = np.sum((observed_V[kept] - expected_V[kept]) ** 2 / expected_V[kept])
    assert chi_squared < 18.5  # 99.9 % quantile with 4 degrees of freedom


def test_the_seed_decides():
    assert (counts(1.0, 1.0) == counts(1.0, 1.0)).all()
    assert (counts(1.0, 1.0) != counts(1.0, 1.0, seed=1)).any()


def test_what_a_row_draws_depends_on_its_own_key_alone():
    key_B, order = row_keys(7, N_DRAWS), np.roll(np.arange(N_DRAWS), 5)
    assert (drawn(1.0, 0.9, key_B=key_B[order]) == np.roll(drawn(1.0, 0.9, key_B=key_B), 5)).all()
    assert (row_keys(7, 3) == key_B[:3]).all()


def test_rows_may_differ_in_temperature_and_nucleus():
    rows = np.arange(N_DRAWS)
    ids = drawn(np.where(rows < 100, 0.0, 1.0), np.where(rows < 200, 0.0, 1.0))
    assert (ids[:200] == 1).all() and (ids[200:] != 1).any()


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, None])
def test_the_nucleus_is_the_first_of_the_sorted_tokens(spread):
    """Also with many equal ones (`None`: multiples of a half, zeros of both signs), of which the first come first."""
    random = np.random.default_rng(0)
    logits_BV = np.float32(random.normal(size=(64, 100)) * (spread or 1.0))
    logits_BV = logits_BV if spread else np.round(2 * logits_BV) / 2
    top_p_B = np.float32(np.concatenate([[0, 1, 1e-9], random.uniform(size=61)]))
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
    p_BV = np.exp(np.take_along_axis(logits_BV, order_BV, axis=-1).astype(np.float64))
    p_BV /= p_BV.sum(axis=-1, keepdims=True)
    kept_BV = (np.cumsum(p_BV, axis=-1) - p_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    kept_BV[:, 0] = True
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(nucleus(logits_BV, top_p_B)), order_BV, -1), kept_BV)


def test_what_nobody_needs_may_be_left_out():
    logits_BV, key_B = np.tile(LOGITS_V, (64, 1)), row_keys(0, 64)
    assert (draw(logits_BV, key_B) == draw(logits_BV, key_B, 0.0, 1.0)).all()
    assert (draw(logits_BV, key_B, 1.5) == draw(logits_BV, key_B, 1.5, 1.0)).all()


def test_the_likeliest_are_the_first_of_the_sorted_tokens():
    random = np.random.default_rng(0)
    logits_BV = np.round(2 * np.float32(random.normal(size=(64, 100)))) / 2  # many equal ones
    logits_BV[:8, 50:] = -np.inf
    n_B = np.concatenate([[1, 99, 100, 101, 2**24], random.integers(1, 100, 59)]).astype(np.int32)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
    kept_BV = np.take_along_axis(np.asarray(likeliest(logits_BV, n_B)), order_BV, -1)
    np.testing.assert_array_equal(kept_BV, np.arange(100) < n_B[:, None])


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"min_p": 0.5}, [1, 2, 4]),  # 0.2 is half of 0.4
        ({"top_k": 3, "top_p": 0.7}, [1, 2]),  # of the three, which make up 0.85, these have 0.76
        ({"min_p": 0.2, "top_p": 0.9}, [1, 2, 3, 4]),
    ],
)
def test_filters_keep_what_they_say(filters, kept):
    drawn_B = np.asarray(draw(np.tile(LOGITS_V, (512, 1)), row_keys(0, 512), 1.0, **filters))
    assert sorted(set(drawn_B.tolist())) == kept


def test_penalties_by_hand():
    logits_BV = np.float32([[2, -2, 4, 0]] * 2)
    ids_BS = np.int32([[0, 1, 2, 2], [3, 0, 0, 0]])
    prompt_BS, drawn_BS = np.array([[1, 0, 0, 0], [1, 0, 0, 0]], bool), np.array([[0, 1, 1, 1], [0, 0, 0, 0]], bool)
    numbers = (np.float32([value, value]) for value in (0.5, 0.25, 2.0))
    found_BV = np.asarray(penalised(logits_BV, ids_BS, prompt_BS, drawn_BS, Penalties(*numbers)))
    assert found_BV.tolist() == [[1, -4 - 0.75, 2 - 1, 0], [2, -2, 4, 0]]
    assert np.asarray(biased(logits_BV, np.int32([[0, 0], [3, 1]]), np.float32([[1, 0], [2, 3]]))).tolist() == [
        [3, -2, 4, 0],
        [2, 1, 4, 2],
    ]


def test_scores_are_log_probabilities_and_the_likeliest_come_first():
    found = scores(np.tile(LOGITS_V, (2, 1)), np.int32([3, 1]), 2)
    np.testing.assert_allclose(found.logprob_B, np.log([0.1, 0.4]), rtol=1e-6)
    assert found.top_ids_BK.tolist() == [[1, 2]] * 2 and found.top_BK[1, 0] == found.logprob_B[1]
