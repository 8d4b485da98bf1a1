"""The experts of one token of `bench kernels`: weights in bfloat16, and FP8 codes with a scale per 128 x 128.

Beside the kernel the definition by XLA, in float32 and with exact products, which copies the weights of the chosen
experts first; a run without the kernel takes three products of its own, which may be faster. Work is three products.
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
from pallas_kernels.grouped_matmul import Scaled
from pallas_kernels.token_experts import experts, experts_in_codes

KINDS = ("token_experts", "token_experts in codes")
PER_CHOICE = 4  # experts to choose from, for each that is chosen


def experts_row(shape: tuple[int, ...], kind: str, options: SimpleNamespace) -> dict:
    """Measures the experts of one token; `shape`: chosen experts, D, F."""
    k, d, f = shape
    in_codes = kind == KINDS[1]
    n_bytes = 3 * k * d * f * (1 if in_codes else 2)
    n_sets = max(2, min(16, int(_bench_kernels.SET_BYTES // (PER_CHOICE * n_bytes))))
    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    sets = jax.block_until_ready([operands(jax.random.fold_in(key, i), shape, in_codes) for i in range(n_sets)])
    ours = on_all("mosaic_gpu", in_codes)
    sides = {"ours": _bench_kernels.dispatched(ours, sets)}
    if options.peer:
        sides["XLA"] = _bench_kernels.dispatched(on_all("reference", in_codes), sets)
    error = relative_error(sets[0], ours(sets[:1])[0], in_codes)
    microseconds = _bench_kernels.measured(sides, n_sets, options)
    microseconds["ours alone"] = _bench_kernels.alone(ours, sets)
    return {"op": kind, "shape": list(shape), "work": 6 * k * d * f, "bytes": n_bytes, "error": error} | {
        "microseconds": microseconds
    }


def operands(key: Any, shape: tuple[int, ...], in_codes: bool) -> tuple:
    """A token, weights of some experts, normally distributed, and a choice of them."""
    k, d, f = shape
    n_experts, keys = PER_CHOICE * k, jax.random.split(key, 6)
    x_D, weight_K = jax.random.normal(keys[0], (d,), jnp.bfloat16), jax.random.uniform(keys[1], (k,))
    sizes = [(n_experts, *size) for size in ((f, d), (f, d), (d, f))]

    draw = jax.jit(_weights, static_argnums=(1, 2))
    drawn = [draw(one, size, in_codes) for one, size in zip(keys[2:5], sizes, strict=True)]
    return x_D, *drawn, jax.random.permutation(keys[5], n_experts)[:k].astype(jnp.int32), weight_K


def _weights(key: Any, size: tuple[int, ...], in_codes: bool) -> Any:
    """Matrices with outputs first in codes, else last."""
    w = jax.random.normal(key, size, jnp.bfloat16) / size[-1] ** 0.5
    return Scaled(*quantize_blocks(w)) if in_codes else w.swapaxes(1, 2)


def on_all(implementation: str, in_codes: bool) -> Callable:
    """The experts of one token, compiled for a list of operands."""
    one = jax.jit(functools.partial(_call(in_codes), implementation=implementation))
    return jax.jit(lambda sets: [one(*operands) for operands in sets])


def _call(in_codes: bool) -> Callable:
    return experts_in_codes if in_codes else _experts_of_one


def _experts_of_one(
    x_D: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    chosen_K: jax.Array,
    weight_K: jax.Array,
    **how: str,
) -> jax.Array:
    return experts(x_D[None], gate, up, down, chosen_K[None], weight_K[None], **how)[0]


def relative_error(one: tuple, found: jax.Array, in_codes: bool) -> float:
    """|found - right| / |right|; right is the definition in float32."""
    x_D, *weights, chosen_K, weight_K = one
    if not in_codes:
        weights = [w.astype(jnp.float32) for w in weights]
    right = _call(in_codes)(x_D.astype(jnp.float32), *weights, chosen_K, weight_K, implementation="reference")
    return float(jnp.linalg.norm(found.astype(jnp.float32) - right) / jnp.linalg.norm(right))
