"""What differs between JAX 0.10, 0.11 and 0.12 in Pallas Mosaic GPU, and what it can only do by inlining PTX."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgpu


def can_interpret() -> bool:
    """Whether this JAX runs Mosaic GPU kernels on a CPU, tensor cores and clusters included (0.11 and later)."""
    return hasattr(plgpu, "InterpretGPUParams")


def load(ref, layout):
    """Returns what `ref` holds in registers, in `layout`."""
    try:
        return plgpu.load(ref, layout=layout, optimized=False)
    except TypeError:  # JAX 0.10 takes an index as well
        return plgpu.load(ref, (), layout=layout, optimized=False)


def transpose(ref):
    """Returns `ref` with its two axes exchanged; moves nothing."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def named_barrier(instruction: str, index: jax.Array, n_threads: int) -> None:
    """`bar.sync` or `bar.arrive` on the hardware's barrier number `index`, in which `n_threads` threads take part.

    Numbers below 8 belong to Mosaic GPU.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()),))
    def emit(_, number):
        void, operands = mgpu.ir.Type.parse("!llvm.void"), [number.registers.item()]
        mgpu.llvm.inline_asm(void, operands, f"{instruction} $0, {n_threads};", "r", has_side_effects=True)

    emit(index)


def check_hopper(name: str) -> int:
    """Returns the number of processors of the default device; raises ValueError unless it is a Hopper GPU."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if jax.default_backend() != "gpu" or capability != "9.0":
        raise ValueError(
            f"implementation={name!r} on {device.device_kind}: needs a Hopper GPU (compute capability 9.0). Use "
            "implementation='reference'."
        )
    return device.core_count
