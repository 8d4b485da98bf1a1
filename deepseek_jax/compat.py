"""What depends on the version of JAX or on where a run was started; everything else is the same on jax 0.10 to 0.12."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax


def start_processes() -> None:
    """Joins the other processes of a run on a cluster that JAX knows (SLURM, TPU pods, Kubernetes, Open MPI).

    A process that was started alone stays alone.
    """
    if jax.distributed.is_initialized():
        return
    clusters = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
    if any(int(os.environ.get(name) or 1) > 1 for name in clusters) or os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize()


def keep_freed_memory() -> None:
    """On a CPU, keeps the memory of one step's temporaries for the next instead of giving it back to the system.

    XLA allocates its temporaries anew each step; glibc maps and unmaps such blocks, and the page faults of that cost a
    quarter of a step.  To be called before JAX starts its threads (before any array or device is asked for).  Elsewhere
    than on Linux with glibc, and on a host with an accelerator, this does nothing.
    """
    accelerators = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio", "/dev/kfd")
    if not sys.platform.startswith("linux") or any(map(os.path.exists, accelerators)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 4097)


def quick_compile(function: Callable, **options: object) -> Callable:
    """`jax.jit` for a program that runs once, such as an initialiser: compiled in a third of the time, runs slower."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1}, **options)


def start_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` ("" is the user's cache), so that a second start need not compile."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepseek_jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", directory or str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
