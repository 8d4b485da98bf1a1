"""Causal softmax attention, in blocks of queries so that the score matrix never exists whole.

P = softmax(scale * q k^T + causal mask), o = P v; scores and softmax in float32.
A block of queries meets only the keys up to its own end, so the upper triangle is skipped except for the diagonal
blocks, and the blocks of a long sequence are recomputed in the backward pass: memory grows with `block * S`, not
`T * S`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

RECOMPUTED_FROM = 1024  # tokens of a sequence above which scores are not kept for the backward pass
MASKED = -1e30  # a score that softmax turns into 0 without making a NaN of an all-masked row


@jax.named_scope("attention")
def causal_attention(
    q_BTHQ: jax.Array,
    k_BTHQ: jax.Array,
    v_BTHU: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """Attention of each token to itself and the tokens before it.

    Args:
        q_BTHQ, k_BTHQ, v_BTHU: queries, keys and values; the value width U may differ from Q.
        scale: factor of the scores.
        segments_BT: documents; where given, a token sees only its own document.
        block: queries handled at a time; by default an eighth of the tokens, between 128 and 512.

    Returns o_BTHU in the dtype of `v_BTHU`.
    """
    n_tokens = q_BTHQ.shape[1]
    block = block or min(max(n_tokens // 8, 128), 512)
    attend: Callable[..., jax.Array] = functools.partial(_attend, scale=scale)
    if n_tokens > RECOMPUTED_FROM:
        attend = jax.checkpoint(attend)
    outputs = []
    for start in range(0, n_tokens, block):
        end = min(start + block, n_tokens)
        seen_TS = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        if segments_BT is not None:
            seen_TS = seen_TS & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])
        outputs.append(attend(q_BTHQ[:, start:end], k_BTHQ[:, :end], v_BTHU[:, :end], seen_TS))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _attend(q_BTHQ: jax.Array, k_BSHQ: jax.Array, v_BSHU: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    q_BHTQ, k_BHSQ, v_BHSU = (jnp.swapaxes(x, 1, 2) for x in (q_BTHQ, k_BSHQ, v_BSHU))
    scores_BHTS = jnp.einsum("BHTQ,BHSQ->BHTS", q_BHTQ, k_BHSQ, preferred_element_type=jnp.float32)
    weights_BHTS = masked_softmax(scores_BHTS * scale, seen if seen.ndim == 2 else seen[:, None])
    return jnp.swapaxes(jnp.einsum("BHTS,BHSU->BHTU", weights_BHTS.astype(v_BSHU.dtype), v_BHSU), 1, 2)


def latent_decode(
    q_latent_BTHC: jax.Array,
    q_rope_BTHP: jax.Array,
    c_BSC: jax.Array,
    k_rope_BSP: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attention of new tokens to a cache of latents, which all heads read: score = q~ . c + q^R . k^R, o = P c.

    Args:
        q_latent_BTHC, q_rope_BTHP: queries, moved into the latent space, and their rotary parts.
        c_BSC, k_rope_BSP: the cache.
        seen_BTS: which slots a token looks at.
        scale: factor of the scores.

    Returns o_latent_BTHC in the dtype of the queries.
    """
    wide = {"preferred_element_type": jnp.float32}
    scores_BHTS = jnp.einsum("BTHC,BSC->BHTS", q_latent_BTHC, c_BSC, **wide)
    scores_BHTS += jnp.einsum("BTHP,BSP->BHTS", q_rope_BTHP, k_rope_BSP, **wide)
    weights_BHTS = masked_softmax(scores_BHTS * scale, seen_BTS[:, None]).astype(q_latent_BTHC.dtype)
    return jnp.einsum("BHTS,BSC->BTHC", weights_BHTS, c_BSC)


def grouped_decode(
    q_BTHQ: jax.Array, k_BSZQ: jax.Array, v_BSZU: jax.Array, seen_BTS: jax.Array, *, scale: float
) -> jax.Array:
    """Attention of new tokens to a cache of keys and values, each read by H / Z heads.

    Args:
        q_BTHQ: queries.
        k_BSZQ, v_BSZU: the cache.
        seen_BTS: which slots a token looks at.
        scale: factor of the scores.

    Returns o_BTHU in the dtype of the queries.
    """
    q_BTZJQ = q_BTHQ.reshape(*q_BTHQ.shape[:2], k_BSZQ.shape[2], -1, q_BTHQ.shape[-1])
    scores_BZJTS = jnp.einsum("BTZJQ,BSZQ->BZJTS", q_BTZJQ, k_BSZQ, preferred_element_type=jnp.float32)
    weights_BZJTS = masked_softmax(scores_BZJTS * scale, seen_BTS[:, None, None]).astype(q_BTHQ.dtype)
    o_BTZJU = jnp.einsum("BZJTS,BSZU->BTZJU", weights_BZJTS, v_BSZU)
    return o_BTZJU.reshape(*q_BTHQ.shape[:3], -1)


def masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of float32 `scores` where `seen` (broadcast against it) holds; 0 elsewhere.

    A row where it holds nowhere comes out uniform: such rows mean nothing and are not to be used.
    """
    return jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
