"""Declaring weights, stacking blocks and running them, with a toy block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import normal

from deepseek_jax.layers.base import (
    N_AHEAD,
    REMAT,
    Execution,
    RouterBias,
    bind,
    logical_axes,
    next_key,
    param,
    remat,
    run_stack,
    split,
    stack,
)


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.weight_DD = param(rngs, (3, 3), ("embed", None), normal(0.5), role="up")
        self.bias = RouterBias(jnp.zeros(3), axes=(None,))

    def __call__(self, x):
        return x + jnp.tanh(x @ self.weight_DD[...] + self.bias[...])


class Pair(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = stack(lambda r: Block(rngs=r), 4, rngs)
        self.ends = nnx.List(Block(rngs=rngs) for _ in range(2))


@pytest.fixture(scope="module")
def pair(filled) -> tuple:
    return filled(lambda: Pair(rngs=nnx.Rngs(0)), std=0.5)


def gradient(pair: tuple, policy: str):
    definition, params, bias = pair

    def loss(params, x):
        model = bind(definition, params, bias)
        add = jnp.arange(4.0)
        x, kept = run_stack(model.blocks, x, Execution(remat=policy), lambda b, x, e: (b(x) + e, jnp.sum(x)), add)
        return jnp.sum(x**2), (x, kept)

    return jax.jit(jax.grad(loss, has_aux=True))(params, jnp.float32([[1, -1, 0.5]]))


def test_a_stack_is_a_loop(pair):
    _, params, bias = pair
    _, (x, kept) = gradient(pair, "none")
    expected, sums = np.array([[1, -1, 0.5]]), []
    for i in range(4):
        sums.append(expected.sum())
        pre = expected @ np.float64(params["blocks"]["weight_DD"][i]) + bias["blocks"]["bias"][i]
        expected = expected + np.tanh(pre) + i
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    np.testing.assert_allclose(kept, sums, rtol=1e-5)


@pytest.mark.parametrize("policy", REMAT[1:])
def test_rematerialisation_changes_no_gradient(pair, policy):
    expected, got = (jax.tree.leaves(gradient(pair, name)[0]) for name in ("none", policy))
    for right, here in zip(expected, got, strict=True):
        np.testing.assert_allclose(here, right, rtol=1e-6, atol=1e-6)


def test_an_unknown_policy_is_named():
    with pytest.raises(ValueError, match="'all': no such policy. Choose one of none, dots, block"):
        remat(lambda x: x, "all")


def test_split_and_bind_are_inverse_and_every_key_is_a_name(pair):
    definition, params, bias = pair
    again = split(bind(definition, params, bias))
    assert list(again[1]["ends"]) == ["0", "1"]
    assert jax.tree.structure(again[1:]) == jax.tree.structure((params, bias))
    for old, new in zip(jax.tree.leaves((params, bias)), jax.tree.leaves(again[1:]), strict=True):
        assert old is new or np.array_equal(old, new)


def test_axes_follow_the_declaration():
    axes, bias_axes = logical_axes(nnx.eval_shape(lambda: Pair(rngs=nnx.Rngs(0))))
    assert axes["blocks"]["weight_DD"] == ("layers", "embed", None)
    assert axes["ends"]["1"]["weight_DD"] == ("embed", None)
    assert bias_axes["blocks"]["bias"] == ("layers", None)


def test_stacked_blocks_differ_from_one_another():
    blocks = jax.jit(lambda: split(stack(lambda r: Block(rngs=r), 3, nnx.Rngs(0)))[1])()
    first, second, _ = blocks["weight_DD"]
    assert not np.allclose(first, second)


def test_keys_made_together_are_those_that_flax_makes_one_by_one():
    """Also after the stream has been asked directly, as `stack` asks it, and after more than are made at once."""
    ours, theirs = nnx.Rngs(5), nnx.Rngs(5)
    for n in (2, N_AHEAD + 1):
        found = [jax.random.key_data(next_key(ours)) for _ in range(n)]
        np.testing.assert_array_equal(found, [jax.random.key_data(theirs.params()) for _ in range(n)])
        assert jax.random.key_data(ours.params()).tolist() == jax.random.key_data(theirs.params()).tolist()


def test_as_many_axes_as_dimensions():
    with pytest.raises(ValueError, match="needs 2 logical axes"):
        param(nnx.Rngs(0), (2, 3), ("embed",), normal(1.0), role="up")


def test_a_role_is_one_that_is_known():
    with pytest.raises(ValueError, match="role='weight': unknown. Choose one of attention_in, "):
        param(nnx.Rngs(0), (2,), ("embed",), normal(1.0), role="weight")
