"""The latent decode of `bench kernels`: one token per sequence over its cached tokens, in bfloat16.

Beside it torch's attention, to which the heads are queries of one head whose keys are the cache, in a cache of its own
that is not paged, and the portable path: plain jax over the same pages. Work is two products, heads x tokens x
(width of latents and rotary keys + width of latents).
"""

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.launch import _bench_kernels
from pallas_kernels.mla_decode import Pages, decode
from pallas_kernels.mla_decode.work import PAGE

KINDS = ("decode", "decode ragged")
SCALE = 192**-0.5  # V3's
FEW = 16  # sequences, below which the kernels are also timed without their dispatch


def decode_row(shape: tuple[int, ...], kind: str, options: SimpleNamespace) -> dict:
    """Measures decode; `shape`: sequences, tokens of each, heads, widths of latents and of rotary keys.

    Ragged: lengths at random from half of the tokens to all of them.
    """
    b, s, h, width, rope = shape
    cache_bytes = b * s * (width + rope) * 2
    n_sets = max(2, min(8, int(_bench_kernels.SET_BYTES // cache_bytes)))
    sets = operands(shape, kind, n_sets)
    n_tokens = sum(int(jnp.sum(one[-1])) for one in sets) / n_sets
    ours = on_all("mosaic_gpu")
    sides = {"ours": _bench_kernels.dispatched(ours, sets)}
    if options.peer and kind == KINDS[0]:
        sides["torch"] = torch_side(shape, n_sets)
    if options.peer:
        sides["XLA"] = _bench_kernels.dispatched(on_all("chunked"), sets)
    error = relative_error(sets[0], ours(sets[:1])[0])
    microseconds = _bench_kernels.measured(sides, n_sets, options)
    if b <= FEW:
        microseconds["ours alone"] = _bench_kernels.alone(ours, sets)
    work = 2 * h * n_tokens * (2 * width + rope)
    return {"op": kind, "shape": list(shape), "work": work, "bytes": n_tokens * (width + rope) * 2, "error": error} | {
        "microseconds": microseconds
    }


def operands(shape: tuple[int, ...], kind: str, n_sets: int) -> list[tuple]:
    """Sets of queries, pages in any order, their table and lengths, normally distributed, different in every run."""
    b, s, h, width, rope = shape
    most = -(-s // PAGE)

    @jax.jit
    def draw(key: Any) -> tuple:
        keys = jax.random.split(key, 6)
        sizes = (b, 1, h, width), (b, 1, h, rope), (b * most, PAGE, width), (b * most, PAGE, rope)
        q, q_rope, c, k = (jax.random.normal(one, size, jnp.bfloat16) for one, size in zip(keys, sizes, strict=False))
        table = jax.random.permutation(keys[4], b * most).reshape(b, most)
        shortest = s if kind == KINDS[0] else -(-s // 2)
        return q, q_rope, Pages(c, k), table, jax.random.randint(keys[5], (b,), shortest, s + 1)

    key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
    return jax.block_until_ready([draw(jax.random.fold_in(key, i)) for i in range(n_sets)])


def on_all(implementation: str) -> Callable:
    """Decode compiled for a list of operands."""
    one = jax.jit(functools.partial(decode, implementation=implementation, scale=SCALE))
    return jax.jit(lambda sets: [one(*operands)[0] for operands in sets])


def relative_error(one: tuple, found: jax.Array) -> float:
    """|found - right| / |right| of the first two sequences; right comes from plain jax in float32."""
    q, q_rope, pages, table, lengths = one
    own = (pool[table[:2]].reshape(-1, *pool.shape[1:]) for pool in pages)
    q, q_rope, c, k = (x.astype(jnp.float32) for x in (q[:2], q_rope[:2], *own))
    places = jnp.arange(table[:2].size).reshape(table[:2].shape)
    right, _ = decode(q, q_rope, Pages(c, k), places, lengths[:2], implementation="chunked", scale=SCALE)
    return float(jnp.linalg.norm(found[:2].astype(jnp.float32) - right) / jnp.linalg.norm(right))


def torch_side(shape: tuple[int, ...], n_sets: int) -> Callable:
    """torch's scaled_dot_product_attention over caches of its own, each a CUDA graph's step."""
    import torch
    from torch.nn import functional

    b, s, h, width, rope = shape

    def draw(*size: int) -> Any:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    def attend(q: Any, keys: Any) -> Any:
        return functional.scaled_dot_product_attention(q, keys, keys[..., :width], scale=SCALE)

    sets = [(draw(b, 1, h, width + rope), draw(b, 1, s, width + rope)) for _ in range(n_sets)]
    return _bench_kernels.replayed(attend, sets)
