"""Compiles the grouped kernels for a Hopper chip on a machine that has none, and prints what ptxas says of each.

    python tests/pallas_kernels/compile_grouped_for_hopper.py

As `compile_for_hopper.py`, whose requirements and output it shares.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from compile_for_hopper import CHIP, DUMP, found  # sets the environment: first
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.grouped_matmul import rows, weights

BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
SIZES = ((4, 32768, 7168, 4096), (32, 8192, 2048, 7168), (3, 1003, 128, 384))  # groups, rows, D, F


def calls(x: int, a: int, d: int, f: int) -> dict:
    """Every kernel with the shapes and dtypes of its operands, the counts apart."""
    blocks, columns, padded = d // 128, f // 128, -(-a // 128) * 128
    fp8 = (((a, d), E4M3), ((blocks, a), F32), ((x, f, d), E4M3), ((x, columns, blocks), F32))
    by_rows = (((d, padded), E4M3), ((padded // 128, d), F32), ((f, padded), E4M3), ((padded // 128, f), F32))
    both = ((a, d), BF16), ((a, f), BF16)
    return {
        "grouped_matmul": (rows.grouped_matmul, (both[0], ((x, d, f), BF16))),
        "transposed": (functools.partial(rows.grouped_matmul, transposed=True), (both[1], ((x, d, f), BF16))),
        "gradient": (functools.partial(weights.grouped_weight_gradient, out_dtype=BF16), both),
        "gradient in float32": (weights.grouped_weight_gradient, both),
        "fp8": (rows.grouped_fp8_matmul, fp8),
        "fp8 to float32": (functools.partial(rows.grouped_fp8_matmul, out_dtype=F32), fp8),
        "fp8 gradient": (weights.grouped_fp8_weight_gradient, by_rows),
    }


def main() -> None:
    """Compiles every kernel for every size."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=CHIP, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    for sizes in SIZES:
        for name, (function, operands) in calls(*sizes).items():
            shapes = (*operands, ((sizes[0],), jnp.int32))
            arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
            bf16_instructions = sum(code.read_text().count("HGMMA.") for code in DUMP.glob("*.sass_ctrl"))
            facts = {"call": [name, *sizes], "bf16_instructions": bf16_instructions, **found()}
            print(json.dumps(facts), flush=True)
    shutil.rmtree(DUMP)


if __name__ == "__main__":
    main()
