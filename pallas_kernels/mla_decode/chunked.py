"""Decode over a paged latent cache in plain jax: some pages at a time, on any device.

    m' = max(m, max_j s_j),    l' = e^(m - m') l + sum_j e^(s_j - m'),    o' = e^(m - m') o + sum_j e^(s_j - m') c_j

lse = m + log l, and o / l is the result. Besides results only one chunk of the cache is ever copied, `PAGES` pages per
sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_decode.reference import visible
from pallas_kernels.mla_decode.work import PAGE

PAGES = 8  # of a chunk
MASKED = -1e30  # a score whose exponential is 0 beside any other

Fetch = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # pages -> their latents and rotary keys


def decode(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    fetch: Fetch,
    table: jax.Array,
    items: jax.Array,
    *,
    n_splits: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o [n_splits * B, T, H, C] in float32 or wider, lse [n_splits * B, T, H]), part by part.

    `fetch` reads pages [...] of the cache, as [..., 64, C] and [..., 64, P]; `items` as `work.items` makes them,
    not sorted.
    """
    sequence, begin, end, length = (items[:, i] for i in range(4))
    q_c, q_rope, table = q_c_BTHC[sequence], q_rope_BTHP[sequence], table[sequence]
    wide = jnp.promote_types(q_c.dtype, jnp.float32)

    def add(sums: tuple, first: jax.Array) -> tuple[tuple, None]:
        o_BTHC, top_BTH, sum_BTH = sums
        page = begin[:, None] + first + jnp.arange(PAGES)
        key_BS = (page[..., None] * PAGE + jnp.arange(PAGE)).reshape(len(items), -1)
        held_BS = (key_BS < length[:, None]) & (key_BS < end[:, None] * PAGE)
        known = jnp.take_along_axis(table, jnp.minimum(page, jnp.maximum(end - 1, 0)[:, None]), axis=1)
        c_BSC, rope_BSP = (
            jnp.where(held_BS[..., None], x.reshape(*key_BS.shape, -1), 0) for x in fetch(known)
        )  # what lies behind a sequence may be anything, NaN too
        scores_BTHS = jnp.einsum("BTHC,BSC->BTHS", q_c, c_BSC, preferred_element_type=wide)
        scores_BTHS += jnp.einsum("BTHP,BSP->BTHS", q_rope, rope_BSP, preferred_element_type=wide)
        seen_BTHS = (visible(length, q_c.shape[1], key_BS) & held_BS[:, None])[:, :, None]
        scores_BTHS = jnp.where(seen_BTHS, scale * scores_BTHS, MASKED)
        new_BTH = jnp.maximum(top_BTH, scores_BTHS.max(axis=-1))
        weights_BTHS = jnp.where(seen_BTHS, jnp.exp(scores_BTHS - new_BTH[..., None]), 0)
        fade_BTH = jnp.exp(top_BTH - new_BTH)
        rounded_BTHS = weights_BTHS.astype(c_BSC.dtype)
        added_BTHC = jnp.einsum("BTHS,BSC->BTHC", rounded_BTHS, c_BSC, preferred_element_type=wide)
        return (
            fade_BTH[..., None] * o_BTHC + added_BTHC,
            new_BTH,
            fade_BTH * sum_BTH + weights_BTHS.sum(axis=-1),
        ), None

    nothing_BTH = jnp.zeros_like(q_c, wide, shape=q_c.shape[:-1])
    sums = jnp.zeros_like(q_c, wide), nothing_BTH + MASKED, nothing_BTH
    most = -(-table.shape[1] // n_splits)
    o_BTHC, top_BTH, sum_BTH = lax.scan(add, sums, jnp.arange(0, most, PAGES))[0]
    some_BTH = sum_BTH > 0
    return (
        jnp.where(some_BTH[..., None], o_BTHC / jnp.where(some_BTH, sum_BTH, 1)[..., None], 0),
        jnp.where(some_BTH, top_BTH + jnp.log(jnp.where(some_BTH, sum_BTH, 1)), -jnp.inf),
    )
