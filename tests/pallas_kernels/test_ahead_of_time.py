"""The GPU kernels, compiled for Hopper without a GPU: tensor cores used, few spills, shared memory within bounds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 232_448  # bytes that a CTA may have on Hopper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("jax_cuda13_plugin") and importlib.util.find_spec("nvidia")),
        reason="needs the wheels of .ci/ahead_of_time.txt, no GPU",
    ),
]


@pytest.fixture(scope="module")
def compiled():
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_kernel_uses_the_instructions_that_it_is_built_on(compiled):
    """FP8 tensor cores, not serialised; for 16-bit values, loads that transpose."""
    assert len(compiled) == 21
    for kernel in compiled:
        if kernel["call"].startswith("fp8_matmul"):
            assert kernel["fp8_instructions"] >= 4, kernel
        elif "bfloat16" in kernel["call"]:
            assert kernel["transposing_loads"] >= 16, kernel
        assert not kernel["serialised"], kernel


def test_kernels_spill_next_to_nothing(compiled):
    """A spill inside the loop shares the pipe that feeds the tensor cores; four bytes per thread lie outside it."""
    for kernel in compiled:
        assert kernel["spilled"] <= 4, kernel


def test_shared_memory_is_within_bounds(compiled):
    for kernel in compiled:
        assert kernel["shared"] is None or kernel["shared"] <= SHARED_MEMORY, kernel
