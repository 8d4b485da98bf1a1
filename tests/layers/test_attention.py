"""Causal attention: the formula in float64, blocks or none, documents apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.attention import causal_attention, masked_softmax

SCALE = 0.4
SEGMENTS = np.array([[1] * 6 + [2] * 7, [1] * 13])


@pytest.fixture(scope="module")
def qkv() -> tuple:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, 13, 2, width)).astype(np.float32) for width in (6, 6, 4))


def formula(q, k, v, segments) -> np.ndarray:
    q, k, v = (np.float64(x) for x in (q, k, v))
    scores = np.einsum("bthq,bshq->bhts", q, k) * SCALE
    seen = np.tril(np.ones(scores.shape[-2:], bool)) & (segments[:, None, :, None] == segments[:, None, None, :])
    p = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("bhts,bshu->bthu", p / p.sum(-1, keepdims=True), v)


@functools.cache
def both(block: int, masked: bool):
    """Compiled (output, gradients) of attention in blocks."""

    def loss(q, k, v):
        segments = jnp.asarray(SEGMENTS) if masked else None
        o = causal_attention(q, k, v, scale=SCALE, segments_BT=segments, block=block)
        return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_change_nothing(qkv, masked):
    segments = SEGMENTS if masked else np.ones_like(SEGMENTS)
    whole_gradients, whole = both(64, masked)(*qkv)
    gradients, blocked = both(5, masked)(*qkv)
    np.testing.assert_allclose(whole, formula(*qkv, segments), atol=1e-5)
    np.testing.assert_allclose(blocked, whole, atol=1e-5)
    for got, expected in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_masked_document_is_as_if_alone(qkv):
    _, together = both(64, True)(*qkv)
    alone = formula(*(x[:1, 6:] for x in qkv), np.ones((1, 7)))
    np.testing.assert_allclose(together[:1, 6:], alone, atol=1e-5)


def test_a_row_that_sees_nothing_is_finite():
    assert np.isfinite(masked_softmax(jnp.ones((2, 3)), jnp.zeros((2, 3), bool))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments_BT": jnp.zeros((1, 4), jnp.int32)}, "does not keep documents apart"),
        ({"dtype": jnp.float32}, "float32 activations, expected bfloat16"),
        ({}, "on cpu: needs an NVIDIA GPU"),
    ],
)
def test_cudnn_says_what_it_needs(options, message):
    x = jnp.zeros((1, 4, 2, 8), options.pop("dtype", jnp.bfloat16))
    with pytest.raises(UserError, match=message):
        Kernels(attention="cudnn")["attention"](x, x, x, scale=1.0, **options)
