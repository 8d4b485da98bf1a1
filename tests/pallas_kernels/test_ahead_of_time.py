"""The GPU kernels, compiled for Hopper without a GPU: tensor cores used, few spills, shared memory within bounds.

With `-m matrix` at the other sizes of their script as well, at which they have the same branches.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = 232_448  # bytes that a CTA may have on Hopper
FEW = 8  # bytes of registers that may be spilled, all of them outside the loops
ADDRESSES = 96  # bytes of addresses that one kernel spills and reads again only where it compares documents
PARTS = ("attention", "decode", "grouped", "few rows", "dense", "sparse", "codes", "of one token")
ADDRESSES_OF_DECODE = 48  # bytes of addresses that latent decode spills, and reads again once per page
ADDRESSES_OF_FEW = 160  # the same of few heads with a page at a time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # of the first test, for which the kernels are compiled, beside other work
    pytest.mark.skipif(
        not (importlib.util.find_spec("jax_cuda13_plugin") and importlib.util.find_spec("nvidia")),
        reason="needs the wheels of .ci/ahead_of_time.txt, no GPU",
    ),
]


@pytest.fixture(
    scope="module", params=[("once", 64), pytest.param(("again", 26), marks=pytest.mark.matrix)], ids=lambda p: p[0]
)
def compiled(request):
    """What the compiler said of each kernel; as many processes as there are cores divide the parts of the script."""
    which, n_kernels = request.param
    script = Path(__file__).with_name("compile_for_hopper.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    n = min(os.cpu_count() or 1, len(PARTS))
    started = [
        subprocess.Popen(
            [sys.executable, script, which, *PARTS[first::n]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for first in range(n)
    ]
    lines = []
    for process in started:
        output, complaints = process.communicate(timeout=3500)
        assert process.returncode == 0, complaints[-3000:]
        lines += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == n_kernels
    return lines


def test_every_kernel_uses_the_instructions_that_it_is_built_on(compiled):
    """Tensor cores, not serialised; for 16-bit values that are transposed on the way, loads that transpose."""
    for kernel in compiled:
        name = kernel["call"]
        if name.startswith(("fp8_matmul", "grouped fp8", "indexer 1x4096")):
            assert kernel["fp8_instructions"] >= 4, kernel
        elif name.startswith(("codes", "decode", "grouped", "attention", "sparse_mla", "chosen", "mean")):
            assert kernel["bf16_instructions"] >= 4, kernel
        elif "bfloat16" in name:
            assert kernel["transposing_loads"] >= 8, kernel
        assert not kernel["serialised"], kernel


def test_kernels_spill_next_to_nothing(compiled):
    """A spill inside the loop shares the pipe that feeds the tensor cores."""
    for kernel in compiled:
        compares = kernel["call"] == "attention of keys 4096x128x128x192x128 documents"
        is_decode = kernel["call"].startswith(("decode", "sparse_mla"))
        most = ADDRESSES_OF_DECODE if is_decode else ADDRESSES if compares else FEW
        most = ADDRESSES_OF_FEW if kernel["call"].startswith("decode few") else most
        assert kernel["spilled"] <= most, kernel


def test_shared_memory_is_within_bounds(compiled):
    for kernel in compiled:
        assert kernel["shared"] is None or kernel["shared"] <= SHARED_MEMORY, kernel
