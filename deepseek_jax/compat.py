"""What depends on the version of JAX or on where a run was started; everything else is the same on jax 0.10 to 0.12."""

import contextlib
import ctypes
import functools
import importlib.util
import math
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from deepseek_jax import cluster
from deepseek_jax.errors import PassingError, UserError
from deepseek_jax.paths import user_cache

# Between processes: the project's own watch (parallel/peers.py) comes first and can say what it found; JAX's, which
# waits for so much longer, ends the program silently.
LATER_S = 60
SHUTDOWN_TIMEOUT_S = 30
JOIN_S = 600  # until all processes have joined: their supervisors may wait five minutes before a start


def start_processes(heartbeat_s: float = 30) -> None:
    """Joins the other processes of a run; to be called before any array or device is asked for.

    Without a sign of life for `heartbeat_s` and a minute more, JAX ends them; `parallel.peers` does so before.

    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it outright; what is left out JAX looks
    up on a cluster that it knows. Without them a process joins the others of its SLURM step, of its Open MPI run, of
    its TPU slice or slices (where TPU_WORKER_HOSTNAMES, TPU_PROCESS_ADDRESSES or MEGASCALE_NUM_SLICES name them; on
    other TPU pods set JAX_NUM_PROCESSES) or of its indexed Kubernetes Job (this needs the package kubernetes). A
    process started alone stays alone, as does one with JAX_NUM_PROCESSES=1 and no coordinator.

    Raises UserError: the others cannot be found. Raises PassingError: they cannot be reached within `JOIN_S`.
    """
    if jax.distributed.is_initialized():
        return
    names = (cluster.ADDRESS, cluster.NUMBER, cluster.INDEX)
    try:
        found = cluster.place(os.environ)
        if found is None:
            return
        # JAX's preemption service would take SIGTERM for itself, and nobody asks it: the run has a handler of its own.
        jax.config.update("jax_enable_preemption_service", False)
        with _plain_ctrl_c():
            jax.distributed.initialize(
                **found.given(),
                initialization_timeout=JOIN_S,
                heartbeat_timeout_seconds=round(heartbeat_s) + LATER_S,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
            )
    except (ValueError, RuntimeError, LookupError, OSError) as error:
        told = [name for name in names if name in os.environ] + cluster.indications(os.environ)
        shown, reason = ", ".join(f"{name}={os.environ[name]}" for name in told), (str(error).splitlines() or [""])[0]
        if not isinstance(error, ValueError | LookupError):
            raise PassingError(
                f"{shown}: the other processes of the run could not be reached ({reason.rstrip('.')}). Start all of "
                "them within ten minutes of one another, as deepseek-jax supervise does after a loss."
            ) from error
        raise UserError(
            f"{shown}: the processes of the run could not be joined ({reason.rstrip('.')}). Set "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process (SLURM: start "
            "them with srun), or JAX_NUM_PROCESSES=1 alone for a run of one."
        ) from error


@contextlib.contextmanager
def _plain_ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C end the process while it waits for the others in native code, where Python's handler is not run."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread, which alone may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class ProcessStore:
    """Short texts by key that all processes of a run see; process 0 keeps them. Calls may raise or wait."""

    def __init__(self, client: Any):
        self._client = client

    def set(self, key: str, value: str) -> None:
        """Writes a text, over an older one."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str) -> str:
        """Returns a text, "" where there is none."""
        try:
            return self._client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return ""
            raise

    def meet(self, name: str, seconds: float) -> None:
        """Returns when all processes are here; a name serves once. Raises JaxRuntimeError after `seconds`."""
        self._client.wait_at_barrier(name, round(seconds * 1000))

    def under(self, folder: str) -> list[str]:
        """Returns all texts whose keys begin with `folder`, which ends in a slash."""
        return [value for _, value in self._client.key_value_dir_get(folder)]


def process_store() -> ProcessStore:
    """Returns the store of a run of several processes, joined before."""
    from jax._src import distributed  # has no public name

    return ProcessStore(distributed.global_state.client)


# Of each accelerator: its device files, the variable that hides it when empty or -1, and the start of the names of the
# jax plugins without one of which it cannot be used (libtpu is a module of its own).
ACCELERATORS = (
    (("/dev/nvidia0",), "CUDA_VISIBLE_DEVICES", "xla_cuda"),
    (("/dev/kfd",), "ROCR_VISIBLE_DEVICES", "xla_rocm"),
    (("/dev/accel0", "/dev/vfio"), "TPU_VISIBLE_CHIPS", "libtpu"),
)


def computes_on_cpu() -> bool:
    """Whether JAX's default device will be the CPU, from what is configured and installed; starts nothing in JAX.

    A host may have accelerators that a process does not use: JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES= or a plain `jax`
    without its plugin leave the work to the CPU.
    """
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]  # made at run time
    if platforms:
        return platforms.partition(",")[0] == "cpu"
    installed = _jax_plugins()
    return not any(
        any(map(os.path.exists, files))
        and os.environ.get(variable, "all") not in ("", "-1")
        and any(name.startswith(plugin) for name in installed)
        for files, variable, plugin in ACCELERATORS
    )


def _jax_plugins() -> list[str]:
    """The names of the installed modules through which JAX reaches an accelerator."""
    package = importlib.util.find_spec("jax_plugins")
    found = [module.name for module in pkgutil.iter_modules(package.submodule_search_locations)] if package else []
    return [*found, *(["libtpu"] if importlib.util.find_spec("libtpu") else [])]


def keep_freed_memory() -> bool:
    """Where the CPU computes, keeps the memory of one step's temporaries for the next instead of giving it back.

    XLA allocates its temporaries anew each step; glibc maps and unmaps such blocks, and the page faults of that are a
    third of a step's CPU time. To be called before JAX starts its threads (before any array or device is asked for).
    Where an accelerator computes (`computes_on_cpu`), or elsewhere than on Linux with glibc, this does nothing.

    Returns whether the memory is kept.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None or not computes_on_cpu():
        return False
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    settings = ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 4097))
    return all(mallopt(*setting) == 1 for setting in settings)


@functools.cache
def quieten_compilation() -> None:
    """While XLA compiles on a CPU, lets through its fatal messages only.

    After two minutes XLA logs "Very slow compile? If you want to file a bug", as an error and with no option to turn
    it off; on a slow machine nothing is wrong. What does go wrong in a compilation is raised as an exception as well.
    Errors at any other time are logged as before. Does nothing if TF_CPP_MIN_LOG_LEVEL asks for more than errors.
    """
    errors, fatal = 2, 3
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != str(errors):
        return
    from jaxlib import utils

    def begins(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/compile_requests_use_cache":
            utils.absl_set_min_log_level(fatal)

    def ends(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            utils.absl_set_min_log_level(errors)

    jax.monitoring.register_event_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)


class Compilation:
    """What the main thread has compiled, as JAX reports it; see `compilation`.

    Attributes:
        began_s: when the compilation under way began (time.monotonic), None between them.
        ended_s: when the last one ended, 0.0 before there was one.
        seconds: that those before it took together.
    """

    def __init__(self) -> None:
        self.began_s: float | None = None
        self.ended_s = self.seconds = 0.0

    def begins(self, event: str, value: float, **_: object) -> None:
        """Hears of an event of JAX that has a value: of a compilation's beginning, with or without a cache."""
        if event == "/jax/core/compile/backend_compile_duration" and _is_main_thread():
            self.began_s = time.monotonic()

    def ends(self, event: str, duration_secs: float, **_: object) -> None:
        """Hears of an event of JAX that has a duration."""
        if event == "/jax/core/compile/backend_compile_duration" and _is_main_thread():
            # In this order, for another thread looks at them meanwhile.
            self.ended_s, self.seconds = time.monotonic(), self.seconds + duration_secs
            self.began_s = None


@functools.cache
def compilation() -> Compilation:
    """Returns what is known of compilations from now on; the same object at each call."""
    known = Compilation()
    jax.monitoring.register_scalar_listener(known.begins)
    jax.monitoring.register_event_duration_secs_listener(known.ends)
    return known


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def quick_compile(function: Callable, **options: Any) -> Callable:
    """`jax.jit` for a program that runs once, such as an initialiser: compiled in a third of the time, runs slower.

    A level that `XLA_FLAGS` names stays as it is.
    """
    if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
        return jax.jit(function, **options)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 1}, **options)


def hides_collectives(devices: Iterable[jax.Device]) -> dict[str, bool]:
    """Options of `jax.jit` for a program on these devices, with which its collectives run beside other operations.

    On GPUs XLA then orders operations so that collectives begin early and are waited for late; TPUs do so anyway. A
    choice in `XLA_FLAGS` stays as it is.
    """
    option, devices = "xla_gpu_enable_latency_hiding_scheduler", [*devices]
    is_open = option not in os.environ.get("XLA_FLAGS", "")
    return {option: True} if is_open and len(devices) > 1 and devices[0].platform == "gpu" else {}


def start_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` ("" is the user's cache), so that a second start need not compile."""
    quieten_compilation()
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", directory or str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held so far (resident set size); None where it is unknown."""
    status = Path("/proc/self/status")
    if status.is_file():  # elsewhere the parent's may be counted as well
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bytes() -> int | None:
    """The memory of the first device, or of the machine where that is a CPU; None where it is unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        return math.prod(map(os.sysconf, names)) if known else None
    return (device.memory_stats() or {}).get("bytes_limit")


def scan_inputs(params: dict) -> tuple[int, int]:
    """Returns how many of the inputs of a traced `scan` are constants and how many its carry; the rest are rows.

    `params` are those of the equation (`jax.extend.core.JaxprEqn`).
    """
    if "num_consts" in params:  # jax 0.10
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def cudnn_causal_attention(q_BTHQ: jax.Array, k_BTHQ: jax.Array, v_BTHU: jax.Array, scale: float) -> jax.Array:
    """Causal attention by cuDNN: o_BTHU. `jax.nn.dot_product_attention` needs values as wide as queries.

    Raises RuntimeError, NotImplementedError or ValueError for what cuDNN does not support.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention(q_BTHQ, k_BTHQ, v_BTHU, scale=scale, mask_type=cudnn.MaskType.CAUSAL)


def has_plugin(name: str) -> bool:
    """Whether a plugin of jax is installed whose name begins so: "xla_cuda" (GPUs), "libtpu" (TPUs)."""
    return any(module.startswith(name) for module in _jax_plugins())


# What the compiler must know of a GPU of compute capability 9.0.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""


def gpu_topology(name: str, memory_gb: int, shape: tuple[int, int, int]) -> list[jax.Device]:
    """Returns Hopper GPUs to compile for, none of which need be here: slices x hosts x GPUs per host."""
    from jax.experimental import topologies

    known = HOPPER.format(memory=memory_gb * 10**9, name=name.upper())
    description = topologies.get_topology_desc(name, "cuda", target_config=known, topology="x".join(map(str, shape)))
    return list(description.devices)


def tpu_topology(name: str) -> list[jax.Device]:
    """Returns the chips of a TPU slice to compile for, such as "v5p:2x2x2", none of which need be here."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(name, platform="tpu").devices)
