"""AdamW by hand, the learning rate at its corners, the batch ramp."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.configs import v3_671b
from deepseek_jax.train.optim import OptimizerConfig, adamw_update, init_moments, learning_rate
from deepseek_jax.train.ramp import BatchRamp, Shares

RECIPE = OptimizerConfig(
    peak_rate=1.0,
    warmup_steps=4,
    constant_steps=10,
    cosine_steps=20,
    tail_rate=0.1,
    tail_steps=5,
    final_rate=0.03,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    moments_dtype="float32",
)


@pytest.mark.parametrize(
    ("step", "wanted"),
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
def test_learning_rate_at_its_corners(step, wanted):
    assert float(learning_rate(RECIPE)(jnp.int32(step))) == pytest.approx(wanted, abs=1e-6)


def test_a_schedule_without_some_of_its_parts():
    rate = learning_rate(dataclasses.replace(RECIPE, warmup_steps=0, constant_steps=0, cosine_steps=0, tail_steps=2))
    assert [float(rate(step)) for step in (0, 1, 2)] == pytest.approx([0.1, 0.1, 0.03])
    assert float(learning_rate(dataclasses.replace(RECIPE, warmup_steps=0))(0)) == 1.0


def test_two_steps_of_adamw_by_hand():
    w = {"matrix": np.array([[1.0, -2.0]]), "gain": np.array([3.0])}
    decayed = {"matrix": True, "gain": False}
    params = jax.tree.map(jnp.float32, w)
    moments = init_moments(RECIPE, params)
    mean, square = (jax.tree.map(np.zeros_like, w) for _ in range(2))
    for count, rate in ((1, 0.5), (2, 0.2)):
        g = {"matrix": np.array([[0.3, -0.1]]) * count, "gain": np.array([2.0])}
        params, moments = adamw_update(RECIPE, jax.tree.map(jnp.float32, g), moments, params, decayed, rate)
        for name in w:
            mean[name] = 0.9 * mean[name] + 0.1 * g[name]
            square[name] = 0.95 * square[name] + 0.05 * g[name] ** 2
            step = mean[name] / (1 - 0.9**count) / (np.sqrt(square[name] / (1 - 0.95**count)) + 1e-8)
            w[name] = w[name] - rate * (step + 0.1 * decayed[name] * w[name])
            np.testing.assert_allclose(params[name], w[name], rtol=1e-5)
            np.testing.assert_allclose(moments["nu"][name], square[name], rtol=1e-5)
    assert int(moments["count"]) == 2


def test_moments_are_kept_in_the_dtype_asked_for():
    recipe = dataclasses.replace(RECIPE, moments_dtype="bfloat16")
    params = {"w": jnp.ones((2, 2))}
    moments = init_moments(recipe, params)
    params, after = adamw_update(recipe, {"w": jnp.full((2, 2), 0.5)}, moments, params, {"w": True}, 0.1)
    assert {x.dtype for m in (moments, after) for x in (m["mu"]["w"], m["nu"]["w"])} == {jnp.dtype(jnp.bfloat16)}
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], 1 - 0.1 * (1 + 0.1), rtol=1e-5)


def test_without_a_gradient_decay_moves_what_decays_alone():
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones((4, 8))}
    still = jax.tree.map(jnp.zeros_like, params)
    decayed = {"matrix": True, "bias": False}
    after, _ = adamw_update(RECIPE, still, init_moments(RECIPE, params), params, decayed, 0.5)
    np.testing.assert_allclose(after["matrix"], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], params["bias"])


@pytest.mark.parametrize(
    "ramp", [BatchRamp(8, 64, 100), BatchRamp(3072, 15360, 14909), BatchRamp(8, 24, 5), BatchRamp(8, 40, 20)], ids=str
)
def test_the_ramp_grows_in_few_multiples(ramp):
    sizes = [ramp.size(step) for step in range(ramp.steps + 5)]
    assert sizes == sorted(sizes) and sizes[0] == ramp.start and sizes[-1] == ramp.final
    unit = math.gcd(ramp.start, ramp.final)
    assert all(size % unit == 0 for size in sizes), "divides over every mesh that the first and the last divide over"
    assert len(set(sizes)) <= 9
    assert max(np.diff(sizes)) <= (ramp.final - ramp.start) / min(8, ramp.steps) + 2 * unit


def test_the_step_number_says_where_in_the_data_a_run_is():
    ramp = BatchRamp(8, 24, 5)
    first = 0
    for step in range(9):
        assert ramp.first(step) == first
        first += ramp.size(step)


def test_no_ramp():
    ramp = BatchRamp(16, 16, 0)
    assert ramp.size(0) == 16 and ramp.first(10) == 160


def test_the_published_recipe_adds_up_to_the_published_tokens():
    """V3 section 4.2: 469B tokens of ramp, 10T, 14.3T, 14.8T, to a thousandth."""
    config = v3_671b.get_config()
    train, rates = config.train, config.optimizer
    ramp = BatchRamp(train.batch_size_start, train.batch_size, train.batch_ramp_steps)

    def tokens(step: int) -> float:
        return ramp.first(step) * config.data.seq_len

    decay = rates.warmup_steps + rates.constant_steps
    tail = decay + rates.cosine_steps
    last = tail + rates.tail_steps
    steps = {ramp.steps: 469e9, decay: 10e12, tail: 14.3e12, last: 14.633e12, train.steps: 14.8e12}
    for step, published in steps.items():
        assert tokens(step) == pytest.approx(published, rel=1e-3)
    assert train.mtp_weight_switch == decay and train.balance_rate_stop == tail


@pytest.mark.parametrize(("start", "final", "steps"), [(8, 64, 100), (8, 24, 5), (8, 40, 3), (16, 16, 0), (64, 8, 13)])
def test_the_first_sample_of_a_step_is_the_sum_of_those_before(start, final, steps):
    ramp = BatchRamp(start, final, steps)
    assert [ramp.first(step) for step in range(120)] == [sum(map(ramp.size, range(step))) for step in range(120)]


def test_the_processes_of_a_run_share_each_step():
    ramp = BatchRamp(8, 24, 5)
    sides = [Shares(ramp, range(2, 9), process, 2) for process in range(2)]
    for step, (one, other) in enumerate(zip(*sides, strict=True), 2):
        assert one == (ramp.first(step), ramp.size(step) // 2)
        assert other == (sum(one), one[1])
    assert list(sides[0][3:]) == list(sides[0])[3:]


def test_a_run_of_a_thousand_million_steps_costs_no_memory():
    """Nothing is listed: the last step of two thousand million is known at once."""
    steps, ramp = 2 * 10**9, BatchRamp(8, 64, 10**9)
    shares = Shares(ramp, range(steps))
    assert len(shares) == steps
    assert shares[steps - 1] == (ramp.first(steps - 1), 64)
    assert shares[: 10**9][-1][0] + shares[10**9 - 1][1] == ramp.first(10**9)


def test_schedules_as_long_as_they_may_be_do_not_overflow():
    longest = 2 * 10**9
    recipe = dataclasses.replace(RECIPE, constant_steps=longest, cosine_steps=longest, tail_steps=longest)
    assert float(learning_rate(recipe)(jnp.int32(longest))) == 1.0
    assert float(learning_rate(dataclasses.replace(recipe, warmup_steps=longest))(jnp.int32(10**9))) == 0.5
