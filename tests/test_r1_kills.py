"""A chain of R1 that is killed in stage after stage ends with the bits of an undisturbed one.

`pytest -m matrix` kills the first stages twice; with DEEPSEEK_JAX_FAULTS=10 all stages are killed, twenty times.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.launch._chain import ANSWERS
from deepseek_jax.launch._stages import R1, RECORD
from deepseek_jax.train.metrics import read_log
from deepseek_jax.weights import open_weights
from tests.forks import fork, one_device

FAULTS = int(os.environ.get("DEEPSEEK_JAX_FAULTS", "1"))
KILLS = 2 * FAULTS
STAGES = R1 if FAULTS > 1 else R1[:4]  # one of each kind
SEED = int(os.environ.get("DEEPSEEK_JAX_FAULT_SEED", "0"))


def forked(workdir: Path) -> None:
    """What a fork runs."""
    from deepseek_jax.launch import _chain, _conversations, _sums_base

    _sums_base.BASE_TEXT, _conversations.N_BUILT_IN = 500, 300
    config = run_config.load(str(Path(__file__).with_name("nano_r1.py"))).unlock()
    for name in {*config.r1} - {stage.name for stage in STAGES}:
        del config.r1[name]
    config.mesh.data = 1
    sys.exit(_chain.run(config, workdir, "the same", STAGES))


def start(workdir: Path) -> multiprocessing.Process:
    return fork(workdir.with_suffix(".out"), one_device(), forked, workdir)


def seconds(workdir: Path) -> dict[str, float]:
    """How long each stage of a finished chain took."""
    ends = {stage.name: (workdir / stage.name / RECORD).stat().st_mtime for stage in STAGES}
    begins = [min(file.stat().st_mtime for file in (workdir / stage.name).iterdir()) for stage in STAGES]
    return {stage.name: end - begin for stage, begin, end in zip(STAGES, begins, ends.values(), strict=True)}


def logs(workdir: Path) -> dict[str, list[dict]]:
    """Every figure that was logged, without what the clock decides."""
    return {
        stage.name: [
            {key: value for key, value in record.items() if key != "speed" and not key.endswith("_s")}
            for record in read_log(workdir / stage.name / "metrics.jsonl")
        ]
        for stage in STAGES
    }


def results(workdir: Path) -> list:
    """How each stage was judged."""
    return [json.loads((workdir / stage.name / RECORD).read_bytes())["held_out"] for stage in STAGES]


@pytest.mark.slow
@pytest.mark.matrix
def test_killed_in_stage_after_stage_the_chain_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where a fork finds this file
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole)
    process.join(500)
    assert process.exitcode == 0, whole.with_suffix(".out").read_text()
    took, choose = seconds(whole), random.Random(SEED)
    ends = []
    for name in sorted(choose.choices([stage.name for stage in STAGES], k=KILLS), key=[*took].index):
        process = start(cut)
        while process.is_alive() and not (cut / name).exists():
            time.sleep(0.02)
        process.join(choose.uniform(0, took[name]))
        process.kill()
        process.join()
        ends.append(process.exitcode)
    assert -signal.SIGKILL in ends, "every kill came after the end of the chain"
    process = start(cut)
    process.join(500)
    assert process.exitcode == 0, cut.with_suffix(".out").read_text()
    assert results(cut) == results(whole) and logs(cut) == logs(whole)
    assert (cut / "kept" / ANSWERS).read_bytes() == (whole / "kept" / ANSWERS).read_bytes()
    for stage in STAGES:
        if stage.kind != "sample":
            states = [open_weights(workdir / stage.name).load().state for workdir in (whole, cut)]
            jax.tree.map(np.testing.assert_array_equal, *states)
