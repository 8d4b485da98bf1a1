"""AdamW by hand, the learning rate at its corners."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.train.optimizers import Schedule
from deepseek_jax.train.optimizers.adamw import AdamW

RATE = Schedule(
    peak_rate=1.0,
    warmup_steps=4,
    constant_steps=10,
    cosine_steps=20,
    tail_rate=0.1,
    tail_steps=5,
    final_rate=0.03,
)


def adamw(decayed: dict, moments_dtype: str = "float32") -> AdamW:
    return AdamW(decayed, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, moments_dtype=moments_dtype)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.25),
        (3, 0.75),
        (4, 1.0),
        (13, 1.0),
        (14, 1.0),
        (19, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        (24, 0.55),
        (34, 0.1),
        (38, 0.1),
        (39, 0.03),
        (10**6, 0.03),
    ],
)
def test_learning_rate_at_its_corners(step, expected):
    assert float(RATE(jnp.int32(step))) == pytest.approx(expected, abs=1e-6)


def test_a_schedule_without_some_of_its_parts():
    rate = dataclasses.replace(RATE, warmup_steps=0, constant_steps=0, cosine_steps=0, tail_steps=2)
    assert [float(rate(step)) for step in (0, 1, 2)] == pytest.approx([0.1, 0.1, 0.03])
    assert float(dataclasses.replace(RATE, warmup_steps=0)(0)) == 1.0


def test_two_steps_of_adamw_by_hand():
    w = {"matrix": np.array([[1.0, -2.0]]), "gain": np.array([3.0])}
    optimizer = adamw({"matrix": True, "gain": False})
    params = jax.tree.map(jnp.float32, w)
    moments = optimizer.init(params)
    mean, square = (jax.tree.map(np.zeros_like, w) for _ in range(2))
    for count, rate in ((1, 0.5), (2, 0.2)):
        g = {"matrix": np.array([[0.3, -0.1]]) * count, "gain": np.array([2.0])}
        params, moments = optimizer.update(jax.tree.map(jnp.float32, g), moments, params, rate)
        for name in w:
            mean[name] = 0.9 * mean[name] + 0.1 * g[name]
            square[name] = 0.95 * square[name] + 0.05 * g[name] ** 2
            step = mean[name] / (1 - 0.9**count) / (np.sqrt(square[name] / (1 - 0.95**count)) + 1e-8)
            w[name] = w[name] - rate * (step + 0.1 * (name == "matrix") * w[name])
            np.testing.assert_allclose(params[name], w[name], rtol=1e-5)
            np.testing.assert_allclose(moments["nu"][name], square[name], rtol=1e-5)
    assert int(moments["count"]) == 2


def test_moments_are_kept_in_the_dtype_asked_for():
    optimizer = adamw({"w": True}, moments_dtype="bfloat16")
    params = {"w": jnp.ones((2, 2))}
    moments = optimizer.init(params)
    params, after = optimizer.update({"w": jnp.full((2, 2), 0.5)}, moments, params, 0.1)
    assert {x.dtype for m in (moments, after) for x in (m["mu"]["w"], m["nu"]["w"])} == {jnp.dtype(jnp.bfloat16)}
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], 1 - 0.1 * (1 + 0.1), rtol=1e-5)


def test_without_a_gradient_decay_moves_what_decays_alone():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones((4, 8))}
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw({"matrix": True, "bias": False, "a weight that is not trained": True})
    after, _ = optimizer.update(still, optimizer.init(params), params, 0.5)
    np.testing.assert_allclose(after["matrix"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], params["bias"])


def test_schedules_as_long_as_they_may_be_do_not_overflow():
    longest = 2 * 10**9
    rate = dataclasses.replace(RATE, constant_steps=longest, cosine_steps=longest, tail_steps=longest)
    assert float(rate(jnp.int32(longest))) == 1.0
    assert float(dataclasses.replace(rate, warmup_steps=longest)(jnp.int32(10**9))) == 0.5
