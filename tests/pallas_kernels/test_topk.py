"""Exact top k of long rows: the definition against numpy, the other implementations against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.topk import gpu, gpu_split, reference, top_k


def rows(s=300):
    """Many ties, both zeros, ends that are -inf; the first row has one number, the last is full."""
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(6, s)) * 3) / 3 * np.where(np.arange(6) % 2, 1, -1)[:, None]
    return np.where(np.arange(s) < (np.arange(6) * s // 5 + 1)[:, None], x, -np.inf).astype(np.float32)


@pytest.mark.parametrize("implementation", ["reference", "threshold"])
def test_the_lowest_of_equal_numbers_in_the_order_of_positions(implementation):
    x, k = rows(), 70
    found = jax.jit(functools.partial(top_k, k=k, implementation=implementation))(x.reshape(2, 3, -1))
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(x, order, axis=1) > -np.inf
    expected = np.sort(np.where(chosen, order, 1000), axis=1)
    np.testing.assert_array_equal(found.reshape(6, k), np.where(expected == 1000, -1, expected))


@pytest.mark.parametrize(("k", "most"), [(5, 512), (64, 128), (90, 128), (300, 512)])
def test_the_kernel_is_the_definition(k, most):
    """Interpreted; at once, by parts and parts of these, by parts of more than 2 k numbers, and more than there are."""
    x = jnp.asarray(rows())
    np.testing.assert_array_equal(gpu.top_k(x, k, most=most, interpret=True), reference.top_k(x, k))


@pytest.mark.parametrize(
    ("k", "part"),
    [
        pytest.param(5, 128, marks=[pytest.mark.slow, pytest.mark.matrix]),
        (90, 128),
        pytest.param(300, 64, marks=pytest.mark.slow),
    ],
)
def test_rows_in_parts_side_by_side_are_the_definition(k, part):
    """Interpreted; the last part is not full, numbers are those of other parts as well."""
    x = jnp.asarray(rows()).at[0, :200].set(-1e-30)
    np.testing.assert_array_equal(gpu_split.top_k(x, k, part=part, interpret=True), reference.top_k(x, k))


def test_what_does_not_fit_is_said():
    for x, k, name, message in (
        (jnp.zeros((2, 3)), 1, "other", "unknown"),
        (jnp.zeros((2, 3), jnp.bfloat16), 1, "reference", "expected float32"),
        (jnp.zeros((2, 3)), 1, "triton", "needs an NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            top_k(x, k, implementation=name)
    with pytest.raises(ValueError, match="the best 20,000 of 40,000 numbers: a program holds 32,768"):
        gpu.top_k(jnp.zeros((33, 40_000)), 20_000, interpret=True)
