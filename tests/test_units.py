"""Numbers of bytes and durations as text."""

import pytest

from deepseek_jax.units import binary, duration


@pytest.mark.parametrize(("n_bytes", "text"), [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (2**40, "1.00 TiB")])
def test_bytes(n_bytes, text):
    assert binary(n_bytes) == text


def test_durations():
    assert [duration(0.9), duration(61), duration(36_000)] == ["0:00:00", "0:01:01", "10:00:00"]
