"""RMSNorm and SwiGLU against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.swiglu import SwiGLU


def test_rms_norm_is_its_formula(filled):
    definition, params, bias = filled(lambda: RMSNorm(6, 1e-6, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 3, 6))
    expected = params["gain"] * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(bind(definition, params, bias)(jnp.float32(x)), expected, rtol=1e-5)


def test_rms_norm_keeps_the_dtype_and_survives_large_numbers(filled):
    norm = bind(*filled(lambda: RMSNorm(4, 1e-6, rngs=nnx.Rngs(0)), std=0.0))
    y = norm(jnp.full((1, 4), 1e18, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), 1.0)


def test_swiglu_is_its_formula(filled):
    definition, params, bias = filled(lambda: SwiGLU(4, 6, 0.1, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(1, 3, 4))
    gate, up, down = (np.float64(params[name]) for name in ("gate_DF", "up_DF", "down_FD"))
    expected = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(bind(definition, params, bias)(jnp.float32(x)), expected, rtol=1e-4, atol=1e-6)
