"""The batch ramp, and each process's share of it."""

import math

import numpy as np
import pytest

from deepseek_jax.configs import v3_671b
from deepseek_jax.train.ramp import BatchRamp, Shares


@pytest.mark.parametrize(
    "ramp", [BatchRamp(8, 64, 100), BatchRamp(3072, 15360, 14909), BatchRamp(8, 24, 5), BatchRamp(8, 40, 20)], ids=str
)
def test_the_ramp_grows_in_few_multiples(ramp):
    sizes = [ramp.size_at(step) for step in range(ramp.ramp_steps + 5)]
    assert sizes == sorted(sizes) and sizes[0] == ramp.size_start and sizes[-1] == ramp.size
    unit = math.gcd(ramp.size_start, ramp.size)
    assert all(size % unit == 0 for size in sizes), "divides over every mesh that the first and the last divide over"
    assert len(set(sizes)) <= 9
    assert max(np.diff(sizes)) <= (ramp.size - ramp.size_start) / min(8, ramp.ramp_steps) + 2 * unit


def test_the_step_number_says_where_in_the_data_a_run_is():
    ramp = BatchRamp(8, 24, 5)
    first = 0
    for step in range(9):
        assert ramp.first(step) == first
        first += ramp.size_at(step)


def test_no_ramp():
    ramp = BatchRamp(16, 16, 0)
    assert ramp.size_at(0) == 16 and ramp.first(10) == 160


def test_the_published_recipe_adds_up_to_the_published_tokens():
    """V3 section 4.2: 469B tokens of ramp, 10T, 14.3T, 14.8T, to a thousandth."""
    config = v3_671b.get_config()
    loss, rates = config.loss, config.schedule
    ramp = BatchRamp(**config.batch)

    def tokens(step: int) -> float:
        return ramp.first(step) * config.data.seq_len

    decay = rates.warmup_steps + rates.constant_steps
    tail = decay + rates.cosine_steps
    last = tail + rates.tail_steps
    steps = {ramp.ramp_steps: 469e9, decay: 10e12, tail: 14.3e12, last: 14.633e12, config.loop.steps: 14.8e12}
    for step, published in steps.items():
        assert tokens(step) == pytest.approx(published, rel=1e-3)
    assert loss.mtp_weight_switch == decay and loss.balance_rate_stop == tail


@pytest.mark.parametrize(("start", "final", "steps"), [(8, 64, 100), (8, 24, 5), (8, 40, 3), (16, 16, 0), (64, 8, 13)])
def test_the_first_sample_of_a_step_is_the_sum_of_those_before(start, final, steps):
    ramp = BatchRamp(start, final, steps)
    assert [ramp.first(step) for step in range(120)] == [sum(map(ramp.size_at, range(step))) for step in range(120)]


def test_the_processes_of_a_run_share_each_step():
    ramp = BatchRamp(8, 24, 5)
    sides = [Shares(ramp, range(2, 9), process, 2) for process in range(2)]
    for step, (one, other) in enumerate(zip(*sides, strict=True), 2):
        assert one == (ramp.first(step), ramp.size_at(step) // 2)
        assert other == (sum(one), one[1])
    assert list(sides[0][3:]) == list(sides[0])[3:]


def test_a_run_of_a_thousand_million_steps_costs_no_memory():
    """Nothing is listed: the last step of two thousand million is known at once."""
    steps, ramp = 2 * 10**9, BatchRamp(8, 64, 10**9)
    shares = Shares(ramp, range(steps))
    assert len(shares) == steps
    assert shares[steps - 1] == (ramp.first(steps - 1), 64)
    assert shares[: 10**9][-1][0] + shares[10**9 - 1][1] == ramp.first(10**9)
