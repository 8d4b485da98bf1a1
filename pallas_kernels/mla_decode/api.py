"""The public function: arguments are checked once, then the named implementation runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import chunked, fp8_cache, reference, work
from pallas_kernels.mla_decode.work import PAGE

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_gpu", "mosaic_tpu")


class Pages(NamedTuple):
    """A cache of numbers in the dtype of the queries: latents [pages, 64, C] and rotary keys [pages, 64, P]."""

    c: jax.Array
    rope: jax.Array

    def fetch(self, pages: jax.Array, rope: int) -> tuple[jax.Array, jax.Array]:
        """Returns the latents and the `rope` wide rotary keys of some pages."""
        return self.c[pages], self.rope[pages]


class Fp8Pages(NamedTuple):
    """A cache in FP8, `fp8_cache.encode`: uint8 [pages, 64, bytes of an entry]."""

    entries: jax.Array

    def fetch(self, pages: jax.Array, rope: int) -> tuple[jax.Array, jax.Array]:
        """Returns the latents and the `rope` wide rotary keys of some pages, in bfloat16."""
        return fp8_cache.decode(self.entries[pages], rope)


def contiguous(c_BSC: jax.Array, k_rope_BSP: jax.Array) -> tuple[Pages, jax.Array]:
    """Returns a cache in which the slots of a sequence lie side by side as (pages, their table).

    Nothing is copied, unless a sequence has less than a page, which is filled up. Raises ValueError if S is larger than
    64 and not a multiple of it.
    """
    b, s, _ = c_BSC.shape
    if s > PAGE and s % PAGE:
        raise ValueError(f"a cache of {s} slots per sequence: expected a multiple of {PAGE}, the tokens of a page.")
    whole = (jnp.pad(x, ((0, 0), (0, -s % PAGE), (0, 0))) for x in (c_BSC, k_rope_BSP))
    pages = Pages(*(x.reshape(-1, PAGE, x.shape[-1]) for x in whole))
    return pages, jnp.arange(pages.c.shape[0], dtype=jnp.int32).reshape(b, -1)


def decode(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: Pages | Fp8Pages,
    table: jax.Array,
    lengths_B: jax.Array,
    *,
    implementation: str,
    scale: float,
    n_splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Latent attention of each sequence's last T tokens to its tokens: (o_BTHC in the dtype of q, lse_BTH).

    The absorbed form: all heads read the latents themselves, as keys and as values. Query t sees the first
    length - T + 1 + t tokens. lse is the natural logarithm of the sum of the exponentiated scores, float32 (float64 for
    float64 inputs). A query that sees nothing gives o = 0 and lse = -inf. What lies in a page behind a sequence's end,
    or in a page of the table behind its last one, is never used; it may be NaN.

    Args:
        q_c_BTHC: queries, moved into the latent space.
        q_rope_BTHP: their rotary parts, in the same dtype.
        cache: `Pages` in the dtype of the queries, or `Fp8Pages`.
        table: pages of each sequence, integers [B, most]; page i holds its tokens from 64 i on.
        lengths_B: tokens of each sequence, these included, integers.
        implementation: "reference" (any device, copies the whole cache), "chunked" (any device, some pages at a time),
            "mosaic_gpu" (Hopper, 16 bits or FP8, T <= 4) or "mosaic_tpu" (`Pages` of bfloat16 or float32, T <= 4).
            There is no fallback from one to another.
        scale: factor of the scores.
        n_splits: parts in which each sequence is read; None lets the kernel choose, others read it in one.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    _check(q_c_BTHC, q_rope_BTHP, cache, table, lengths_B, n_splits)
    table, lengths_B = table.astype(jnp.int32), lengths_B.astype(jnp.int32)
    if implementation == "reference":
        pools = cache.fetch(jnp.arange(cache[0].shape[0]), q_rope_BTHP.shape[3])
        return reference.decode(q_c_BTHC, q_rope_BTHP, *pools, table, lengths_B, scale=scale)
    if implementation == "mosaic_gpu":
        from pallas_kernels.mla_decode import hopper  # Mosaic GPU is not part of every JAX build

        return hopper.decode(q_c_BTHC, q_rope_BTHP, cache, table, lengths_B, scale=scale, n_splits=n_splits)
    if implementation == "mosaic_tpu":
        from pallas_kernels import mosaic_tpu
        from pallas_kernels.mla_decode import tpu  # nor is Mosaic TPU

        tpu.check(q_c_BTHC, q_rope_BTHP, cache, table)
        mosaic_tpu.check_tpu(implementation)
        parts = n_splits or mosaic_tpu.n_cores()
        return tpu.decode(q_c_BTHC, q_rope_BTHP, cache, table, lengths_B, scale=scale, n_splits=parts)
    parts, rope = n_splits or 1, q_rope_BTHP.shape[3]
    o, lse = chunked.decode(
        q_c_BTHC, q_rope_BTHP, lambda pages: cache.fetch(pages, rope), table,
        work.items(lengths_B, parts, longest_first=False), n_splits=parts, scale=scale,
    )  # fmt: skip
    o_BTHC, lse_BTH = work.combined(*(x.reshape(parts, -1, *x.shape[1:]) for x in (o, lse)))
    return o_BTHC.astype(q_c_BTHC.dtype), lse_BTH


def _check(
    q_c: jax.Array, q_rope: jax.Array, cache: Pages | Fp8Pages, table: jax.Array, lengths: jax.Array,
    n_splits: int | None,
) -> None:  # fmt: skip
    shapes = f"q {q_c.shape} and {q_rope.shape}, table {table.shape}, lengths {lengths.shape}"
    if q_c.ndim != 4 or q_rope.shape[:-1] != q_c.shape[:-1] or 0 in (*q_c.shape, *q_rope.shape, *table.shape):
        raise ValueError(f"{shapes}: expected queries [B, T, H, C] and [B, T, H, P], no empty axis.")
    if table.ndim != 2 or table.shape[0] != q_c.shape[0] or lengths.shape != q_c.shape[:1]:
        raise ValueError(f"{shapes}: expected a table [B, pages of the longest] and lengths [B], B = {q_c.shape[0]}.")
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (table, lengths)):
        raise ValueError(f"table {table.dtype}, lengths {lengths.dtype}: expected integers.")
    widths, found = (q_c.shape[3], q_rope.shape[3]), tuple(x.shape[-1] for x in cache)
    in_fp8 = isinstance(cache, Fp8Pages)
    expected = (fp8_cache.entry_bytes(*widths),) if in_fp8 else widths
    if found != expected or any(x.ndim != 3 or x.shape[1] != PAGE for x in cache):
        raise ValueError(
            f"cache {[x.shape for x in cache]}: expected [pages, {PAGE}, width] with widths {expected} for queries of "
            f"{widths} numbers."
        )
    dtypes = {x.dtype for x in (q_c, q_rope, *(() if in_fp8 else cache))}
    if len(dtypes) > 1 or not jnp.issubdtype(q_c.dtype, jnp.floating) or (in_fp8 and cache[0].dtype != jnp.uint8):
        raise ValueError(
            f"queries {q_c.dtype} and {q_rope.dtype}, cache {[str(x.dtype) for x in cache]}: expected one "
            "floating-point dtype, or an FP8 cache of uint8. Cast them."
        )
    if n_splits is not None and n_splits < 1:
        raise ValueError(f"n_splits={n_splits}: expected 1 or more.")
