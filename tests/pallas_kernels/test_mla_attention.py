"""Attention by blocks is attention: outputs, lse and gradients against the definition, in float64 and in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_attention import attention, chunked

WIDTHS = 6, 4  # of queries and keys, of values
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16)


def numbers(b, t, s, h, z, dtype=np.float64, draw=np.random.Generator.normal) -> tuple:
    rng = np.random.default_rng(0)
    shapes = (b, t, h, WIDTHS[0]), (b, s, z, WIDTHS[0]), (b, s, z, WIDTHS[1])
    return tuple(jnp.asarray(draw(rng, size=shape), dtype) for shape in shapes)


def wave(x):
    return jnp.sin(jnp.arange(1, x.size + 1)).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("implementation",))
def results(q, k, v, segments=None, q_offset=0, *, implementation):
    """(o, lse), gradients of a sum over both."""

    def loss(q, k, v):
        o, lse = attention(q, k, v, implementation=implementation, scale=SCALE, segments=segments, q_offset=q_offset)
        return jnp.sum(wave(o) * o) + jnp.sum(wave(lse) * jnp.where(jnp.isfinite(lse), lse, 0)), (o, lse)

    (_, found), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *found, *gradients


@pytest.mark.parametrize(("shape", "offset"), [((1, 1, 1, 2, 2), 0), ((2, 40, 40, 4, 2), 0), ((1, 20, 50, 2, 1), -3)])
def test_blocks_change_nothing_in_float64(shape, offset):
    with jax.enable_x64(True):
        arrays = numbers(*shape)
        for found, expected in zip(
            results(*arrays, q_offset=offset, implementation="chunked"),
            results(*arrays, q_offset=offset, implementation="reference"),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
