"""Devices to compile for, none of which need exist: emulated CPUs, GPUs by their description, slices of TPUs.

| target | devices |
| --- | --- |
| cpu | this machine's CPU, as many times as are asked for |
| h100, h200, h800 | GPUs of compute capability 9.0, eight per host; need the CUDA plugin of jax, and no driver |
| v5p:4x4x8, v6e:16x16, … | a TPU slice of that shape; needs the wheel libtpu |

The process that compiles must be started with the variables of `environment`, since they count only before JAX starts.
"""

import math
import os

import jax

from deepseek_jax.compat import gpu_topology, has_plugin, tpu_topology
from deepseek_jax.errors import UserError

CPU = "cpu"
HOPPER = {"h100": 80, "h200": 141, "h800": 80}  # GB of memory
GPUS_PER_HOST = 8
# The program is not run: LLVM need not improve it, and its order is the one that needs least memory, as on an
# accelerator, not the one that keeps most of a CPU's cores busy (which takes several times as much).
UNRUN = ("--xla_backend_optimization_level=0", "--xla_cpu_enable_concurrency_optimized_scheduler=false")


def environment(target: str, n_devices: int) -> dict[str, str]:
    """Returns the variables of a process that compiles for so many devices.

    Raises UserError for an unknown target, one whose wheel is missing, or another number of devices.
    """
    variables, given = {"JAX_PLATFORMS": "cpu"}, os.environ.get("XLA_FLAGS", "")
    if target == CPU:
        more = [f"--xla_force_host_platform_device_count={n_devices}", *(flag for flag in UNRUN if flag not in given)]
        return variables | {"XLA_FLAGS": " ".join([given, *more])}
    if target in HOPPER:
        _check_wheel(target, "xla_cuda", "jax-cuda13-plugin", "gpu")
        return variables | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": f"{given} --xla_gpu_autotune_level=0"}
    name, colon, shape = target.partition(":")
    sizes = shape.split("x")
    if not (name and colon and all(size.isdecimal() for size in sizes)):
        raise UserError(
            f"--target={target}: no such target. Choose cpu, one of {', '.join(HOPPER)}, or a TPU slice by its shape, "
            "like v5p:8x16x16."
        )
    if math.prod(map(int, sizes)) != n_devices:
        raise UserError(
            f"--target={target} has {math.prod(map(int, sizes)):,} devices, the mesh {n_devices:,}. Choose a shape "
            f"of {n_devices:,} devices, or another config.mesh."
        )
    _check_wheel(target, "libtpu", "libtpu", "tpu")
    # The compiler looks for a TPU machine's metadata and locks its library unless these say otherwise.
    hosts = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return variables | hosts


def _check_wheel(target: str, plugin: str, wheel: str, extra: str) -> None:
    if not has_plugin(plugin):
        raise UserError(
            f"--target={target}: the wheel {wheel} is not installed. Run pip install 'jax[{extra}]' with this "
            "version of jax (no such device is needed), or compile for --target=cpu."
        )


def target_devices(target: str, n_devices: int) -> list[jax.Device]:
    """Returns the devices of a target, in a process started with the variables of `environment`.

    Raises UserError if the compiler does not know the target.
    """
    if target == CPU:
        return jax.devices()
    try:
        if target not in HOPPER:
            return tpu_topology(target)
        hosts = -(-n_devices // GPUS_PER_HOST)
        return gpu_topology(target, HOPPER[target], (1, hosts, min(n_devices, GPUS_PER_HOST)))[:n_devices]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--target={target}: this version of jax cannot compile for it ({(str(error).splitlines() or [''])[0]}). "
            "Choose another shape, or --target=cpu."
        ) from error
