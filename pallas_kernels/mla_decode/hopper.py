"""Decode by the kernel for Hopper: what it takes, rows of heads and tokens, parts of long sequences, their sum."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu
from pallas_kernels.mla_decode import gpu, gpu_few, gpu_load, gpu_plan, work

NAME = "mosaic_gpu"
MOST_TOKENS = 4
MOST_WIDTH = 512, 64  # of latents and of rotary keys that fit into shared memory
INSTEAD = "Use implementation='chunked'."


def decode(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: Sequence[jax.Array],
    table: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
    n_splits: int | None = None,
    tuning: gpu.Tuning | None = None,
    n_processors: int | None = None,
    interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHC, lse_BTH); arguments as in `pallas_kernels.mla_decode`, Raises ValueError as `check` does.

    `n_processors` is the default device's if None; `interpret` runs the kernel on a CPU (JAX 0.11 and later).
    """
    check(q_c_BTHC, q_rope_BTHP, cache, scale)
    n_processors = n_processors or mosaic_gpu.check_hopper(NAME)
    b, t, h, width = q_c_BTHC.shape
    in_fp8 = len(cache) == 1
    if not in_fp8 and n_splits is None and tuning is None and work.are_few(t, h):
        options: dict[str, Any] = {"scale": scale, "interpret": interpret}
        return _of_few(q_c_BTHC, q_rope_BTHP, cache, table, lengths_B, n_processors=n_processors, **options)
    q_c, q_rope = (_rows(x) for x in (q_c_BTHC, q_rope_BTHP))
    n_tiles = q_c.shape[1] // gpu.ROWS
    tuning = tuning or (gpu_plan.IN_FP8 if in_fp8 else gpu.Tuning(cluster=1 if n_tiles % 2 else 2))
    n_splits = n_splits or work.n_splits(b * n_tiles, table.shape[1], n_processors)
    items = work.items(lengths_B, n_splits, longest_first=b * n_splits * n_tiles > n_processors)
    o, lse = gpu.decode(
        q_c, q_rope, gpu_load.views(*cache) if in_fp8 else tuple(cache), table, items,
        n_heads=h, n_tokens=t, n_splits=n_splits, scale=scale, tuning=tuning, interpret=interpret,
    )  # fmt: skip
    if n_splits > 1:
        o, lse = work.combined(o.reshape(n_splits, b, -1, width), lse.reshape(n_splits, b, -1))
    o_BTHC = o[:, : t * h].reshape(b, t, h, width).astype(q_c_BTHC.dtype)
    return o_BTHC, lse[:, : t * h].reshape(b, t, h)


def _of_few(
    q_c_BTHC: jax.Array, q_rope_BTHP: jax.Array, cache: Sequence[jax.Array], table: jax.Array, lengths_B: jax.Array,
    *, n_processors: int, **options: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`decode` by `gpu_few`; tokens whose rows are more than it takes become sequences of the same pages."""
    b, t, h, _ = q_c_BTHC.shape
    if t * h > work.FEW_ROWS:
        lengths_BT = lengths_B[:, None] + jnp.arange(1 - t, 1, dtype=lengths_B.dtype)
        table, lengths_B = jnp.repeat(table, t, axis=0), lengths_BT.reshape(-1)
    q_c, q_rope = (q.reshape(len(lengths_B), -1, q.shape[-1]) for q in (q_c_BTHC, q_rope_BTHP))
    n_parts, n_stages = work.parts_of_few(len(lengths_B), table.shape[1], n_processors)
    divided = {"n_heads": h, "n_parts": n_parts, "n_stages": n_stages}
    o, lse = gpu_few.decode(q_c, q_rope, cache, table, lengths_B, **divided, **options)
    return o.reshape(q_c_BTHC.shape), lse.reshape(b, t, h)


def _rows(q_BTHC: jax.Array) -> jax.Array:
    """[B, T, H, C] -> [B, T * H, C], filled up to whole tiles."""
    b, t, h, width = q_BTHC.shape
    return jnp.pad(q_BTHC.reshape(b, t * h, width), ((0, 0), (0, -(t * h) % gpu.ROWS), (0, 0)))


def check(q_c_BTHC: jax.Array, q_rope_BTHP: jax.Array, cache: Sequence[jax.Array], scale: float) -> None:
    """Raises ValueError for what the kernel does not take: other dtypes, odd widths, many tokens."""
    t, width, rope = q_c_BTHC.shape[1], q_c_BTHC.shape[3], q_rope_BTHP.shape[3]
    dtypes = (jnp.bfloat16,) if len(cache) == 1 else (jnp.bfloat16, jnp.float16)
    if q_c_BTHC.dtype not in dtypes:
        raise ValueError(
            f"implementation={NAME!r}: queries {q_c_BTHC.dtype}, cache {[str(x.dtype) for x in cache]}; expected "
            f"bfloat16 or float16 in both, or bfloat16 beside an FP8 cache. Cast them. {INSTEAD}"
        )
    if width % 256 or rope % 64 or width > MOST_WIDTH[0] or rope > MOST_WIDTH[1]:
        raise ValueError(
            f"implementation={NAME!r}: latents of {width} numbers, rotary keys of {rope}; expected multiples of 256 "
            f"and 64, up to {MOST_WIDTH[0]} and {MOST_WIDTH[1]}. {INSTEAD}"
        )
    if len(cache) == 1 and cache[0].shape[-1] % 16:
        raise ValueError(
            f"implementation={NAME!r}: FP8 entries of {cache[0].shape[-1]} bytes; expected a multiple of 16, as with "
            f"latents of 512 numbers. {INSTEAD}"
        )
    if t > MOST_TOKENS:
        raise ValueError(f"implementation={NAME!r}: {t} tokens per sequence, expected up to {MOST_TOKENS}. {INSTEAD}")
    if not scale > 0:
        raise ValueError(f"implementation={NAME!r}: scale={scale}, expected a positive number. {INSTEAD}")
