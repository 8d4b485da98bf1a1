"""Multi-head latent attention: two forms of one function, and the function written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.mla import MLA, Latents, MLAConfig
from deepseek_jax.layers.rope import Yarn, frequencies, softmax_scale
from deepseek_jax.layers.tokens import Tokens

SIZES = MLAConfig(n_heads=2, q_rank=6, kv_rank=5, nope_width=4, rope_width=4, value_width=3, yarn=Yarn(40, 16))
D, T = 8, 9


@pytest.fixture(scope="module")
def parts(filled) -> tuple:
    return filled(lambda: MLA(SIZES, D, rngs=nnx.Rngs(0)), std=0.5)


@pytest.fixture(scope="module")
def x_BTD() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, T, D)).astype(np.float32)


def in_cache(mla: MLA, x_BTD: jax.Array, spare: int = 3) -> jax.Array:
    """Absorbed attention of all tokens to a cache of T + `spare` slots."""
    tokens = Tokens.of(x_BTD[..., 0])
    cache = Latents(*(jnp.pad(part, ((0, 0), (0, spare), (0, 0))) for part in mla.entries(x_BTD, tokens)))
    seen_BTS = jnp.arange(T + spare) <= tokens.positions_BT[..., None]
    return mla.over_cache(x_BTD, tokens, cache, seen_BTS)


@functools.cache
def gradients(form):
    def loss(params, x_BTD, definition):
        u_BTD = form(bind(definition, params, {}), x_BTD)
        return jnp.sum(u_BTD * jnp.cos(jnp.arange(u_BTD.size)).reshape(u_BTD.shape)), u_BTD

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)


def test_absorbed_is_expanded(parts, x_BTD):
    definition, params, _ = parts
    d_expanded, expanded = gradients(MLA.__call__)(params, x_BTD, definition)
    d_absorbed, absorbed = gradients(in_cache)(params, x_BTD, definition)
    np.testing.assert_allclose(absorbed, expanded, atol=1e-5)
    for got, expected in zip(jax.tree.leaves(d_absorbed), jax.tree.leaves(d_expanded), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        assert np.any(expected)


def test_expanded_is_the_papers_formula(parts, x_BTD):
    definition, params, _ = parts
    w = jax.tree.map(np.float64, params)
    x, theta = np.float64(x_BTD), frequencies(4, 1e4, SIZES.yarn)

    def norm(z, gain):
        return gain * z / np.sqrt(np.mean(z**2, -1, keepdims=True) + 1e-6)

    def rope(z):  # (..., T, P)
        pairs = (z[..., 0::2] + 1j * z[..., 1::2]) * np.exp(1j * np.arange(T)[:, None] * theta)
        return np.stack([pairs.real, pairs.imag], -1).reshape(z.shape)

    q = np.einsum("btr,rhq->bhtq", norm(x @ w["q_down_DR"], w["q_norm"]["gain"]), w["q_up_RHQ"])
    c = norm(x @ w["kv_down_DC"], w["kv_norm"]["gain"])
    k, v = (np.einsum("btc,chn->bhtn", c, w[name]) for name in ("k_up_CHN", "v_up_CHU"))
    scores = q[..., :4] @ k.swapaxes(-1, -2) + rope(q[..., 4:]) @ rope(x @ w["k_rope_DP"])[:, None].swapaxes(-1, -2)
    p = np.exp(np.where(np.tri(T, dtype=bool), scores * softmax_scale(8, SIZES.yarn), -np.inf))
    expected = np.einsum("bhtu,hud->btd", p / p.sum(-1, keepdims=True) @ v, w["out_HUD"])
    _, expanded = gradients(MLA.__call__)(params, x_BTD, definition)
    np.testing.assert_allclose(expanded, expected, atol=2e-5)


def test_documents_with_their_own_positions_are_as_if_alone(parts, x_BTD):
    definition, params, _ = parts
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    segments = np.array([[1] * 4 + [2] * 5] * 2)
    call = jax.jit(lambda params, *arrays: bind(definition, params, {})(*arrays))
    together = call(params, x_BTD, positions, segments)
    first = np.concatenate([x_BTD[:, 4:], x_BTD[:, :4]], axis=1)  # what follows the document it cannot see
    _, alone = gradients(MLA.__call__)(params, first, definition)
    np.testing.assert_allclose(together[:, 4:], alone[:, :5], atol=1e-5)


def test_the_dtype_of_the_activations_is_kept(parts, x_BTD):
    definition, params, _ = parts
    narrow = jax.jit(lambda params, x: bind(definition, params, {})(x))(params, jnp.bfloat16(x_BTD))
    assert narrow.dtype == jnp.bfloat16
    _, wide = gradients(MLA.__call__)(params, x_BTD, definition)
    np.testing.assert_allclose(np.float32(narrow), wide, atol=0.3)
