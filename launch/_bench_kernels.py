"""The speed of the kernels on this machine's GPU, in turns with torch where that is installed: `bench kernels`.

Per shape a table row: TFLOP/s and microseconds of the fp8_matmul kernel, of torch's block-scaled `scaled_mm` (cuBLASLt;
the same codes and scales) and of torch's bfloat16 matmul, the ratio to the first, and the relative error against
float64 on rows drawn at random. Before a shape's first measurement each side loads the chip for a while (`--warm`): its
clock falls at the limit of power, and what is measured before that favours the side with fewer cycles. Inputs are
fresh in each run and more than the caches hold; every side walks through several sets of them, a few hundredths of a
second at a time, in turns, so that heat and clocks touch all alike. Ours is dispatched by JAX, which takes some 30
microseconds of the host per kernel; torch's sides are CUDA graphs. Where the kernel is shorter than that, its time on
the GPU alone (CUPTI) is printed beside it, and the ratio is that time's. Further rows: gradients, quantisation, grouped
matmuls, attention, latent decode and the experts of one token, each beside its peers.
"""

import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.bounds import number, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _bench_attention, _bench_decode, _bench_experts, _bench_grouped, _options, _tune_kernels
from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels import tile_table
from pallas_kernels.fp8_matmul import fp8_matmul, tiles
from pallas_kernels.grouped_matmul import tiles as grouped_tiles
from pallas_kernels.quantize import quantize, quantize_squares
from pallas_kernels.quantize.reference import quantize_rows

FORWARD = "4096x2112x7168,4096x24576x1536,4096x32768x512,4096x7168x16384,4096x4096x7168,4096x7168x2048"
SMALL = "64x2112x7168,128x7168x2048"
GROUPED = "4x8192x4096x7168,4x8192x7168x2048,32x256x4096x7168,32x256x7168x2048"
ATTENTION = "1x4096x128x128x192x128,1x16384x128x128x192x128"
EXPERTS = "6x2048x1408,8x7168x2048"
DECODE = "128x4096x128x512x64,128x8192x128x512x64,4x32768x128x512x64"
EXTRA = {
    "shapes": (str, f"{FORWARD},{SMALL}", "m x n x k of the products, separated by commas"),
    "gradient_shapes": (str, "4096x7168x4096,7168x2048x4096", "of weight gradients: scales per 1 x 128 on both sides"),
    "quantize_shapes": (str, "4096x7168,8192x7168", "m x k of matrices to quantise along both axes"),
    "weight_shapes": (
        str,
        "1x7168x18432,16x7168x2048",
        "experts x k x n of weights to quantise, as stored and transposed",
    ),
    "grouped_shapes": (str, GROUPED, "groups x rows x n x k of grouped matmuls"),
    "attention_shapes": (str, ATTENTION, "batch x tokens x heads of queries x of keys x their width x values' width"),
    "decode_shapes": (str, DECODE, "sequences x tokens x heads x width of latents x of rotary keys"),
    "expert_shapes": (str, EXPERTS, "chosen experts x model width x experts' width, of one token"),
    "rounds": (int, 9, "times that each side is measured", whole(1, 10**6)),
    "seconds": (float, 0.03, "length of one measurement", number(1e-6, 3600)),
    "warm": (float, 0.1, "seconds of load before the first measurement of a shape, per side", number(0, 3600)),
    "peer": (bool, True, "measure torch as well, if it is installed"),
    "json": (str, "", "file to which each row is appended as JSON", path()),
    "tune": (bool, False, "measure every tiles that the kernels may choose, and write this GPU's table of them"),
    "table": (str, "", "file of that table; empty: the one in the package that the kernels read", path()),
    "jobs": (int, 6, "processes that prepare measurements for the table at a time", whole(1, 1000)),
    "timeout": (float, 300.0, "seconds after which such a process is stopped", number(1, 86400)),
}
SET_BYTES = 3e9  # of all input and output sets of a shape


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, extra=EXTRA, config=False, workdir=False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    if jax.default_backend() != "gpu":
        raise UserError(f"bench kernels on {jax.devices()[0].device_kind}: needs a Hopper GPU (H100, H200).")
    if options.peer and not options.tune and importlib.util.find_spec("torch") is None:
        raise UserError('bench kernels compares with torch, which is not installed. Install "torch" or give --no-peer.')
    if options.tune:
        _tune(options)
        return 0
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {options.rounds} rounds of {options.seconds} s")
    for row in _rows(options):
        report(row, options.json)
    return 0


def _rows(options: SimpleNamespace) -> Iterator[dict]:
    """Measures one shape of one operation after another."""
    for forward, shapes in ((True, options.shapes), (False, options.gradient_shapes)):
        for m, n, k in parsed(shapes, 3):
            yield matmul_row(m, n, k, forward, options)
    for n_sizes, shapes in ((2, options.quantize_shapes), (3, options.weight_shapes)):
        for shape in parsed(shapes, n_sizes):
            yield quantize_row(shape, options)
    measures = (
        (options.grouped_shapes, 4, _bench_grouped.KINDS, _bench_grouped.grouped_row),
        (options.attention_shapes, 6, _bench_attention.KINDS, _bench_attention.attention_row),
        (options.decode_shapes, 5, _bench_decode.KINDS, _bench_decode.decode_row),
        (options.expert_shapes, 3, _bench_experts.KINDS, _bench_experts.experts_row),
    )
    for shapes, n_sizes, kinds, measure in measures:
        for shape in parsed(shapes, n_sizes):
            for kind in kinds:
                yield measure(shape, kind, options)


def _tune(options: SimpleNamespace) -> None:
    """Measures the tiles for the shapes of the options and writes the table of this machine's GPU."""
    device = jax.devices()[0]
    shapes = {
        tiles.FORWARD: [shape for shape in parsed(options.shapes, 3) if shape[0] > tiles.FEW],
        tiles.WEIGHT_GRADIENT: parsed(options.gradient_shapes, 3),
        grouped_tiles.FP8: parsed(options.grouped_shapes, 4),
    }
    file = Path(options.table) if options.table else tile_table.file_of(device.device_kind)
    with tempfile.NamedTemporaryFile() as lock:
        # -P: the installed package, not a checkout that happens to be the working directory
        command = [sys.executable, "-P", "-m", _tune_kernels.__name__, lock.name, str(options.seconds)]
        measure = _tune_kernels.in_a_process(command, options.timeout)
        _tune_kernels.tune(shapes, file, device.device_kind, device.core_count, measure, options.jobs)


def parsed(text: str, n_sizes: int) -> list[tuple[int, ...]]:
    """Returns text like 4096x7168x2048,64x2112x7168 as tuples."""
    try:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",") if shape]
    except ValueError:
        shapes = [()]
    if not all(len(shape) == n_sizes and min(shape) > 0 for shape in shapes):
        form = "x".join(["4096", "7168", "2048", "512", "192", "128"][:n_sizes])
        raise UserError(f"shapes {text!r}: expected positive sizes such as {form}, separated by commas.")
    return shapes


def matmul_row(m: int, n: int, k: int, forward: bool, options: SimpleNamespace) -> dict:
    """Measures one product; `forward`: w has scales per 128 x 128, else per 1 x 128 and the result is float32."""
    out_dtype, w_block = (jnp.bfloat16, (128, 128)) if forward else (jnp.float32, (1, 128))
    n_sets = max(2, min(16, int(SET_BYTES // (m * k + n * k + m * n * jnp.dtype(out_dtype).itemsize))))
    sets = operands(m, n, k, forward, n_sets)
    product = jax.jit(lambda *x: fp8_matmul(*x, w_block=w_block, out_dtype=out_dtype, implementation="mosaic_gpu"))
    ours = jax.jit(lambda sets: [product(*one) for one in sets])
    error = relative_error(ours(sets)[0], sets[0], forward)
    sides = {"ours": dispatched(ours, sets)}
    if options.peer and forward:
        sides |= torch_sides(sets)
    microseconds = measured(sides, n_sets, options)
    if m <= 128:
        microseconds["ours alone"] = alone(ours, sets)
    return {"op": "fp8_matmul", "shape": [m, n, k], "forward": forward, "work": 2 * m * n * k, "error": error} | {
        "microseconds": microseconds
    }


def operands(m: int, n: int, k: int, forward: bool, n_sets: int) -> list[tuple]:
    """Sets of codes and scales of normally distributed numbers, different in every run."""

    @jax.jit
    def draw(key: Any) -> Any:
        keys = jax.random.split(key)
        w = jax.random.normal(keys[1], (n, k))
        return *quantize_rows(jax.random.normal(keys[0], (m, k))), *(
            quantize_blocks(w) if forward else quantize_rows(w)
        )

    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    return jax.block_until_ready([draw(jax.random.fold_in(key, i)) for i in range(n_sets)])


def relative_error(y: Any, operands: tuple, forward: bool, n_rows: int = 32) -> float:
    """|y - expected| / |expected| on some rows, where `expected` comes from the same codes and scales in float64."""
    rows = np.random.default_rng().permutation(y.shape[0])[:n_rows]
    x, x_scale, w, w_scale = operands
    x, x_scale = np.asarray(x[rows].astype("float32"), np.float64), np.asarray(x_scale[:, rows], np.float64)
    columns = (
        np.asarray(w_scale, np.float64) if not forward else np.repeat(np.asarray(w_scale).T, 128, 1)[:, : w.shape[0]]
    )
    expected = np.zeros((len(rows), w.shape[0]))
    for b in range(x_scale.shape[0]):
        ks = slice(b * 128, (b + 1) * 128)
        products = x[:, ks] @ np.asarray(w[:, ks].astype("float32"), np.float64).T
        expected += products * x_scale[b][:, None] * columns[b][None, :]
    found = np.asarray(y[rows].astype("float32"), np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def torch_sides(sets: list[tuple]) -> dict[str, Callable]:
    """torch's products of the same operands, each side one CUDA graph over all sets."""
    import torch
    from torch.nn import functional

    def codes(array: Any) -> Any:
        return torch.from_dlpack(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(torch.float8_e4m3fn)

    def block_scaled(x: Any, x_scale: Any, w: Any, w_scale: Any) -> Any:
        return functional.scaled_mm(
            x, w.t(), x_scale.t(), functional.ScalingType.BlockWise1x128, w_scale.t(),
            functional.ScalingType.BlockWise128x128, output_dtype=torch.bfloat16,
        )  # fmt: skip

    scaled, plain = [], []
    for x, x_scale, w, w_scale in sets:
        padded = functional.pad(torch.from_dlpack(w_scale), (0, -w_scale.shape[1] % 4))
        scaled.append((codes(x), torch.from_dlpack(x_scale).clone(), codes(w), padded))
        plain.append((scaled[-1][0].bfloat16(), scaled[-1][2].bfloat16()))
    return {
        "torch block-scaled": replayed(block_scaled, scaled),
        "torch bf16": replayed(lambda x, w: x @ w.t(), plain),
    }


def replayed(function: Callable, arguments: list[tuple]) -> Callable:
    """A CUDA graph of `function` over all of `arguments`, as a function that replays it several times and waits."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        function(*arguments[0])  # libraries set themselves up outside the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(*one) for one in arguments]

    def run(repeats: int, results: list = results) -> None:
        for _ in range(repeats):
            graph.replay()
        torch.cuda.synchronize()

    return run


def dispatched(function: Callable, sets: list) -> Callable:
    """A compiled function over all `sets`, as a function that runs it several times and waits for the last."""

    def run(repeats: int) -> None:
        for _ in range(repeats):
            results = function(sets)
        jax.block_until_ready(results)

    return run


def quantize_row(shape: tuple[int, ...], options: SimpleNamespace) -> dict:
    """Measures the quantisation of activations [m, k] along both axes, or of weights [x, k, n] and their transposes.

    Beside it a copy of as many bytes: 2 read and 2 written per value.
    """
    name, function = ("quantize", quantize) if len(shape) == 2 else ("quantize_squares", quantize_squares)
    n_sets = max(2, min(16, int(SET_BYTES // (4 * math.prod(shape)))))
    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    sets = [jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16) for i in range(n_sets)]
    one = jax.jit(lambda x: function(x, implementation="mosaic_gpu"))
    ours = jax.jit(lambda sets: [one(x) for x in sets])
    on_cpu = jax.device_put(sets[0], jax.devices("cpu")[0])  # where divisions are correctly rounded
    expected = jax.jit(lambda x: function(x, implementation="reference"))(on_cpu)
    pairs = zip(ours(sets)[0], expected, strict=True)
    wrong = sum(int(np.sum(np.asarray(a.astype("float32")) != np.asarray(b.astype("float32")))) for a, b in pairs)
    sides = {"ours": dispatched(ours, sets)}
    if options.peer:
        import torch

        copies = [torch.from_dlpack(x) for x in sets]
        sides["torch copy"] = replayed(lambda x: x.clone(), [(x,) for x in copies])
    microseconds = measured(sides, n_sets, options) | {"ours alone": alone(ours, sets)}
    return {
        "op": name,
        "shape": list(shape),
        "work": 4 * math.prod(shape),
        "error": wrong,
        "microseconds": microseconds,
    }


def measured(sides: dict[str, Callable], n_sets: int, options: SimpleNamespace) -> dict[str, float]:
    """Median microseconds per call of each side, the sides in turns."""
    repeats: dict[str, int] = {}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():  # the clocks rise
        begin = time.perf_counter()
        while time.perf_counter() - begin < options.warm:
            run(1)
    for name, run in sides.items():
        begin = time.perf_counter()
        run(3)
        repeats[name] = max(2, int(options.seconds * 3 / (time.perf_counter() - begin)))
    for turn in range(options.rounds):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            begin = time.perf_counter()
            sides[name](repeats[name])
            taken[name].append((time.perf_counter() - begin) / repeats[name] / n_sets * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def alone(function: Callable, sets: list, repeats: int = 5) -> float:
    """Median microseconds per set of the kernels that `function` runs, without their dispatch."""
    from jax.experimental.mosaic.gpu import profiler

    measure: Any = profiler.measure(function, aggregate=False)
    times = [sum(ms for _, ms in measure(sets)[1]) for _ in range(repeats)]
    return statistics.median(times) * 1e3 / len(sets)


def report(row: dict, file: str) -> None:
    """Prints a row, and appends it to `file` if there is one."""
    is_copy = row["op"].startswith("quantize")
    rate, unit = (1e-3, "GB/s") if is_copy else (1e-6, "TFLOP/s")
    times = row["microseconds"]
    cells = [f"{name} {row['work'] / us * rate:7.0f} {unit} {us:8.1f} us" for name, us in times.items()]
    peers = [us for name, us in times.items() if not name.startswith("ours")]
    if "bytes" in row:
        cells.append(f"read at {row['bytes'] / times.get('ours alone', times['ours']) * 1e-3:.0f} GB/s")
    if peers:
        cells.append(f"ratio {peers[0] / times.get('ours alone', times['ours']):.2f}")
    cells.append(f"codes that differ {row['error']:.0f}" if is_copy else f"error {row['error']:.2e}")
    kind = "" if row.get("forward", True) else " (gradient)"
    print(f"{row['op']} {'x'.join(map(str, row['shape']))}{kind}: " + " | ".join(cells), flush=True)
    if file:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
