"""What depends on where a run was started: which device computes, and whether freed memory is kept for the next."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jaxlib import utils

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


@pytest.fixture
def levels(monkeypatch, tmp_path):
    """The log levels that are set, in their order; the listeners and the cache are undone."""
    found = []
    monkeypatch.setattr(utils, "absl_set_min_log_level", found.append)
    compat.quieten_compilation.cache_clear()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield found
    jax.config.update("jax_compilation_cache_dir", before)
    jax.monitoring.clear_event_listeners()  # those of others as well
    compat.quieten_compilation.cache_clear()
    compat.compilation.cache_clear()


def test_alarms_are_quiet_only_while_something_is_compiled(levels, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    compat.quieten_compilation()
    compat.quieten_compilation()
    jax.jit(lambda x: x * 3 + 41)(jnp.float32(1)).block_until_ready()
    assert levels and levels[::2] == [3] * (len(levels) // 2) and levels[1::2] == [2] * (len(levels) // 2)


@pytest.mark.parametrize("level", ["0", "1", "3", None])
def test_who_asks_for_more_or_less_gets_it(levels, monkeypatch, level):
    if level is None:
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    else:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    compat.quieten_compilation()
    jax.jit(lambda x: x * 5 + 43)(jnp.float32(1)).block_until_ready()
    assert levels == []


def test_collectives_are_hidden_on_several_gpus_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    gpu, cpu = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")
    assert [len(compat.hides_collectives(devices)) for devices in ([gpu, gpu], [gpu], [cpu, cpu])] == [1, 0, 0]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false")
    assert compat.hides_collectives([gpu, gpu]) == {}
