"""Compiles the GPU kernels for a Hopper chip on a machine that has none, and prints what ptxas says of each.

    python tests/pallas_kernels/compile_for_hopper.py [once | again] [part …]

Needs the wheels of .ci/ahead_of_time.txt, and no driver. One line of JSON per kernel: its name, bytes spilled, shared
memory, tensor-core instructions. The parts are the names in PARTS, all of them unless some are given; with `once` the
calls of `OTHER_SIZES` are left out, with `again` all others. To be run in a process of its own: the variables count
only before JAX starts.
"""

import fnmatch
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver
# To standard output, and no more than is read: the module before each of its passes takes a quarter of the time.
os.environ |= dict.fromkeys([f"MOSAIC_GPU_DUMP_{what}" for what in ("PTXAS", "RESOURCES", "SASS_CTRL")], "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.coded_matmul import gpu as coded
from pallas_kernels.coded_matmul import tiles as coded_tiles
from pallas_kernels.fp8_matmul import gpu as matmul
from pallas_kernels.fp8_matmul import tiles
from pallas_kernels.grouped_matmul import Groups, Scaled, pipeline, rows, weights
from pallas_kernels.grouped_matmul import tiles as grouped_tiles
from pallas_kernels.indexer import gpu as indexer
from pallas_kernels.mla_attention import gpu_backward, gpu_forward
from pallas_kernels.mla_decode import gpu as latent_decode
from pallas_kernels.mla_decode import gpu_few, gpu_load, gpu_plan, work
from pallas_kernels.quantize import gpu as quantise
from pallas_kernels.sparse_mla import gpu as chosen_rows
from pallas_kernels.sparse_mla import gpu_mean
from pallas_kernels.sparse_mla import hopper as sparse_mla
from pallas_kernels.token_experts import gpu as token_experts
from pallas_kernels.token_experts import gpu_codes as token_experts_in_codes

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

BF16, F32, E4M3, BLOCKS, ROWS = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, (128, 128), (1, 128)
# V3's layers at 4,096 tokens, a decoding batch, and sizes that must be filled up.
PRODUCTS = [
    (4096, 32768, 512, BLOCKS, BF16),
    (256, 7168, 2048, BLOCKS, BF16),
    (128, 7168, 2048, BLOCKS, BF16),
    (64, 2112, 7168, BLOCKS, BF16),
    (64, 1024, 7168, ROWS, F32),
    (128, 576, 7168, ROWS, F32),
    (1, 7, 200, BLOCKS, F32),
    (4096, 7168, 2048, BLOCKS, F32),
    (4096, 2112, 4096, ROWS, BF16),
    (100, 2112, 4096, ROWS, BF16),
]
TILED = (4096, 2112, 7168), (7168, 2048, 4096)  # with each of the tiles, by operation
GRADIENT = (4096, 7168, 4096)
QUANTISED = [(BF16, "fp32"), (BF16, "ue8m0"), (F32, "fp32")]
SWIGLUS = [(BF16, "fp32", False), (BF16, "ue8m0", True), (F32, "fp32", True)]  # the last: a factor per row
# Tokens, heads of queries and of keys, their width, that of values, with documents or not: V3's, V1's 67B model, a tiny
# one. With documents a kernel has all that it has without.
V3_ATTENDED = (4096, 128, 128, 192, 128)
ATTENDED = [(*V3_ATTENDED, False), (*V3_ATTENDED, True), (4096, 64, 8, 128, 128, False), (1000, 2, 1, 64, 64, True)]
# Sequences, tokens of each, heads, width of latents, parts, CTAs of a cluster: V3, V2-Lite, speculation, small.
DECODED = [(128, 1, 128, 512, 1, 2), (64, 1, 16, 512, 2, 1), (4, 2, 128, 512, 16, 2), (2, 4, 16, 256, 1, 1)]
# Groups, rows, N, K, matrices: V2-Lite's experts at batch 1, an output projection in parts, queries, prompts.
CODED = [(6, 6, 1408, 2048, 64), (1, 1, 2048, 2048, 1), (1, 64, 3072, 2048, 1), (64, 6144, 1408, 2048, 64)]
# The same with gate and up at once: V2-Lite's experts at batch 16 and 256.
GATED = [(64, 96, 1408, 2048, 64), (64, 1536, 1408, 2048, 64)]
# Sequences, queries of each, heads, keys: V3.2's prefill, its decoding, a few heads.
INDEXED = [(1, 4096, 64, 32768), (16, 1, 64, 8192), (2, 100, 8, 1000)]
# Sequences, queries of each, heads, width of latents, rows of each, parts: V3.2's prefill, its decoding, small.
CHOSEN = [(1, 4096, 128, 512, 2048, 1), (1, 1, 128, 512, 2048, 16), (2, 3, 16, 256, 64, 1)]
# Calls of kernels that another call compiles with the same branches, for other sizes.
OTHER_SIZES = ("fp8_matmul 4096x32768x512 *", "fp8_matmul 256x*", "fp8_matmul 128x*", "fp8_matmul 100x*")
OTHER_SIZES += ("quantize_squares float32 *", "quantize_swiglu bfloat16 fp32", "grouped * 3x1003x128x384")
OTHER_SIZES += ("decode 4x2x128x512 16*", "decode few 1x2x8", "together 1x2x8", "together 64x1x16", "codes 1x1x*")
OTHER_SIZES += ("indexer 2x100x8x1000", "token_experts 1x8x*", "token_experts 2x6x*", "codes of experts 6x*")
OTHER_SIZES += ("attention 4096x128x128x192x128", "attention of * 4096x128x128x192x128")
GROUPED = ((32, 8192, 2048, 7168), (3, 1003, 128, 384))  # groups, rows, D, F


def product(m, n, k, w_block, out_dtype, choice=None):
    """A call of fp8_matmul with the shapes and dtypes of its operands."""
    blocks = -(-k // 128)
    w_scale = (blocks, n) if w_block == ROWS else (-(-n // 128), blocks)
    operands = (((m, k), E4M3), ((blocks, m), F32), ((n, k), E4M3), (w_scale, F32))
    return functools.partial(matmul.fp8_matmul, w_block=w_block, out_dtype=out_dtype, tiles=choice), operands


def add(x, x_scale, w, w_scale, total):
    """A weight gradient that is added to those before it."""
    return matmul.fp8_matmul(x, x_scale, w, w_scale, w_block=ROWS, out_dtype=F32, add_to=total)


def swiglu(scale, both, factor=None):
    """Gate and up of an expert, side by side."""
    return quantise.quantize_swiglu(both, None, factor, scale=scale)


def dense() -> dict:
    """fp8_matmul, with every tiles that it may choose, and quantisation."""
    calls = {}
    for m, n, k, w_block, out_dtype in PRODUCTS:
        calls[f"fp8_matmul {m}x{n}x{k} {w_block[0]} {jnp.dtype(out_dtype).name}"] = product(m, n, k, w_block, out_dtype)
    for (operation, variants), shape in zip(tiles.VARIANTS.items(), TILED, strict=True):
        options = (BLOCKS, BF16) if operation == tiles.FORWARD else (ROWS, F32)
        for name, choice in variants.items():
            calls[f"{operation} {name}"] = product(*shape, *options, choice)
    m, n, _ = GRADIENT
    calls["fp8_matmul added to float32"] = add, (*product(*GRADIENT, ROWS, F32)[1], ((m, n), F32))
    for dtype, scale in QUANTISED:
        call = functools.partial(quantise.quantize, scale=scale)
        calls[f"quantize {jnp.dtype(dtype).name} {scale}"] = call, (((4096, 7168), dtype),)
        call = functools.partial(quantise.quantize_squares, scale=scale)
        calls[f"quantize_squares {jnp.dtype(dtype).name} {scale}"] = call, (((16, 7168, 2048), dtype),)
    for dtype, scale, with_factor in SWIGLUS:
        factors = (((4096,), F32),) if with_factor else ()
        call = functools.partial(swiglu, scale)
        calls[f"quantize_swiglu {jnp.dtype(dtype).name} {scale}"] = call, (((4096, 2 * 2048), dtype), *factors)
    return calls


FEW = "a few rows per group, with a layer's part of the weights of all layers"


def of_arrays(call):
    """`call` of a grouped kernel as a function of its arrays: in FP8 these are codes and scales of both operands."""

    def of(*arrays):
        *operands, count = arrays
        if call is FEW:
            return rows.grouped_matmul(*operands, Groups(count, matrix_X=count))
        if len(operands) == 2:
            return call(*operands, Groups(count))
        return call(Scaled(*operands[:2]), Scaled(*operands[2:]), Groups(count, align=128))

    return of


def grouped() -> dict:
    """The grouped kernels."""
    calls = {}
    for x, a, d, f in GROUPED:
        blocks, columns, padded = d // 128, f // 128, -(-a // 128) * 128
        fp8 = (((a, d), E4M3), ((blocks, a), F32), ((x, f, d), E4M3), ((x, columns, blocks), F32))
        by_rows = (((d, padded), E4M3), ((padded // 128, d), F32), ((f, padded), E4M3), ((padded // 128, f), F32))
        both = ((a, d), BF16), ((a, f), BF16)
        found = {
            "bf16": (rows.grouped_matmul, (both[0], ((x, d, f), BF16))),
            "bf16 transposed": (functools.partial(rows.grouped_matmul, transposed=True), (both[1], ((x, d, f), BF16))),
            "bf16 gradient": (functools.partial(weights.grouped_weight_gradient, out_dtype=BF16), both),
            "bf16 gradient in float32": (weights.grouped_weight_gradient, both),
            "fp8 to float32": (functools.partial(rows.grouped_fp8_matmul, out_dtype=F32), fp8),
            "fp8 gradient": (weights.grouped_fp8_weight_gradient, by_rows),
        }
        variants = grouped_tiles.VARIANTS[grouped_tiles.FP8] if a == GROUPED[0][1] else {}
        for name, choice in variants.items():
            found[f"fp8 {name}"] = functools.partial(rows.grouped_fp8_matmul, run=pipeline.Run(tiles=choice)), fp8
        for name, (call, operands) in found.items():
            calls[f"grouped {name} {x}x{a}x{d}x{f}"] = of_arrays(call), (*operands, ((x,), jnp.int32))
    (a, d), (n_layers, x), f = (96, 2048), (3, 64), 1408  # V2-Lite, 16 sequences
    few = (((a, d), BF16), ((n_layers * x, d, f), BF16), ((x,), jnp.int32))
    calls[f"grouped bf16 few {x}x{a}x{d}x{f}"] = of_arrays(FEW), few
    return calls


def attend(call, q, k, v, *rest):
    """An attention kernel; documents come last."""
    n = 0 if call is gpu_forward.forward else 3
    return call(q, k, v, rest[n:] or None, 0, *rest[:n], scale=0.07)


def attention() -> dict:
    """Attention, forward and backward, without and with documents."""
    calls = {}
    for t, h, z, width, v_width, documents in ATTENDED:
        more = (((1, t), jnp.int32),) * 2 if documents else ()
        inputs = (((1, t, h, width), BF16), ((1, t, z, width), BF16), ((1, t, z, v_width), BF16))
        numbers = ((1, h, t), F32)
        later = (numbers, ((1, t, h, v_width), BF16), numbers)
        name = f"{t}x{h}x{z}x{width}x{v_width}{' documents' if documents else ''}"
        calls[f"attention {name}"] = functools.partial(attend, gpu_forward.forward), (*inputs, *more)
        for of_keys in (False, True):
            call = functools.partial(attend, functools.partial(gpu_backward.backward, of_keys=of_keys))
            calls[f"attention of {'keys' if of_keys else 'queries'} {name}"] = call, (*inputs, *later, *more)
    return calls


def decode() -> dict:
    """Latent decode over pages in 16 bits, and in FP8."""
    calls = {}

    def of_arrays(call, is_fp8, q_c, q_rope, table, items, *cache):
        return call(q_c, q_rope, gpu_load.views(*cache) if is_fp8 else cache, table, items)

    for b, t, h, width, n_splits, cluster in DECODED:
        options = {"n_heads": h, "n_tokens": t, "n_splits": n_splits, "scale": 0.07}
        rows, pages = -(-t * h // 64) * 64, 8 * b
        arrays = *[((b, rows, w), BF16) for w in (width, 64)], ((b, 8), jnp.int32), ((n_splits * b, 5), jnp.int32)
        caches = {"": [((pages, 64, w), BF16) for w in (width, 64)]}
        if width == 512 and cluster == 2:  # FP8 has a tuning of its own
            caches[" fp8"] = [((pages, 64, 656), jnp.uint8)]
        for name, cache in caches.items():
            tuning = gpu_plan.IN_FP8 if name else gpu_plan.Tuning(cluster=cluster)
            call = functools.partial(latent_decode.decode, **options, tuning=tuning)
            call = functools.partial(of_arrays, call, bool(name))
            calls[f"decode {b}x{t}x{h}x{width} {n_splits}{name}"] = call, (*arrays, *cache)
    return calls


def of_one_token() -> dict:
    """The experts of one or two tokens: V2-Lite's and V3's, in bfloat16, and of one in FP8 codes."""
    calls = {}

    def in_codes(x, gate, up, down, *rest):
        return token_experts_in_codes.experts(x, *(Scaled(*w) for w in (gate, up, down)), *rest)

    for d, f, k in ((2048, 1408, 6), (7168, 2048, 8)):
        weights = ((64, d, f), BF16), ((64, d, f), BF16), ((64, f, d), BF16)
        for m in (1, 2):
            operands = ((m, d), BF16), *weights, ((m, k), jnp.int32), ((m, k), F32)
            calls[f"token_experts {m}x{k}x{d}x{f}"] = token_experts.experts, operands
        scaled = [(((64, n, m), E4M3), ((64, n // 128, m // 128), F32)) for n, m in ((f, d), (f, d), (d, f))]
        calls[f"codes of experts {k}x{d}x{f}"] = in_codes, (((d,), BF16), *scaled, ((k,), jnp.int32), ((k,), F32))
    return calls


def few_rows() -> dict:
    """Latent decode of few heads: the kernel of parts of sequences, and the one that puts them together."""
    calls = {}
    for b, t, h in ((1, 1, 16), (1, 2, 8), (64, 1, 16)):
        queries, pages = [((b, t * h, w), BF16) for w in (512, 64)], [((32 * b, 64, w), BF16) for w in (512, 64)]
        n_parts, n_stages = work.parts_of_few(b, 32, 132)
        call = functools.partial(latent_decode_few, n_heads=h, n_parts=n_parts, n_stages=n_stages)
        calls[f"decode few {b}x{t}x{h}"] = call, (*queries, *pages, ((b, 32), jnp.int32), ((b,), jnp.int32))
        parts = ((b, n_parts, 512, t * h), F32), *[((b, n_parts, t * h), F32)] * 2
        calls[f"together {b}x{t}x{h}"] = functools.partial(gpu_few.combined, dtype=BF16), parts
    return calls


def latent_decode_few(q_c, q_rope, c, rope, table, lengths, **sizes):
    """The first of the two kernels."""
    return gpu_few.parts(q_c, q_rope, (c, rope), table, lengths, scale=0.07, **sizes)


def codes() -> dict:
    """Products with weights that stay FP8 codes."""
    calls = {}

    def of_arrays(x, codes, scale, count, matrix):
        return coded.coded_matmul(x, Scaled(codes, scale), Groups(count, matrix_X=matrix))

    for groups, a, n, k, matrices in CODED:
        w = ((matrices, n, k), E4M3), ((matrices, n // 128, k // 128), F32)
        calls[f"codes {groups}x{a}x{n}x{k}"] = of_arrays, (((a, k), BF16), *w, *[((groups,), jnp.int32)] * 2)

    def gated(x, factor, count, matrix, gate, gate_scale, up, up_scale):
        weights = Scaled(gate, gate_scale), Scaled(up, up_scale)
        choice = coded_tiles.choose_gated(count.size, len(x), *gate.shape[1:], 132)
        return coded.multiplied(x, weights, factor, Groups(count, matrix_X=matrix), 128, choice, 132, None)

    for groups, a, n, k, matrices in GATED:
        w = ((matrices, n, k), E4M3), ((matrices, n // 128, k // 128), F32)
        operands = ((a, k), BF16), ((a,), F32), *[((groups,), jnp.int32)] * 2, *w, *w
        calls[f"codes gated {groups}x{a}x{n}x{k}"] = gated, operands
    return calls


def sparse() -> dict:
    """What DeepSeek sparse attention is made of: the indexer's logits, and attention to chosen rows."""
    calls = {}

    def score(q, k, scale, weight, *ids):
        return indexer.logits(q, k, scale, weight, 0, ids or None)

    def attend(n_splits, *arrays):
        return sparse_mla.attend(*arrays, scale=0.07, n_splits=n_splits, n_processors=132, tuning=chosen_rows.TUNING)

    for b, t, h, s in INDEXED:
        arrays = ((b, t, h, 128), E4M3), ((b, s, 128), E4M3), ((b, s), F32), ((b, t, h), F32)
        ids = ((b, t), jnp.int32), ((b, s), jnp.int32)
        calls[f"indexer {b}x{t}x{h}x{s}"] = score, arrays
        if t > 1:
            calls[f"indexer {b}x{t}x{h}x{s} documents"] = score, (*arrays, *ids)
    for b, t, h, width, n, n_splits in CHOSEN:
        queries, cache = [((b, t, h, w), BF16) for w in (width, 64)], [((b * 8192, w), BF16) for w in (width, 64)]
        arrays = *queries, *cache, ((b, t, n), jnp.int32), ((b, t), jnp.int32)
        calls[f"sparse_mla {b}x{t}x{h}x{width} {n_splits}"] = functools.partial(attend, n_splits), arrays
    t, h, _, width, v_width = V3_ATTENDED
    numbers, words = ((1, h, t), F32), ((1, t // 32, t), jnp.int32)
    inputs = *[((1, t, h, w), BF16) for w in (width, width, v_width)], words
    later = numbers, ((1, t, h, v_width), BF16), numbers
    calls["chosen by bits"] = chosen_by_bits, inputs
    for of_keys in (False, True):
        call = functools.partial(chosen_by_bits, of_keys=of_keys)
        calls[f"chosen by bits, of {'keys' if of_keys else 'queries'}"] = call, (*inputs, *later)
    call = functools.partial(gpu_mean.mean_weights, scale=0.07)
    calls["mean weights"] = call, (*inputs[:2], numbers, words)
    return calls


def chosen_by_bits(q, k, v, words, *later, of_keys=False):
    """Attention whose pairs are chosen by bits, or a half of its backward pass."""
    if later:
        return gpu_backward.backward(q, k, v, None, 0, *later, scale=0.07, of_keys=of_keys, chosen=words)
    return gpu_forward.forward(q, k, v, None, 0, scale=0.07, chosen_BWT=words)


PARTS = {
    "codes": codes,
    "of one token": of_one_token,
    "few rows": few_rows,
    "decode": decode,
    "sparse": sparse,
    "dense": dense,
    "grouped": grouped,
    "attention": attention,
}


def chosen(call: str, words: list[str]) -> bool:
    """Whether a call is compiled: all are, unless `words` have "once" or "again"."""
    when = "again" if any(fnmatch.fnmatchcase(call, pattern) for pattern in OTHER_SIZES) else "once"
    return when in words or not {"once", "again"} & {*words}


def main(words: list[str]) -> None:
    """Compiles every call of the parts."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=CHIP, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    for part in [word for word in words if word in PARTS] or PARTS:
        for name, (call, operands) in PARTS[part]().items():
            if not chosen(name, words):
                continue
            arguments = [abstract(operand, sharding) for operand in operands]
            print(json.dumps({"call": name, **found(printed(call, arguments))}), flush=True)


def printed(call: Callable, arguments: list) -> str:
    """What is printed, in whatever language, while the call is compiled."""
    sys.stdout.flush()
    known = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
            sys.stdout.flush()
        finally:
            os.dup2(known, 1)
            os.close(known)
        file.seek(0)
        return file.read()


def abstract(operand, sharding):
    """An operand, given as shape and dtype, or several of them."""
    if isinstance(operand[1], tuple):
        return [abstract(part, sharding) for part in operand]
    return jax.ShapeDtypeStruct(*operand, sharding=sharding)


def found(text: str) -> dict:
    """What the compiler said of a kernel: resources, the log of ptxas, instructions."""
    properties = text.split("Function properties for ")
    assert len(properties) == 2, f"{len(properties) - 1} kernels"
    spilled = re.search(r"(\d+) bytes spill stores", properties[1])
    shared = re.search(r"smem_scratch_bytes=(\d+)", text)
    return {
        "spilled": int(spilled.group(1)),
        "shared": int(shared.group(1)) if shared else None,
        "fp8_instructions": text.count("QGMMA."),
        "bf16_instructions": text.count("HGMMA."),
        "transposing_loads": len(re.findall(r"LDSM\.16\.MT88", text)),
        "serialised": "wgmma" in text and "serialized" in text,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
