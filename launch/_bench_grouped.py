"""The grouped matmuls of `bench kernels`: forward and weight gradient in bfloat16 and FP8, beside torch's grouped_mm.

Groups of equal sizes, as the experts of one device have them when their load is balanced; the kernels do not know that.
The list of row tiles that XLA computes before a kernel is part of the time.
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.launch import _bench_kernels
from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels import grouped_matmul as kernels
from pallas_kernels.grouped_matmul import Groups, Scaled
from pallas_kernels.quantize.reference import quantize_rows

KINDS = ("bf16", "bf16 gradient", "fp8", "fp8 gradient")


def grouped_row(shape: tuple[int, ...], kind: str, options: SimpleNamespace) -> dict:
    """Measures `groups` groups of `rows` rows of k values, to n values each; `shape`: these four."""
    groups, rows, n, k = shape
    n_rows = groups * rows
    n_sets = max(2, min(8, int(_bench_kernels.SET_BYTES // (2 * (n_rows * k + groups * n * k + n_rows * n)))))
    one = jax.jit(functools.partial(function(kind), implementation="mosaic_gpu"))
    ours = jax.jit(lambda sets: [one(*operands) for operands in sets])
    sets = operands(groups, rows, n, k, kind, n_sets)
    error = relative_error(ours(sets)[0], sets[0], kind)
    sides = {"ours": _bench_kernels.dispatched(ours, sets)}
    if options.peer:
        sides["torch bf16"] = torch_side(groups, rows, n, k, "gradient" in kind, n_sets)
    microseconds = _bench_kernels.measured(sides, n_sets, options)
    work = 2 * n_rows * n * k
    return {"op": f"grouped_matmul {kind}", "shape": [groups, rows, n, k], "work": work, "error": error} | {
        "microseconds": microseconds
    }


def function(kind: str) -> Callable:
    """The public function that computes a kind of product."""
    functions: dict[str, Callable] = {
        "bf16": kernels.grouped_matmul,
        "bf16 gradient": functools.partial(kernels.grouped_weight_gradient, out_dtype=jnp.bfloat16),
        "fp8": kernels.grouped_fp8_matmul,
        "fp8 gradient": kernels.grouped_fp8_weight_gradient,
    }
    return functions[kind]


def operands(groups: int, rows: int, n: int, k: int, kind: str, n_sets: int) -> list[tuple]:
    """Sets of operands of normally distributed numbers, different in every run."""
    gradient = "gradient" in kind
    sizes = Groups(jnp.full(groups, rows, jnp.int32), align=128 if kind == "fp8 gradient" else 1)
    right = (groups * rows, n) if gradient else (groups, n, k)

    @jax.jit
    def draw(key: Any) -> Any:
        x, w = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(jax.random.split(key), ((groups * rows, k), right), strict=True)
        )
        if kind == "bf16":
            return x, w.swapaxes(1, 2), sizes
        if kind == "bf16 gradient":
            return x, w, sizes
        quantised_w = quantize_rows(w.T) if gradient else jax.vmap(quantize_blocks)(w)
        return Scaled(*quantize_rows(x.T if gradient else x)), Scaled(*quantised_w), sizes

    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    return jax.block_until_ready([draw(jax.random.fold_in(key, i)) for i in range(n_sets)])


def relative_error(y: Any, operands: tuple, kind: str) -> float:
    """|y - expected| / |expected| for the first group, in float32, where `expected` comes from the same operands."""
    x, w, sizes = operands
    rows, f32 = int(sizes.count_X[0]), jnp.float32

    def decoded(codes: Any, scale: Any) -> Any:
        return codes.astype(f32) * jnp.repeat(scale.T, 128, axis=1)

    @jax.jit
    def expected() -> tuple:
        if kind == "bf16":
            return x[:rows].astype(f32), w[0].astype(f32)
        if kind == "bf16 gradient":
            return x[:rows].astype(f32).T, w[:rows].astype(f32)
        if kind == "fp8":
            scales = jnp.repeat(jnp.repeat(w.scale[0], 128, 0), 128, 1)
            return decoded(x.codes[:rows], x.scale[:, :rows]), (w.codes[0].astype(f32) * scales).T
        x_rows, w_rows = (decoded(a.codes[:, :rows], a.scale[: rows // 128]) for a in (x, w))
        return x_rows, w_rows.T

    product = jnp.matmul(*expected(), precision="highest")
    found = (y[0] if "gradient" in kind else y[:rows]).astype(f32)
    return float(jnp.linalg.norm(found - product) / jnp.linalg.norm(product))


def torch_side(groups: int, rows: int, n: int, k: int, gradient: bool, n_sets: int) -> Callable:
    """torch's grouped matmul of bfloat16 operands of the same shapes, as a CUDA graph over all sets."""
    import torch

    ends = torch.arange(1, groups + 1, device="cuda", dtype=torch.int32) * rows

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def product(x: Any, w: Any) -> Any:
        pair = (x.t(), w) if gradient else (x, w.transpose(-2, -1))
        return torch._grouped_mm(*pair, offs=ends, out_dtype=torch.bfloat16)

    right = (groups * rows, n) if gradient else (groups, n, k)
    return _bench_kernels.replayed(product, [(draw(groups * rows, k), draw(*right)) for _ in range(n_sets)])
