"""The TPU kernels, compiled for v5p, those that multiply E4M3 for TPU7x, without a TPU.

With -m matrix all of them for TPU7x and v6e.
"""

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
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not importlib.util.find_spec("libtpu"), reason="needs the wheel of .ci/ahead_of_time_tpu.txt, no TPU"
    ),
]


def compiled_for(*slices: tuple[str, ...]) -> list[dict]:
    """What the compiler says of each kernel; the chips' processes run side by side."""
    script = Path(__file__).with_name("compile_for_tpu.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen(
            [sys.executable, script, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for words in slices
    ]
    lines = []
    for process in started:
        output, complaints = process.communicate(timeout=3500)
        assert process.returncode == 0, complaints[-3000:]
        lines += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return lines


@pytest.fixture(scope="module")
def compiled():
    return compiled_for(("v5p:2x2x1",), ("products", "tpu7x:2x2x1"))


def check_kernels(compiled: list[dict]) -> None:
    for kernel in compiled:
        assert kernel["kernels"] == (2 if "backward" in kernel["call"] else 1), kernel


def test_every_kernel_compiles_for_the_smallest_memory_and_products_for_the_latest_chip(compiled):
    """The compiler refuses what does not fit into a chip's vector or scalar memory."""
    assert len(compiled) == 30 + 9
    check_kernels(compiled)


def test_only_one_chip_multiplies_e4m3(compiled):
    assert {kernel["chip"] for kernel in compiled if kernel["native"]} == {"TPU7x"}
    assert {kernel["chip"] for kernel in compiled if not kernel["native"]} == {"TPU v5"}


@pytest.mark.matrix
def test_every_kernel_compiles_for_the_latest_chip():
    found = compiled_for(("tpu7x:2x2x1",))
    assert len(found) == 30
    check_kernels(found)


@pytest.mark.matrix
def test_every_kernel_compiles_for_the_chip_between():
    """It multiplies as the older one does."""
    found = compiled_for(("v6e:2x2",))
    assert len(found) == 30 and {(kernel["chip"], kernel["native"]) for kernel in found} == {("TPU v6 lite", False)}
    check_kernels(found)
