"""Compiles the TPU kernels for chips that this machine does not have, and prints what the compiler says of each.

    python tests/pallas_kernels/compile_for_tpu.py

Needs the wheel of .ci/ahead_of_time_tpu.txt. One line of JSON per kernel and chip: its name and the number of kernels
in the program. To be run in a process of its own: the variables count only before JAX starts.
"""

import functools
import json
import os

# The compiler looks for a TPU machine's metadata and locks its library unless these say otherwise.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import mosaic_tpu
from pallas_kernels.fp8_matmul import tpu as matmul
from pallas_kernels.grouped_matmul import Groups, Scaled
from pallas_kernels.grouped_matmul import tpu as grouped
from pallas_kernels.quantize import tpu as quantiser

SLICES = ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
BF16, F32, E4M3, BLOCKS, ROWS = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, (128, 128), (1, 128)
# V3's layers at 4,096 tokens, a single token, and sizes that no tile divides.
MATMULS = [
    (4096, 2112, 7168, BLOCKS, BF16),
    (1, 7168, 1536, BLOCKS, F32),
    (600, 520, 1408, ROWS, BF16),
    (7168, 2048, 4096, ROWS, F32),
]
GROUPED = [(32, 8192, 7168, 2048), (3, 896, 128, 384)]  # groups, rows, D, F


def calls(native: bool) -> dict:
    """Every kernel by name, with the shapes and dtypes of its operands."""
    found = {}
    for m, n, k, w_block, out_dtype in MATMULS:
        blocks = k // 128
        w_scale = (blocks, n) if w_block == ROWS else (-(-n // 128), blocks)
        operands = (((m, k), E4M3), ((blocks, m), F32), ((n, k), E4M3), (w_scale, F32))
        call = functools.partial(matmul.fp8_matmul, w_block=w_block, out_dtype=out_dtype, native=native)
        found[f"fp8_matmul {m}x{n}x{k} {w_block[0]} {jnp.dtype(out_dtype).name}"] = call, operands
    found["fp8_matmul added to float32"] = functools.partial(add, native), (*operands, ((m, n), F32))
    for dtype, scale in ((BF16, "fp32"), (F32, "ue8m0")):
        form, options = f"{jnp.dtype(dtype).name} {scale}", {"scale": scale}
        found[f"quantize {form}"] = functools.partial(quantiser.quantize, **options), (((4096, 7168), dtype),)
        weights = (((16, 7168, 2048), dtype),)
        found[f"quantize_squares {form}"] = functools.partial(quantiser.quantize_squares, **options), weights
        both, factor = ((4096, 2 * 2048), dtype), ((4096,), F32)
        found[f"quantize_swiglu {form}"] = functools.partial(swiglu, **options), (both, factor)
    return found | {
        f"{name} {sizes}": call for sizes in GROUPED for name, call in grouped_calls(native, *sizes).items()
    }


def grouped_calls(native: bool, x: int, a: int, d: int, f: int) -> dict:
    """Every grouped kernel, as above, for `x` groups of `a` rows together."""
    blocks, columns, count = d // 128, f // 128, ((x,), jnp.int32)
    fp8 = (((a, d), E4M3), ((blocks, a), F32), ((x, f, d), E4M3), ((x, columns, blocks), F32), count)
    by_rows = (((d, a), E4M3), ((a // 128, d), F32), ((f, a), E4M3), ((a // 128, f), F32), count)
    weights, both = ((x, d, f), BF16), (((a, d), BF16), ((a, f), BF16))
    found = {
        "grouped_matmul": (grouped.grouped_matmul, (both[0], weights, count)),
        "transposed": (functools.partial(grouped.grouped_matmul, transposed=True), (both[1], weights, count)),
        "gradient": (grouped.grouped_weight_gradient, (*both, count)),
        "fp8": (functools.partial(grouped.grouped_fp8_matmul, native=native), fp8),
        "fp8 gradient": (functools.partial(grouped.grouped_fp8_weight_gradient, native=native), by_rows),
    }
    return {name: (of_arrays(call), operands) for name, (call, operands) in found.items()}


def of_arrays(call):
    """`call` of a grouped kernel as a function of its arrays: in FP8 these are codes and scales of both operands."""

    def of(*arrays):
        *operands, count = arrays
        if len(operands) == 2:
            return call(*operands, Groups(count))
        return call(Scaled(*operands[:2]), Scaled(*operands[2:]), Groups(count, align=128))

    return of


def swiglu(gate_and_up, factor, scale):
    """Of an expert's gate and up, side by side."""
    return quantiser.quantize_swiglu(gate_and_up, None, factor, scale=scale)


def add(native: bool, x, x_scale, w, w_scale, total):
    """A weight gradient that is added to those before it."""
    return matmul.fp8_matmul(x, x_scale, w, w_scale, w_block=ROWS, out_dtype=F32, add_to=total, native=native)


def main() -> None:
    """Compiles every call for every chip."""
    for name in SLICES:
        device = topologies.get_topology_desc(name, platform="tpu").devices[0]
        sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
        native = device.device_kind in mosaic_tpu.TAKE_E4M3
        for call, (function, operands) in calls(native).items():
            arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
            text = jax.jit(function).lower(*arguments).compile().as_text()
            facts = {
                "call": call,
                "chip": device.device_kind,
                "native": native,
                "kernels": text.count("tpu_custom_call"),
            }
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
