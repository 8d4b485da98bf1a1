"""Causal attention in plain jax.numpy: the definition that every implementation is tested against.

    s_ij   = scale * q_i . k_j         over the keys j that query i sees
    lse_i  = log sum_j exp(s_ij)       -inf where it sees none
    o_i    = sum_j exp(s_ij - lse_i) v_j

Query i sees key j if j <= i + q_offset and both belong to the same document. Head h reads key-value head h // J, with
J = H / Z query heads per key-value head. Everything is computed in float32, or float64 where the inputs are.
"""

import jax
import jax.numpy as jnp

Segments = tuple[jax.Array, jax.Array]  # documents of the queries [B, T] and of the keys [B, S], integers
MASKED = -1e30  # a score whose exponential is 0 beside any other; finite, so that its gradient is 0 and not NaN


def attention(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    *,
    scale: float,
    segments: Segments | None = None,
    q_offset: int | jax.Array = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (o_BTHU, lse_BHT); see `pallas_kernels.mla_attention`. Stores all scores."""
    wide = jnp.promote_types(q_BTHQ.dtype, jnp.float32)
    (b, t, h, width), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    q_BTZJQ = q_BTHQ.reshape(b, t, z, h // z, width).astype(wide)
    k_BSZQ, v_wide_BSZU = k_BSZQ.astype(wide), v_BSZU.astype(wide)
    scores_BZJTS = scale * jnp.einsum("BTZJQ,BSZQ->BZJTS", q_BTZJQ, k_BSZQ, precision="highest")
    seen = visible(jnp.arange(t) + q_offset, jnp.arange(s))
    if segments is not None:
        seen = (seen & same_document(*segments))[:, None, None]
    scores_BZJTS = jnp.where(seen, scores_BZJTS, MASKED)
    lse_BZJT = jax.nn.logsumexp(scores_BZJTS, axis=-1)
    weights_BZJTS = jnp.where(seen, jnp.exp(scores_BZJTS - lse_BZJT[..., None]), 0)
    o_BTZJU = jnp.einsum("BZJTS,BSZU->BTZJU", weights_BZJTS, v_wide_BSZU, precision="highest")
    lse_BZJT = jnp.where(jnp.any(seen, axis=-1), lse_BZJT, -jnp.inf)
    return o_BTZJU.reshape(b, t, h, -1).astype(v_BSZU.dtype), lse_BZJT.reshape(b, h, t)


def visible(q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    """Returns seen_TS: causality, from the positions of queries [T] and keys [S]."""
    return q_position[:, None] >= k_position[None, :]


def same_document(q_BT: jax.Array, k_BS: jax.Array) -> jax.Array:
    """Returns seen_BTS: whether query and key belong to one document."""
    return q_BT[:, :, None] == k_BS[:, None, :]
