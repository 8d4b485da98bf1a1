"""What depends on where a run was started: which device computes, and whether freed memory is kept for the next."""

import subprocess
import sys

import jax
import pytest

from deepseek_jax import compat

GPU, TPU = "/dev/nvidia0", "/dev/vfio"


@pytest.mark.parametrize(
    "platforms, files, variables, plugins, on_cpu",
    [
        (None, [], {}, [], True),
        (None, [GPU], {}, ["xla_cuda13"], False),
        (None, [GPU], {}, [], True),  # the host has a GPU and jax is the plain one
        (None, [], {}, ["xla_cuda12"], True),  # the plugin and no GPU
        (None, [GPU], {"CUDA_VISIBLE_DEVICES": ""}, ["xla_cuda13"], True),
        (None, [GPU], {"CUDA_VISIBLE_DEVICES": "-1"}, ["xla_cuda13"], True),
        (None, [GPU], {"CUDA_VISIBLE_DEVICES": "1"}, ["xla_cuda13"], False),
        (None, [TPU], {}, ["libtpu"], False),
        (None, [TPU], {"CUDA_VISIBLE_DEVICES": ""}, ["libtpu"], False),
        ("cpu", [GPU], {}, ["xla_cuda13"], True),
        ("cuda,cpu", [GPU], {}, ["xla_cuda13"], False),
    ],
)
def test_the_cpu_computes_unless_an_accelerator_can_be_used(monkeypatch, platforms, files, variables, plugins, on_cpu):
    monkeypatch.setattr(compat.os.path, "exists", lambda path: path in files)
    monkeypatch.setattr(compat, "_jax_plugins", lambda: plugins)
    for _, variable, _ in compat.ACCELERATORS:
        monkeypatch.delenv(variable, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        assert compat.computes_on_cpu() is on_cpu
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.skipif(not hasattr(compat.ctypes.CDLL(None), "mallopt"), reason="memory is kept by glibc's mallopt")
def test_memory_that_was_freed_is_not_faulted_in_again():
    """Blocks as large as a step's temporaries, made and freed again and again: pages are touched anew once only."""
    program = (
        "import resource, ctypes; from deepseek_jax.compat import keep_freed_memory\n"
        "libc, size = ctypes.CDLL(None), 64 << 20\n"
        "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "def once():\n"
        "    block = libc.malloc(size); libc.memset(block, 1, size); libc.free(block)\n"
        "def faults():\n"
        "    once(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(4): once()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults()); assert keep_freed_memory(); print(faults())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert 4 * kept < given_back, (kept, given_back)
