"""Cross-entropy in chunks against log-softmax of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.train.cross_entropy import cross_entropy, token_nll

M, D, V = 11, 6, 9


@pytest.fixture(scope="module")
def inputs() -> tuple:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, M)
    targets[[2, 10]] = -1
    h_MD, weight_DV = rng.normal(size=(M, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
    return h_MD, weight_DV, targets, np.float32(rng.integers(0, 4, M) / 2)


def naive(h_MD, weight_DV, targets_M, weights_M, chunk):
    log_p = jax.nn.log_softmax(h_MD @ weight_DV)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets_M, 0)[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(targets_M >= 0, weights_M * picked, 0))


@functools.cache
def compiled(function, chunk: int):
    """(value, gradients) of -3.5 times the loss: the cotangent is not 1."""

    def scaled(h, weight, targets, weights):
        loss = function(h, weight, targets, weights, chunk)
        return -3.5 * loss, loss

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_value_and_gradients(inputs, chunk):
    (_, expected), right = compiled(naive, 0)(*inputs)
    (_, loss), gradients = compiled(cross_entropy, chunk)(*inputs)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(jax.jit(cross_entropy, static_argnums=4)(*inputs, chunk)) == pytest.approx(float(expected), rel=1e-6)
    for got, here in zip(gradients, right, strict=True):
        np.testing.assert_allclose(got, here, rtol=1e-5, atol=1e-5)
    assert not np.any(gradients[0][2]) and not np.any(gradients[0][10])


def test_huge_logits_stay_finite(inputs):
    h, *others = inputs
    (_, loss), gradients = compiled(cross_entropy, 4)(1e4 * h, *others)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)


def test_nothing_to_predict_costs_nothing(inputs):
    h, weight, targets, weights = inputs
    for nothing in ((np.full_like(targets, -1), weights), (targets, np.zeros_like(weights))):
        (_, loss), gradients = compiled(cross_entropy, 4)(h, weight, *nothing)
        assert float(loss) == 0 and not any(np.any(g) for g in gradients)


def test_bfloat16_activations(inputs):
    h, *others = inputs
    (_, loss), gradients = compiled(cross_entropy, 4)(jnp.bfloat16(h), *others)
    (_, expected), right = compiled(naive, 0)(*inputs)
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(float(expected), rel=0.02)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    for got, here in zip(gradients, right, strict=True):
        assert np.linalg.norm(np.float32(got) - here) < 0.03 * np.linalg.norm(here)


@pytest.mark.parametrize("chunk", [4, 64])
def test_any_function_of_the_tokens_losses(inputs, chunk):
    """`token_nll` and its gradients under a function that is not linear in them, at a temperature."""
    h, weight, targets, _ = inputs
    temperature = 0.7

    def through(nll):
        return lambda h, weight: jnp.sum(jnp.where(targets >= 0, jnp.tanh(nll(h, weight)) ** 2, 0.0))

    def all_at_once(h, weight):
        logp_MV = jax.nn.log_softmax(h @ weight / temperature)
        return -jnp.take_along_axis(logp_MV, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]

    def chunked(h, weight):
        return token_nll(h, weight, targets, chunk, temperature)

    nll_M = jax.jit(chunked)(h, weight)
    np.testing.assert_allclose(nll_M, np.where(targets >= 0, all_at_once(h, weight), 0), rtol=1e-5)
    assert nll_M.dtype == jnp.float32 and nll_M[2] == nll_M[10] == 0
    right = jax.jit(jax.grad(through(all_at_once), argnums=(0, 1)))(h, weight)
    found = jax.jit(jax.grad(through(chunked), argnums=(0, 1)))(h, weight)
    for got, expected in zip(found, right, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    rounded = jnp.asarray(h, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)
    expected = all_at_once(*(x.astype(jnp.float32) for x in rounded))
    given = targets >= 0  # the temperature rounds nothing: it divides logits, which are float32
    np.testing.assert_allclose(jax.jit(chunked)(*rounded)[given], expected[given], rtol=1e-5)


def test_the_weighted_sum_is_that_of_the_tokens_losses(inputs):

    def summed(h, weight, targets, weights, chunk):
        return jnp.sum(weights * token_nll(h, weight, targets, chunk))

    (_, one), one_gradients = compiled(cross_entropy, 4)(*inputs)
    (_, other), other_gradients = compiled(summed, 4)(*inputs)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    for got, expected in zip(other_gradients, one_gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
