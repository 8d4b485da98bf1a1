"""One depth of multi-token prediction, by hand."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.layers.base import bind
from deepseek_jax.layers.mtp import MTP, shift_left


class Marked(nnx.Module):
    """Stands for a Transformer block: adds one, and reports what it was called with."""

    def __call__(self, x_BTD, tokens):
        return x_BTD + 1, (None, tokens)


def test_the_embedding_comes_first(filled):
    definition, params, bias = filled(lambda: MTP(lambda r: Marked(), 3, 1e-6, 0.1, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    h, embedded = rng.normal(size=(2, 1, 2, 3))

    def norm(x, gain):
        return gain * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)

    joined = np.concatenate(
        [norm(embedded, params["embedding_norm"]["gain"]), norm(h, params["hidden_norm"]["gain"])], axis=-1
    )
    expected = norm(joined @ params["join_YD"] + 1, params["final_norm"]["gain"])
    got, reported = bind(definition, params, bias)(jnp.float32(h), jnp.float32(embedded), "tokens")
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert reported == "tokens"


def test_shift_left():
    np.testing.assert_array_equal(shift_left(jnp.array([[1, 2, 3]]), fill=-1), [[2, 3, -1]])
