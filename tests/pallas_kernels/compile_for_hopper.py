"""Compiles the GPU kernels for a Hopper chip on a machine that has none, and prints what ptxas says of each.

    python tests/pallas_kernels/compile_for_hopper.py

Needs the wheels of .ci/ahead_of_time.txt, and no driver. One line of JSON per kernel: its shape, bytes spilled, shared
memory, FP8 tensor-core instructions. To be run in a process of its own: the variables count only before JAX starts.
"""

import functools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
DUMP = Path(tempfile.mkdtemp())
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.fp8_matmul import gpu as matmul  # noqa: E402
from pallas_kernels.quantize import gpu as quantise  # noqa: E402

# What the compiler must know of a chip of compute capability 9.0; the figures are an H100's.
CHIP = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 80000000000
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100"
"""

BF16, F32, BLOCKS, ROWS = jnp.bfloat16, jnp.float32, (128, 128), (1, 128)
# V3's layers at 4,096 tokens, a decoding batch, and sizes that must be filled up.
CALLS = [
    (4096, 2112, 7168, BLOCKS, BF16),
    (4096, 24576, 1536, BLOCKS, BF16),
    (4096, 7168, 16384, BLOCKS, BF16),
    (4096, 4096, 7168, BLOCKS, BF16),
    (256, 7168, 2048, BLOCKS, BF16),
    (128, 7168, 2048, BLOCKS, BF16),
    (64, 2112, 7168, BLOCKS, BF16),
    (64, 1024, 7168, ROWS, F32),
    (128, 576, 7168, ROWS, F32),
    (1, 7, 200, BLOCKS, F32),
    (4096, 7168, 2048, BLOCKS, F32),
    (7168, 2048, 4096, ROWS, F32),
    (4096, 2112, 4096, ROWS, BF16),
    (100, 2112, 4096, ROWS, BF16),
]


GRADIENT = (4096, 7168, 4096)
QUANTISED = [(BF16, "fp32"), (BF16, "ue8m0"), (F32, "fp32")]
SWIGLUS = [(BF16, "fp32", False), (BF16, "ue8m0", True), (F32, "fp32", True)]  # the last: a factor per row


def main() -> None:
    """Compiles every call of the tables."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=CHIP, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())

    def report(name, call, *operands):
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
        jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        print(json.dumps({"call": name, **found()}), flush=True)

    for m, n, k, w_block, out_dtype in CALLS:
        blocks = -(-k // 128)
        w_scale = (blocks, n) if w_block == ROWS else (-(-n // 128), blocks)
        operands = (((m, k), jnp.float8_e4m3fn), ((blocks, m), F32), ((n, k), jnp.float8_e4m3fn), (w_scale, F32))
        call = functools.partial(matmul.fp8_matmul, w_block=w_block, out_dtype=out_dtype)
        report(f"fp8_matmul {m}x{n}x{k} {w_block[0]} {jnp.dtype(out_dtype).name}", call, *operands)
    (m, n, k), blocks = GRADIENT, GRADIENT[2] // 128
    codes, scales = ((m, k), jnp.float8_e4m3fn), ((blocks, m), F32)
    operands = (codes, scales, ((n, k), jnp.float8_e4m3fn), ((blocks, n), F32), ((m, n), F32))
    report(f"fp8_matmul {m}x{n}x{k} 1 added to float32", add, *operands)
    for dtype, scale in QUANTISED:
        call = functools.partial(quantise.quantize, scale=scale)
        report(f"quantize {jnp.dtype(dtype).name} {scale}", call, ((4096, 7168), dtype))
    for dtype, scale, with_factor in SWIGLUS:
        both = ((4096, 2 * 2048), dtype)
        call = functools.partial(swiglu, scale)
        factors = (((4096,), F32),) if with_factor else ()
        report(f"quantize_swiglu {jnp.dtype(dtype).name} {scale}", call, both, *factors)
    shutil.rmtree(DUMP)


def add(x, x_scale, w, w_scale, total):
    """A weight gradient that is added to those before it."""
    return matmul.fp8_matmul(x, x_scale, w, w_scale, w_block=ROWS, out_dtype=F32, add_to=total)


def swiglu(scale, both, factor=None):
    """Gate and up of an expert, side by side."""
    return quantise.quantize_swiglu(both, None, factor, scale=scale)


def found() -> dict:
    """What the compiler left behind for the kernel compiled last; empties the folder (its logs are large)."""
    (report,) = DUMP.glob("*.ptxas")
    resources, code = (report.with_suffix(suffix) for suffix in (".resources.txt", ".sass_ctrl"))
    text = report.read_text()
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else None
    facts = {
        "spilled": int(re.search(r"(\d+) bytes spill stores", text).group(1)),
        "shared": int(shared.group(1)) if shared else None,
        "fp8_instructions": code.read_text().count("QGMMA."),
        "transposing_loads": len(re.findall(r"LDSM\.16\.MT88", code.read_text())),
        "serialised": "wgmma" in text and "serialized" in text,
    }
    for file in DUMP.iterdir():
        file.unlink()
    return facts


if __name__ == "__main__":
    main()
