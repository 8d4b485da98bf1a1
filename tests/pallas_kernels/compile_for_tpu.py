"""Compiles the TPU kernels for chips that this machine does not have, and prints what the compiler says of each.

    python tests/pallas_kernels/compile_for_tpu.py [products] [SLICE ...]

Needs the wheel of .ci/ahead_of_time_tpu.txt. One line of JSON per kernel and chip: its name and the number of kernels
in the program. With `products` only those that a chip with products of E4M3 computes in another way. To be run in a
process of its own: the variables count only before JAX starts.
"""

import functools
import json
import os
import sys

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
from pallas_kernels.mla_attention import tpu_backward, tpu_forward
from pallas_kernels.mla_decode import tpu as mla_decode
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
# B, T, S, H, Z, widths of keys and values, dtype, whether the position of the first query is known later
ATTENTION = [
    (2, 4096, 4096, 128, 128, (192, 128), BF16, False),
    (1, 600, 131072, 16, 2, (128, 128), BF16, True),
    (1, 300, 300, 2, 1, (256, 256), F32, False),
]
# B, T, H, C, pages of a sequence, parts, dtype
DECODE = [(128, 1, 128, 512, 128, 2, BF16), (4, 4, 128, 512, 2048, 1, BF16), (3, 2, 16, 256, 3, 1, F32)]


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
    found |= attention_calls() | decode_calls()
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


def attention_calls() -> dict:
    """Latent attention of V3 with documents, and grouped heads of which the first query's position is known later."""
    found = {}
    for b, t, s, h, z, widths, dtype, later in ATTENTION:
        matrices = tuple((shape, dtype) for shape in ((b, t, h, widths[0]), *((b, s, z, width) for width in widths)))
        rest = ((), jnp.int32) if later else (((b, t), jnp.int32), ((b, s), jnp.int32))
        place = (rest,) if later else rest
        rows, do = ((b, h, t), F32), ((b, t, h, widths[1]), dtype)
        name = f"{t}x{s} {h}/{z} heads {jnp.dtype(dtype).name}"
        found[f"attention {name}"] = of_place(tpu_forward.forward, later), (*matrices, *place)
        backward = of_place(tpu_backward.backward, later)
        found[f"attention backward {name}"] = backward, (*matrices, *place, rows, do, rows)
    return found


def of_place(call, later: bool):
    """`call` of an attention kernel as a function of its arrays: with an offset, or with documents."""

    def with_offset(q, k, v, offset, *saved):
        return call(q, k, v, None, offset, *saved, scale=0.1)

    def with_documents(q, k, v, of_queries, of_keys, *saved):
        return call(q, k, v, (of_queries, of_keys), 0, *saved, scale=0.1)

    return with_offset if later else with_documents


def decode_calls() -> dict:
    """V3's decode, of one token per sequence in two parts, and of four; and small sizes."""
    found = {}
    for b, t, h, c, pages, n_splits, dtype in DECODE:
        pool = tuple(((b * pages, 64, width), dtype) for width in (c, 64))
        queries = tuple(((b, t, h, width), dtype) for width in (c, 64))
        call = functools.partial(paged, n_splits=n_splits)
        found[f"decode {b}x{t}x{h} {pages} pages {jnp.dtype(dtype).name}"] = (
            call, (*queries, *pool, ((b, pages), jnp.int32), ((b,), jnp.int32))
        )  # fmt: skip
    return found


def paged(q, q_rope, c, rope, table, lengths, n_splits: int):
    return mla_decode.decode(q, q_rope, (c, rope), table, lengths, scale=0.1, n_splits=n_splits)


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


def main(words: list[str]) -> None:
    """Compiles every call for the chips of these slices, or for every chip."""
    for name in [word for word in words if word in SLICES] or SLICES:
        device = topologies.get_topology_desc(name, platform="tpu").devices[0]
        sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
        native = device.device_kind in mosaic_tpu.TAKE_E4M3
        for call, (function, operands) in calls(native).items():
            if "products" in words and not call.startswith("fp8"):
                continue
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
    main(sys.argv[1:])
