"""Schedules: the formulas of the bubbles on whole numbers, what is refused."""

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.simulate import Times
from deepseek_jax.plan.schedules import SCHEDULES, schedule

# One unit each for forward pass, input gradients and weight gradients: B is 2, F&B is 3.
UNITS = Times(forward=1, backward=2, weights=1, both=3)
# V3's own operations, in milliseconds, from its published phases: the formula gives 1.09 s per step.
V3 = Times(forward=49, backward=75 + 32, weights=32, both=143.8)


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize(
    ("name", "bubble"),
    [
        ("1f1b", lambda n: 3 * (n - 1)),
        ("1f1b_paired", lambda n: 3 * (n - 1)),
        ("zb1p", lambda n: n - 1),
        ("dualpipe", lambda n: 2 * (n // 2 - 1)),
        ("dualpipev", lambda n: 2 * (n // 2 - 1)),
    ],
)
def test_bubbles_in_units(name, bubble, n):
    assert SCHEDULES[name].bubble(n, UNITS) == bubble(n)


def test_bubbles_by_hand():
    assert SCHEDULES["1f1b"].bubble(16, V3) == 15 * (49 + 107)
    assert SCHEDULES["zb1p"].bubble(16, V3) == 15 * (49 + 107 - 64)
    assert SCHEDULES["dualpipe"].bubble(16, V3) == pytest.approx(7 * (143.8 + 107 - 96))


def test_one_device_waits_for_nobody():
    for name in ("1f1b", "zb1p", "dualpipev"):
        assert SCHEDULES[name].bubble(SCHEDULES[name].arrangement.n_stages(1), UNITS) == 0


@pytest.mark.parametrize(
    ("name", "n_devices", "micro_batches", "words"),
    [
        ("gpipe", 4, 8, "no such schedule. Choose one of 1f1b, 1f1b_paired, zb1p, dualpipe, dualpipev"),
        ("dualpipe", 3, 12, "config.mesh.pipe=3: expected an even number of devices"),
        ("dualpipe", 4, 6, "expected an even number >= 8"),
        ("dualpipe", 4, 9, "expected an even number >= 8"),
        ("dualpipev", 4, 7, "expected 8 or more"),
    ],
)
def test_what_does_not_suit_is_refused(name, n_devices, micro_batches, words):
    with pytest.raises(UserError, match=words):
        schedule(name, n_devices, micro_batches)
