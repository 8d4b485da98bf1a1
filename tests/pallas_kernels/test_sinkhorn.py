"""Sinkhorn's normalisation: the kernel, interpreted, against the definition; refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sinkhorn import api, doubly_stochastic, gpu, reference

STEPS, EPS = 5, 1e-6
BOTH = api._in_one_pass, reference.doubly_stochastic


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 3, 3, 11)])
def test_the_kernel_is_the_definition(shape):
    """Of one token; of more than a program has, and matrices that are not square."""
    logits = 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = gpu.doubly_stochastic(logits, STEPS, EPS, interpret=True)
    expected = jax.jit(reference.doubly_stochastic, static_argnums=(1, 2))(logits, STEPS, EPS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(found, axis=0), 1, atol=1e-4)


def test_gradients_are_those_of_the_definition(monkeypatch):
    logits, g = np.random.default_rng(0).normal(size=(2, 4, 4, 5)).astype(np.float32)
    monkeypatch.setattr(gpu, "doubly_stochastic", reference.doubly_stochastic)

    @jax.jit
    def both(logits, g):
        return [jax.vjp(functools.partial(of, n_steps=3, eps=EPS), logits)[1](g)[0] for of in BOTH]

    np.testing.assert_array_equal(*both(logits, g))


def test_what_does_not_fit_is_said():
    for x, n, name, message in (
        (jnp.zeros((4, 4)), 1, "other", "unknown"),
        (jnp.zeros((4, 4), jnp.bfloat16), 1, "reference", "expected float32"),
        (jnp.zeros((4, 4)), 0, "reference", "n_steps > 0"),
        (jnp.zeros((4, 4)), 1, "triton", "needs an NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            doubly_stochastic(x, n, EPS, implementation=name)
