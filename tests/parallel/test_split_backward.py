"""A stage in three programs: together they are its derivative, and no matmul runs twice."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deepseek_jax.parallel.split_backward import everything, matmuls, nothing, split
from pallas_kernels import mla_attention
from pallas_kernels.mla_attention import chunked

N, D = 3, 8  # layers of two matmuls each
SHAPES = {"up": (N, D, 2 * D), "down": (N, 2 * D, D), "gain": (N, D)}
DRAW = np.random.default_rng(0)
WEIGHTS = {name: DRAW.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
X, DY = DRAW.normal(size=(2, 4, D)).astype(np.float32)
REST = {"mask": np.float32([1, 0, 1, 1]), "scale": np.float32(0.5)}


def stage(weights, x, rest):
    """Norms, matmuls in a jit and a loop, a side loss, and a mask made of `rest` alone."""
    loss = 0.0
    mask = (rest["mask"] * rest["scale"])[:, None]
    for up, down, gain in zip(*(weights[name] for name in ("up", "down", "gain")), strict=True):
        normed = gain * x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        hidden = jax.nn.silu(jax.jit(jnp.dot)(normed, up))
        x = x + mask * lax.fori_loop(0, 2, lambda _, h: h * 0.9, hidden) @ down
        loss += jnp.mean(x**2)
    return x, loss, {"mean": jnp.mean(x)}


@jax.jit
def reference(weights, x, rest, dy):
    def of(weights, x):
        y, loss, report = stage(weights, x, rest)
        return (y, loss), report

    (y, _), pull, report = jax.vjp(of, weights, x, has_aux=True)
    return y, report, *pull((dy, jnp.float32(1)))


def count(program, *arguments) -> int:
    return str(jax.make_jaxpr(program)(*arguments)).count("dot_general")


@pytest.fixture(scope="module", params=[everything, matmuls, nothing], ids=lambda f: f.__name__)
def case(request):
    parts = split(stage, WEIGHTS, X, REST, request.param)
    return request.param, parts, parts.prepare(WEIGHTS)


def test_the_three_programs_are_the_derivative(case):
    _, parts, weights = case
    y, report, early, late = jax.jit(parts.forward)(weights, X, REST)
    dx, stash = jax.jit(parts.backward)(weights, REST, DY, early, late)
    d_weights = jax.jit(parts.weights)(weights, REST, late, stash)
    expected = reference(WEIGHTS, X, REST, DY)
    for found, known in zip(jax.tree.leaves((y, report, d_weights, dx)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-6)


def test_no_matmul_runs_twice(case):
    saveable, parts, weights = case
    *_, early, late = jax.eval_shape(parts.forward, weights, X, REST)
    _, stash = jax.eval_shape(parts.backward, weights, REST, DY, early, late)
    recomputed = 2 * N if saveable is nothing else 0
    assert count(parts.forward, weights, X, REST) == 2 * N
    assert count(parts.backward, weights, REST, DY, early, late) == 2 * N + recomputed
    assert count(parts.weights, weights, REST, late, stash) == 2 * N


def test_what_may_not_be_saved_is_not():
    sizes = {}
    for saveable in (everything, matmuls, nothing):
        parts = split(stage, WEIGHTS, X, REST, saveable)
        sizes[saveable] = sum(array.size for array in jax.tree.leaves(parts.shapes["early"] + parts.shapes["late"]))
    assert sizes[nothing] == X.size < sizes[matmuls] < sizes[everything]


def test_one_pass_is_made_again_where_it_is_read_and_what_follows_from_weights_once():
    """silu and its derivative follow from gate and up; gate and up side by side from the weights alone."""

    def feed_forward(weights, x, rest):
        gate_up = x @ jnp.concatenate([weights["gate"], weights["up"]], axis=1)
        hidden = jax.nn.silu(gate_up[:, : 2 * D]) * gate_up[:, 2 * D :]
        return hidden @ weights["down"], jnp.float32(0), {}

    weights = {"gate": WEIGHTS["up"][0], "up": WEIGHTS["up"][1], "down": WEIGHTS["down"][0]}
    parts = split(feed_forward, weights, X, {})
    assert [a.shape for a in parts.prepare(weights)[1]] == [(D, 4 * D)]
    programs = {"forward": (X, {}), "backward": ({}, DY, parts.shapes["early"], parts.shapes["late"])}
    for name, arguments in programs.items():
        traced = jax.make_jaxpr(getattr(parts, name))(parts.prepare(weights), *arguments)
        assert not any(
            equation.primitive.name == "concatenate" and equation.params["dimension"] for equation in traced.eqns
        )
    kept = sorted(a.shape for a in parts.shapes["early"] + parts.shapes["late"])
    assert kept == [(4, D), (4, 2 * D), (4, 2 * D)]  # x, gate, up


def test_the_results_of_a_kernel_may_be_saved():
    kernel = plgpu.kernel(lambda x, y: None, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
    assert [matmuls(equation) for equation in jax.make_jaxpr(kernel)(np.ones(128, np.float32)).eqns] == [True]


@pytest.mark.parametrize(("saveable", "loops"), [(matmuls, 1), (nothing, 2)])
def test_attention_in_blocks_is_one_loop_forward_and_one_backward(monkeypatch, saveable, loops):
    """Unless nothing is saved: then the backward pass repeats the forward loop."""
    monkeypatch.setattr(chunked, "BLOCK", 4)
    attend = functools.partial(mla_attention.attention, implementation="chunked", scale=1.0)

    def attention(weights, x, rest):
        q = (x @ weights)[:, :, None]
        y = x + attend(q, x[:, :, None], x[:, :, None])[0][:, :, 0]
        return y, jnp.mean(y), {}

    weights, x = np.eye(D, dtype=np.float32), np.ones((1, 8, D), np.float32)
    parts = split(attention, weights, x, {}, saveable)
    weights = parts.prepare(weights)
    _, _, early, late = jax.eval_shape(parts.forward, weights, x, {})
    traced = jax.make_jaxpr(parts.backward)(weights, {}, x, early, late)
    assert sum(equation.primitive.name == "scan" for equation in traced.jaxpr.eqns) == loops
