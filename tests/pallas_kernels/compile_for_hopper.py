"""Compiles the GPU kernels for a Hopper chip on a machine that has none, and prints what ptxas says of each.

    python tests/pallas_kernels/compile_for_hopper.py

Needs the wheels of `pip install "deepseek_jax[gpu]"` and nvidia-cuda-nvdisasm, and no driver. One line of JSON per
kernel: registers, bytes spilled, shared memory, FP8 tensor-core instructions. Run in a process of its own: the
variables below count only before JAX starts.
"""

import glob
import json
import os
import re
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
DUMP = os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from pallas_kernels.fp8_matmul import gpu, tiles  # noqa: E402

# What the compiler must know of an H100 or H200; both are compute capability 9.0.
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
