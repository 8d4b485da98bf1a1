"""Rotary embedding and YaRN: the formulas in float64, and the published numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.rope import Yarn, frequencies, rotary_scale, rotate, rotate_halves, softmax_scale, temperature

V3 = Yarn(factor=40, original_length=4096)


def turned(x: np.ndarray, positions: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Neighbouring pairs as complex numbers, times exp(i t theta)."""
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    pairs = pairs * np.exp(1j * positions[..., None] * theta)
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def test_rotation_multiplies_neighbouring_pairs_by_a_phase():
    x, positions = np.random.default_rng(0).normal(size=(2, 5, 8)), np.array([[0, 1, 2, 7, 50], [3, 3, 9, 0, 1]])
    theta = frequencies(8, 1e4)
    np.testing.assert_allclose(theta, [1, 1e-1, 1e-2, 1e-3])
    expected = turned(x, positions, theta)
    np.testing.assert_allclose(rotate(jnp.float32(x), positions, theta), expected, atol=1e-5)
    heads = rotate(jnp.float32(np.stack([x, 2 * x], axis=2)), positions, theta)
    np.testing.assert_allclose(heads, np.stack([expected, 2 * expected], axis=2), atol=2e-5)


def test_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 16)).astype(np.float32)
    theta = frequencies(16, 1e4, V3)

    def score(query_position: int, key_position: int) -> float:
        at = [np.full((1, 1), position) for position in (query_position, key_position)]
        return float(jnp.sum(rotate(q, at[0], theta) * rotate(k, at[1], theta)))

    assert score(17, 4) == pytest.approx(score(113, 100), abs=1e-4)
    assert abs(score(17, 4) - score(17, 5)) > 1e-2


def test_a_scaled_rotation_is_the_rotation_scaled():
    x, at = np.ones((1, 2, 4), np.float32), np.array([[1, 2]])
    theta = frequencies(4, 1e4)
    np.testing.assert_allclose(rotate(x, at, theta, 3.0), 3 * rotate(x, at, theta), rtol=1e-6)
    np.testing.assert_allclose(rotate_halves(x, at, theta, 3.0), 3 * rotate_halves(x, at, theta), rtol=1e-6)
    assert rotate(x.astype(jnp.bfloat16), at, theta).dtype == jnp.bfloat16


def test_yarn_blends_between_pairs_10_and_23():
    ratio = frequencies(64, 1e4, V3) / frequencies(64, 1e4)
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-12)
    i = np.arange(11, 23)
    np.testing.assert_allclose(ratio[11:23], (i - 10) / 13 / 40 + (23 - i) / 13)


def test_a_band_of_yarn_between_equal_rotations_is_one_pair_wide():
    """Kimi K2: beta_fast = beta_slow = 1; the pair that turns once over 4096 tokens lies between 19 and 20."""
    ratio = frequencies(64, 5e4, Yarn(32, 4096, beta_fast=1.0, beta_slow=1.0)) / frequencies(64, 5e4)
    np.testing.assert_allclose(ratio[:20], 1.0)
    np.testing.assert_allclose(ratio[20:], 1 / 32)


def test_a_band_of_yarn_need_not_begin_at_a_whole_pair():
    ratio = frequencies(64, 1e4, Yarn(40, 4096, truncate=False)) / frequencies(64, 1e4)
    low, high = (32 * np.log(4096 / (turns * 2 * np.pi)) / np.log(1e4) for turns in (32, 1))
    stretch = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(ratio, stretch / 40 + 1 - stretch)


def test_the_scale_of_rotated_values():
    assert rotary_scale(None) == rotary_scale(V3) == 1.0
    assert rotary_scale(Yarn(4, 64, mscale_all_dim=0.0)) == temperature(4, 1.0)
    assert rotary_scale(Yarn(4, 64, mscale=1.0, mscale_all_dim=0.5)) == temperature(4, 1.0) / temperature(4, 0.5)
    assert rotary_scale(Yarn(4, 64, attention_factor=1.3)) == 1.3


def test_published_scales():
    assert softmax_scale(192, None) == 192**-0.5
    assert softmax_scale(192, V3) == pytest.approx(0.135234, abs=5e-7)
    v2 = Yarn(40, 4096, mscale=0.707, mscale_all_dim=0.707)
    assert softmax_scale(192, v2) == pytest.approx(0.114721, abs=5e-7)
    assert temperature(40, 1.0) == pytest.approx(1.368888, abs=5e-7)
    assert temperature(1.0, 1.0) == temperature(0.5, 1.0) == 1.0
