"""The table of chips, the kinds that JAX reports, and custom chips."""

import dataclasses

import pytest

from deepseek_jax.chips import ALIASES, CHIPS, DEVICE_KINDS, chip, chips_of, peak_flops
from deepseek_jax.errors import UserError


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_chip_by_the_kind_that_jax_reports(kind, peak):
    assert peak_flops(kind) == peak


def test_every_kind_of_device_is_a_chip_or_a_number():
    assert {known for known in DEVICE_KINDS.values() if isinstance(known, str)} <= CHIPS.keys()


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_is_plausible(name):
    it = CHIPS[name]
    assert it.bf16 <= it.fp8 <= 2.01 * it.bf16
    assert it.network < it.fast < it.hbm
    assert it.reach > 1


def test_a_chip_of_ones_own():
    mine = chip("mine:bf16=500,memory=64,reach=16")
    assert (mine.name, mine.bf16, mine.fp8, mine.memory, mine.reach) == ("mine", 500, 1000, 64, 16)
    assert mine.hbm == CHIPS["h800"].hbm
    assert chip("x:bf16=500,fp8=500").fp8 == 500
    assert chip("H800") is CHIPS["h800"]
    assert chip("h200:memory=96") == dataclasses.replace(CHIPS["h200"], memory=96)


@pytest.mark.parametrize(
    "text",
    ["h900", "", ":bf16=1", "mine:", "a:bf16", "a:bf16=x", "a:bf16=0", "a:hbm=1e-320", "a:speed=3", "a:reach=1.5"],
)
def test_an_unknown_chip_is_refused(text):
    with pytest.raises(UserError, match="--chip="):
        chip(text)


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("h100", "h100", 0),
        ("8xh100", "h100", 8),
        ("8x H100", "h100", 8),
        ("h100x8", "h100", 8),
        ("gb200-72", "gb200", 72),
        ("64xa100_40", "a100_40", 64),
        ("8xl4", "l4", 8),
        ("v5p", "tpu_v5p", 0),
        ("v5p-512", "tpu_v5p", 256),  # TensorCores, two per chip
        ("tpu_v5p-8", "tpu_v5p", 4),
        ("256xv5p", "tpu_v5p", 256),  # chips
        ("v5e-256", "tpu_v5e", 256),
        ("v5litepod-16", "tpu_v5e", 16),
        ("v6e-256", "tpu_v6e", 256),
        ("mine:bf16=500", "mine", 0),
        ("h100:memory=64", "h100", 0),
    ],
)
def test_a_name_may_say_how_many(text, name, count):
    found, number = chips_of(text)
    assert (found.name, number) == (name, count)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_chip_itself(alias):
    assert chip(alias) is CHIPS[ALIASES[alias]] and chip(f"{alias}:hbm=99").bf16 == CHIPS[ALIASES[alias]].bf16


@pytest.mark.parametrize("text", ["v5p-511", "0xh100", "8xh900", "h900-8", "8xh100x8", "x8", "-8", "8x", "v5p-"])
def test_a_number_of_chips_that_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="--chip="):
        chips_of(text)
