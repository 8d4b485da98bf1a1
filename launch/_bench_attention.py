"""The attention of `bench kernels`: forward, and forward and backward together, beside cuDNN through JAX.

Work is counted as usual: half of the square, two products forward and five more backward, whatever is computed twice.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import compat
from deepseek_jax.launch import _bench_kernels
from pallas_kernels.mla_attention import attention

KINDS = ("forward", "forward and backward")


def attention_row(shape: tuple[int, ...], kind: str, options: SimpleNamespace) -> dict:
    """Measures causal attention; `shape`: batch, tokens, heads of queries and of keys, their width, values' width."""
    b, s, h, z, width, v_width = shape
    sizes = (b, s, h, width), (b, s, z, width), (b, s, z, v_width), (b, s, h, v_width)
    n_sets = max(2, min(8, int(_bench_kernels.SET_BYTES // (4 * b * s * h * (width + v_width)))))
    sets, scale = operands(sizes, n_sets), width**-0.5

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, implementation="mosaic_gpu", scale=scale)[0]

    def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return compat.cudnn_causal_attention(q, k, v, scale)

    def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, implementation="chunked", scale=scale)[0]

    functions = {"ours": ours} | ({"cuDNN": cudnn} if options.peer else {})
    both = {name: on_all(function, kind) for name, function in functions.items()}
    found = both["ours"](sets[:1])[0]
    heads = h // z, 1, 1, h // z
    first = [x[:, :, :n].astype(jnp.float32) for x, n in zip(sets[0], heads, strict=True)]
    right = on_all(blocks, kind)([tuple(first)])[0]
    n_heads = heads[3], *heads[:3]  # of the output and of the three gradients
    errors = [distance(x[:, :, :n], y) for x, y, n in zip(found, right, n_heads, strict=False)]
    sides = {name: _bench_kernels.dispatched(function, sets) for name, function in both.items()}
    microseconds = _bench_kernels.measured(sides, n_sets, options)
    work = b * h * s * s * (width + v_width + (3 * width + 2 * v_width if kind != KINDS[0] else 0))
    return {"op": f"attention {kind}", "shape": list(shape), "work": work, "error": max(errors)} | {
        "microseconds": microseconds
    }


def operands(sizes: tuple, n_sets: int) -> list[tuple]:
    """Sets of q, k, v and do of normally distributed numbers, different in every run."""

    @jax.jit
    def draw(key: Any) -> tuple:
        keys = jax.random.split(key, len(sizes))
        return tuple(jax.random.normal(one, size, jnp.bfloat16) for one, size in zip(keys, sizes, strict=True))

    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    return jax.block_until_ready([draw(jax.random.fold_in(key, i)) for i in range(n_sets)])


def on_all(function: Callable, kind: str) -> Callable:
    """`function`, and its three gradients if `kind` is with backward, compiled for a list of operands."""

    def one(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple:
        if kind == KINDS[0]:
            return (function(q, k, v),)
        o, pull = jax.vjp(function, q, k, v)
        return o, *pull(do)

    return jax.jit(lambda sets: [one(*operands) for operands in sets])


def distance(found: jax.Array, right: jax.Array) -> float:
    """|found - right| / |right|."""
    found = found.astype(jnp.float32)
    return float(jnp.linalg.norm(found - right) / jnp.linalg.norm(right))
