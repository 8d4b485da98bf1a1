"""Hyper-connections: mixing matrices, gradients, and the plain residual connection as their simplest case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.hyper import HyperConfig, HyperConnection, HyperHead, sinkhorn, widened

B, T, D = 2, 5, 6
SIZES = HyperConfig(n_streams=4, sinkhorn_steps=20, hyper_eps=1e-6, norm_eps=1e-6)


def connection(filled, c=SIZES):
    return filled(lambda: HyperConnection(c, D, rngs=nnx.Rngs(0)), std=0.5)


@pytest.fixture(scope="module")
def streams():
    rng = np.random.default_rng(1)
    return np.float32(rng.normal(size=(B, T, 4, D))), np.float32(rng.normal(size=(B, T, D)))


def test_mixing_matrices_are_doubly_stochastic_and_gradients_flow_through_twenty_steps():
    logits_OJBT = np.float32(np.random.default_rng(0).normal(size=(4, 4, B, T)))
    aim_OJBT = np.float32(np.random.default_rng(1).normal(size=(4, 4, B, T)))

    @jax.jit
    def both(logits):
        found = lambda logits: sinkhorn(logits, 20, 1e-6)  # noqa: E731
        return found(logits), jax.grad(lambda logits: jnp.sum(found(logits) * aim_OJBT))(logits)

    comb, gradient = jax.device_get(both(logits_OJBT))
    assert (comb > 0).all()
    np.testing.assert_allclose(comb.sum(1), 1, atol=1e-4)
    np.testing.assert_allclose(comb.sum(0), 1, atol=1e-4)
    assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=(0, 1)) > 1e-3).all()
    # adding a number to a row or a column of the logits changes no doubly stochastic matrix: there is no slope there
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-4)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-4)


def test_streams_are_mixed_as_the_formula_says(filled, streams):
    x_BTOD, u_BTD = streams
    definition, params, _ = connection(filled)

    @jax.jit
    def run(params, x, u):
        branch = bind(definition, params, {})
        read, carry = branch.read(x)
        return read, branch.write(x, u, carry)

    read, written = jax.device_get(run(params, x_BTOD, u_BTD))
    w = jax.tree.map(np.float64, params)
    for b, t in np.ndindex(B, T):
        x, u = np.float64(x_BTOD[b, t]), np.float64(u_BTD[b, t])
        m = x.ravel() @ w["mix_ODY"].reshape(4 * D, 24) / np.sqrt(np.mean(x**2) + 1e-6)
        m = m * np.repeat(w["scale"], (4, 4, 16)) + w["bias_Y"]
        pre, post = 1 / (1 + np.exp(-m[:4])) + 1e-6, 2 / (1 + np.exp(-m[4:8]))
        comb = np.exp(m[8:].reshape(4, 4))
        comb = comb / comb.sum(1, keepdims=True) + 1e-6
        comb /= comb.sum(0) + 1e-6
        for _ in range(19):
            comb /= comb.sum(1, keepdims=True) + 1e-6
            comb /= comb.sum(0) + 1e-6
        np.testing.assert_allclose(read[b, t], pre @ x, atol=1e-5)
        np.testing.assert_allclose(written[b, t], post[:, None] * u + comb.T @ x, atol=1e-5)


def test_mixing_alone_keeps_the_mean_of_the_streams(filled, streams):
    """Columns sum to 1, so no stream is amplified; rows do, so none is forgotten."""
    x_BTOD, u_BTD = streams
    definition, params, _ = connection(filled)

    @jax.jit
    def mixed(params, x):
        branch = bind(definition, params, {})
        return branch.write(x, jnp.zeros_like(u_BTD), branch.read(x)[1])

    np.testing.assert_allclose(mixed(params, x_BTOD).mean(2), x_BTOD.mean(2), atol=1e-4)


def test_one_stream_is_the_plain_residual_connection(filled, streams):
    """With pre and post set to 1; a 1 x 1 doubly stochastic matrix is 1."""
    x_BTD, u_BTD = streams[0][:, :, 0], streams[1]
    one = HyperConfig(n_streams=1, sinkhorn_steps=20, hyper_eps=1e-6, norm_eps=1e-6)
    definition, params, _ = connection(filled, one)
    params = params | {"scale": jnp.zeros(3), "bias_Y": jnp.float32([30.0, 0.0, 0.7])}

    @jax.jit
    def run(params, x, u):
        branch, x_BTOD = bind(definition, params, {}), widened(x, 1)
        read, carry = branch.read(x_BTOD)
        return read, branch.write(x_BTOD, u, carry)[:, :, 0]

    read, written = run(params, x_BTD, u_BTD)
    np.testing.assert_allclose(read, x_BTD, atol=1e-5)
    np.testing.assert_allclose(written, x_BTD + u_BTD, atol=1e-5)


def test_half_precision_streams_stay_so_and_are_mixed_in_float32(filled, streams):
    x_BTOD, u_BTD = (np.asarray(x, jnp.bfloat16) for x in streams)
    definition, params, _ = connection(filled)
    head = filled(lambda: HyperHead(SIZES, D, rngs=nnx.Rngs(0)))

    def run(x, u):
        branch = bind(definition, params, {})
        read, carry = branch.read(x)
        return read, branch.write(x, u, carry), bind(*head)(x), carry

    *streams, carry = jax.eval_shape(run, x_BTOD, u_BTD)
    assert [x.dtype for x in streams] == [jnp.bfloat16] * 3
    assert {x.dtype for x in carry} == {jnp.dtype(jnp.float32)}
    assert carry.comb_OJBT.shape == (4, 4, B, T)
