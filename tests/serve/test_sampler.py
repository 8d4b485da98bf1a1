"""Sampling: its two limits are the argmax, and in between it samples from the right distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.serve.sampler import row_keys, sample

LOGITS_V = np.log([0.05, 0.4, 0.25, 0.1, 0.2]).astype(np.float32)
N_DRAWS = 4096

draw = jax.jit(sample)


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
    key_B = row_keys(7, N_DRAWS)
    assert (drawn(1.0, 0.9, key_B=jnp.roll(key_B, 5)) == np.roll(drawn(1.0, 0.9, key_B=key_B), 5)).all()
    assert (row_keys(7, 3) == key_B[:3]).all()


def test_rows_may_differ_in_temperature_and_nucleus():
    rows = np.arange(N_DRAWS)
    ids = drawn(np.where(rows < 100, 0.0, 1.0), np.where(rows < 200, 0.0, 1.0))
    assert (ids[:200] == 1).all() and (ids[200:] != 1).any()
