"""Decode over a paged latent cache in plain jax.numpy: the definition that every implementation is tested against.

    s_j = scale (q~ . c_j + q^R . k^R_j)        over the tokens j that the query sees
    lse = log sum_j exp(s_j)                    -inf where it sees none
    o = sum_j exp(s_j - lse) c_j                0 where it sees none

Token j of sequence b lies in page table[b, j // 64] at j % 64. Of the T queries of a sequence, its last tokens, query t
sees the first length - T + 1 + t. Everything is computed in float32, or float64 where the inputs are.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode.work import PAGE


def decode(
    q_c_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    c_pool: jax.Array,
    rope_pool: jax.Array,
    table: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHC, lse_BTH); see `pallas_kernels.mla_decode`. Gathers the whole cache."""
    wide = jnp.promote_types(q_c_BTHC.dtype, jnp.float32)
    (b, t), s = q_c_BTHC.shape[:2], table.shape[1] * PAGE
    held_BS = jnp.arange(s) < lengths_B[:, None]
    c_BSC, rope_BSP = (
        jnp.where(held_BS[..., None], pool[table].reshape(b, s, -1).astype(wide), 0) for pool in (c_pool, rope_pool)
    )
    scores_BTHS = jnp.einsum("BTHC,BSC->BTHS", q_c_BTHC.astype(wide), c_BSC, precision="highest")
    scores_BTHS += jnp.einsum("BTHP,BSP->BTHS", q_rope_BTHP.astype(wide), rope_BSP, precision="highest")
    seen_BTHS = visible(lengths_B, t, jnp.arange(s))[:, :, None]
    scores_BTHS = jnp.where(seen_BTHS, scale * scores_BTHS, -jnp.inf)
    lse_BTH = jax.nn.logsumexp(scores_BTHS, axis=-1)
    weights_BTHS = jnp.exp(scores_BTHS - jnp.where(lse_BTH == -jnp.inf, 0, lse_BTH)[..., None])
    return jnp.einsum("BTHS,BSC->BTHC", weights_BTHS, c_BSC, precision="highest").astype(q_c_BTHC.dtype), lse_BTH


def visible(lengths_B: jax.Array, n_tokens: int, key: jax.Array) -> jax.Array:
    """Returns seen_BTS: whether query t of a sequence sees the tokens `key`, [S] or [B, S]."""
    n_seen_BT = lengths_B[:, None] - n_tokens + 1 + jnp.arange(n_tokens)
    return key.reshape(-1, 1, key.shape[-1]) < n_seen_BT[..., None]
