"""The table of chips: it agrees with the one that training logs use, and a chip of one's own is read."""

import dataclasses

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.plan.chips import CHIPS, chip
from deepseek_jax.train.metrics import PEAK_FLOPS

IN_LOGS = {"h800": "H800", "h100": "H100", "h200": "H200", "b200": "B200", "tpu_v5p": "TPU v5", "tpu_v6e": "TPU v6"}


@pytest.mark.parametrize("name", CHIPS)
def test_the_peaks_are_those_of_the_training_log(name):
    assert CHIPS[name].bf16 * 1e12 == PEAK_FLOPS[IN_LOGS[name]]


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
def test_a_chip_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--chip="):
        chip(text)
