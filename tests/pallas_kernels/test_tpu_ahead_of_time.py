"""The TPU kernels, compiled for v5p, v6e and TPU7x without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs the wheel of .ci/ahead_of_time_tpu.txt, no TPU"
    ),
]


@pytest.fixture(scope="module")
def compiled():
    script = Path(__file__).with_name("compile_for_tpu.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_kernel_compiles_for_every_chip(compiled):
    """The compiler refuses what does not fit into a chip's vector or scalar memory."""
    assert len(compiled) == 3 * 30
    for kernel in compiled:
        assert kernel["kernels"] == (2 if "backward" in kernel["call"] else 1), kernel


def test_only_one_chip_multiplies_e4m3(compiled):
    assert {kernel["chip"] for kernel in compiled if kernel["native"]} == {"TPU7x"}
    assert {kernel["chip"] for kernel in compiled if not kernel["native"]} == {"TPU v5", "TPU v6 lite"}
