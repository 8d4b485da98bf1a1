"""Before jax is imported: the CPU as eight devices, and a cache of compiled programs that makes reruns fast."""

import contextlib
import ctypes
import gc
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

DEVICES = 8
# Files of long tests begin first, so that no process is left alone with one at the end.
LONG = ("test_notebooks.py", "train/test_run.py", "train/test_pipelined.py", "train/test_step.py")
LONG += ("train/test_family_steps.py", "plan/test_suggest.py", "parallel/test_processes.py", "plan/test_compile.py")
LONG += ("test_fine_tuning.py", "models/test_families.py", "train/test_fp8_steps.py", "convert/test_golden.py")
LONG += ("train/test_context_steps.py", "models/test_v4.py", "rl/test_rl_verb.py", "faults/test_runs.py")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that a test starts inherit the flags and may append another number of devices: the last one counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
        "--xla_backend_optimization_level=0",  # tests compile much and compute little
        "--xla_cpu_parallel_codegen_split_count=1",  # the other core has tests of its own
        # on a busy machine emulated devices wait long for one another: XLA would end the process after 40 s
        "--xla_cpu_collective_call_terminate_timeout_seconds=400",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=200",
        # the older code generator, which newer versions have dropped, compiles twice as fast
        "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else "",
    ]
).strip()

# Under nohup, or in the background of a script, these are ignored, here and in every process that a test starts.
for _number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(_number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

_cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_home / "deepseek_jax" / "test_programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # programs without the lines of Python they come from

# Compilers ask for memory again and again. glibc keeps up to 256 MB, instead of giving back at once what is free; what
# a test starts does as it does for users, whose memory is measured.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt
if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for _parameter, _mb in ((TRIM_THRESHOLD, 256), (TOP_PAD, 16), (MMAP_THRESHOLD, 32)):
            ctypes.CDLL("libc.so.6").mallopt(_parameter, _mb << 20)

# Tracing makes many small objects that live on: Python's usual 700 between two collections cost a seventh of the suite.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_finish() -> None:
    """What the modules hold is never garbage."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of `LONG` first, in its order."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.as_posix().rpartition("/tests/")[2], len(LONG)))


@pytest.fixture(scope="session")
def filled():
    """A function that makes a module's (definition, weights, router biases) with random numbers, without compiling."""
    import jax
    import numpy as np
    from flax import nnx

    from deepseek_jax.layers.base import shapes_alone, split

    def fill(build, std: float = 0.2, seed: int = 0):
        with shapes_alone():
            definition, *trees = split(nnx.eval_shape(build))
        rng = np.random.default_rng(seed)

        def numbers(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
            mean = 1.0 if path[-1].key == "gain" else 0.0
            return jax.device_put(np.asarray(mean + std * rng.normal(size=x.shape), x.dtype))  # no program converts

        return definition, *jax.tree_util.tree_map_with_path(numbers, trees)

    return fill


@pytest.fixture(scope="session")
def begun():
    """A function that makes a trainer's first state with random weights, for which no initialiser is compiled."""
    import jax
    import numpy as np

    def begin(trainer, seed: int = 0, std: float = 0.1) -> dict:
        rng = np.random.default_rng(seed)

        def numbers(path: tuple, x: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = 1.0 if path[-1].key == "gain" else 0.0
            return np.asarray(mean + std * rng.normal(size=x.shape), x.dtype)

        weights = (trainer.stored[name] for name in ("params", "router_bias"))
        return trainer.init(0, *(jax.tree_util.tree_map_with_path(numbers, tree) for tree in weights))

    return begin


@pytest.fixture(scope="module")
def any_load():
    """Exchanges have buffers for any load alone, where they would choose among three sizes: a third of the programs.

    The choice is the subject of `parallel/test_alltoall.py`, `train/test_step.py` and `train/test_pipelined.py`.
    """
    import math

    from deepseek_jax.parallel import alltoall

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alltoall, "HEADROOM", (math.inf,) * len(alltoall.HEADROOM))
        yield


@pytest.fixture(scope="session")
def tiny_sizes():
    """The `model` part of a config: V3 with every mechanism at widths of one digit or two."""
    from deepseek_jax.configs import tiny_v3

    m = tiny_v3.get_config().model
    m.update(vocab_size=64, d_model=32, n_layers=3, dense_width=48, n_heads=2, q_rank=16, kv_rank=16)
    m.update(nope_width=8, rope_width=8, value_width=8)
    m.update(n_experts=8, expert_width=16, top_k=2, n_groups=2, top_groups=1)
    return m
