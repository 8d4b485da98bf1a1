"""The public function: arguments are checked once, then the named implementation runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla import reference

IMPLEMENTATIONS = ("reference", "mosaic_gpu")


def attend(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    row_BTO: jax.Array,
    count_BT: jax.Array,
    *,
    implementation: str,
    scale: float,
    n_splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Latent attention of each query to rows of its own: (o_BTHC in the dtype of q, lse_BTH float32).

    The absorbed form, for prefill and for decode: all heads of a query read the same rows, as keys and as values. lse
    is the natural logarithm of the sum of the exponentiated scores. A query without rows gives o = 0 and lse = -inf.

    Args:
        q_c_BTHC: queries, moved into the latent space.
        q_rope_BTHP: their rotary parts, in the same dtype.
        cache: latents [N, C] and rotary keys [N, P] in the dtype of q; a paged cache is one with its pages in a row.
        row_BTO: the rows that each query attends to, integers.
        count_BT: how many of them count; those behind are never used, and may be anything.
        implementation: "reference" (any device, gathers all rows first) or "mosaic_gpu" (Hopper, 16 bits, latents 256
            or 512 wide, rotary keys 64). There is no fallback from one to another.
        scale: factor of the scores.
        n_splits: parts in which the rows of a query are read; None lets the kernel choose.

    Paper: DeepSeek-V3.2, arXiv 2512.02556, section 2.1, eq. 2.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    _check(q_c_BTHC, q_rope_BTHP, cache, row_BTO, count_BT)
    arguments = q_c_BTHC, q_rope_BTHP, *cache, row_BTO.astype(jnp.int32), count_BT.astype(jnp.int32)
    if implementation == "reference":
        return reference.attend(*arguments, scale=scale)
    from pallas_kernels.sparse_mla import hopper  # Mosaic GPU is not part of every JAX build

    return hopper.attend(*arguments, scale=scale, n_splits=n_splits)


def _check(
    q_c: jax.Array, q_rope: jax.Array, cache: tuple[jax.Array, jax.Array], row: jax.Array, count: jax.Array
) -> None:
    c, rope = cache
    shapes = f"q {q_c.shape} and {q_rope.shape}, cache {c.shape} and {rope.shape}, rows {row.shape}, {count.shape}"
    if q_c.ndim != 4 or q_rope.shape[:-1] != q_c.shape[:-1] or 0 in (*q_c.shape, *q_rope.shape, *row.shape):
        raise ValueError(f"{shapes}: expected queries [B, T, H, C] and [B, T, H, P], no empty axis.")
    if row.ndim != 3 or row.shape[:2] != q_c.shape[:2] or count.shape != q_c.shape[:2]:
        raise ValueError(f"{shapes}: expected rows [B, T, O] and counts [B, T], B and T = {q_c.shape[:2]}.")
    if (
        c.ndim != 2
        or rope.ndim != 2
        or len(c) != len(rope)
        or (c.shape[1], rope.shape[1]) != (q_c.shape[3], q_rope.shape[3])
    ):
        raise ValueError(f"{shapes}: expected a cache [N, C] and [N, P], as wide as the queries.")
    if len({x.dtype for x in (q_c, q_rope, c, rope)}) > 1:
        raise ValueError(f"q {q_c.dtype} and {q_rope.dtype}, cache {c.dtype} and {rope.dtype}: expected one dtype.")
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (row, count)):
        raise ValueError(f"rows {row.dtype}, counts {count.dtype}: expected integers.")
