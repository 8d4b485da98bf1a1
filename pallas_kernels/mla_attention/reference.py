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


def forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, with the arguments of an implementation (`pallas_kernels.mla_attention.api`)."""
    return attention(q_BTHQ, k_BSZQ, v_BSZU, scale=scale, segments=segments, q_offset=q_offset)


def backward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    q_offset: int | jax.Array,
    lse_BHT: jax.Array,
    do_BTHU: jax.Array,
    delta_BHT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq_BTHQ, dk_BSZQ, dv_BSZU) by the formulas of `pallas_kernels.mla_attention.api`."""
    wide = lse_BHT.dtype
    (b, t, h, _), (s, z) = q_BTHQ.shape, k_BSZQ.shape[1:3]
    q_BTZJQ, do_BTZJU = (x.reshape(b, t, z, h // z, -1).astype(wide) for x in (q_BTHQ, do_BTHU))
    lse_BZJT, delta_BZJT = (x.reshape(b, z, h // z, t) for x in (lse_BHT, delta_BHT))
    k_wide_BSZQ, v_wide_BSZU = k_BSZQ.astype(wide), v_BSZU.astype(wide)
    seen = visible(jnp.arange(t) + q_offset, jnp.arange(s))
    if segments is not None:
        seen = (seen & same_document(*segments))[:, None, None]
    scores_BZJTS = scale * jnp.einsum("BTZJQ,BSZQ->BZJTS", q_BTZJQ, k_wide_BSZQ, precision="highest")
    sees_BZJT = lse_BZJT > -jnp.inf
    weights_BZJTS = jnp.exp(jnp.where(seen, scores_BZJTS, MASKED) - jnp.where(sees_BZJT, lse_BZJT, 0)[..., None])
    dweights_BZJTS = jnp.einsum("BTZJU,BSZU->BZJTS", do_BTZJU, v_wide_BSZU, precision="highest")
    dscores_BZJTS = scale * weights_BZJTS * (dweights_BZJTS - delta_BZJT[..., None])
    dq_BTZJQ = jnp.einsum("BZJTS,BSZQ->BTZJQ", dscores_BZJTS, k_wide_BSZQ, precision="highest")
    dk_BSZQ = jnp.einsum("BZJTS,BTZJQ->BSZQ", dscores_BZJTS, q_BTZJQ, precision="highest")
    dv_BSZU = jnp.einsum("BZJTS,BTZJU->BSZU", weights_BZJTS, do_BTZJU, precision="highest")
    dq_BTHQ = dq_BTZJQ.reshape(q_BTHQ.shape)
    return dq_BTHQ.astype(q_BTHQ.dtype), dk_BSZQ.astype(k_BSZQ.dtype), dv_BSZU.astype(v_BSZU.dtype)


def visible(q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    """Returns seen_TS: causality, from the positions of queries [T] and keys [S]."""
    return q_position[:, None] >= k_position[None, :]


def same_document(q_BT: jax.Array, k_BS: jax.Array) -> jax.Array:
    """Returns seen_BTS: whether query and key belong to one document."""
    return q_BT[:, :, None] == k_BS[:, None, :]
