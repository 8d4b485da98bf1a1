"""bench rl on our side; beside TRL only where that is installed."""

import importlib.util
import re

import pytest

from deepseek_jax import cli
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_rl

SMALL = ["--config=nano_zero", "--questions=2", "--answers=2", "--new-tokens=4", "--turns=1", "--config.mesh.data=1"]


@pytest.mark.slow
def test_steps_are_measured_beside_trl_where_that_is_installed(capsys):
    has_peer = importlib.util.find_spec("trl") is not None
    assert cli.main(["bench", "rl", *SMALL, f"--peer={has_peer}"]) == 0
    printed = capsys.readouterr().out
    assert "2 prompts of 9 tokens x 2 answers of 4, 2 updates; 1 turns of 1" in printed and "rollout" in printed
    sizes = re.findall(r"([0-9.]+)M parameters", printed)
    assert sizes == ["0.04"] * (1 + has_peer) and ("ratio of the medians" in printed) == has_peer


def test_settings_are_checked():
    with pytest.raises(UserError, match="--new-tokens=0: expected a whole number from 1"):
        _bench_rl.main(["--new-tokens=0"])
    with pytest.raises(UserError, match="the peer computes in fp32"):
        _bench_rl.main(["--config.precision=bf16"])
